#!/usr/bin/env bash
# Time and peak memory of `make demo`, stage by stage: `bash benchmarks/demo.sh [fresh|warm]` (warm is `make bench`).
#   fresh  as a stranger meets it: empty caches, new environment (in a temporary folder, removed afterwards)
#   warm   the environment and the caches are there; two new runs, with seeds 1 and 2
# Peak memory is the largest resident set of any one process of a stage. Writes benchmarks/results/demo.{json,md}.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" benchmarks/demo.py "${1:-warm}"

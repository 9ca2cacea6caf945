#!/bin/bash
# Every linter over what it knows; no finding is let through. .ci/ and the workflows are scripts, too.
set -euo pipefail
cd "$(dirname "$0")/.."
for tool in ruff mypy hadolint actionlint shellcheck; do
    if ! command -v "$tool" >/dev/null; then
        echo "error: $tool is not here" >&2
        echo "next: make env on Linux, x86-64 (shellcheck: sudo apt-get install shellcheck), then make lint" >&2
        exit 2
    fi
done
ruff check --quiet .
ruff format --check --quiet .
mypy --no-error-summary
hadolint --no-color docker/Dockerfile
shellcheck .ci/run benchmarks/*.sh docker/*.sh launch/providers/*.sh setup/*.sh
actionlint -no-color .github/workflows/*.yml
echo "lint: clean"

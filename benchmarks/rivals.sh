#!/usr/bin/env bash
# The systems that benchmarks/data.py compares with, each in an environment of its own: `bash benchmarks/rivals.sh DIR`.
# About 6.5 GB. Neither of them is changed, but for what does not import beside a CPU build of torch.
set -euo pipefail
mkdir -p "$1" && cd "$1"
python3 -m venv axolotl
axolotl/bin/pip install --extra-index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0+cpu' 'axolotl==0.19.0'
python3 -m venv llamafactory
llamafactory/bin/pip install --extra-index-url https://download.pytorch.org/whl/cpu --only-binary :all: 'torch==2.13.0+cpu' 'llamafactory==0.9.5'
# PyPI's builds of both want CUDA's libraries. Text needs neither; torchaudio imports without its C extension.
llamafactory/bin/pip uninstall -y torchvision
rm -f llamafactory/lib/python3*/site-packages/torchaudio/lib/*.so

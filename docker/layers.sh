#!/bin/bash
# Move the heavy packages out of the environment, each to where one COPY puts it back.
set -euo pipefail
packages=$(echo /opt/venv/lib/python3*/site-packages)
mkdir -p "/layers/cuda$packages" "/layers/torch$packages"
for name in nvidia triton; do
    if [ -d "$packages/$name" ]; then mv "$packages/$name" "/layers/cuda$packages/"; fi
done
mv "$packages/torch" "/layers/torch$packages/"
# `python -m pipeline` finds the code from any folder, and so does what it starts.
echo /opt/ferry >"$packages/ferry.pth"

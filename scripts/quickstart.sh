#!/usr/bin/env bash
# The whole method on real images, on a CPU: set-up, tokenizer, codes, self-guided training, sampling, probe, report.
# usage: scripts/quickstart.sh [RUN_FOLDER]     (default runs/digits)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
run=${1:-runs/digits}

star-fast prepare digits --out data/digits
resume=()
[ -n "$(ls -d "$run"/checkpoints/step-*[0-9] 2>/dev/null)" ] && resume=(--resume)
deepspeed --num_accelerators 1 star_fast/train.py --preset tiny --data.codes data/digits --run "$run" "${resume[@]}"
star-fast sample --model "$run/model" --out "$run/samples.npz" --images 100
star-fast probe --run "$run"
star-fast report --run "$run"

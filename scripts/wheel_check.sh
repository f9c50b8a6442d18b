#!/usr/bin/env bash
# Does all that an installed star_fast needs travel with it? Builds the sdist and from it alone the wheel; installs the
# wheel into a fresh environment with the pinned versions and there, in an empty folder, runs doctor, prepares the
# built-in digits with a small tokenizer, trains preset tiny for 20 steps and samples. Ends with one line, "wheel: ok".
# usage: scripts/wheel_check.sh [--cuda]     --cuda: with the CUDA sampler; needs nvcc
#
# VENV (.venv, which scripts/setup.sh makes) is the environment that builds, TORCH_CUDA_ARCH_LIST says for which GPUs.
# About ten minutes on two cores, and 6 GB in TMPDIR (/tmp), which are removed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh
case "$#${1-}" in
  0) export STAR_FAST_NO_CUDA=1; cuda=False ;;
  1--cuda) unset STAR_FAST_NO_CUDA; cuda=True ;;
  *) echo "usage: scripts/wheel_check.sh [--cuda]" >&2; exit 2 ;;
esac
unset PYTHONPATH STAR_FAST_NO_EXT
venv=$(realpath "${VENV:-.venv}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work"/{tree,plain,empty}

quietly() {  # quietly COMMAND...: its output is shown if it fails
  echo "$*" | sed "s|$work/||g"
  "$@" > "$work/log" 2>&1 || { tail -n 40 "$work/log"; echo "error: this failed: $*" >&2; exit 1; }
}
wheel() { pip_of "$venv" wheel --no-deps --no-build-isolation --wheel-dir "$1" "$2"; }
files() { "$venv/bin/python" -m zipfile -l "$1" | awk 'NR > 1 {print $1}' | grep -v '^star_fast/_C\..*so$' | sort; }

# A copy, since what lies about in the tree besides its files (build/, compiled extensions) would be found there.
git ls-files -z | xargs -0 cp --parents -t "$work/tree"
export PATH="$venv/bin:$PATH"  # ninja
quietly env -C "$work/tree" python -c 'from setuptools import build_meta; build_meta.build_sdist("..")'
quietly wheel "$work" "$work"/star_fast-*.tar.gz
STAR_FAST_NO_EXT=1 quietly wheel "$work/plain" "$work/tree"
rm -r "$work/tree"
diff <(files "$work"/star_fast-*.whl) <(files "$work"/plain/star_fast-*.whl) || {
  echo "error: from the sdist (<) and from the tree (>) come wheels of different files" >&2
  exit 1
}

PYTHON="$venv/bin/python" make_environment "$work/venv"
quietly pip_of "$work/venv" install "$(echo "$work"/star_fast-*.whl)[train]"
export PATH="$work/venv/bin:$PATH"
cd "$work/empty"
quietly python -c "import importlib.metadata, sys, torch, star_fast, star_fast._C as compiled
assert star_fast.__file__.startswith(sys.prefix), star_fast.__file__
assert star_fast.__version__ == importlib.metadata.version('star_fast'), star_fast.__version__
assert compiled.has_cuda is $cuda, 'the extension and --cuda do not agree'"
quietly star-fast doctor
quietly star-fast prepare digits --out codes --new-tokenizer.steps 40 --new-tokenizer.base-channels 16
quietly star-fast train --preset tiny --data.codes codes --run run --train.max-steps 20
quietly star-fast sample --model run/model --out samples.npz --images 16
echo "wheel: ok, $(basename "$work"/star_fast-*.whl), $(files "$work"/star_fast-*.whl | wc -l) files and the extension"

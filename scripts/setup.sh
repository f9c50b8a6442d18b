#!/usr/bin/env bash
# Makes .venv with everything that installs without a GPU, from pinned versions. Safe to run again: it does nothing when all is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/installed.sha256
wanted=$(cat scripts/constraints.txt pyproject.toml setup.py csrc/* | sha256sum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && .venv/bin/python -c 'import star_fast' 2>/dev/null; then
  exit 0
fi

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed, $python is $("$python" --version); set PYTHON" >&2; exit 2; }
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --quiet --disable-pip-version-check "$@" -c scripts/constraints.txt; }
echo "Installing torch and the build tools into .venv ..."
pip install torch torchvision numpy setuptools wheel ninja pybind11
echo "Installing star_fast (compiles the token sampler, about a minute) ..."
# Without build isolation: an isolated build would download a second torch.
pip install --no-build-isolation -e '.[train,eval,dev]'
printf '%s' "$wanted" > "$stamp"
echo "Ready. What was found and what is absent: .venv/bin/star-fast doctor"

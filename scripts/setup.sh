#!/usr/bin/env bash
# Makes .venv with everything that installs without a GPU, from pinned versions. Safe to run again: it does nothing
# when all is there.
# usage: scripts/setup.sh [--tests]     --tests: DALI too (0.6 GB), which the quickstart does without
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh
case "$#${1-}" in
  0) ;;
  1--tests) tests=yes ;;
  *) echo "usage: scripts/setup.sh [--tests]" >&2; exit 2 ;;
esac

# Each stamp holds what its part was installed from.
stamp=.venv/installed.sha256 tests_stamp=.venv/installed-tests.sha256
wanted=$(cat scripts/constraints.txt pyproject.toml setup.py csrc/* | sha256sum)
there() { [ -f "$1" ] && [ "$(cat "$1")" = "$wanted" ]; }

if ! { there "$stamp" && .venv/bin/python -c 'import star_fast' 2>/dev/null; }; then
  make_environment .venv
  echo "Installing torch and the build tools into .venv ..."
  pip_of .venv install torch torchvision numpy setuptools wheel ninja pybind11
  echo "Installing star_fast (compiles the token sampler, about a minute) ..."
  # Without build isolation: an isolated build would download a second torch.
  pip_of .venv install --no-build-isolation -e '.[train,eval,dev]'
  printf '%s' "$wanted" > "$stamp"
  echo "Ready. What was found and what is absent: .venv/bin/star-fast doctor"
fi
if [ -n "${tests-}" ] && ! there "$tests_stamp"; then
  echo "Installing what the tests need besides: DALI ..."
  # The extra's requirements alone: naming star_fast again would compile it again.
  mapfile -t extra < <(.venv/bin/python -c 'import tomllib
for name in tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["data"]: print(name)')
  if pip_of .venv install "${extra[@]}"; then
    printf '%s' "$wanted" > "$tests_stamp"
  else
    echo "DALI does not install here: the tests of it will be skipped, by name" >&2
  fi
fi

# Sourced, from the root of the repository: virtual environments, and pip in them with the versions that
# scripts/constraints.txt pins.

make_environment() {  # make_environment FOLDER: with $PYTHON (python3), unless it is there
  local python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: Python 3.11 or newer is needed, $python is $("$python" --version); set PYTHON" >&2
    exit 2
  }
  [ -x "$1/bin/python" ] || "$python" -m venv "$1"
}

pip_of() {  # pip_of FOLDER ARGUMENTS...
  "$1/bin/python" -m pip --quiet --disable-pip-version-check "${@:2}" -c scripts/constraints.txt
}

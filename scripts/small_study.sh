#!/usr/bin/env bash
# The paper's Table 3 and Figure 7 in small, on a CPU: set-up, then the runs that are missing. The core takes about 90
# minutes on two cores; killed, it goes on.
# usage: scripts/small_study.sh [core] [alone] [open]     (default: core)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
exec .venv/bin/python benchmarks/small_study.py --runs "${@:-core}"

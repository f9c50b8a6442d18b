"""How long OpenMP's threads spin while they wait for each other; told before torch loads, as OpenMP asks once."""

from __future__ import annotations

import os

# By default a thread of GNU OpenMP spins 300 000 times before it sleeps. Small models wait a thousand times a step, and where another process keeps a core
# each wait is for a thread that is not running: a tiny run falls to a tenth of its speed. With this bound it keeps half, and loses under 5 % alone.
SPINS = 6500


def bound_spinning() -> None:
    """Set GOMP_SPINCOUNT, unless the user has chosen how threads wait. Without effect once torch is loaded."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)

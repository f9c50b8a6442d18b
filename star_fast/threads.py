"""How many threads OpenMP starts on the CPU, and how long they spin while they wait for each other; told before torch
loads, as OpenMP asks once.
"""

from __future__ import annotations

import os
from pathlib import Path

# By default a thread of GNU OpenMP spins 300 000 times before it sleeps. Small models wait a thousand times a step, and
# where another process keeps a core each wait is for a thread that is not running: a tiny run falls to a tenth of its
# speed. With this bound it keeps half, and loses under 5 % alone.
SPINS = 6500


def settle_threads() -> None:
    """Set OMP_NUM_THREADS and GOMP_SPINCOUNT in the environment, each unless the user has chosen it. Without effect
    once torch is loaded.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(threads_here())
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def threads_here(system: Path = Path("/sys")) -> int:
    """One thread for each core that this process may keep busy, shared among the ranks that a launcher started on this
    host; at least 1.

    A core's second hardware thread adds nothing to products that fill its arithmetic units, or to reads that fill its
    memory channel. A container's share of CPU time counts where it is less than its cores: threads beyond it are
    stopped in turns while the others wait for them. torch counts cores as well, but knows of no such share.

    Args:
        system: where Linux tells of processors and control groups; elsewhere every processor is taken for a core.
    """
    processors = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = {
        _told(system / f"devices/system/cpu/cpu{number}/topology/thread_siblings_list") or str(number)
        for number in processors
    }
    ranks = next(
        (
            int(told)
            for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
            if (told := os.environ.get(name, "")).isdecimal() and int(told)
        ),
        1,
    )
    return max(1, int(min(len(cores), _share(system / "fs/cgroup", len(cores))) // ranks))


def _share(groups: Path, cores: int) -> float:
    """Cores' worth of time that the control group grants: cpu.max of version 2, cfs_quota_us over cfs_period_us of
    version 1; `cores` where nothing limits.
    """
    told = _told(groups / "cpu.max").split() or [
        _told(groups / f"cpu/cpu.cfs_{name}_us") for name in ("quota", "period")
    ]
    return (
        int(told[0]) / int(told[1])
        if len(told) == 2 and all(part.isdecimal() and int(part) for part in told)
        else cores
    )


def _told(file: Path) -> str:
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""

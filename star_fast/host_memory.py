"""The host's memory: how much there is, and the C library's allocator, told to keep what is freed, since the same large
tensors are needed again a moment later.
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # numbers of mallopt's parameters (malloc.h)


def physical_bytes() -> int:
    """Of this machine, in use or not."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def keep_freed_memory(most_bytes: int = 2**31 - 1) -> bool:
    """Never hand large blocks back to the system between two uses; returns whether the C library knows how (glibc
    does).

    By default glibc maps every tensor beyond 32 MiB anew and unmaps it after, smaller ones too at first, so that each
    use of its pages is a page fault: half of a training step's time on the CPU, and 18,000 faults, 6 to 10 % of the
    time, of decoding an image's pixels.
    Training needs its peak size again in every step and keeps it all. A size may be held up to eight times before the
    first of it comes back: an aligned block leaves a crumb beside it that glibc keeps apart (seven of a kind), and
    blocks do not grow together across one.

    Args:
        most_bytes: of free memory at the heap's end that the process keeps; what is more goes back.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, most_bytes))


def give_back() -> None:
    """Hand what is free now back to the system: after work that a step does not repeat, such as a save, which holds the
    weights in float32 twice more.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

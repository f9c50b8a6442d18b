"""The C library's allocator, told to keep what training frees: the same large tensors are needed again a moment later."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # numbers of mallopt's parameters (malloc.h)


def keep_freed_memory() -> bool:
    """Never hand large blocks back to the system between two uses; returns whether the C library knows how (glibc does).

    By default glibc maps every tensor beyond 32 MiB anew and unmaps it after, so that each use of its pages is a page fault: half of a step's time on the CPU.
    The process then stays at its peak size, which training needs again in every step. A size may be held up to eight times before the first of it comes
    back: an aligned block leaves a crumb beside it that glibc keeps apart (seven of a kind), and blocks do not grow together across one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def give_back() -> None:
    """Hand what is free now back to the system: after work that a step does not repeat, such as a save, which holds the weights in float32 twice more."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

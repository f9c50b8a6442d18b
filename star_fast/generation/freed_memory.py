"""Memory that a process gives back and takes again: kept instead, on the CPU."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's names for them (malloc.h)
_BLOCK_BYTES = 2**25  # the largest that glibc lets the threshold be
_KEPT_BYTES = 2**28


def keep_freed_memory() -> bool:
    """Let this process keep up to 256 MiB of what it frees, in blocks of up to 32 MiB each, for its next use; whether the C library can.

    A decoder's activations are a few blocks of 16 MB, taken and given back 40 times an image. glibc returns such blocks to the system, which hands them out
    again page by page, cleared: 18,000 page faults an image of VQ-16, 6 to 10 % of its time.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, _BLOCK_BYTES)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT_BYTES))

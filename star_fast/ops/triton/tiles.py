"""Tile sizes of every kernel, each with its reason. A plain table: no autotuning, so results and resources are the same everywhere."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Tile edges in elements (meaning: per kernel), warps of 32 threads a program, software pipeline stages."""

    block: tuple[int, ...]
    num_warps: int
    num_stages: int


# One program handles `block[0]` columns of one row. 1024 bf16 columns = 2 x 16 bytes a thread and input at 4 warps.
SWIGLU = Tile((1024,), num_warps=4, num_stages=1)

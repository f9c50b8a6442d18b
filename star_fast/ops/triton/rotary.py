"""Rotary on a tile, for the attention kernels: what `rotate` in ops/rotary.py is in plain torch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def turn(x, table, SIGN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr):
    """Each pair (x0, x1) of a (ROWS, COLS) tile, or of COLS numbers with ROWS = 1, becomes (x0 cos - x1 sin, x0 sin +
    x1 cos).

    Returns (ROWS, COLS) in ACC. `table` holds cos and sin in x's shape, one after the other. SIGN -1 turns back (the
    transpose).
    """
    cos, sin = tl.split(tl.reshape(table.to(ACC), (ROWS, COLS // 2, 2)))  # (ROWS, COLS / 2) each
    even, odd = tl.split(tl.reshape(x.to(ACC), (ROWS, COLS // 2, 2)))
    sin = sin * SIGN
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, COLS))

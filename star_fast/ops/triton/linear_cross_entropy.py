"""Linear cross-entropy on CUDA: cuBLAS for the three products of a chunk of rows, one kernel that turns its logits into
their gradient.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from star_fast.ops import error_flag
from star_fast.ops.dispatch import Cost
from star_fast.ops.linear_cross_entropy import in_chunks
from star_fast.ops.triton.launching import Kernel, accumulator, ceil_div, why_not_device
from star_fast.ops.triton.tiles import CROSS_ENTROPY_ROWS, LOGITS_CHUNK_BYTES

_TARGET_OUT_OF_RANGE = tl.constexpr(error_flag.TARGET_OUT_OF_RANGE)


@triton.jit
def cross_entropy_rows(
    logits_ptr,
    target_ptr,
    loss_ptr,
    flag_ptr,
    logits_row_stride,
    n_cols,
    WITH_GRADIENT: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """One row a program: its loss, and softmax - one_hot in place of its logits.

    A row of one block is read once and stays in registers. A longer one is read twice, the second time from the cache.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_row_stride
    target = tl.load(target_ptr + row)
    if (target < 0) | (target >= n_cols):
        tl.atomic_or(flag_ptr, _TARGET_OUT_OF_RANGE)
    cols = tl.arange(0, BLOCK)  # (BLOCK,), as all tiles here; what belongs to the row is a scalar
    if BLOCKS == 1:
        x = tl.load(logits_ptr + cols, mask=cols < n_cols, other=float("-inf")).to(ACC)
        top = tl.max(x, 0)
        weights = tl.exp(x - top)
        total = tl.sum(weights, 0)
        at_target = tl.sum(tl.where(cols == target, x, 0.0), 0)
        if WITH_GRADIENT:
            gradient = weights * (1.0 / total) - (cols == target).to(ACC)
            tl.store(logits_ptr + cols, gradient.to(logits_ptr.dtype.element_ty), mask=cols < n_cols)
    else:
        top = tl.full((), float("-inf"), ACC)
        total = tl.full((), 0.0, ACC)
        at_target = tl.full((), 0.0, ACC)
        for block in range(BLOCKS):
            c = block * BLOCK + cols
            x = tl.load(logits_ptr + c, mask=c < n_cols, other=float("-inf")).to(ACC)
            higher = tl.maximum(top, tl.max(x, 0))
            # So far every logit was -inf, and -inf - -inf would be NaN
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift), 0)
            top = higher
            at_target += tl.sum(tl.where(c == target, x, 0.0), 0)
        if WITH_GRADIENT:
            tl.debug_barrier()
            for block in range(BLOCKS):
                c = block * BLOCK + cols
                x = tl.load(logits_ptr + c, mask=c < n_cols, other=float("-inf")).to(ACC)
                gradient = tl.exp(x - top) * (1.0 / total) - (c == target).to(ACC)
                tl.store(logits_ptr + c, gradient.to(logits_ptr.dtype.element_ty), mask=c < n_cols)
    tl.store(loss_ptr + row, top + tl.log(total) - at_target)


ROWS = Kernel(
    "linear_cross_entropy rows",
    cross_entropy_rows,
    lambda a: Cost(
        a.grid[0] * ((2 if a.WITH_GRADIENT else 1) * a.n_cols * a.logits_ptr.element_size() + 12),
        (6 if a.WITH_GRADIENT else 4) * a.grid[0] * a.n_cols,
    ),
)


def overwrite(logits: Tensor, target: Tensor, losses: Tensor, gradient: bool) -> None:
    """See `Overwrite` in ops/linear_cross_entropy.py. A target out of range sets the error flag."""
    ROWS.launch(
        (logits.shape[0],),
        (logits, target, losses, error_flag.flag_for(logits), logits.stride(0), logits.shape[1]),
        WITH_GRADIENT=gradient,
        ACC=accumulator(logits.dtype),
        num_stages=CROSS_ENTROPY_ROWS.num_stages,
        **_widths(logits.shape[1]),
    )


@functools.cache
def _widths(n_cols: int) -> dict[str, int]:
    """BLOCK and BLOCKS cover a row, the warps follow: see CROSS_ENTROPY_ROWS in tiles.py."""
    one_block, long_block, a_thread = CROSS_ENTROPY_ROWS.block
    block = triton.next_power_of_2(n_cols) if n_cols <= one_block else long_block
    warps = max(1, min(CROSS_ENTROPY_ROWS.num_warps, block // (32 * a_thread)))
    return {"BLOCK": block, "BLOCKS": ceil_div(n_cols, block), "num_warps": warps}


def _chunk_rows(n_rows: int, n_cols: int, itemsize: int) -> int:
    """Rows of a chunk: few chunks, within LOGITS_CHUNK_BYTES each, all of a size but the last, whole tiles of 128 where
    one fits.
    """
    most = max(16, LOGITS_CHUNK_BYTES // (n_cols * itemsize))
    whole = 128 if most >= 128 else 1
    most -= most % whole
    return ceil_div(ceil_div(n_rows, ceil_div(n_rows, most)), whole) * whole


def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """See ops/linear_cross_entropy.py."""
    return in_chunks(
        hidden,
        weight,
        target.contiguous(),
        _chunk_rows(hidden.shape[0], weight.shape[0], weight.element_size()),
        overwrite,
    )


def why_not(hidden: Tensor, weight: Tensor, target: Tensor) -> str | None:
    """None if the kernel can serve this call."""
    return why_not_device(hidden)

"""Masked causal attention: a launch that turns the keys and packs the mask, one forward kernel, two backward kernels;
no atomics.

The kernels, and what was decided about them by counting, are in masked_attention_kernels.py.

Bytes, in tensors of (B, T, H, E): forward 4 (q, k, v, out), 2 more where rotary is applied (keys read and written), 1
more where a gradient is wanted (turned queries written), 6 more where the caller keeps its qkv (a copy). Backward reads
q, k, v and dout twice (once a kernel): 13 where 8 are the least, if no cache helps.
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor

from star_fast.ops.dispatch import Cost
from star_fast.ops.triton.launching import Kernel, accumulator, ceil_div, operand, why_not_device
from star_fast.ops.triton.masked_attention_kernels import (
    attention_backward_keys,
    attention_backward_queries,
    attention_forward,
    attention_prepare,
)
from star_fast.ops.triton.tiles import (
    ATTENTION_BACKWARD,
    ATTENTION_BACKWARD_FULL_PRECISION,
    ATTENTION_FORWARD,
    ATTENTION_FORWARD_FULL_PRECISION,
    ATTENTION_PREPARE,
    Tile,
)

_WORDS = {16: torch.int16, 32: torch.int32, 64: torch.int64}  # a word of the packed mask, by the keys in it


def _cost(tensors: int, statistics: int, products: int, a: SimpleNamespace) -> Cost:
    """A kernel that moves so many tensors of (B, T, H, E) and statistics of (B, H, T), and makes so many causal
    products.
    """
    batch, n, _, heads, size = a.qkv_ptr.shape
    side = (a.words_ptr.nbytes if a.MASK else 0) + (4 * n * size if a.ROTARY else 0) + statistics * a.lse_ptr.nbytes
    return Cost(
        tensors * batch * n * heads * size * a.qkv_ptr.element_size() + side,
        products * batch * heads * size * n * (n + 1),
    )


def _forward_cost(a: SimpleNamespace) -> Cost:
    return _cost(4 + a.LEAVE_TURNED, 1, 2, a)


def _prepare_cost(a: SimpleNamespace) -> Cost:
    batch, n, _, heads, size = a.qkv_ptr.shape
    numbers = batch * n * heads * size if a.ROTARY else 0  # keys, read and written
    side = (a.keep_ptr.nbytes + a.words_ptr.nbytes if a.MASK else 0) + (4 * n * size if a.ROTARY else 0)
    return Cost(2 * numbers * a.qkv_ptr.element_size() + side, 3 * numbers)


PREPARE = Kernel("masked_attention prepare", attention_prepare, _prepare_cost)
FORWARD = Kernel("masked_attention forward", attention_forward, _forward_cost)
BACKWARD_QUERIES = Kernel(
    "masked_attention backward, queries", attention_backward_queries, functools.partial(_cost, 6, 2, 3)
)
BACKWARD_KEYS = Kernel("masked_attention backward, keys", attention_backward_keys, functools.partial(_cost, 6, 2, 4))


class _MaskedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, keep: Tensor | None, table: Tensor | None, overwrite: bool) -> Tensor:
        batch, positions, _, heads, size = qkv.shape
        keep, table = (None if x is None else x.contiguous() for x in (keep, table))
        if table is None:
            qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
        else:  # q and k are turned in place
            qkv = qkv.contiguous() if overwrite or not qkv.is_contiguous() else qkv.clone()
        words = _prepare(qkv, keep, table)
        out = qkv.new_empty((batch, positions, heads, size))
        lse = qkv.new_empty((batch, heads, positions), dtype=torch.promote_types(qkv.dtype, torch.float32))
        _launch(FORWARD, qkv, words, table, out, lse, LEAVE_TURNED=table is not None and ctx.needs_input_grad[0])
        ctx.save_for_backward(qkv, words, table, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None, None]:
        qkv, words, table, out, lse = ctx.saved_tensors
        dout = dout.contiguous()
        dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        delta = torch.empty_like(lse)
        _launch(BACKWARD_QUERIES, qkv, words, table, out, dout, lse, delta, dqkv)
        _launch(BACKWARD_KEYS, qkv, words, table, dout, lse, delta, dqkv)
        return dqkv, None, None, None


def _prepare(qkv: Tensor, keep: Tensor | None, table: Tensor | None) -> Tensor | None:
    """Turn the keys of a contiguous qkv in place and pack the mask: (B, ceil(T / 64)) int64, visible keys as bits from
    the lowest on.
    """
    if keep is None and table is None:
        return None
    batch, positions, _, heads, size = qkv.shape
    rows, cols = ATTENTION_PREPARE.block
    words = None if keep is None else qkv.new_empty((batch, ceil_div(positions, 64)), dtype=torch.int64)
    groups = ceil_div(positions, 64) * (64 // rows)  # all words of the mask, so that none is left unwritten
    grid = (batch * groups, 1 if table is None else ceil_div(heads * size, cols))
    if math.prod(grid):
        PREPARE.launch(
            grid,
            (qkv, table, keep, None if words is None else words.view(_WORDS[rows]), positions, groups, heads * size),
            E=size,
            ROWS=rows,
            COLS=cols,
            MASK=keep is not None,
            ROTARY=table is not None,
            ACC=accumulator(qkv.dtype),
            num_warps=ATTENTION_PREPARE.num_warps,
            num_stages=ATTENTION_PREPARE.num_stages,
        )
    return words


def kernel_tile(kernel: object, size: int, dtype: torch.dtype) -> Tile:
    """Blocks of (rows that a program owns, rows that it streams): queries and keys, for attention_backward_keys keys
    and queries.
    """
    if kernel is attention_forward:
        table = ATTENTION_FORWARD if dtype.itemsize == 2 else ATTENTION_FORWARD_FULL_PRECISION
    else:
        table = ATTENTION_BACKWARD if dtype.itemsize == 2 else ATTENTION_BACKWARD_FULL_PRECISION
    return table[_padded(size)]


def _launch(
    kernel: Kernel, qkv: Tensor, words: Tensor | None, table: Tensor | None, *more: Tensor, **constants: bool
) -> None:
    """Run a kernel on all blocks of all heads of all sequences."""
    batch, positions, _, heads, size = qkv.shape
    settings = _settings(kernel, size, qkv.stride(3), qkv.dtype, words is not None, table is not None)
    rows = settings["BLOCK_N" if kernel is BACKWARD_KEYS else "BLOCK_M"]
    n_tiles, n_words = ceil_div(positions, rows), 0
    if words is not None:
        words = words.view(_WORDS[settings["BLOCK_N"]])
        n_words = words.shape[1]
    if batch:
        kernel.launch(
            (batch * heads * n_tiles,),
            (qkv, words, table, *more, *qkv.stride()[:3], positions, heads, n_tiles, n_words),
            **settings,
            **constants,
        )


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


@functools.cache  # a Python launch costs as much as this kernel runs at small batches
def _settings(
    kernel: Kernel, size: int, head_stride: int, dtype: torch.dtype, masked: bool, turned: bool
) -> dict[str, Any]:
    tile = kernel_tile(kernel.function, size, dtype)
    queries, keys = tile.block[::-1] if kernel is BACKWARD_KEYS else tile.block
    root = size**-0.5
    return {
        "HEAD_STRIDE": head_stride,
        "SCALE": root * math.log2(math.e),
        **({} if kernel is FORWARD else {"ROOT": root}),
        "E": size,
        "BLOCK_M": queries,
        "BLOCK_N": keys,
        "BLOCK_E": _padded(size),
        "MASK": masked,
        "ROTARY": turned,
        "DOT": operand(dtype),
        "ACC": accumulator(dtype),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def run(qkv: Tensor, keep: Tensor | None = None, *, rotary: Tensor | None = None, overwrite: bool = False) -> Tensor:
    """See ops/masked_attention.py."""
    return _MaskedAttention.apply(qkv, keep, rotary, overwrite)


def why_not(
    qkv: Tensor, keep: Tensor | None = None, *, rotary: Tensor | None = None, overwrite: bool = False
) -> str | None:
    """None if the kernels can serve this call."""
    if qkv.shape[-1] > 128:
        return f"the kernels take head sizes up to 128, got {qkv.shape[-1]}"
    if qkv.dtype == torch.float64 and qkv.device.type == "cuda":
        return "float64 is for tests in the interpreter: its tiles do not fit the registers of a GPU"
    return why_not_device(qkv)


def moved_bytes(
    qkv: Tensor, keep: Tensor | None = None, *, rotary: Tensor | None = None, overwrite: bool = False
) -> int:
    """The tensors counted at the head of this file, one float32 a query, the mask and its bits, the rotary table."""
    batch, positions, _, heads, size = qkv.shape
    tensors = 4
    if rotary is not None:
        tensors += 2 + (torch.is_grad_enabled() and qkv.requires_grad) + (0 if overwrite else 6)
    side = (0 if keep is None else batch * (positions + 2 * positions // 8)) + (
        0 if rotary is None else 4 * positions * size
    )
    return (tensors * size * qkv.element_size() + 4) * batch * positions * heads + side

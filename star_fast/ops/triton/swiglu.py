"""SwiGLU kernels: one elementwise pass forward, one backward; each input read once, each output written once."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_fast.ops.dispatch import Cost
from star_fast.ops.triton.launching import Kernel, accumulator, ceil_div, rows_of, why_not_device
from star_fast.ops.triton.tiles import SWIGLU


@triton.jit
def swiglu_forward(
    x_ptr, out_ptr, x_row_stride, n_rows, n_cols, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """out[row, c] = silu(x[row, c]) * x[row, n_cols + c]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < n_rows) & (cols < n_cols)
    a = tl.load(x_ptr + row * x_row_stride + cols, mask=inside, other=0.0).to(ACC)  # (ROWS, BLOCK), as all tiles here
    b = tl.load(x_ptr + row * x_row_stride + n_cols + cols, mask=inside, other=0.0).to(ACC)
    sigmoid = 1.0 / (1.0 + tl.exp(-a))
    out = a * sigmoid * b
    tl.store(out_ptr + row * n_cols + cols, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(
    x_ptr,
    dout_ptr,
    dx_ptr,
    x_row_stride,
    dout_row_stride,
    n_rows,
    n_cols,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """da = dout * b * s * (1 + a * (1 - s)); db = dout * a * s; s = sigmoid(a)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < n_rows) & (cols < n_cols)
    a = tl.load(x_ptr + row * x_row_stride + cols, mask=inside, other=0.0).to(ACC)  # (ROWS, BLOCK), as all tiles here
    b = tl.load(x_ptr + row * x_row_stride + n_cols + cols, mask=inside, other=0.0).to(ACC)
    dout = tl.load(dout_ptr + row * dout_row_stride + cols, mask=inside, other=0.0).to(ACC)
    sigmoid = 1.0 / (1.0 + tl.exp(-a))
    da = dout * b * sigmoid * (1.0 + a * (1.0 - sigmoid))
    db = dout * a * sigmoid
    tl.store(dx_ptr + row * 2 * n_cols + cols, da.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dx_ptr + row * 2 * n_cols + n_cols + cols, db.to(dx_ptr.dtype.element_ty), mask=inside)


FORWARD = Kernel("swiglu forward", swiglu_forward, lambda a: Cost(3 * a.out_ptr.nbytes, 5 * a.out_ptr.numel()))
BACKWARD = Kernel("swiglu backward", swiglu_backward, lambda a: Cost(5 * a.dout_ptr.nbytes, 11 * a.dout_ptr.numel()))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w1w3: Tensor) -> Tensor:
        (x, row_stride), (*leading, width) = rows_of(w1w3), w1w3.shape
        n_cols = width // 2
        out = w1w3.new_empty((*leading, n_cols))
        if n_rows := w1w3.numel() // width:
            FORWARD.launch(_grid(n_rows, n_cols), (x, out, row_stride, n_rows, n_cols), **_settings(n_cols, x.dtype))
        ctx.save_for_backward(w1w3)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        (w1w3,) = ctx.saved_tensors
        (x, row_stride), (dout, dout_stride) = rows_of(w1w3), rows_of(dout)
        n_cols = dout.shape[-1]
        dx = torch.empty_like(w1w3, memory_format=torch.contiguous_format)
        if n_rows := dout.numel() // n_cols:
            BACKWARD.launch(
                _grid(n_rows, n_cols),
                (x, dout, dx, row_stride, dout_stride, n_rows, n_cols),
                **_settings(n_cols, x.dtype),
            )
        return dx


@functools.cache
def _tile(n_cols: int) -> tuple[int, int]:
    """Narrow rows share a tile: (rows, columns) with a product of SWIGLU.block[0]."""
    block = min(SWIGLU.block[0], triton.next_power_of_2(n_cols))
    return SWIGLU.block[0] // block, block


@functools.cache  # a Python launch costs more than most kernels run
def _settings(n_cols: int, dtype: torch.dtype) -> dict[str, Any]:
    rows, block = _tile(n_cols)
    return {
        "ROWS": rows,
        "BLOCK": block,
        "ACC": accumulator(dtype),
        "num_warps": SWIGLU.num_warps,
        "num_stages": SWIGLU.num_stages,
    }


def _grid(n_rows: int, n_cols: int) -> tuple[int, int]:
    rows, block = _tile(n_cols)
    return ceil_div(n_rows, rows), ceil_div(n_cols, block)


def run(w1w3: Tensor) -> Tensor:
    """See ops/swiglu.py."""
    return _SwiGLU.apply(w1w3)


def why_not(w1w3: Tensor) -> str | None:
    """None if the kernels can serve this call."""
    return why_not_device(w1w3)

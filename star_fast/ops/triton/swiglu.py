"""SwiGLU kernels: one elementwise pass forward, one backward; each input read once, each output written once."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_fast.ops.dispatch import Cost
from star_fast.ops.triton.launching import Kernel, accumulator, why_not_device
from star_fast.ops.triton.tiles import SWIGLU


@triton.jit
def swiglu_forward(x_ptr, out_ptr, x_row_stride, n_rows, n_cols, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
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
def swiglu_backward(x_ptr, dout_ptr, dx_ptr, x_row_stride, dout_row_stride, n_rows, n_cols, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                    ACC: tl.constexpr):
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
    def forward(ctx, w1w3: Tensor) -> Tensor:
        x = _rows(w1w3)
        n_cols = x.shape[1] // 2
        out = torch.empty(x.shape[0], n_cols, dtype=x.dtype, device=x.device)
        if out.numel():
            FORWARD.launch(_grid(*out.shape), (x, out, x.stride(0), *out.shape), **_settings(n_cols, x.dtype))
        ctx.save_for_backward(w1w3)
        return out.view(*w1w3.shape[:-1], n_cols)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor) -> Tensor:
        (w1w3,) = ctx.saved_tensors
        x, dout = _rows(w1w3), _rows(dout)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if dx.numel():
            BACKWARD.launch(_grid(*dout.shape), (x, dout, dx, x.stride(0), dout.stride(0), *dout.shape),
                            **_settings(dout.shape[1], x.dtype))
        return dx.view(w1w3.shape)


def _rows(x: Tensor) -> Tensor:
    """(N, width) with unit stride inside a row; a copy only where the strides leave no other way."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


@functools.cache
def _tile(n_cols: int) -> dict[str, int]:
    """Narrow rows share a tile: (rows, columns) with a product of SWIGLU.block[0]."""
    block = min(SWIGLU.block[0], triton.next_power_of_2(n_cols))
    return {"ROWS": SWIGLU.block[0] // block, "BLOCK": block}


@functools.cache  # a Python launch costs more than most kernels run
def _settings(n_cols: int, dtype: torch.dtype) -> dict[str, object]:
    return {**_tile(n_cols), "ACC": accumulator(dtype), "num_warps": SWIGLU.num_warps, "num_stages": SWIGLU.num_stages}


def _grid(n_rows: int, n_cols: int) -> tuple[int, int]:
    tile = _tile(n_cols)
    return triton.cdiv(n_rows, tile["ROWS"]), triton.cdiv(n_cols, tile["BLOCK"])


def run(w1w3: Tensor) -> Tensor:
    """See ops/swiglu.py."""
    return _SwiGLU.apply(w1w3)


def why_not(w1w3: Tensor) -> str | None:
    """None if the kernels can serve this call."""
    return why_not_device(w1w3)

"""SwiGLU kernels: one elementwise pass forward, one backward; each input read once, each output written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_fast.ops.dispatch import Launch
from star_fast.ops.shapes import Shape
from star_fast.ops.triton.launching import FP_FUSION, Variant, accumulator, pointer, why_not_device
from star_fast.ops.triton.tiles import SWIGLU


@triton.jit
def swiglu_forward(x_ptr, out_ptr, x_row_stride, n_rows, n_cols, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """out[row, c] = silu(x[row, c]) * x[row, n_cols + c]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < n_rows) & (cols < n_cols)
    a = tl.load(x_ptr + row * x_row_stride + cols, mask=inside, other=0.0).to(ACC)
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
    a = tl.load(x_ptr + row * x_row_stride + cols, mask=inside, other=0.0).to(ACC)
    b = tl.load(x_ptr + row * x_row_stride + n_cols + cols, mask=inside, other=0.0).to(ACC)
    dout = tl.load(dout_ptr + row * dout_row_stride + cols, mask=inside, other=0.0).to(ACC)
    sigmoid = 1.0 / (1.0 + tl.exp(-a))
    da = dout * b * sigmoid * (1.0 + a * (1.0 - sigmoid))
    db = dout * a * sigmoid
    tl.store(dx_ptr + row * 2 * n_cols + cols, da.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dx_ptr + row * 2 * n_cols + n_cols + cols, db.to(dx_ptr.dtype.element_ty), mask=inside)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w1w3: Tensor) -> Tensor:
        x = _rows(w1w3)
        n_cols = x.shape[1] // 2
        out = torch.empty(x.shape[0], n_cols, dtype=x.dtype, device=x.device)
        if out.numel():
            swiglu_forward[_grid(*out.shape)](x, out, x.stride(0), *out.shape, **_tile(n_cols), ACC=accumulator(x.dtype),
                                              num_warps=SWIGLU.num_warps, num_stages=SWIGLU.num_stages, enable_fp_fusion=FP_FUSION)
        ctx.save_for_backward(w1w3)
        return out.view(*w1w3.shape[:-1], n_cols)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor) -> Tensor:
        (w1w3,) = ctx.saved_tensors
        x, dout = _rows(w1w3), _rows(dout)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if dx.numel():
            swiglu_backward[_grid(*dout.shape)](x, dout, dx, x.stride(0), dout.stride(0), *dout.shape, **_tile(dout.shape[1]),
                                                ACC=accumulator(x.dtype), num_warps=SWIGLU.num_warps, num_stages=SWIGLU.num_stages,
                                                enable_fp_fusion=FP_FUSION)
        return dx.view(w1w3.shape)


def _rows(x: Tensor) -> Tensor:
    """(N, width) with unit stride inside a row; a copy only where the strides leave no other way."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _tile(n_cols: int) -> dict[str, int]:
    """Narrow rows share a tile: (rows, columns) with a product of SWIGLU.block[0]."""
    block = min(SWIGLU.block[0], triton.next_power_of_2(n_cols))
    return {"ROWS": SWIGLU.block[0] // block, "BLOCK": block}


def _grid(n_rows: int, n_cols: int) -> tuple[int, int]:
    tile = _tile(n_cols)
    return triton.cdiv(n_rows, tile["ROWS"]), triton.cdiv(n_cols, tile["BLOCK"])


def run(w1w3: Tensor) -> Tensor:
    """See ops/swiglu.py."""
    return _SwiGLU.apply(w1w3)


def why_not(w1w3: Tensor) -> str | None:
    """None if the kernels can serve this call."""
    return why_not_device(w1w3)


def fake(w1w3: Tensor) -> Tensor:
    """An empty result."""
    return w1w3.new_empty(*w1w3.shape[:-1], w1w3.shape[-1] // 2)


def launches(w1w3: Tensor) -> list[Launch]:
    """The forward launches."""
    n_cols = w1w3.shape[-1] // 2
    return [Launch("swiglu_forward", _grid(w1w3.numel() // (2 * n_cols), n_cols))]


def variants(shape: Shape, dtype: torch.dtype) -> list[Variant]:
    """What to compile for a training step at `shape`."""
    size, numbers, p, grid = dtype.itemsize, shape.rows * shape.F, pointer(dtype), _grid(shape.rows, shape.F)
    constants = {**_tile(shape.F), "ACC": accumulator(dtype)}
    forward = {"x_ptr": p, "out_ptr": p, "x_row_stride": "i32", "n_rows": "i32", "n_cols": "i32"}
    backward = {"x_ptr": p, "dout_ptr": p, "dx_ptr": p, "x_row_stride": "i32", "dout_row_stride": "i32", "n_rows": "i32", "n_cols": "i32"}
    static = dict.fromkeys(constants, "constexpr")
    return [
        Variant("swiglu forward", swiglu_forward, {**forward, **static}, constants, SWIGLU.num_warps, SWIGLU.num_stages, tuple(forward),
                (3 * size * numbers, 5 * numbers), grid),
        Variant("swiglu backward", swiglu_backward, {**backward, **static}, constants, SWIGLU.num_warps, SWIGLU.num_stages, tuple(backward),
                (5 * size * numbers, 11 * numbers), grid),
    ]

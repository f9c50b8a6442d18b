"""Residual add + dropout + RMSNorm kernels: one pass forward; one backward and a sum over it. The dropout mask is
hashed anew in both.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_fast.ops.add_rms_norm import keys, threshold
from star_fast.ops.dispatch import Cost
from star_fast.ops.triton.launching import Kernel, accumulator, ceil_div, rows_of, why_not_device
from star_fast.ops.triton.tiles import ADD_RMS_NORM, ADD_RMS_NORM_WEIGHT

_COLUMNS_A_WARP = 256  # 8 elements a thread: one 16-byte access of bfloat16
_LEAST_TILE = 1024  # elements: four 16-byte accesses of bfloat16 for each thread of one warp
_MOST_COLUMNS = 16384  # 32 elements a thread at 16 warps; a row is held in registers


@triton.jit
def _hash(x):
    """lowbias32 on uint32, as in ops/add_rms_norm.py."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _survives(row, column_hash, row_key, LIMIT: tl.constexpr):
    row_hash = _hash(row.to(tl.uint32) ^ row_key.to(tl.uint32, bitcast=True))
    return _hash(row_hash + column_hash).to(tl.int32, bitcast=True) < LIMIT


@triton.jit(do_not_specialize=["row_key", "column_key"])
def add_rms_norm_forward(
    x_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    new_residual_ptr,
    x_row_stride,
    residual_row_stride,
    n_rows,
    n_cols,
    rows_a_program,
    row_key,
    column_key,
    EPS: tl.constexpr,
    LIMIT: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """A run of rows a program, ROWS at once, so that the weight is loaded and the columns are hashed once for all of
    them.
    """
    cols = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + cols, mask=cols < n_cols, other=0.0).to(ACC)  # (1, BLOCK)
    column_hash = _hash(cols.to(tl.uint32) ^ column_key.to(tl.uint32, bitcast=True))
    first = tl.program_id(0) * rows_a_program
    for i in range(0, tl.minimum(rows_a_program, n_rows - first), ROWS):
        row = (first + i + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = (cols < n_cols) & (row < tl.minimum(n_rows, first + rows_a_program))
        # (ROWS, BLOCK), as all tiles here
        h = tl.load(x_ptr + row * x_row_stride + cols, mask=inside, other=0.0).to(ACC)
        if HAS_DROPOUT:
            h = tl.where(_survives(row, column_hash, row_key, LIMIT), h * SCALE, 0.0)
        if HAS_RESIDUAL:
            h += tl.load(residual_ptr + row * residual_row_stride + cols, mask=inside, other=0.0).to(ACC)
        if HAS_RESIDUAL or HAS_DROPOUT:
            rounded = h.to(new_residual_ptr.dtype.element_ty)
            tl.store(new_residual_ptr + row * n_cols + cols, rounded, mask=inside)
            h = rounded.to(ACC)
        normed = (h * tl.rsqrt(tl.sum(h * h, 1, keep_dims=True) / n_cols + EPS)).to(normed_ptr.dtype.element_ty).to(ACC)
        tl.store(normed_ptr + row * n_cols + cols, (normed * weight).to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["row_key", "column_key"])
def add_rms_norm_backward(
    h_ptr,
    dnormed_ptr,
    dh_in_ptr,
    weight_ptr,
    dh_ptr,
    dx_ptr,
    partial_ptr,
    h_row_stride,
    dnormed_row_stride,
    dh_in_row_stride,
    n_rows,
    n_cols,
    rows_a_program,
    row_key,
    column_key,
    EPS: tl.constexpr,
    LIMIT: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_DNORMED: tl.constexpr,
    HAS_DH_IN: tl.constexpr,
    WRITE_DH: tl.constexpr,
    WRITE_DX: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """A run of rows a program, ROWS at once; each program leaves its own row of dweight sums, which
    `add_rms_norm_weight` adds up.

    Loads run ahead of the arithmetic by one tile: 512 programs are four a multiprocessor of an H100, and what they have
    in flight, 48 bytes a thread, is 24 KB a multiprocessor while all of them load. Bytes a second times a latency of
    0.7 us ask for 18 KB at every moment (B200: 38 KB), and without the next tile under way nothing is in flight while a
    row is summed. (Forward has 2048 programs, 16 a multiprocessor and 62 KB, and needs none of it.)
    """
    cols = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + cols, mask=cols < n_cols, other=0.0).to(ACC)  # (1, BLOCK)
    column_hash = _hash(cols.to(tl.uint32) ^ column_key.to(tl.uint32, bitcast=True))
    dweight = tl.zeros((ROWS, BLOCK), dtype=ACC)
    first = tl.program_id(0) * rows_a_program
    for i in tl.range(0, tl.minimum(rows_a_program, n_rows - first), ROWS, num_stages=STAGES):
        row = (first + i + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = (cols < n_cols) & (row < tl.minimum(n_rows, first + rows_a_program))
        dh = tl.zeros((ROWS, BLOCK), dtype=ACC)
        if HAS_DNORMED:
            # (ROWS, BLOCK), as all tiles here
            h = tl.load(h_ptr + row * h_row_stride + cols, mask=inside, other=0.0).to(ACC)
            dnormed = tl.load(dnormed_ptr + row * dnormed_row_stride + cols, mask=inside, other=0.0).to(ACC)
            inverse = tl.rsqrt(tl.sum(h * h, 1, keep_dims=True) / n_cols + EPS)
            n = h * inverse
            dweight += dnormed * n.to(h_ptr.dtype.element_ty).to(ACC)
            dn = dnormed * weight
            dh = inverse * (dn - n * (tl.sum(dn * n, 1, keep_dims=True) / n_cols))
        if HAS_DH_IN:
            dh += tl.load(dh_in_ptr + row * dh_in_row_stride + cols, mask=inside, other=0.0).to(ACC)
        if WRITE_DH:
            tl.store(dh_ptr + row * n_cols + cols, dh.to(dh_ptr.dtype.element_ty), mask=inside)
        if WRITE_DX:
            if HAS_DROPOUT:
                dh = tl.where(_survives(row, column_hash, row_key, LIMIT), dh * SCALE, 0.0)
            tl.store(dx_ptr + row * n_cols + cols, dh.to(dx_ptr.dtype.element_ty), mask=inside)
    if HAS_DNORMED:
        total = tl.sum(dweight, 0, keep_dims=True)
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * n_cols + cols, total, mask=cols < n_cols)


@triton.jit
def add_rms_norm_weight(
    partial_ptr, dweight_ptr, n_partials, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr
):
    """dweight: the column sums of partial (n_partials, n_cols), always in the same order; COLS columns a program, ROWS
    rows at once.
    """
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), dtype=ACC)
    for start in range(0, n_partials, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < n_partials)[:, None] & (cols < n_cols)[None, :]
        total += tl.load(partial_ptr + rows[:, None] * n_cols + cols[None, :], mask=inside, other=0.0)  # (ROWS, COLS)
    tl.store(dweight_ptr + cols, tl.sum(total, 0).to(dweight_ptr.dtype.element_ty), mask=cols < n_cols)


def _forward_cost(a: SimpleNamespace) -> Cost:
    tensors = 2 + a.HAS_RESIDUAL + (a.HAS_RESIDUAL or a.HAS_DROPOUT)  # x and normed; the residual; its new value
    return Cost(tensors * a.normed_ptr.nbytes + a.weight_ptr.nbytes, 6 * a.normed_ptr.numel())


def _backward_cost(a: SimpleNamespace) -> Cost:
    tensors = 2 * a.HAS_DNORMED + a.HAS_DH_IN + a.WRITE_DH + a.WRITE_DX
    side = a.weight_ptr.nbytes + (a.partial_ptr.nbytes if a.HAS_DNORMED else 0)
    return Cost(tensors * a.n_rows * a.n_cols * a.h_ptr.element_size() + side, 11 * a.n_rows * a.n_cols)


FORWARD = Kernel("add_rms_norm forward", add_rms_norm_forward, _forward_cost)
BACKWARD = Kernel("add_rms_norm backward", add_rms_norm_backward, _backward_cost)
WEIGHT = Kernel(
    "add_rms_norm weight",
    add_rms_norm_weight,
    lambda a: Cost(a.partial_ptr.nbytes + a.dweight_ptr.nbytes, a.partial_ptr.numel()),
)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dropout: float, seed: int
    ) -> tuple[Tensor, Tensor | None]:
        (rows, row_stride), weight, n_cols = rows_of(x), weight.contiguous(), x.shape[-1]
        shortcut, shortcut_stride = (rows, row_stride) if residual is None else rows_of(residual)
        normed = torch.empty_like(x, memory_format=torch.contiguous_format)
        new_residual = None if residual is None and not dropout else torch.empty_like(normed)
        drop_keys = keys(seed) if dropout else (0, 0)
        if n_rows := x.numel() // n_cols:
            rows_a_program = _forward_rows(n_rows, n_cols)
            FORWARD.launch(
                (ceil_div(n_rows, rows_a_program),),
                (
                    rows,
                    shortcut,
                    weight,
                    normed,
                    normed if new_residual is None else new_residual,
                    row_stride,
                    shortcut_stride,
                    n_rows,
                    n_cols,
                    rows_a_program,
                    *drop_keys,
                ),
                HAS_RESIDUAL=residual is not None,
                **_settings(n_cols, x.dtype, eps, dropout),
            )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if new_residual is None else new_residual, weight)
        ctx.rest = eps, dropout, drop_keys
        return normed, new_residual

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dnormed: Tensor | None, dh_in: Tensor | None) -> tuple[Tensor | None, ...]:
        if dnormed is None and dh_in is None:
            return (None,) * 6
        (saved, weight), (eps, dropout, drop_keys) = ctx.saved_tensors, ctx.rest
        want_x, want_residual, want_weight, *_ = ctx.needs_input_grad
        write_dx = want_x and dropout > 0
        write_dh = want_residual or (want_x and not write_dx)
        dh = torch.empty_like(saved, memory_format=torch.contiguous_format) if write_dh else None
        dx = torch.empty_like(saved, memory_format=torch.contiguous_format) if write_dx else None
        (h, h_stride), n_cols = rows_of(saved), saved.shape[-1]
        n_rows = h.numel() // n_cols
        rows_a_program = max(ceil_div(n_rows, ADD_RMS_NORM.block[2]), _rows_at_once(n_cols))
        programs = ceil_div(n_rows, rows_a_program)
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        partial = h if dnormed is None else weight.new_empty((programs, n_cols), dtype=wide)
        from_normed, normed_stride = (h, h_stride) if dnormed is None else rows_of(dnormed)
        from_residual, residual_stride = (h, h_stride) if dh_in is None else rows_of(dh_in)
        if n_rows:
            BACKWARD.launch(
                (programs,),
                (
                    h,
                    from_normed,
                    from_residual,
                    weight,
                    dh if write_dh else h,
                    dx if write_dx else h,
                    partial,
                    h_stride,
                    normed_stride,
                    residual_stride,
                    n_rows,
                    n_cols,
                    rows_a_program,
                    *drop_keys,
                ),
                HAS_DNORMED=dnormed is not None,
                HAS_DH_IN=dh_in is not None,
                WRITE_DH=write_dh,
                WRITE_DX=write_dx,
                STAGES=ADD_RMS_NORM.num_stages,
                **_settings(n_cols, h.dtype, eps, dropout),
            )
        dweight = None
        if want_weight and dnormed is not None:
            dweight = torch.empty_like(weight) if n_rows else torch.zeros_like(weight)
            if n_rows:
                WEIGHT.launch(
                    (ceil_div(n_cols, ADD_RMS_NORM_WEIGHT.block[1]),),
                    (partial, dweight, programs, n_cols),
                    **_weight_settings(h.dtype),
                )
        return (dx if write_dx else dh) if want_x else None, dh if want_residual else None, dweight, None, None, None


@functools.cache
def _rows_at_once(n_cols: int) -> int:
    """Rows of one tile: several where a row alone would leave a warp idle."""
    return max(1, _LEAST_TILE // triton.next_power_of_2(n_cols))


def _forward_rows(n_rows: int, n_cols: int) -> int:
    """Rows of one program forward: one tile when rows are few, as in decoding."""
    return max(_rows_at_once(n_cols), min(ADD_RMS_NORM.block[0], n_rows // ADD_RMS_NORM.block[1]))


@functools.cache  # a Python launch costs more than most kernels run
def _settings(n_cols: int, dtype: torch.dtype, eps: float, dropout: float) -> dict[str, Any]:
    """What both kernels share of a launch."""
    block = triton.next_power_of_2(n_cols)
    warps = max(1, min(ADD_RMS_NORM.num_warps, block // _COLUMNS_A_WARP))
    return {
        "EPS": eps,
        "LIMIT": threshold(dropout),
        "SCALE": 1 / (1 - dropout),
        "HAS_DROPOUT": dropout > 0,
        "ROWS": _rows_at_once(n_cols),
        "BLOCK": block,
        "ACC": accumulator(dtype),
        "num_warps": warps,
        "num_stages": ADD_RMS_NORM.num_stages,
    }


@functools.cache
def _weight_settings(dtype: torch.dtype) -> dict[str, Any]:
    rows, cols = ADD_RMS_NORM_WEIGHT.block
    return {
        "ROWS": rows,
        "COLS": cols,
        "ACC": accumulator(dtype),
        "num_warps": ADD_RMS_NORM_WEIGHT.num_warps,
        "num_stages": ADD_RMS_NORM_WEIGHT.num_stages,
    }


def run(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dropout: float, seed: int
) -> tuple[Tensor, Tensor]:
    """See ops/add_rms_norm.py."""
    normed, new_residual = _AddRMSNorm.apply(x, residual, weight, eps, dropout, seed)
    return normed, x if new_residual is None else new_residual


def why_not(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dropout: float, seed: int) -> str | None:
    """None if the kernels can serve this call."""
    if x.shape[-1] > _MOST_COLUMNS:
        return f"a row is held in registers: D must be at most {_MOST_COLUMNS}, got {x.shape[-1]}"
    return why_not_device(x)

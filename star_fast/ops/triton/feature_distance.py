"""Feature-distance kernels: forward reads both features once and leaves the gradient up to a factor; backward applies
the factor.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_fast.ops.dispatch import Cost
from star_fast.ops.triton.launching import Kernel, accumulator, ceil_div, rows_of, why_not_device
from star_fast.ops.triton.tiles import FEATURE_DISTANCE, FEATURE_DISTANCE_SCALE

_LARGEST_WIDTH = 16384  # a row is held in registers


@triton.jit
def inverse_norm(squares):
    """1 / sqrt(squares), and 0 for a norm below 1e-12, so that such a vector has cosine 0 and gradient 0."""
    norm = tl.sqrt(squares)
    short = norm < 1e-12
    return tl.where(short, 0.0, 1.0 / tl.where(short, 1.0, norm))


@triton.jit
def feature_distance_forward(
    student_ptr,
    teacher_ptr,
    distance_ptr,
    gradient_ptr,
    student_row_stride,
    teacher_row_stride,
    n_rows,
    n_cols,
    WITH_GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """ROWS rows a program: their distances 1 - c, and the gradients of them, -(t / |t| - c s / |s|) / |s|."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    inside = (row < n_rows) & (cols < n_cols)
    # (ROWS, BLOCK), as t and gradient
    s = tl.load(student_ptr + row * student_row_stride + cols, mask=inside, other=0.0).to(ACC)
    t = tl.load(teacher_ptr + row * teacher_row_stride + cols, mask=inside, other=0.0).to(ACC)
    s_inverse, t_inverse = (
        inverse_norm(tl.sum(s * s, 1, keep_dims=True)),
        inverse_norm(tl.sum(t * t, 1, keep_dims=True)),
    )
    cosine = tl.sum(s * t, 1, keep_dims=True) * (s_inverse * t_inverse)  # (ROWS, 1)
    tl.store(distance_ptr + row, 1.0 - cosine, mask=row < n_rows)
    if WITH_GRADIENT:
        gradient = s * (cosine * s_inverse * s_inverse) - t * (s_inverse * t_inverse)
        tl.store(gradient_ptr + row * n_cols + cols, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)


@triton.jit
def feature_distance_backward(
    gradient_ptr, dout_ptr, dstudent_ptr, n_rows, n_numbers, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """dstudent = gradient * dout / n_rows."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,), as all tiles here
    inside = index < n_numbers
    factor = tl.load(dout_ptr).to(ACC) / n_rows
    gradient = tl.load(gradient_ptr + index, mask=inside, other=0.0).to(ACC)
    tl.store(dstudent_ptr + index, (gradient * factor).to(dstudent_ptr.dtype.element_ty), mask=inside)


FORWARD = Kernel(
    "feature_distance forward",
    feature_distance_forward,
    lambda a: Cost(
        (3 if a.WITH_GRADIENT else 2) * a.student_ptr.nbytes + a.distance_ptr.nbytes,
        (9 if a.WITH_GRADIENT else 6) * a.student_ptr.numel(),
    ),
)
BACKWARD = Kernel(
    "feature_distance backward", feature_distance_backward, lambda a: Cost(2 * a.gradient_ptr.nbytes, a.n_numbers)
)


class _FeatureDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
        ctx.save_for_backward(gradient)
        return _forward(student, teacher, gradient)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        dstudent = torch.empty_like(gradient)
        (block,), numbers = FEATURE_DISTANCE_SCALE.block, gradient.numel()
        BACKWARD.launch(
            (ceil_div(numbers, block),),
            (gradient, dout, dstudent, gradient.shape[0], numbers),
            BLOCK=block,
            ACC=accumulator(gradient.dtype),
            num_warps=FEATURE_DISTANCE_SCALE.num_warps,
            num_stages=FEATURE_DISTANCE_SCALE.num_stages,
        )
        return dstudent, None


def _forward(student: Tensor, teacher: Tensor, gradient: Tensor | None) -> Tensor:
    """The mean distance; fills `gradient`, if there is one, with N times its gradient. The mean is taken in a fixed
    order.
    """
    (student, student_stride), (teacher, teacher_stride), (n_rows, n_cols) = (
        rows_of(student),
        rows_of(teacher),
        student.shape,
    )
    settings = _settings(n_cols, student.dtype)
    distances = student.new_empty(n_rows, dtype=torch.promote_types(student.dtype, torch.float32))
    FORWARD.launch(
        (ceil_div(n_rows, settings["ROWS"]),),
        (
            student,
            teacher,
            distances,
            student if gradient is None else gradient,
            student_stride,
            teacher_stride,
            n_rows,
            n_cols,
        ),
        WITH_GRADIENT=gradient is not None,
        **settings,
    )
    return distances.mean()


@functools.cache  # a Python launch costs more than this kernel runs
def _settings(n_cols: int, dtype: torch.dtype) -> dict[str, Any]:
    """BLOCK holds a row, narrow rows share a program; the warps follow from it, so that a thread has
    FEATURE_DISTANCE.block[0] columns.
    """
    block = triton.next_power_of_2(n_cols)
    return {
        "ROWS": max(1, FEATURE_DISTANCE.block[1] // block),
        "BLOCK": block,
        "ACC": accumulator(dtype),
        "num_warps": max(1, min(FEATURE_DISTANCE.num_warps, block // (32 * FEATURE_DISTANCE.block[0]))),
        "num_stages": FEATURE_DISTANCE.num_stages,
    }


def run(student: Tensor, teacher: Tensor) -> Tensor:
    """See ops/feature_distance.py."""
    if torch.is_grad_enabled() and student.requires_grad:
        return _FeatureDistance.apply(student, teacher)
    return _forward(student, teacher, None)


def why_not(student: Tensor, teacher: Tensor) -> str | None:
    """None if the kernels can serve this call."""
    if student.shape[1] > _LARGEST_WIDTH:
        return f"a row of D = {student.shape[1]} does not fit in registers, at most {_LARGEST_WIDTH}"
    return why_not_device(student)

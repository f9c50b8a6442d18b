"""Mean cosine distance between the student's and the teacher's features: L_MIM of the method."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_fast.ops import dispatch
from star_fast.ops.shapes import SHAPES

ZERO_NORM = 1e-12  # a vector shorter than this has cosine 0 and gradient 0 (docs/method.md, choice)
_ROWS = 512  # rows handled at once on the CPU: a few MB in float32


def feature_distance(student: Tensor, teacher: Tensor, *, backend: str | None = None) -> Tensor:
    """mean over n of 1 - cos(student[n], teacher[n]); a vector of norm < 1e-12 has cosine 0 and gradient 0.

    Backward, with s, t one row each and c their cosine: ds = -dout / N * (t / |t| - c s / |s|) / |s|. No gradient goes
    to the teacher.

    Args:
        student: (N, D) float, N, D >= 1. Norms below 1e19, so that their squares fit float32.
        teacher: (N, D), dtype and device of `student`.
        backend: name of a backend; None chooses (see dispatch).

    Returns:
        Scalar float32 (float64 for float64): the mean, between 0 and 2.

    Numerics:
        Products, norms, cosines and the mean in float32 (float64 for float64). Deterministic.

    Memory:
        Where a gradient is wanted the forward pass computes it up to the factor dout / N, in the dtype of `student`;
        nothing else is saved, so the teacher's features can be freed after it. No (N, D) tensor of another dtype
        exists.

    Raises:
        TypeError: not floating point. ValueError: shapes, dtypes or devices that do not fit.

    Source:
        ST-AR (arXiv 2509.15185), L_MIM.
    """
    if not student.is_floating_point():
        raise TypeError(f"feature_distance: student must be floating point, got {student.dtype}")
    if student.ndim != 2 or 0 in student.shape:
        raise ValueError(f"feature_distance: student must be (N, D) with N, D >= 1, got shape {tuple(student.shape)}")
    if teacher.shape != student.shape or teacher.dtype != student.dtype or teacher.device != student.device:
        raise ValueError(
            f"feature_distance: teacher must be {tuple(student.shape)} {student.dtype} on {student.device} like "
            "student, "
            f"got {tuple(teacher.shape)} {teacher.dtype} on {teacher.device}"
        )
    return dispatch.call("feature_distance", student.device, (student, teacher.detach()), backend=backend)


def reference(student: Tensor, teacher: Tensor) -> Tensor:
    """The formula, in plain torch, by blocks of rows that stay in cache; the gradient beside the loss."""
    if torch.is_grad_enabled() and student.requires_grad:
        return _FeatureDistance.apply(student, teacher)
    return _by_blocks(student, teacher, None)


class _FeatureDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        loss = _by_blocks(student, teacher, gradient)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        return scaled(ctx.saved_tensors[0], dout), None


def scaled(gradient: Tensor, dout: Tensor) -> Tensor:
    """gradient * dout / N in the dtype of `gradient`, the factor in the dtype of `dout`."""
    out, factor = torch.empty_like(gradient), (dout / gradient.shape[0]).view(1, 1)
    # The CPU computes with a float32 copy
    for block, rows in zip(out.split(_ROWS), gradient.split(_ROWS), strict=True):
        torch.mul(rows, factor, out=block)
    return out


def _by_blocks(student: Tensor, teacher: Tensor, gradient: Tensor | None) -> Tensor:
    """The mean; fills `gradient` with -(t / |t| - c s / |s|) / |s|, N times the gradient of the mean."""
    exact = torch.promote_types(student.dtype, torch.float32)
    cosines = student.new_empty(student.shape[0], 1, dtype=exact)
    for start in range(0, student.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        s, t = student[rows].to(exact), teacher[rows].to(exact)
        s_inverse, t_inverse = inverse_norm(s), inverse_norm(t)
        cosines[rows] = cosine = (s * t).sum(1, keepdim=True) * (s_inverse * t_inverse)
        if gradient is not None:
            gradient[rows] = (s * (cosine * s_inverse**2)).addcmul_(t, s_inverse * t_inverse, value=-1)
    return (1 - cosines).mean()


def inverse_norm(x: Tensor) -> Tensor:
    """(..., D) -> (..., 1): 1 / |x|, and 0 where |x| < 1e-12, which makes cosine and gradient of such a vector 0."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm < ZERO_NORM, 0.0, 1 / norm)


def inputs(preset: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """Arguments for one call at a preset's training shape: student and teacher (N, D), correlated as after some
    training.
    """
    shape = SHAPES[preset]
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(shape.rows, shape.D, generator=generator)
    student = 0.7 * teacher + 0.7 * torch.randn(shape.rows, shape.D, generator=generator)
    return {"student": student.to(device, dtype), "teacher": teacher.to(device, dtype)}


def cost(call: dict[str, Tensor], backward: bool = False) -> dispatch.Cost:
    """Least bytes and FLOPs of one call without gradient, or if `backward` of what the gradient adds: written forward,
    scaled backward.
    """
    numbers, size = call["student"].numel(), call["student"].element_size()
    if backward:  # forward writes the gradient; backward reads it and writes it scaled
        return dispatch.Cost(3 * numbers * size, 4 * numbers)
    return dispatch.Cost(2 * numbers * size + 4, 6 * numbers)


dispatch.register(
    "feature_distance",
    reference,
    modules={"triton": "star_fast.ops.triton.feature_distance"},
    order={"cuda": ("triton",)},
)

"""The teacher's exponential moving average: every weight in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from star_fast.ops import dispatch
from star_fast.ops.shapes import SHAPES


def ema_update(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    decay: float,
    copy_to: Sequence[Tensor] | None = None,
    *,
    backend: str | None = None,
) -> None:
    """teacher += (1 - decay) * (student - teacher), in place; copy_to becomes the teacher rounded to its dtype.

    Args:
        teacher: float32 tensors of any shapes (float64 in tests), updated in place. A bfloat16 teacher would not move
            at decay 0.9999.
        student: as many tensors of the same shapes and device, all of one floating-point dtype.
        decay: in [0, 1]; 1 - decay is computed in float64.
        copy_to: None, or as many tensors of the same shapes and device, all of one floating-point dtype, overwritten.
        backend: name of a backend; None chooses (see dispatch).

    Numerics:
        Computed in the teacher's dtype; equal weights stay bit-equal. Deterministic. No gradient flows.

    Memory:
        Nothing beyond the arguments on CUDA; on the CPU a float32 copy of one student tensor when the dtypes differ.

    Raises:
        TypeError: a dtype is wrong or mixed. ValueError: list lengths, shapes or devices differ, decay is out of range.

    Source:
        docs/method.md section 2, "Student and teacher"; Tarvainen & Valpola 2017 (arXiv 1703.01780).
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"ema_update: decay must be in [0, 1], got {decay}")
    lists = {"teacher": teacher, "student": student, **({} if copy_to is None else {"copy_to": copy_to})}
    for name, tensors in lists.items():
        if len(tensors) != len(teacher):
            raise ValueError(f"ema_update: {name} must have {len(teacher)} tensors like teacher, got {len(tensors)}")
        for i, (tensor, like) in enumerate(zip(tensors, teacher, strict=True)):
            if tensor.shape != like.shape or tensor.device != teacher[0].device:
                raise ValueError(
                    f"ema_update: {name}[{i}] must be {tuple(like.shape)} on {teacher[0].device}, "
                    f"got {tuple(tensor.shape)} on {tensor.device}"
                )
            if not tensor.is_floating_point() or tensor.dtype != tensors[0].dtype:
                raise TypeError(
                    f"ema_update: {name} must be of one floating-point dtype, got {tensors[0].dtype} and at {i} "
                    f"{tensor.dtype}"
                )
    if not teacher:
        return
    if teacher[0].dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"ema_update: teacher must be float32 (a rounded average does not move), got {teacher[0].dtype}"
        )
    dispatch.call(
        "ema_update",
        teacher[0].device,
        (list(teacher), list(student), decay, None if copy_to is None else list(copy_to)),
        backend=backend,
    )


@torch.no_grad()
def reference(teacher: list[Tensor], student: list[Tensor], decay: float, copy_to: list[Tensor] | None = None) -> None:
    """The formula, in plain torch."""
    if student[0].dtype == teacher[0].dtype:
        torch._foreach_lerp_(teacher, student, 1.0 - decay)
    else:
        for t, s in zip(teacher, student, strict=True):
            t.lerp_(s.to(t.dtype), 1.0 - decay)
    if copy_to is not None:
        torch._foreach_copy_(copy_to, teacher)


def inputs(preset: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, list[Tensor] | float]:
    """Arguments for one call on one block's weights: teacher and student float32 (the master weights), copies in
    `dtype`.
    """
    shape = SHAPES[preset]
    generator = torch.Generator().manual_seed(seed)
    sizes = [
        (3 * shape.D, shape.D),
        (shape.D, shape.D),
        (2 * shape.F, shape.D),
        (shape.D, shape.F),
        (shape.D,),
        (shape.D,),
    ]
    teacher = [torch.randn(size, generator=generator).to(device) for size in sizes]
    student = [t + 0.01 * torch.randn(t.shape, generator=generator).to(device) for t in teacher]
    return {"teacher": teacher, "student": student, "decay": 0.9999, "copy_to": [t.to(dtype) for t in teacher]}


def cost(call: dict[str, Any]) -> dispatch.Cost:
    """Least bytes and FLOPs of one call with these arguments: teacher read and written, student read, copy written."""
    weights = sum(t.numel() for t in call["teacher"])
    copy = call["copy_to"][0].element_size() if call.get("copy_to") else 0
    per_weight = 2 * call["teacher"][0].element_size() + call["student"][0].element_size() + copy
    return dispatch.Cost(weights * per_weight, 3 * weights)


dispatch.register(
    "ema_update", reference, modules={"triton": "star_fast.ops.triton.ema_update"}, order={"cuda": ("triton",)}
)

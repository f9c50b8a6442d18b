"""The EMA kernel: every weight of the model in one launch, through a table of addresses."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from star_fast.ops.dispatch import Cost
from star_fast.ops.triton.launching import Kernel, why_not_device
from star_fast.ops.triton.tiles import EMA_UPDATE

_TABLES_KEPT = 4  # distinct sets of tensors in turn; a training run has one


@triton.jit
def ema_update_all(
    tensors_ptr,
    chunks_ptr,
    weight,
    STUDENT: tl.constexpr,
    COPY: tl.constexpr,
    HAS_COPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one tensor: t += weight * (s - t); copy = t.

    tensors holds rows of (teacher, student, copy, numbers), chunks rows of (tensor, chunk in it).
    """
    chunk = tl.program_id(0).to(tl.int64)
    entry = tensors_ptr + tl.load(chunks_ptr + 2 * chunk).to(tl.int64) * 4
    start = tl.load(chunks_ptr + 2 * chunk + 1).to(tl.int64) * BLOCK
    teacher_ptr = tl.load(entry).to(tl.pointer_type(tl.float32))
    student_ptr = tl.load(entry + 1).to(tl.pointer_type(STUDENT))
    copy_ptr = tl.load(entry + 2).to(tl.pointer_type(COPY))
    numbers = tl.load(entry + 3)
    if ALIGNED:  # said of the pointers: the compiler forgets what it knew of an integer that becomes one
        teacher_ptr = tl.multiple_of(teacher_ptr, 16)
        student_ptr = tl.multiple_of(student_ptr, 16)
        copy_ptr = tl.multiple_of(copy_ptr, 16)
    offsets = start + tl.arange(0, BLOCK)  # (BLOCK,), as all tiles here
    teacher_ptr += offsets
    student_ptr += offsets
    copy_ptr += offsets
    # Whole chunks go without a mask, whose unknown end would break 16-byte accesses into single numbers
    if start + BLOCK <= numbers:
        t = tl.load(teacher_ptr)
        t += weight * (tl.load(student_ptr).to(tl.float32) - t)
        tl.store(teacher_ptr, t)
        if HAS_COPY:
            tl.store(copy_ptr, t.to(COPY))
    else:
        inside = offsets < numbers
        t = tl.load(teacher_ptr, mask=inside)
        t += weight * (tl.load(student_ptr, mask=inside).to(tl.float32) - t)
        tl.store(teacher_ptr, t, mask=inside)
        if HAS_COPY:
            tl.store(copy_ptr, t.to(COPY), mask=inside)


def _cost(a: SimpleNamespace) -> Cost:
    numbers = a.grid[0] * a.BLOCK
    return Cost(
        numbers * (8 + (a.STUDENT.primitive_bitwidth + (a.COPY.primitive_bitwidth if a.HAS_COPY else 0)) // 8),
        3 * numbers,
    )


UPDATE = Kernel("ema_update", ema_update_all, _cost)


class _Table(NamedTuple):
    tensors: Tensor  # (n, 4) int64: addresses of teacher, student and copy, and how many numbers
    chunks: Tensor  # (programs, 2) int32: index of the tensor, index of the chunk in it
    aligned: bool  # every address is a multiple of 16


_tables: OrderedDict[tuple[int, ...], _Table] = OrderedDict()
_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _table(teacher: list[Tensor], student: list[Tensor], copy_to: list[Tensor] | None) -> _Table:
    """The table of these very addresses, built on first sight and kept on the device. FakeTensors
    get the shape of one.
    """
    if isinstance(teacher[0], FakeTensor):
        programs = sum(triton.cdiv(t.numel(), EMA_UPDATE.block[0]) for t in teacher)
        empty = teacher[0].new_empty
        return _Table(empty((len(teacher), 4), dtype=torch.int64), empty((programs, 2), dtype=torch.int32), True)
    rows = [
        (t.data_ptr(), s.data_ptr(), c.data_ptr() if copy_to is not None else 0, t.numel())
        for t, s, c in zip(teacher, student, copy_to or teacher, strict=True)
        if t.numel()
    ]
    key = (teacher[0].device.index or 0, *(value for row in rows for value in row))
    if key in _tables:
        _tables.move_to_end(key)
    else:
        tensors = torch.tensor(rows, dtype=torch.int64).view(-1, 4)
        counts = (tensors[:, 3] + EMA_UPDATE.block[0] - 1) // EMA_UPDATE.block[0]
        which = torch.repeat_interleave(torch.arange(len(rows)), counts)
        within = torch.arange(len(which)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        chunks = torch.stack([which, within], dim=1).to(torch.int32)
        _tables[key] = _Table(
            tensors.to(teacher[0].device), chunks.to(teacher[0].device), not (tensors[:, :3] % 16).any().item()
        )
        if len(_tables) > _TABLES_KEPT:
            _tables.popitem(last=False)
    return _tables[key]


@torch.no_grad()
def run(teacher: list[Tensor], student: list[Tensor], decay: float, copy_to: list[Tensor] | None = None) -> None:
    """See ops/ema_update.py."""
    table = _table(teacher, student, copy_to)
    if len(table.chunks):
        UPDATE.launch(
            (len(table.chunks),),
            (table.tensors, table.chunks, 1.0 - decay),
            STUDENT=_TRITON[student[0].dtype],
            COPY=_TRITON[(copy_to or teacher)[0].dtype],
            HAS_COPY=copy_to is not None,
            ALIGNED=table.aligned,
            BLOCK=EMA_UPDATE.block[0],
            num_warps=EMA_UPDATE.num_warps,
            num_stages=EMA_UPDATE.num_stages,
        )
    torch.autograd.graph.increment_version([*teacher, *(copy_to or ())])


def why_not(
    teacher: list[Tensor], student: list[Tensor], decay: float, copy_to: list[Tensor] | None = None
) -> str | None:
    """None if the kernel can serve this call."""
    for tensors in (teacher, student, copy_to or []):
        for i, tensor in enumerate(tensors):
            if tensor.dtype not in _TRITON or not tensor.is_contiguous():
                return (
                    f"tensors must be contiguous float32, bfloat16 or float16, got {tensor.dtype} of strides "
                    f"{tensor.stride()} at {i}"
                )
    if teacher[0].dtype != torch.float32:
        return f"the teacher must be float32, got {teacher[0].dtype}"
    return why_not_device(teacher[0])

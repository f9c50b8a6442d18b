"""ops.ema_update: every backend against float64 arithmetic."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from star_fast.ops import dispatch
from tests import contract

op = import_module("star_fast.ops.ema_update")

SHAPES = [(3, 7), (1,), (0, 4), (2050,), (4096,), ()]


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("decay", [0.9999, 0.1, 0.0, 1.0])
@pytest.mark.parametrize("student_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_formula_against_float64(backend: str, student_dtype: torch.dtype, decay: float) -> None:
    teacher, student, copies = tensors(0), tensors(1, student_dtype), tensors(2, torch.bfloat16)
    expected = [t.double() + (1 - decay) * (s.double() - t.double()) for t, s in zip(teacher, student, strict=True)]
    plain = [t.clone() for t in teacher]
    op.reference(plain, student, decay)
    op.ema_update(teacher, student, decay, copies, backend=backend)
    for i, shape in enumerate(SHAPES):
        contract.assert_error_rule(f"ema_update [{backend}] {shape}", teacher[i], plain[i], expected[i])
        contract.assert_error_rule(
            f"ema_update [{backend}] copy {shape}", copies[i], teacher[i].bfloat16(), expected[i]
        )


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_many_small_steps_follow_the_closed_form(backend: str) -> None:
    """At decay 0.9999 a step is far below bfloat16's resolution; the float32 average moves by 1 - 0.9999^n."""
    teacher, student = [torch.ones(5)], [torch.full((5,), 2.0)]
    for _ in range(200):
        op.ema_update(teacher, student, 0.9999, backend=backend)
    torch.testing.assert_close(
        teacher[0].double(), torch.full((5,), 2 - 0.9999**200, dtype=torch.float64), rtol=0, atol=200 * 2**-24
    )


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_equal_weights_stay_bit_equal_and_version_moves(backend: str) -> None:
    teacher = tensors(3)
    student, versions = [t.clone() for t in teacher], [t._version for t in teacher]
    op.ema_update(teacher, student, 0.37, backend=backend)
    assert all(torch.equal(t, s) for t, s in zip(teacher, student, strict=True))
    assert all(t._version > v for t, v in zip(teacher, versions, strict=True))


def test_no_gradient_flows() -> None:
    for backend in ("reference", "triton"):
        teacher, student = [torch.zeros(3)], [torch.ones(3, requires_grad=True)]
        op.ema_update(teacher, student, 0.5, backend=backend)
        assert not teacher[0].requires_grad and torch.equal(teacher[0], torch.full((3,), 0.5))


def test_unaligned_tensors_and_a_table_for_each_set_of_addresses() -> None:
    wide = torch.zeros(3000)
    for start in (1, 4, 1, 7, 2, 3, 5):
        teacher, student = [wide[start : start + 2100]], [torch.ones(2100)]
        before = teacher[0].clone()
        op.ema_update(teacher, student, 0.75, backend="triton")
        torch.testing.assert_close(teacher[0], before + 0.25 * (1 - before))


def test_triton_really_launches_once_for_all() -> None:
    teacher, student = tensors(0), tensors(1)
    with dispatch.note_launches() as launches:
        op.ema_update(teacher, student, 0.5, backend="triton")
    assert launches == [dispatch.Launch("ema_update_all", (7,))]
    torch.testing.assert_close(teacher[5], (tensors(0)[5] + tensors(1)[5]) / 2)


def test_fake_path_and_empty_list() -> None:
    op.ema_update([], [], 0.5)
    with FakeTensorMode(), dispatch.record() as calls:
        teacher = [torch.empty(5000, device="cuda"), torch.empty(3, device="cuda")]
        op.ema_update(teacher, [t.clone() for t in teacher], 0.9)
    assert calls == [dispatch.Recorded("ema_update", "triton", [dispatch.Launch("ema_update_all", (4,))])]


def test_non_contiguous_gives_way_and_says_why() -> None:
    teacher, student = [torch.zeros(4, 6).t()], [torch.ones(6, 4)]
    op.ema_update(teacher, student, 0.5)
    assert torch.equal(teacher[0], torch.full((6, 4), 0.5))
    with pytest.raises(dispatch.BackendUnavailable, match="contiguous"):
        op.ema_update(teacher, student, 0.5, backend="triton")


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (([torch.zeros(2)], [torch.zeros(2)], 1.5), ValueError, "decay"),
        (([torch.zeros(2)], [], 0.5), ValueError, "student must have 1 tensors"),
        (([torch.zeros(2)], [torch.zeros(3)], 0.5), ValueError, r"student\[0\] must be \(2,\)"),
        (([torch.zeros(2).bfloat16()], [torch.zeros(2)], 0.5), TypeError, "teacher must be float32"),
        (([torch.zeros(2)], [torch.zeros(2).long()], 0.5), TypeError, "student must be of one floating-point dtype"),
        (([torch.zeros(2)] * 2, [torch.zeros(2), torch.zeros(2).bfloat16()], 0.5), TypeError, "student must be of one"),
        (([torch.zeros(2)], [torch.zeros(2)], 0.5, [torch.zeros(1)]), ValueError, r"copy_to\[0\]"),
    ],
)
def test_bad_input_says_what_came(call: tuple, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match="ema_update: " + match):
        op.ema_update(*call)

"""ops.feature_distance: every backend against plain sums in float64."""

from __future__ import annotations

import math
import weakref
from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from star_fast.ops import dispatch
from tests import contract
from tests.access_counting import count_accesses

op = import_module("star_fast.ops.feature_distance")
kernels = import_module("star_fast.ops.triton.feature_distance")
BACKENDS = ["reference", "triton"]


def call(rows: int, width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return {
        "student": 3 * torch.randn(rows, width, generator=generator),
        "teacher": torch.randn(rows, width, generator=generator),
    }


def plain_sums(student: Tensor, teacher: Tensor) -> tuple[float, list[list[float]]]:
    """Value and gradient by the formula, with Python numbers."""
    total, gradient = 0.0, []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        s_norm, t_norm = math.hypot(*s), math.hypot(*t)
        if s_norm < 1e-12 or t_norm < 1e-12:
            total += 1
            gradient.append([0.0] * len(s))
            continue
        cosine = math.fsum(a * b for a, b in zip(s, t, strict=True)) / s_norm / t_norm
        total += 1 - cosine
        gradient.append(
            [-(b / t_norm - cosine * a / s_norm) / s_norm / len(student) for a, b in zip(s, t, strict=True)]
        )
    return total / len(student), gradient


@pytest.mark.parametrize("backend", BACKENDS)
def test_against_plain_sums(backend: str) -> None:
    exact = {key: value.double() for key, value in call(9, 21).items()}
    exact["student"][2], exact["teacher"][3] = 0, 0
    exact["student"][4] *= 5e-13 / exact["student"][4].norm()  # too short
    exact["student"][5] *= 2e-12 / exact["student"][5].norm()  # just long enough
    exact["teacher"][6] = 2 * exact["student"][6]  # cosine 1
    exact["teacher"][7] = -exact["student"][7]
    value, gradient = plain_sums(**exact)
    exact["student"].requires_grad_()
    out = op.feature_distance(**exact, backend=backend)
    assert out.item() == pytest.approx(value, rel=1e-13)
    (got,) = torch.autograd.grad(out, [exact["student"]])
    truth = torch.tensor(gradient, dtype=torch.float64)
    for row, (a, b) in enumerate(zip(got, truth, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14, msg=lambda text, row=row: f"row {row}: {text}")
    assert not got[2:5].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 21), (1, 1), (3, 130), (33, 2)])
def test_error_rule(shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_ROWS", 16)
    contract.check_op(op, "triton", call(*shape), ("student",), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    contract.check_gradcheck(op, backend, call(3, 5), ("student",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_identical_zero_huge_and_tiny_vectors(backend: str, dtype: torch.dtype) -> None:
    x = torch.randn(5, 40).to(dtype)
    out, gradients = contract.run_with_gradients(
        lambda **kw: op.feature_distance(**kw, backend=backend), {"student": x, "teacher": x}, ("student",)
    )
    assert out.item() == pytest.approx(0, abs=1e-6)
    assert gradients["student"].abs().max() <= contract.FLOORS[dtype]
    zero = torch.zeros_like(x)
    for student, teacher in ((zero, x), (x, zero), (zero, zero)):
        out, gradients = contract.run_with_gradients(
            lambda **kw: op.feature_distance(**kw, backend=backend),
            {"student": student, "teacher": teacher},
            ("student",),
        )
        assert out.item() == 1 and not gradients["student"].any()
    for scale in (1e15, 1e-9):
        out = op.feature_distance(x * scale, -x, backend=backend)
        assert out.item() == pytest.approx(2, abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_teacher_gets_no_gradient_and_is_not_kept(backend: str) -> None:
    student, teacher = (x.requires_grad_() for x in call(4, 6).values())
    out = op.feature_distance(student, teacher, backend=backend)
    assert torch.autograd.grad(out, [student, teacher], allow_unused=True, retain_graph=True)[1] is None
    memory = weakref.ref(teacher)
    del teacher
    assert memory() is None
    out.backward()
    assert student.grad is not None and student.grad.any()


def test_strided_rows_and_same_bits() -> None:
    wide = {key: torch.randn(6, 100) for key in ("student", "teacher")}
    contract.check_op(op, "triton", {key: x[:, 10:40] for key, x in wide.items()}, ("student",), torch.float32)
    contract.check_op(op, "triton", {key: x.t() for key, x in wide.items()}, ("student",), torch.float32)
    for backend in BACKENDS:
        contract.check_same_bits(op, backend, wide, ("student",))


def test_triton_launches_and_does_nothing_that_is_not_asked_for() -> None:
    arguments = call(5, 12)
    with count_accesses() as launches:
        contract.run_with_gradients(lambda **kw: op.feature_distance(**kw, backend="triton"), arguments, ("student",))
    assert [launch.kernel for launch in launches] == ["feature_distance_forward", "feature_distance_backward"]
    with count_accesses() as launches, torch.no_grad():
        op.feature_distance(arguments["student"].requires_grad_(), arguments["teacher"], backend="triton")
    assert [launch.kernel for launch in launches] == ["feature_distance_forward"]
    assert launches[0].stored_bytes() == 5 * 4  # a distance a row, no gradient


def test_a_row_too_wide_for_registers_is_declined() -> None:
    with pytest.raises(dispatch.BackendUnavailable, match="a row of D = 16385 does not fit in registers"):
        op.feature_distance(torch.ones(1, 16385), torch.ones(1, 16385), backend="triton")


def test_fake_path_names_the_launch() -> None:
    with FakeTensorMode(), dispatch.record() as calls:
        x = torch.empty(10, 64, device="cuda", dtype=torch.bfloat16)
        out = op.feature_distance(x, x)
        assert out.shape == () and out.dtype == torch.float32 and out.device.type == "cuda"
    assert calls == [
        dispatch.Recorded("feature_distance", "triton", [dispatch.Launch("feature_distance_forward", (1,))])
    ]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (
            {"student": torch.zeros(2, 4, dtype=torch.int32)},
            TypeError,
            "student must be floating point, got torch.int32",
        ),
        (
            {"student": torch.zeros(2, 3, 4)},
            ValueError,
            r"student must be \(N, D\) with N, D >= 1, got shape \(2, 3, 4\)",
        ),
        (
            {"teacher": torch.zeros(3, 4)},
            ValueError,
            r"teacher must be \(2, 4\) torch.float32 on cpu like student, got \(3, 4\)",
        ),
        ({"teacher": torch.zeros(2, 4).double()}, ValueError, "like student, .*got .* torch.float64"),
        ({"teacher": torch.zeros(2, 4, device="meta")}, ValueError, "like student, .*on meta"),
    ],
)
def test_bad_input_says_what_came(change: dict[str, Tensor], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match="feature_distance: .*" + match):
        op.feature_distance(**{"student": torch.zeros(2, 4), "teacher": torch.zeros(2, 4), **change})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", ["unit", "XL"])
def test_on_a_gpu(preset: str, dtype: torch.dtype) -> None:
    contract.check_op(op, "triton", op.inputs(preset, dtype, "cuda"), ("student",), dtype)
    contract.check_same_bits(op, "triton", op.inputs(preset, dtype, "cuda"), ("student",))

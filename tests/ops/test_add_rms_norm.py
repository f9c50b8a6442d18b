"""ops.add_rms_norm: every backend against the float64 formula; the dropout mask against scalar arithmetic and
statistics.
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from star_fast.ops import dispatch
from tests import contract

op = import_module("star_fast.ops.add_rms_norm")


def arguments(shape: tuple[int, ...], residual: bool = True, dropout: float = 0.3, seed: int = 5) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(shape, generator=generator),
        "residual": 2 * torch.randn(shape, generator=generator) if residual else None,
        "weight": torch.randn(shape[-1], generator=generator),
        "dropout": dropout,
        "seed": seed,
    }


def wanted(call: dict[str, object]) -> tuple[str, ...]:
    return ("x", "weight") if call["residual"] is None else ("x", "residual", "weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 74), (1, 1), (2, 3, 130), (0, 8), (9, 300)])
def test_error_rule(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    call = arguments(shape)
    contract.check_op(op, "triton", call, wanted(call), dtype)


@pytest.mark.parametrize(("residual", "dropout"), [(False, 0.0), (False, 0.3), (True, 0.0)])
def test_without_residual_or_dropout(residual: bool, dropout: float) -> None:
    call = arguments((7, 40), residual, dropout)
    contract.check_op(op, "triton", call, wanted(call), torch.float32)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_gradcheck(backend: str) -> None:
    contract.check_gradcheck(op, backend, arguments((2, 3)), ("x", "residual", "weight"))


def test_many_rows_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    from star_fast.ops.triton import add_rms_norm as kernels

    monkeypatch.setattr(kernels, "ADD_RMS_NORM", kernels.ADD_RMS_NORM._replace(block=(4, 2, 3)))
    # Two rounds for three sums, two programs
    monkeypatch.setattr(kernels, "ADD_RMS_NORM_WEIGHT", kernels.ADD_RMS_NORM_WEIGHT._replace(block=(2, 16)))
    call = arguments((11, 20))
    contract.check_op(op, "triton", call, wanted(call), torch.float32)


def test_formula_against_scalar_arithmetic() -> None:
    call = arguments((3, 5), dropout=0.0)
    x, residual, weight = (call[name].double() for name in ("x", "residual", "weight"))
    normed, new_residual = op.reference(x, residual, weight, 1e-3)
    for i in range(3):
        h = [x[i, j].item() + residual[i, j].item() for j in range(5)]
        rms = math.sqrt(sum(value * value for value in h) / 5 + 1e-3)
        for j in range(5):
            assert new_residual[i, j].item() == pytest.approx(h[j], rel=1e-14)
            assert normed[i, j].item() == pytest.approx(h[j] / rms * weight[j].item(), rel=1e-13)


def test_bfloat16_rounds_before_the_weight_as_llamagen_does() -> None:
    call = {
        key: contract.cast(value, torch.bfloat16)
        for key, value in arguments((50, 64), residual=False, dropout=0.0).items()
    }
    x = call["x"].float()
    expected = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)).bfloat16() * call["weight"]
    assert torch.equal(op.add_rms_norm(**call)[0], expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_gradient_of_one_output_alone(backend: str) -> None:
    call = arguments((4, 12))
    for which in (0, 1):

        def one(*, backend: str | None = None, which: int = which, **kw: object) -> torch.Tensor:
            return op.add_rms_norm(**kw, backend=backend)[which] + 0 * sum(
                v.sum() for v in (kw["x"], kw["residual"], kw["weight"])
            )

        exact = {key: contract.cast(value, torch.float64) for key, value in call.items()}
        _, truth = contract.run_with_gradients(
            lambda one=one, **kw: one(**kw, backend="reference"), exact, wanted(call)
        )
        _, got = contract.run_with_gradients(lambda one=one, **kw: one(**kw, backend=backend), call, wanted(call))
        for name in wanted(call):
            torch.testing.assert_close(got[name].double(), truth[name], rtol=1e-5, atol=1e-5)


def test_strided_rows_and_same_bits() -> None:
    wide = torch.randn(6, 100, generator=torch.Generator().manual_seed(2))
    call = {**arguments((6, 30)), "x": wide[:, 10:40], "residual": wide[:, 60:90]}
    contract.check_op(op, "triton", call, wanted(call), torch.float32)
    call = {**arguments((9, 6)), "x": wide[:, :9].t(), "residual": wide[:, 9:18].t()}
    contract.check_op(op, "triton", call, wanted(call), torch.float32)
    contract.check_same_bits(op, "triton", arguments((5, 33)), ("x", "residual", "weight"))


def test_zero_rows_stay_zero_with_finite_gradients() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    for backend in ("reference", "triton"):
        normed, new_residual = op.add_rms_norm(x, torch.zeros(2, 8), torch.ones(8), dropout=0.5, backend=backend)
        assert not normed.any() and not new_residual.any()
        (gradient,) = torch.autograd.grad(normed.sum(), x)
        assert torch.isfinite(gradient).all()


def lowbias32(x: int) -> int:
    """Chris Wellons' hash on Python integers."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_mask_against_python_integers(seed: int) -> None:
    row_key, column_key = (key % 2**32 for key in op.keys(seed))
    expected = [
        [
            int(
                lowbias32((lowbias32(r ^ row_key) + lowbias32(c ^ column_key)) % 2**32) ^ 0x80000000
                < round(0.7 * 2**32)
            )
            for c in range(9)
        ]
        for r in range(40)
    ]
    assert op.kept(40, 9, 0.3, seed).tolist() == expected


def test_mask_is_the_same_on_every_backend_and_in_backward() -> None:
    x = torch.ones(37, 70, requires_grad=True)
    expected = op.kept(37, 70, 0.25, 99) != 0
    for backend in ("reference", "triton"):
        _, new_residual = op.add_rms_norm(x, None, torch.ones(70), dropout=0.25, seed=99, backend=backend)
        (gradient,) = torch.autograd.grad(new_residual.sum(), x)
        assert torch.equal(new_residual != 0, expected) and torch.equal(gradient != 0, expected)
        torch.testing.assert_close(new_residual[expected], torch.full_like(new_residual[expected], 4 / 3))


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_mask_statistics(dropout: float) -> None:
    """Each count below is binomial: within 5 standard deviations, for this fixed set of seeds."""
    masks = torch.stack([op.kept(256, 192, dropout, seed) for seed in (0, 1, 2, 3, 2**32, 2**32 + 1, 2**62)]).double()
    centred = (masks - (1 - dropout)) / math.sqrt(dropout * (1 - dropout))  # mean 0, variance 1
    numbers = masks[0].numel()
    assert (centred.mean((1, 2)) * math.sqrt(numbers)).abs().max() < 5, "share kept"
    for sums, count in ((centred.sum(2), 192), (centred.sum(1), 256)):  # chi-square over rows, over columns
        degrees = sums[0].numel()
        chi_square = (sums.square() / count).sum(1)
        assert (
            (chi_square - degrees).abs()
            < 5 * math.sqrt(2 * degrees + (1 / (dropout * (1 - dropout)) - 4) * degrees / count)
        ).all()
    between_seeds = torch.einsum("srd,trd->st", centred, centred) / math.sqrt(numbers)
    assert (between_seeds - torch.diag(between_seeds.diag())).abs().max() < 5, "neighbouring seeds"
    for shift, axis in ((1, 0), (1, 1), (2, 1), (64, 1)):
        along = (centred * centred.roll(shift, dims=axis + 1)).sum((1, 2)) / math.sqrt(numbers)
        assert along.abs().max() < 5, f"neighbours at distance {shift} along axis {axis}"
    # Any two rows, and any two columns, agree as often as chance has it.
    for flat, count in ((centred[0], 192), (centred[0].T, 256)):
        pairs = (flat @ flat.T / math.sqrt(count)).fill_diagonal_(0)
        assert pairs.abs().max() < 7


def test_extreme_dropout() -> None:
    assert op.kept(100, 100, 1e-12, 0).all()
    assert not op.kept(100, 100, 1 - 1e-12, 0).any()


def test_fake_path_names_the_launch() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), dispatch.record() as calls:
        x = torch.empty(10, 64, device="cuda", dtype=torch.bfloat16)
        normed, new_residual = op.add_rms_norm(x, x, torch.empty(64, device="cuda", dtype=torch.bfloat16), dropout=0.1)
        assert (
            normed.shape == new_residual.shape == x.shape and normed.dtype == x.dtype and normed.device.type == "cuda"
        )
    assert calls == [dispatch.Recorded("add_rms_norm", "triton", [dispatch.Launch("add_rms_norm_forward", (1,))])]


@pytest.mark.parametrize("rows", [1, 16384])
def test_backward_is_two_launches_and_nothing_of_torch(rows: int) -> None:
    """No memset before the kernel, no sum and no cast after it."""
    with FakeTensorMode(), dispatch.note_launches() as launches:
        x, weight = (
            torch.empty(rows, 64, dtype=torch.bfloat16, requires_grad=True),
            torch.empty(64, dtype=torch.bfloat16, requires_grad=True),
        )
        outs = op.add_rms_norm(x, x, weight, dropout=0.1, backend="triton")
        del launches[:]
        with Seen() as seen:
            gradients = torch.autograd.grad(outs, (x, weight), [torch.empty_like(out) for out in outs])
    assert [launch.kernel for launch in launches] == ["add_rms_norm_backward", "add_rms_norm_weight"]
    assert {gradient.dtype for gradient in gradients} == {torch.bfloat16}
    launch_nothing = {"view", "_unsafe_view", "detach", "device", "promote_types", "empty", "empty_like", "new_empty"}
    assert seen.names - launch_nothing == {"add"}, "of the gradients of x as x and as residual, by autograd"


class Seen(TorchDispatchMode):
    """Names of the torch operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.zeros(2, 4, dtype=torch.int32)}, TypeError, "x must be floating point"),
        ({"x": torch.zeros(2, 0)}, ValueError, r"x must be \(\.\.\., D\)"),
        ({"residual": torch.zeros(3, 4)}, ValueError, r"residual must be \(2, 4\) on cpu, got \(3, 4\)"),
        ({"residual": torch.zeros(2, 4).double()}, TypeError, "residual must have x's dtype"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight must be \(4,\)"),
        ({"eps": 0.0}, ValueError, "eps"),
        ({"dropout": 1.0}, ValueError, "dropout"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 0.5}, ValueError, "seed"),
    ],
)
def test_bad_input_says_what_came(change: dict[str, object], error: type[Exception], match: str) -> None:
    call = {"x": torch.zeros(2, 4), "residual": torch.zeros(2, 4), "weight": torch.zeros(4), **change}
    with pytest.raises(error, match="add_rms_norm: .*" + match):
        op.add_rms_norm(**call)


def test_cost_counts_each_tensor_once() -> None:
    call = op.inputs("unit", torch.bfloat16)
    rows, width = call["x"].shape
    assert op.cost(call).bytes_moved == 2 * (4 * rows * width + width)
    assert op.cost(call, backward=True).bytes_moved == 2 * (5 * rows * width + 2 * width)
    assert op.cost({**call, "residual": None, "dropout": 0.0}).bytes_moved == 2 * (2 * rows * width + width)

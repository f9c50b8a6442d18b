"""ops.slot_contrast: every backend against plain sums over pairs, images and keys in float64."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from star_fast.ops import dispatch, error_flag
from tests import contract
from tests.access_counting import count_accesses
from tests.ops.slots import PAIRS, call, unit

op = import_module("star_fast.ops.slot_contrast")
kernels = import_module("star_fast.ops.triton.slot_contrast")
BACKENDS = ["reference", "triton"]


def plain_sums(
    anchor: Tensor, key: Tensor, pairs: Tensor, temperature: float, row_offset: int
) -> tuple[list[float], Tensor]:
    """Each pair's value, and the derivative of their sum by the anchors, by the formulas, with Python numbers."""
    z, k = ([[unit(vector) for vector in slot] for slot in x.tolist()] for x in (anchor, key))
    values, dz = [], torch.zeros(anchor.shape, dtype=torch.float64)
    for a, s in pairs.tolist():
        value = 0.0
        for b in range(anchor.shape[1]):
            logits = [math.fsum(x * y for x, y in zip(z[a][b], vector, strict=True)) / temperature for vector in k[s]]
            top = max(logits)
            weights = [math.exp(x - top) for x in logits]
            value += math.log(math.fsum(weights)) + top - logits[row_offset + b]
            for c, weight in enumerate(weights):
                share = (weight / math.fsum(weights) - (c == row_offset + b)) / temperature / anchor.shape[1]
                dz[a, b] += share * torch.tensor(k[s][c], dtype=torch.float64)
        values.append(value / anchor.shape[1])
    z = torch.tensor(z, dtype=torch.float64)
    norm = anchor.double().norm(dim=-1, keepdim=True)
    projected = (dz - z * (z * dz).sum(-1, keepdim=True)) / norm
    return values, torch.where(norm < 1e-12, 0.0, projected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_against_plain_sums(backend: str) -> None:
    exact = {key: contract.cast(value, torch.float64) for key, value in call(5, 39, 6, row_offset=30).items()}
    exact["anchor"][2, 1], exact["key"][0, 3], exact["key"][1, 31] = 0, 0, 0  # an anchor, a negative, a positive
    exact["anchor"][2, 2] *= 5e-13 / exact["anchor"][2, 2].norm()  # too short
    values, gradient = plain_sums(**exact)
    exact["anchor"].requires_grad_()
    out = op.slot_contrast(**exact, reduction="pair", backend=backend)
    torch.testing.assert_close(out.detach(), torch.tensor(values, dtype=torch.float64), rtol=1e-12, atol=0)
    (got,) = torch.autograd.grad(out.sum(), [exact["anchor"]])
    torch.testing.assert_close(got, gradient, rtol=1e-10, atol=1e-14)
    assert not got[1].any() and not got[2, 1:3].any()
    mean = op.slot_contrast(**exact, backend=backend)
    assert mean.item() == pytest.approx(math.fsum(values) / 4, rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(mean, [exact["anchor"]])[0], gradient / 4, rtol=1e-10, atol=1e-14)


# Tiles are 16 rows, 32 keys and 128 columns of gradient in float32; 32, 64 and 256 in bfloat16.
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((5, 70, 21, 61), torch.float32),
        ((5, 70, 21, 61), torch.bfloat16),
        ((17, 33, 130, 9), torch.float32),
        ((33, 65, 520, 32), torch.bfloat16),
        ((1, 1, 1, 0), torch.float32),
        ((1, 1, 1, 0), torch.bfloat16),
    ],
)
@pytest.mark.parametrize("reduction", ["mean", "pair"])
def test_error_rule(shape: tuple[int, int, int, int], dtype: torch.dtype, reduction: str) -> None:
    contract.check_op(op, "triton", call(*shape, reduction=reduction), ("anchor",), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_gradients_of_a_learnt_batch_keep_their_digits(dtype: torch.dtype) -> None:
    """Positives with 99.9 % of the softmax: the gradient is a thousandth of the single pulls that make it up."""
    key = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    arguments = call(
        4,
        9,
        64,
        key=key,
        anchor=key[[0, 1, 1], 2:6],
        pairs=torch.tensor([[0, 0], [1, 1]]),
        row_offset=2,
        temperature=0.08,
    )
    assert op.slot_contrast(**arguments, backend="reference") < 2e-3
    contract.check_op(op, "triton", arguments, ("anchor",), dtype)


@pytest.mark.parametrize("reduction", ["mean", "pair"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str, reduction: str) -> None:
    contract.check_gradcheck(op, backend, call(1, 3, 2, row_offset=1, reduction=reduction), ("anchor",))


def test_the_reference_in_chunks_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = call(4, 6, 5)
    whole = op.slot_contrast(**arguments, reduction="pair", backend="reference")
    monkeypatch.setattr(op, "_SIMILARITY_BYTES", 3 * 4 * 4 * 6)
    torch.testing.assert_close(
        op.slot_contrast(**arguments, reduction="pair", backend="reference"), whole, rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_degenerate_inputs(backend: str, dtype: torch.dtype) -> None:
    def run(**change: Any) -> tuple[Tensor, Tensor]:
        arguments = {
            key: contract.cast(value, dtype) for key, value in {**call(4, 9, 8, reduction="pair"), **change}.items()
        }
        out, gradients = contract.run_with_gradients(
            lambda **kw: op.slot_contrast(**kw, backend=backend), arguments, ("anchor",)
        )
        assert out.isfinite().all() and gradients["anchor"].isfinite().all()
        return out, gradients["anchor"]

    one = torch.randn(1, 1, 8)
    out, gradient = run(anchor=one.expand(3, 4, 8), key=one.expand(2, 9, 8))  # every image alike
    torch.testing.assert_close(out, torch.full((4,), math.log(9)), rtol=1e-5, atol=0)
    # Zero up to rounding; a single key's pull would be 5 / |anchor|
    assert gradient.abs().max() < 1e-2 * 5 / one.norm()
    out, gradient = run(anchor=torch.zeros(3, 4, 8))
    torch.testing.assert_close(out, torch.full((4,), math.log(9)), rtol=1e-5, atol=0)
    assert not gradient.any()
    out, gradient = run(key=torch.zeros(2, 9, 8))
    torch.testing.assert_close(out, torch.full((4,), math.log(9)), rtol=1e-5, atol=0)
    assert not gradient.any()
    out, gradient = run(anchor=one.expand(3, 1, 8), key=one.expand(2, 1, 8))  # one image: no negative
    assert out.abs().max() < 1e-5 and gradient.abs().max() < 1e-2
    for temperature in (0.005, 50):
        run(temperature=temperature)
    key = torch.randn(2, 9, 8)
    out, _ = run(anchor=key[[0, 0, 0], 3:7], key=key[[0, 0]], row_offset=3, temperature=0.005)  # each its own positive
    assert out.max() < 1e-3
    run(anchor=1e-7 * torch.randn(3, 4, 8), key=1e6 * torch.randn(2, 9, 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_same_bits(backend: str) -> None:
    arguments = call(4, 9, 8)
    arguments["anchor"] = torch.randn(4, 8, 3).permute(2, 0, 1)
    arguments["key"] = torch.randn(9, 2, 16).transpose(0, 1)[:, :, :8]  # images first, as gathered
    arguments["pairs"] = torch.stack((PAIRS[:, 0], PAIRS[:, 1])).t()
    contract.check_op(op, backend, arguments, ("anchor",), torch.float32)
    contract.check_same_bits(op, backend, arguments, ("anchor",))


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_get_no_gradient(backend: str) -> None:
    arguments = call(2, 3, 4)
    leaves = [arguments[name].requires_grad_() for name in ("anchor", "key")]
    gradients = torch.autograd.grad(op.slot_contrast(**arguments, backend=backend), leaves, allow_unused=True)
    assert gradients[0].any() and gradients[1] is None


def test_triton_launches_twice_and_makes_no_gradient_unasked() -> None:
    arguments = call(4, 9, 130)
    with count_accesses() as launches:
        contract.run_with_gradients(
            lambda **kw: op.slot_contrast(**kw, reduction="pair", backend="triton"), arguments, ("anchor",)
        )
    assert [launch.kernel for launch in launches] == ["slot_contrast_forward", "slot_contrast_backward"]
    with count_accesses() as launches, torch.no_grad():
        arguments["anchor"].requires_grad_()
        op.slot_contrast(**arguments, backend="triton")
    assert [launch.kernel for launch in launches] == ["slot_contrast_forward"]
    assert launches[0].stored_bytes() == 4 * 4 * 4  # a loss a pair and row: neither similarities nor gradient


def test_a_slot_out_of_range_sets_the_error_flag() -> None:
    """What CUDA tensors meet, whose values the host does not read."""
    arguments = call(2, 3, 4)
    for bad in ([3, 0], [-1, 0], [0, 2], [0, -1]):
        kernels.run(**{**arguments, "pairs": torch.tensor([[0, 0], bad])})
        with pytest.raises(IndexError, match="named a slot outside"):
            error_flag.raise_if_set(arguments["anchor"].device)
    kernels.run(**arguments)
    error_flag.raise_if_set(arguments["anchor"].device)


def test_fake_path_names_the_launch() -> None:
    with FakeTensorMode(), dispatch.record() as calls:
        anchor, key = (
            torch.empty(8, n, 1280, device="cuda", dtype=torch.bfloat16, requires_grad=n == 33) for n in (33, 256)
        )
        pairs = torch.empty(32, 2, device="cuda", dtype=torch.int64)
        for reduction, shape in (("mean", ()), ("pair", (32,))):
            out = op.slot_contrast(anchor, key, pairs, 0.2, 33, reduction=reduction)
            assert out.shape == shape and out.dtype == torch.float32 and out.device.type == "cuda"
    assert (
        calls
        == [dispatch.Recorded("slot_contrast", "triton", [dispatch.Launch("slot_contrast_forward", (2, 32, 5))])] * 2
    )


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (
            {"anchor": torch.zeros(3, 2, 4, dtype=torch.int64)},
            TypeError,
            "anchor must be floating point, got torch.int64",
        ),
        (
            {"anchor": torch.zeros(2, 4)},
            ValueError,
            r"anchor must be \(S, B, D\) with S, B, D >= 1, got shape \(2, 4\)",
        ),
        (
            {"key": torch.zeros(2, 3, 5)},
            ValueError,
            r"key must be \(S', B_all, D\) with D = 4 like anchor, got shape \(2, 3, 5\)",
        ),
        (
            {"key": torch.zeros(2, 3, 4).double()},
            ValueError,
            "key must be torch.float32 on cpu like anchor, got torch.float64",
        ),
        ({"pairs": torch.zeros(4, 2)}, TypeError, "pairs must be int64"),
        (
            {"pairs": torch.zeros(0, 2, dtype=torch.int64)},
            ValueError,
            r"pairs must be \(P, 2\) with P >= 1 on cpu like anchor, got \(0, 2\)",
        ),
        (
            {"pairs": torch.tensor([[3, 0]])},
            ValueError,
            r"pairs\[:, 0\] must name anchor slots 0 \.\.\. 2, got values from 3 to 3",
        ),
        (
            {"pairs": torch.tensor([[0, 0], [0, -1]])},
            ValueError,
            r"pairs\[:, 1\] must name key slots 0 \.\.\. 1, got values from -1 to 0",
        ),
        ({"temperature": torch.tensor(0.2)}, TypeError, "temperature must be a Python number, got Tensor"),
        ({"temperature": 0}, ValueError, "temperature must be finite and > 0, got 0"),
        ({"temperature": math.nan}, ValueError, "temperature must be finite and > 0, got nan"),
        ({"row_offset": 1.0}, TypeError, "row_offset must be an int, got float"),
        ({"row_offset": 2}, ValueError, r"row_offset must be in 0 \.\.\. B_all - B = 3 - 2, .*got 2"),
        ({"row_offset": -1}, ValueError, "row_offset must be in .*got -1"),
        ({"reduction": "sum"}, ValueError, "reduction must be 'mean' or 'pair', got 'sum'"),
    ],
)
def test_bad_input_says_what_came(change: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match="slot_contrast: .*" + match):
        op.slot_contrast(**{**call(2, 3, 4), **change})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", ["unit", "XL"])
def test_on_a_gpu(preset: str, dtype: torch.dtype) -> None:
    arguments = op.inputs(preset, dtype, "cuda")
    contract.check_op(op, "triton", arguments, ("anchor",), dtype)
    contract.check_same_bits(op, "triton", arguments, ("anchor",))
    width = arguments["anchor"].shape[2]
    many = torch.randn(arguments["key"].shape[0], 5000, width, generator=torch.Generator().manual_seed(1)).to(
        "cuda", dtype
    )
    contract.check_op(
        op, "triton", {**arguments, "key": many, "row_offset": 4001, "reduction": "pair"}, ("anchor",), dtype
    )

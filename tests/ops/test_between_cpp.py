"""The compiled CPU backends of add_rms_norm and swiglu: what they serve meets the error rule, what they do not serve
goes elsewhere.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from star_fast.ops import dispatch
from tests import contract

norm = importlib.import_module("star_fast.ops.add_rms_norm")
gate = importlib.import_module("star_fast.ops.swiglu")
try:
    importlib.import_module("star_fast.ops.between_cpp")
except ImportError as error:
    pytest.skip(f"star_fast._C is not built, or older: {error}", allow_module_level=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 768), (1, 16), (7, 1280), (130, 96)])
def test_error_rule(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual = 3 * torch.randn(2, *shape, generator=generator)
    weight = 1 + 0.1 * torch.randn(shape[1], generator=generator)
    contract.check_op(gate, "cpp", {"w1w3": torch.cat([x, residual], dim=1)}, (), dtype)
    for given in (residual, None):
        call = {
            name: contract.cast(value, dtype) for name, value in {"x": x, "residual": given, "weight": weight}.items()
        }
        truth = norm.reference(**{name: contract.cast(value, torch.float64) for name, value in call.items()})
        for what, got, same, exact in zip(
            ("normed", "sum"), norm.add_rms_norm(**call, backend="cpp"), norm.reference(**call), truth, strict=True
        ):
            assert got.dtype == dtype
            contract.assert_error_rule(f"add_rms_norm [cpp, {dtype}] {what}", got, same, exact)


def test_extremes_and_same_bits_on_any_number_of_threads() -> None:
    x = torch.tensor([1e4, -1e4, 88.0, -88.0, 1e-30, 0.0, 5.0, -5.0]).repeat(2)[None]
    call = {"w1w3": torch.cat([x, torch.ones_like(x)], dim=1)}
    contract.check_op(gate, "cpp", call, (), torch.float32)
    assert gate.swiglu(torch.full((1, 32), float("nan")), backend="cpp").isnan().all()
    assert norm.add_rms_norm(torch.full((1, 16), float("nan")), None, torch.ones(16), backend="cpp")[0].isnan().all()
    rows = torch.randn(500, 768)
    first = norm.add_rms_norm(rows, rows, rows[0], backend="cpp")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        second = norm.add_rms_norm(rows, rows, rows[0], backend="cpp")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_is_not_served_goes_elsewhere() -> None:
    weight = torch.ones(16)
    for arguments, reason in (
        ((torch.zeros(2, 16, dtype=torch.float64), None, weight.double()), "float32 or bfloat16"),
        ((torch.zeros(2, 10), None, torch.ones(10)), "multiple of 16"),
        ((torch.zeros(0, 16), None, weight), "rows"),
    ):
        with pytest.raises(dispatch.BackendUnavailable, match=reason):
            norm.add_rms_norm(*arguments, backend="cpp")
        norm.add_rms_norm(*arguments)  # chosen automatically, another backend takes it
    with pytest.raises(dispatch.BackendUnavailable, match="multiple of 16"):
        gate.swiglu(torch.zeros(2, 10), backend="cpp")


def _norm_call(shape: tuple[int, ...], dropout: float = 0.3) -> dict:
    x, residual = 3 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    return {
        "x": x,
        "residual": residual,
        "weight": 1 + 0.1 * torch.randn(shape[-1], generator=torch.Generator().manual_seed(1)),
        "dropout": dropout,
        "seed": 2**62 + 12345,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 48), (130, 96), (1, 16), (3, 64, 768)])
def test_gradients_and_dropout_meet_the_error_rule(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for dropout in (0.0, 0.3):
        call = _norm_call(shape, dropout)
        contract.check_op(norm, "cpp", call, ("x", "residual", "weight"), dtype)
        contract.check_op(norm, "cpp", call, ("residual",), dtype)
        contract.check_op(norm, "cpp", call | {"residual": None}, ("x", "weight"), dtype)
    contract.check_op(gate, "cpp", {"w1w3": torch.cat([call["x"], call["residual"]], dim=-1)}, ("w1w3",), dtype)
    contract.check_op(
        gate, "cpp", {"w1w3": torch.cat([call["x"], call["residual"]], dim=-1).transpose(0, -2)}, ("w1w3",), dtype
    )


def test_the_mask_is_the_one_of_every_backend() -> None:
    x = torch.ones(300, 96)
    for seed in (0, 1, 2**63 - 1):
        _, kept = norm.add_rms_norm(x, torch.zeros_like(x), torch.ones(96), dropout=0.4, seed=seed, backend="cpp")
        torch.testing.assert_close((kept > 0).int(), norm.kept(300, 96, 0.4, seed), rtol=0, atol=0)


def test_gradients_are_the_same_bits_on_any_number_of_threads() -> None:
    call = _norm_call((500, 768))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(
                contract.run_with_gradients(
                    lambda **kw: norm.add_rms_norm(**kw, backend="cpp"), call, ("x", "residual", "weight")
                )[1]
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in found[0])


def test_only_inputs_are_kept_for_backward() -> None:
    """Memory: nothing of float32 size waits for backward."""
    kept: list[tuple[int, ...]] = []
    call = {
        name: value.bfloat16().requires_grad_() if isinstance(value, torch.Tensor) else value
        for name, value in _norm_call((64, 96)).items()
    }
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append((*t.shape, t.element_size())) or t, lambda t: t
    ):
        _, stream = norm.add_rms_norm(**call, backend="cpp")
        gate.swiglu(stream, backend="cpp")
    assert sorted(kept) == sorted([(64, 96, 2), (96, 2), (64, 96, 2)])

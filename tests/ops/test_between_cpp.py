"""The compiled CPU backends of add_rms_norm and swiglu: what they serve meets the error rule, what they do not serve goes elsewhere."""

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
        call = {name: contract.cast(value, dtype) for name, value in {"x": x, "residual": given, "weight": weight}.items()}
        truth = norm.reference(**{name: contract.cast(value, torch.float64) for name, value in call.items()})
        for what, got, same, exact in zip(("normed", "sum"), norm.add_rms_norm(**call, backend="cpp"), norm.reference(**call), truth, strict=True):
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


def test_only_decoding_rows_without_gradient_are_served() -> None:
    weight = torch.ones(16)
    for arguments, reason in (((torch.zeros(2, 3, 16), None, weight), "rows"), ((torch.zeros(2, 16), None, weight.requires_grad_()), "no gradient"),
                              ((torch.zeros(2, 16, dtype=torch.float64), None, weight.detach().double()), "float32 or bfloat16")):
        with pytest.raises(dispatch.BackendUnavailable, match=reason):
            norm.add_rms_norm(*arguments, backend="cpp")
        norm.add_rms_norm(*arguments)  # chosen automatically, another backend takes it
    with pytest.raises(dispatch.BackendUnavailable, match="no dropout"):
        norm.add_rms_norm(torch.zeros(2, 16), None, weight.detach(), dropout=0.1, backend="cpp")
    with pytest.raises(dispatch.BackendUnavailable, match="multiple of 16"):
        gate.swiglu(torch.zeros(2, 10), backend="cpp")

"""ops.swiglu: every backend against the float64 formula."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from tests import contract

op = import_module("star_fast.ops.swiglu")

SHAPES = [(5, 74), (1, 2), (3, 7, 130), (2, 2048 + 6), (0, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_rule(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    contract.check_op(op, "triton", {"w1w3": 3 * torch.randn(shape, generator=generator)}, ("w1w3",), dtype)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_gradcheck(backend: str) -> None:
    contract.check_gradcheck(op, backend, {"w1w3": torch.randn(2, 3, 10)}, ("w1w3",))


def test_formula_against_scalar_arithmetic() -> None:
    import math

    x = torch.randn(3, 8, dtype=torch.float64)
    expected = [
        [x[i, j].item() / (1 + math.exp(-x[i, j].item())) * x[i, 4 + j].item() for j in range(4)] for i in range(3)
    ]
    torch.testing.assert_close(op.reference(x), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_strided_rows_and_same_bits() -> None:
    wide = torch.randn(6, 100)
    contract.check_op(op, "triton", {"w1w3": wide[:, 10:40]}, ("w1w3",), torch.float32)
    contract.check_op(op, "triton", {"w1w3": wide.t()}, ("w1w3",), torch.float32)
    contract.check_same_bits(op, "triton", {"w1w3": wide}, ("w1w3",))


def test_huge_gates_stay_finite() -> None:
    x = torch.tensor([[1e4, -1e4, 80.0, -80.0, 1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(op.swiglu(x, backend="triton"), op.reference(x))


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (torch.zeros(2, 3), ValueError),
        (torch.zeros(2, 0), ValueError),
        (torch.zeros(2, 4, dtype=torch.int64), TypeError),
    ],
)
def test_bad_input_says_what_came(bad: torch.Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="swiglu: w1w3 must be"):
        op.swiglu(bad)

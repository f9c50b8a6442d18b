"""The 8-bit product against loops over whole numbers, bit for bit, on every instruction set that PyTorch can be lowered
to; its bound; rows kept apart.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from star_fast.ops import dispatch
from star_fast.ops.int8_linear import Int8Weight, int8_linear

ROOT = Path(__file__).resolve().parents[2]
# (R, N, K)
SIZES = [(1, 1, 1), (1, 37, 33), (3, 16, 64), (8, 17, 65), (9, 48, 130), (17, 33, 100), (33, 31, 300), (47, 49, 512)]
BACKENDS = ["cpp", "reference"]


def made(
    rows: int, columns: int, inner: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """x (R, K) and a matrix (N, K), with a few entries far larger than the rest."""
    generator = torch.Generator().manual_seed(seed + rows * columns * inner)
    x, weight = torch.randn(rows, inner, generator=generator), torch.randn(columns, inner, generator=generator)
    x[:, inner // 2] *= 7
    return x.to(dtype), weight.to(dtype)


def rotated_row(row: np.ndarray) -> np.ndarray:
    """Sums and differences of parts of 16 at distance 1, 2, 4, 8 in every 256 entries, in float32."""
    parts = np.pad(row, (0, -len(row) % 256)).reshape(-1, 16, 16).copy()
    for distance in (1, 2, 4, 8):
        for part in range(16):
            if part & distance == 0:
                first, second = parts[:, part].copy(), parts[:, part + distance].copy()
                parts[:, part], parts[:, part + distance] = first + second, first - second
    return parts.reshape(-1)


def code_row(row: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """One rotated row's codes and its scale, in the float32 steps that the docstring names."""
    most = np.abs(row).max()
    inverse = np.float32(127) / most
    # Python's round: ties to even
    return np.array([round(float(entry * inverse)) for entry in row]), most / np.float32(127)


def by_loops(x: Tensor, weight: Tensor) -> Tensor:
    """The product with whole numbers of 64 bits for sums, in x's dtype."""
    rows, columns = (
        [code_row(rotated_row(row) / np.float32(size)) for row in matrix.float().numpy()]
        for matrix, size in ((x, 1), (weight, 16))
    )
    found = [
        [np.float32(int(codes @ others)) * column_scale * scale for others, column_scale in columns]
        for codes, scale in rows
    ]
    return torch.tensor(np.array(found, dtype=np.float32)).to(x.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_loops_bit_for_bit(size: tuple[int, int, int], dtype: torch.dtype, backend: str) -> None:
    x, weight = made(*size, dtype)
    got = int8_linear(x, Int8Weight(weight), backend=backend)
    assert got.dtype == dtype and torch.equal(got, by_loops(x, weight))


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_bits(capability: str) -> None:
    """In a process of its own, since the choice is made once; what the machine does not have PyTorch refuses and takes
    its own.
    """
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    code = (
        "import torch\nfrom tests.ops.test_int8_linear import SIZES, by_loops, made\nfrom "
        "star_fast.ops.int8_linear import Int8Weight, int8_linear\n"
        "for size in SIZES:\n    for dtype in (torch.float32, torch.bfloat16):\n        x, weight = made(*size, "
        "dtype)\n"
        "        assert torch.equal(int8_linear(x, Int8Weight(weight), backend='cpp'), by_loops(x, weight)), "
        "(size, dtype)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_largest_sums_do_not_overflow(backend: str) -> None:
    """Every code at its end: sums of two 16-bit halves, as processors without 8-bit dot products make them, would run
    over.
    """
    first = (torch.arange(4096) % 256 < 16).float()  # rotated: 1 everywhere
    x, weight = first.repeat(5, 1), first.repeat(20, 1)
    x[1] *= -1
    weight[3] *= -1
    got = int8_linear(x, Int8Weight(weight), backend=backend)
    expected = np.float32(4096 * 127 * 127) * (np.float32(1 / 16) / np.float32(127)) * (np.float32(1) / np.float32(127))
    signs = torch.ones(5, 20)
    signs[1] *= -1
    signs[:, 3] *= -1
    assert torch.equal(got, signs * float(expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_error_is_within_half_a_step_of_both_roundings(backend: str) -> None:
    x, weight = made(21, 50, 300)
    got = int8_linear(x, Int8Weight(weight), backend=backend).double()
    exact = x.double() @ weight.double().t()
    hadamard = torch.tensor(
        [[(-1.0) ** (i & j).bit_count() for j in range(16)] for i in range(16)], dtype=torch.float64
    )
    x, weight = (
        torch.einsum(
            "rgpl,pq->rgql", torch.nn.functional.pad(matrix.double(), (0, 212)).view(-1, 2, 16, 16), hadamard
        ).reshape(-1, 512)
        for matrix in (x, weight / 16)
    )
    assert torch.allclose(x @ weight.t(), exact, rtol=0, atol=1e-6)
    x_half, weight_half = x.abs().amax(1, keepdim=True) / 254, weight.abs().amax(1, keepdim=True) / 254
    bound = (
        x.abs().sum(1, keepdim=True) * weight_half.t()
        + x_half * weight.abs().sum(1)
        + 512 * x_half * weight_half.t()
        + 1e-6 * exact.abs()
    )
    error = (got - exact).abs()
    assert bool((error <= bound * (1 + 1e-5)).all()) and 0.002 < float((got - exact).norm() / exact.norm()) < 0.03


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_depends_on_no_other(backend: str) -> None:
    x, weight = made(64, 80, 200, torch.bfloat16)
    packed = Int8Weight(weight)
    together = int8_linear(x, packed, backend=backend)
    for row in (0, 15, 16, 31, 63):
        assert torch.equal(int8_linear(x[row : row + 1], packed, backend=backend)[0], together[row])
    others = x.clone()
    others[1:] *= 1000
    assert torch.equal(int8_linear(others, packed, backend=backend)[0], together[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_nan_whole_and_others_are_not(bad: float, backend: str) -> None:
    for dtype, inner, where in ((torch.float32, 70, 69), (torch.bfloat16, 128, 3)):
        x, weight = made(5, 18, inner, dtype)
        expected = by_loops(x, weight)
        x[2, where] = bad
        got = int8_linear(x, Int8Weight(weight), backend=backend)
        assert bool(got[2].isnan().all())
        assert torch.equal(got[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_and_columns_of_zeros_and_of_next_to_nothing(backend: str) -> None:
    x, weight = made(4, 19, 90)
    expected = by_loops(x, weight)
    x[1] = 0
    x[2] = 1e-40  # no scale: 127 / 1e-40 is infinite
    weight[5] = 0
    got = int8_linear(x, Int8Weight(weight), backend=backend)
    expected[1:3] = 0
    expected[:, 5] = 0
    assert torch.equal(got, expected)


def test_packed_weights_are_codes_and_nothing_beside_them() -> None:
    _, weight = made(1, 100, 200)
    packed = Int8Weight(weight)
    bytes_kept = sum(value.untyped_storage().nbytes() for value in vars(packed).values() if isinstance(value, Tensor))
    assert bytes_kept == 112 * 256 + 2 * 4 * 112
    for row, codes in zip(weight.numpy(), packed.codes(), strict=True):
        assert codes.tolist() == code_row(rotated_row(row) / 16)[0].tolist()


def test_any_strides() -> None:
    x, weight = made(6, 40, 64)
    wide = torch.full((6, 100), 1e6)
    wide[:, 10:74] = x
    assert torch.equal(int8_linear(wide[:, 10:74], Int8Weight(weight)), by_loops(x, weight))


def test_what_makes_no_sense_says_so() -> None:
    x, weight = made(2, 16, 32)
    packed = Int8Weight(weight)
    with pytest.raises(TypeError, match=r"must be float32 or bfloat16, got torch\.float64"):
        int8_linear(x.double(), packed)
    for wrong in (x[:, :31], x[0], x[:0]):
        with pytest.raises(ValueError, match=r"x must be \(R, 32\)"):
            int8_linear(wrong, packed)
    weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        Int8Weight(weight)
    with pytest.raises(ValueError, match=r"expected \(N, K\) with K <= 65536"):
        Int8Weight(torch.zeros(1, 65537))
    with pytest.raises(dispatch.BackendUnavailable, match="no backend 'triton'"):
        int8_linear(x, packed, backend="triton")

"""ops.decode_attention: every step against full attention and float64 loops, the cache's contents, the 8-bit caches,
the error flag.
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from star_fast.ops import dispatch, error_flag
from star_fast.ops.masked_attention import masked_attention_qkv
from star_fast.ops.rotary import random_table
from tests import contract
from tests.access_counting import count_accesses

op = import_module("star_fast.ops.decode_attention")
interpreted = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="runs the kernel on CPU tensors, in Triton's interpreter"
)
BACKENDS = ["reference", pytest.param("triton", marks=interpreted)]
CPU = torch.device("cpu")


def sequence(
    rows: int, positions: int, heads: int, size: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """qkv of a whole sequence (R, T, 3, H, E) and a rotary table."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, positions, 3, heads, size, generator=generator).to(dtype), random_table(
        positions, size, generator
    )


def filled(qkv: Tensor, rotary: Tensor | None, cache_dtype: torch.dtype, upto: int) -> Any:
    """A cache holding positions 0 ... upto-1 of the sequence, by the reference; what comes after is
    NaN (8-bit: large).
    """
    rows, positions, _, heads, size = qkv.shape
    cache = op.new_rows(rows, heads, positions, size, cache_dtype)
    for t in range(upto):
        op.decode_attention(qkv[:, t], cache, t, rotary=rotary, backend="reference")
    for x in cache:
        if x is not None:
            x[:, :, upto:] = 100 if x.dtype in op.LARGEST_CODE else float("nan")
    return cache


def copy(cache: Any, dtype: torch.dtype | None = None) -> Any:
    """The cache cloned; k and v in `dtype` unless they are 8-bit."""
    k, v, *scales = cache
    k, v = (x.clone() if dtype is None or x.dtype in op.LARGEST_CODE else x.to(dtype, copy=True) for x in (k, v))
    return op.KVCache(k, v, *(None if x is None else x.clone() for x in scales))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rotary", [True, False])
def test_every_step_equals_full_attention(backend: str, rotary: bool) -> None:
    qkv, table = sequence(2, 7, 2, 16, torch.float64)
    table = table if rotary else None
    cache = op.new_rows(2, 2, 7, 16, torch.float64)
    full = masked_attention_qkv(qkv, rotary=table, backend="reference")
    for t in range(7):
        got = op.decode_attention(qkv[:, t], cache, t, rotary=table, backend=backend)
        torch.testing.assert_close(got, full[:, t], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loops_in_float64(backend: str) -> None:
    """The last step of a short sequence, one number at a time."""
    qkv, table = sequence(1, 5, 2, 4, torch.float64)
    x, table_list = qkv[0].tolist(), table.tolist()

    def turned(t: int, part: int, h: int) -> list[float]:
        vector = x[t][part][h]
        pairs = [(vector[2 * p], vector[2 * p + 1], *table_list[t][p]) for p in range(2)]
        return [number for a, b, cos, sin in pairs for number in (a * cos - b * sin, a * sin + b * cos)]

    expected = []
    for h in range(2):
        weights = [
            math.exp(sum(a * b for a, b in zip(turned(4, 0, h), turned(s, 1, h), strict=True)) / 2) for s in range(5)
        ]
        expected.append([sum(w * x[s][2][h][e] for s, w in enumerate(weights)) / sum(weights) for e in range(4)])
    got = op.decode_attention(qkv[:, 4], filled(qkv, table, torch.float64, 4), 4, rotary=table, backend=backend)
    torch.testing.assert_close(got[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-13)


@interpreted
@pytest.mark.parametrize("cache_dtype", [None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "position"), [(64, 64), (64, 66), (32, 1), (80, 5), (100, 33), (128, 0)])
def test_error_rule(size: int, position: int, dtype: torch.dtype, cache_dtype: torch.dtype | None) -> None:
    """Both the output and the cached rows; what lies past the position is NaN and must not be read."""
    qkv, table = sequence(2, position + 3, 2, size, dtype)
    before = filled(qkv, table, cache_dtype or dtype, position)
    caches = {"truth": copy(before, torch.float64), "plain": copy(before), "triton": copy(before)}
    outs = {
        name: op.decode_attention(
            qkv[:, position].double() if name == "truth" else qkv[:, position],
            cache,
            position,
            rotary=table,
            backend="triton" if name == "triton" else "reference",
        )
        for name, cache in caches.items()
    }
    assert outs["triton"].dtype == dtype
    contract.assert_error_rule("output", outs["triton"], outs["plain"], outs["truth"])
    for part, (got, plain, truth, old) in zip(
        op.KVCache._fields, zip(caches["triton"], caches["plain"], caches["truth"], before, strict=True), strict=True
    ):
        if got is None:
            continue
        kept = torch.arange(got.shape[2]) != position
        assert torch.equal(got[:, :, kept].view(torch.uint8), old[:, :, kept].view(torch.uint8)), (
            f"{part}: another position changed"
        )
        rows = [x[:, :, position].double() for x in (got, plain, truth)]
        # an 8-bit code may fall on the other side of a tie: one code (int8), one step of 3 mantissa bits (e4m3)
        floor = {torch.int8: 1 / 127, torch.float8_e4m3fn: 2**-3}.get(got.dtype, contract.FLOORS[dtype])
        contract.assert_error_rule(part, *rows, floor=floor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("cache_dtype", "of_row", "of_number", "allowed"),
    [(torch.int8, 0.5 / 127, 0.0, 0.02), (torch.float8_e4m3fn, 2**-9 / 448, 2**-4, 0.12)],
)
def test_8_bit_cache(backend: str, cache_dtype: torch.dtype, of_row: float, of_number: float, allowed: float) -> None:
    """Stored numbers are off by at most half a code of their row (int8) or 2^-4 of themselves (e4m3); the output by a
    stated share of v's largest.
    """
    qkv, table = sequence(2, 12, 2, 32)
    exact, cache = op.new_rows(2, 2, 12, 32, torch.float32), op.new_rows(2, 2, 12, 32, cache_dtype)
    qkv[:, 3] = 0  # a row of zeros is stored exactly, with scale 0
    for t in range(12):
        want = op.decode_attention(qkv[:, t], exact, t, rotary=table, backend="reference")
        got = op.decode_attention(qkv[:, t], cache, t, rotary=table, backend=backend)
        assert (got - want).abs().max() <= allowed * qkv[:, :, 2].abs().max()
    for codes, scale, plain in ((cache.k, cache.k_scale, exact.k), (cache.v, cache.v_scale, exact.v)):
        error = (codes.float() * scale[..., None] - plain).abs()
        bound = of_row * plain.abs().amax(-1, keepdim=True) + of_number * plain.abs()
        assert (error <= bound * (1 + 1e-5)).all()
        assert error.max() > 0
        assert not scale[:, :, 3].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str) -> None:
    qkv, table = sequence(3, 6, 2, 32)
    cache = filled(qkv, table, torch.float32, 5)
    expected = op.decode_attention(qkv[:, 5].contiguous(), copy(cache), 5, rotary=table, backend=backend)
    for strided in (qkv[:, 5], qkv[:, 5].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):
        assert not strided.is_contiguous()
        assert torch.equal(op.decode_attention(strided, copy(cache), 5, rotary=table, backend=backend), expected)


def device_step(backend: str, qkv: Tensor, cache: Any, position: Tensor, rotary: Tensor | None) -> Tensor:
    """The form that reads the position from memory, as on CUDA (the public function turns a CPU tensor into an int)."""
    run = op.reference if backend == "reference" else import_module("star_fast.ops.triton.decode_attention").run
    return run(qkv, cache, position, rotary=rotary)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8, torch.float8_e4m3fn])
def test_position_read_from_memory(backend: str, cache_dtype: torch.dtype) -> None:
    qkv, table = sequence(2, 6, 2, 32)
    by_int, by_tensor = (op.new_rows(2, 2, 6, 32, cache_dtype) for _ in range(2))
    for t in range(6):
        expected = op.decode_attention(qkv[:, t], by_int, t, rotary=table, backend=backend)
        torch.testing.assert_close(device_step(backend, qkv[:, t], by_tensor, torch.tensor(t), table), expected)
        assert torch.equal(
            op.decode_attention(qkv[:, t], by_int, torch.tensor(t), rotary=table, backend=backend), expected
        )
    for a, b in zip(by_int, by_tensor, strict=True):
        assert a is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    error_flag.raise_if_set(CPU)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("position", [-1, 4])
def test_a_bad_position_in_memory_sets_the_flag_and_appends_nothing(backend: str, position: int) -> None:
    qkv, table = sequence(2, 4, 2, 32)
    cache = filled(qkv, table, torch.float32, 4)
    before = copy(cache)
    device_step(backend, qkv[:, 3], cache, torch.tensor(position), table)
    assert torch.equal(cache.k, before.k)
    assert torch.equal(cache.v, before.v)
    with pytest.raises(IndexError, match=r"position was outside 0 \.\.\. T-1"):
        error_flag.raise_if_set(CPU)
    error_flag.raise_if_set(CPU)  # reading it clears it


@interpreted
def test_one_launch_a_step() -> None:
    arguments = op.inputs("unit", torch.bfloat16)
    with count_accesses() as launches:
        op.decode_attention(**arguments, backend="triton")
    assert [launch.kernel for launch in launches] == ["decode_attention_step"]
    first, second = (
        op.decode_attention(**{**arguments, "cache": copy(arguments["cache"])}, backend="triton") for _ in range(2)
    )
    assert torch.equal(first, second)


def test_fake_cuda() -> None:
    """Without a driver, with the position on the device: the Triton backend, one launch, shape, dtype and device."""
    with FakeTensorMode(), dispatch.record() as recorded:
        cache = op.new_cache(6, 4, 49, 64, torch.bfloat16, "cuda")
        out = op.decode_attention(
            torch.empty(6, 3, 4, 64, dtype=torch.bfloat16, device="cuda"),
            cache,
            torch.empty((), dtype=torch.int64, device="cuda"),
            rotary=torch.empty(49, 32, 2, device="cuda"),
        )
    assert (tuple(out.shape), out.dtype, out.device.type) == ((6, 4, 64), torch.bfloat16, "cuda")
    assert recorded == [
        dispatch.Recorded("decode_attention", "triton", [dispatch.Launch("decode_attention_step", (24,))])
    ]


QKV, CACHE, INT8 = torch.zeros(2, 3, 1, 4), op.new_rows(2, 1, 5, 4, torch.float32), op.new_rows(2, 1, 5, 4, torch.int8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"position": 5}, IndexError, r"position must be in 0 \.\.\. 4 \(the cache holds 5\), got 5"),
        ({"position": torch.tensor(-1)}, IndexError, "got -1"),
        ({"position": torch.tensor([1])}, TypeError, r"0-d int64 tensor on cpu, got torch.int64 of shape \(1,\)"),
        ({"position": 1.0}, TypeError, "got float"),
        ({"qkv": QKV.long()}, TypeError, "qkv must be floating point"),
        ({"qkv": QKV[:, :2]}, ValueError, r"qkv must be \(R, 3, H, E\)"),
        ({"qkv": QKV.clone().requires_grad_()}, RuntimeError, "no gradient"),
        ({"qkv": QKV[:1]}, ValueError, r"must be \(1, 1, T, 4\)"),
        ({"qkv": QKV.bfloat16()}, TypeError, "must both be torch.bfloat16 like qkv"),
        ({"cache": INT8._replace(v_scale=None)}, ValueError, "needs k_scale and v_scale"),
        (
            {"cache": INT8._replace(k_scale=INT8.k_scale[:, :, :4].contiguous())},
            ValueError,
            r"k_scale must be \(2, 1, 5\) float32",
        ),
        ({"cache": CACHE._replace(k=torch.zeros(2, 1, 4, 5).transpose(2, 3))}, ValueError, "k must be contiguous"),
        ({"rotary": torch.zeros(4, 2, 2)}, ValueError, "5 positions or more"),
    ],
)
def test_bad_input_says_what_came(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        op.decode_attention(**{"qkv": QKV, "cache": CACHE, "position": 0, "rotary": None, **arguments})


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [None, torch.int8, torch.float8_e4m3fn])
def test_on_cuda(cache_dtype: torch.dtype | None) -> None:
    """The real kernel in bfloat16 against the reference in float64, with the position on the device."""
    if cache_dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8_e4m3fn needs compute capability 8.9")
    arguments = op.inputs("B", torch.bfloat16, "cuda", cache_dtype=cache_dtype)
    position = torch.tensor(arguments["position"], device="cuda")
    outs = {}
    for name, dtype, backend in (
        ("truth", torch.float64, "reference"),
        ("plain", torch.bfloat16, "reference"),
        ("triton", torch.bfloat16, "triton"),
    ):
        cache = copy(arguments["cache"], dtype)
        outs[name] = op.decode_attention(
            arguments["qkv"].to(dtype), cache, position, rotary=arguments["rotary"], backend=backend
        )
    contract.assert_error_rule("output", outs["triton"], outs["plain"], outs["truth"])
    error_flag.raise_if_set(position.device)

"""The compiled CPU backend of decode_attention against the float64 formula; which instruction set runs is the machine's choice."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch

from tests import contract

op = importlib.import_module("star_fast.ops.decode_attention")
try:
    importlib.import_module("star_fast.ops.decode_attention_cpp")
except ImportError as error:
    pytest.skip(f"star_fast._C is not built, or older: {error}", allow_module_level=True)

POSITIONS = 21


def steps(backend: str, dtype: torch.dtype, cache_dtype: torch.dtype, size: int, sliced: bool = False) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs and cache contents of a whole sequence; `dtype` float64 computes on the same rounded inputs."""
    generator = torch.Generator().manual_seed(size)
    table = op.random_table(POSITIONS, size, generator)
    qkvs = torch.randn(POSITIONS, 3, 3, 2, size, generator=generator)
    rounded = torch.bfloat16 if dtype == torch.bfloat16 or cache_dtype == torch.bfloat16 else torch.float32
    cache = op.new_cache(3, 2, POSITIONS, size, cache_dtype)
    outs = []
    for position, qkv in enumerate(qkvs.to(rounded).to(dtype)):
        if sliced:  # a view with gaps between rows, as of a wider product
            qkv = torch.cat([qkv, qkv], dim=1)[:, :3]
        outs.append(op.decode_attention(qkv, cache, position, rotary=table, backend=backend))
    return outs, [part for part in cache if part is not None]


@pytest.mark.parametrize("size", [64, 32, 100, 128, 80, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_rule(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    table = op.random_table(POSITIONS, size, generator)
    caches = {name: op.new_cache(3, 2, POSITIONS, size, kind) for name, kind in (("cpp", dtype), ("reference", dtype), ("truth", torch.float64))}
    for position in range(POSITIONS):
        qkv = torch.randn(3, 3, 2, size, generator=generator).to(dtype)
        truth = op.decode_attention(qkv.double(), caches["truth"], position, rotary=table, backend="reference")
        same, got = (op.decode_attention(qkv, caches[name], position, rotary=table, backend=name) for name in ("reference", "cpp"))
        assert got.dtype == dtype and got.shape == (3, 2, size)
        contract.assert_error_rule(f"decode_attention [cpp, {dtype}] position {position}", got, same, truth)
    for part in ("k", "v"):
        contract.assert_error_rule(f"cache {part}", getattr(caches["cpp"], part), getattr(caches["reference"], part), getattr(caches["truth"], part))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_cache_attends_to_what_it_stored(dtype: torch.dtype) -> None:
    outs, (k, v, k_scale, v_scale) = steps("cpp", dtype, torch.int8, 64)
    reference_outs, parts = steps("reference", dtype, torch.int8, 64)
    assert (k.int() - parts[0].int()).abs().max() <= 1 and torch.equal(v, parts[1])  # a rotated key may round to the neighbouring code
    torch.testing.assert_close(k_scale, parts[2], rtol=1e-6, atol=0)
    keys, values = k.double() * k_scale.double()[..., None], v.double() * v_scale.double()[..., None]
    generator = torch.Generator().manual_seed(64)
    table = op.random_table(POSITIONS, 64, generator)
    qkvs = torch.randn(POSITIONS, 3, 3, 2, 64, generator=generator).to(dtype)
    for position, (qkv, out) in enumerate(zip(qkvs, outs, strict=True)):
        q = op.rotate(qkv[:, 0].double(), table[position])
        probs = torch.softmax(torch.einsum("rhe,rhte->rht", q, keys[:, :, : position + 1]) / 8, dim=-1)
        expected = torch.einsum("rht,rhte->rhe", probs, values[:, :, : position + 1])
        assert (out.double() - expected).abs().max() <= (2e-6 if dtype == torch.float32 else 2**-7), position
    assert len(reference_outs) == POSITIONS


def test_strided_input_and_same_bits_on_any_number_of_threads() -> None:
    expected, cache = steps("cpp", torch.float32, torch.float32, 64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        outs, again = steps("cpp", torch.float32, torch.float32, 64, sliced=True)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip([*expected, *cache], [*outs, *again], strict=True))


def test_sharp_and_flat_rows_and_nan() -> None:
    cache = op.new_cache(1, 1, 3, 32, torch.float32)
    for position, height in enumerate((1000.0, -1000.0, 0.0)):
        qkv = torch.full((1, 3, 1, 32), height)
        qkv[:, 0] = 1000.0
        qkv[:, 2] = position
        out = op.decode_attention(qkv, cache, position, rotary=None, backend="cpp")
    assert out.min() >= 0 and out.max() < 1e-36  # all weight on position 0, without overflow
    cache.k[0, 0, 1, 0] = float("nan")
    assert op.decode_attention(qkv, cache, 2, rotary=None, backend="cpp").isnan().all()


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_narrower_instruction_sets(capability: str) -> None:
    code = ("from tests.ops.test_decode_attention_cpp import test_error_rule as t; import torch\n"
            f"assert torch.backends.cpu.get_cpu_capability() == '{capability.upper()}'\n"
            "[t(dtype, size) for dtype in (torch.float32, torch.bfloat16) for size in (64, 100)]")
    if capability == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this CPU has no AVX2")
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "ATEN_CPU_CAPABILITY": capability}, check=True, timeout=300)

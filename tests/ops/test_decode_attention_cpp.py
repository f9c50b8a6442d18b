"""The compiled CPU backend of decode_attention: its blocked cache against float64 loops, the same bits everywhere,
nothing read that is stale.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from star_fast.ops import dispatch, kv_cache
from tests import contract

op = importlib.import_module("star_fast.ops.decode_attention")
try:
    importlib.import_module("star_fast.ops.decode_attention_cpp")
except ImportError as error:
    pytest.skip(f"star_fast._C is not built, or older: {error}", allow_module_level=True)

KINDS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.int8),
    (torch.bfloat16, torch.int8),
]
# Of the largest |v|, beside a rounding of the output: float32 sums; an int8 cache is multiplied by whole numbers of 15
# bits.
ALLOWED = {torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.int8: 2**-11}
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8}


def stale(rows: int, heads: int, positions: int, size: int, cache_dtype: torch.dtype) -> kv_cache.KVCache:
    """A blocked cache that holds NaN everywhere, padding included (codes: 100, with scales of NaN)."""
    cache = op.new_cache(rows, heads, positions, size, cache_dtype)
    assert cache.layout == (positions, size)
    for part in cache[:4]:
        if part is not None:
            part.fill_(math.nan if part.is_floating_point() else 100)
    return cache


def sequence(rows: int, heads: int, positions: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """qkv of a whole sequence (T, R, 3, H, E) and a rotary table."""
    generator = torch.Generator().manual_seed(size + positions)
    return torch.randn(positions, rows, 3, heads, size, generator=generator).to(dtype), op.random_table(
        positions, size, generator
    )


def run(qkvs: Tensor, table: Tensor | None, cache: kv_cache.KVCache) -> list[Tensor]:
    return [op.decode_attention(qkv, cache, position, rotary=table, backend="cpp") for position, qkv in enumerate(qkvs)]


def stored(cache: kv_cache.KVCache, r: int, h: int, t: int) -> tuple[np.ndarray, np.ndarray]:
    """One position's key and value, entry by entry from where the layout's description says that they lie."""
    group, together = {4: (1, 1), 2: (2, 1), 1: (4, 4)}[cache.k.element_size()]
    k, v = cache.k[r, h].double().numpy(), cache.v[r, h].double().numpy()
    scales = [1.0 if scale is None else float(scale[r, h, t]) for scale in (cache.k_scale, cache.v_scale)]
    key = [k[t // 16, e // group, t % 16, e % group] * scales[0] for e in range(cache.layout.size)]
    value = [v[t // together, e, t % together] * scales[1] for e in range(cache.layout.size)]
    return np.array(key), np.array(value)


def turned(x: Tensor, row: Tensor) -> np.ndarray:
    """A head's vector in float64, pairs turned by the table's (cos, sin)."""
    pairs = zip(x.double().view(-1, 2).tolist(), row.double().tolist(), strict=True)
    return np.array([number for (a, b), (cos, sin) in pairs for number in (a * cos - b * sin, a * sin + b * cos)])


@pytest.mark.parametrize(
    ("rows", "positions", "size"),
    [(2, 33, 64), (1, 1, 6), (1, 20, 6), (2, 17, 100), (1, 35, 34), (1, 16, 80), (1, 18, 128)],
)
@pytest.mark.parametrize(("dtype", "cache_dtype"), KINDS)
def test_blocks_against_float64_loops(
    dtype: torch.dtype, cache_dtype: torch.dtype, rows: int, positions: int, size: int
) -> None:
    """What was appended, and the output, at the borders of blocks; whatever later positions and padding hold."""
    qkvs, table = sequence(rows, 2, positions, size, dtype)
    cache = stale(rows, 2, positions, size, cache_dtype)
    outs = run(qkvs, table, cache)
    # Half of one, of the largest entry
    code = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.int8: 0.5001 / 127}[cache_dtype]
    for r, h in ((0, 0), (rows - 1, 1)):
        kept = [stored(cache, r, h, t) for t in range(positions)]
        for t, (key, value) in enumerate(kept):
            given = turned(qkvs[t, r, 1, h], table[t]), qkvs[t, r, 2, h].double().numpy()
            assert all(
                np.abs(a - b).max() <= code * np.abs(b).max() for a, b in zip((key, value), given, strict=True)
            ), f"stored at {t}"
        for t in sorted({0, 1, 14, 15, 16, positions - 1} & set(range(positions))):
            query = turned(qkvs[t, r, 0, h], table[t])
            weights = [math.exp(sum(query * key) / math.sqrt(size)) for key, _ in kept[: t + 1]]
            expected = sum(w * value for w, (_, value) in zip(weights, kept, strict=False)) / sum(weights)
            largest = max(np.abs(value).max() for _, value in kept[: t + 1])
            assert outs[t].dtype == dtype and outs[t].shape == (rows, 2, size)
            error = np.abs(outs[t][r, h].double().numpy() - expected)
            assert (error <= ALLOWED[cache_dtype] * largest + ROUNDING[dtype] * np.abs(expected)).all(), (
                f"position {t}: {error.max() / largest:.2e}"
            )


@pytest.mark.parametrize("size", [64, 32, 100, 128, 80, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_rule(dtype: torch.dtype, size: int) -> None:
    qkvs, table = sequence(3, 2, 21, size, dtype)
    caches = {
        "cpp": stale(3, 2, 21, size, dtype),
        "reference": op.new_rows(3, 2, 21, size, dtype),
        "truth": op.new_rows(3, 2, 21, size, torch.float64),
    }
    for position, qkv in enumerate(qkvs):
        truth = op.decode_attention(qkv.double(), caches["truth"], position, rotary=table, backend="reference")
        same, got = (
            op.decode_attention(qkv, caches[name], position, rotary=table, backend=name)
            for name in ("reference", "cpp")
        )
        contract.assert_error_rule(f"decode_attention [cpp, {dtype}] position {position}", got, same, truth)
    rows = kv_cache.in_rows(caches["cpp"])
    for part in ("k", "v"):
        contract.assert_error_rule(
            f"cache {part}", getattr(rows, part), getattr(caches["reference"], part), getattr(caches["truth"], part)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_codes_are_the_reference_s(dtype: torch.dtype) -> None:
    qkvs, table = sequence(3, 2, 21, 64, dtype)
    qkvs[4] = 0  # a row of zeros is stored with scale 0
    mine, theirs = stale(3, 2, 21, 64, torch.int8), op.new_rows(3, 2, 21, 64, torch.int8)
    run(qkvs, table, mine)
    for position, qkv in enumerate(qkvs):
        op.decode_attention(qkv, theirs, position, rotary=table, backend="reference")
    rows = kv_cache.in_rows(mine)
    # A rotated key may round to the neighbouring code
    assert (rows.k.int() - theirs.k.int()).abs().max() <= 1 and torch.equal(rows.v, theirs.v)
    torch.testing.assert_close(rows.k_scale, theirs.k_scale, rtol=1e-6, atol=0)
    assert torch.equal(rows.v_scale, theirs.v_scale) and not rows.k_scale[:, :, 4].any()


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("positions", "size"), [(33, 6), (16, 100), (1, 64)])
def test_layouts_turn_into_each_other(cache_dtype: torch.dtype, positions: int, size: int) -> None:
    dtype = torch.float32 if cache_dtype == torch.int8 else cache_dtype
    qkvs, table = sequence(2, 3, positions, size, dtype)
    cache = stale(2, 3, positions, size, cache_dtype)
    run(qkvs, table, cache)
    rows = kv_cache.in_rows(cache)
    assert rows.layout is None and rows.k.shape == rows.v.shape == (2, 3, positions, size)
    for r, h, t in ((0, 0, 0), (1, 2, positions - 1), (0, 1, positions // 2)):
        for got, scale, want in zip(
            (rows.k, rows.v), (rows.k_scale, rows.v_scale), stored(cache, r, h, t), strict=True
        ):
            assert np.array_equal(
                got[r, h, t].double().numpy() * (1.0 if scale is None else float(scale[r, h, t])), want
            )
    again = op.laid_out(rows, "cpp")
    assert again.layout == cache.layout and all(
        a is None or torch.equal(a, b) for a, b in zip(kv_cache.in_rows(again)[:4], rows[:4], strict=True)
    )
    assert op.laid_out(cache, "cpp") is cache and op.laid_out(rows, "reference") is rows


def digest() -> str:
    """Of the bits of outputs and caches, every kind, head sizes with and without padding."""
    found, generator = hashlib.sha256(), torch.Generator().manual_seed(0)

    # Whole numbers scaled: torch's normal and trigonometric ones differ between instruction sets themselves
    def numbers(*shape: int) -> Tensor:
        return torch.randint(-(2**20), 2**20, shape, generator=generator) / 2**19

    for (dtype, cache_dtype), size in ((kind, size) for kind in KINDS for size in (64, 100, 6)):
        qkvs, table = numbers(37, 3, 3, 2, size).to(dtype), numbers(37, size // 2, 2)
        cache = op.new_cache(3, 2, 37, size, cache_dtype, backend="cpp")
        for tensor in [*run(qkvs, table, cache), *(part for part in cache[:4] if part is not None)]:
            found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_same_bits_on_narrower_instruction_sets(capability: str) -> None:
    if capability == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this CPU has no AVX2")
    code = (
        f"import torch; assert torch.backends.cpu.get_cpu_capability() == '{capability.upper()}'\n"
        "from tests.ops.test_decode_attention_cpp import digest; print(digest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        check=True,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split()[-1] == digest()


@pytest.mark.parametrize(("dtype", "cache_dtype"), KINDS)
def test_strided_input_and_the_same_bits_on_any_number_of_threads(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    qkvs, table = sequence(40, 12, 3, 64, dtype)
    cache, again = (op.new_cache(40, 12, 300, 64, cache_dtype) for _ in range(2))
    threads, late = torch.get_num_threads(), [0, 1, 298]  # at 298 every thread gets rows
    table = table[[0, 1, *[2] * 297]].repeat(2, 1, 1)
    expected = [
        op.decode_attention(qkv, cache, position, rotary=table, backend="cpp")
        for position, qkv in zip(late, qkvs, strict=True)
    ]
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        wider = torch.cat([qkvs, qkvs], dim=2)[:, :, :3]  # a view with gaps between rows, as of a wider product
        outs = [
            op.decode_attention(qkv, again, position, rotary=table, backend="cpp")
            for position, qkv in zip(late, wider, strict=True)
        ]
    finally:
        torch.set_num_threads(threads)
    assert all(
        a is None or torch.equal(a, b) for a, b in zip([*expected, *cache[:4]], [*outs, *again[:4]], strict=True)
    )


@pytest.mark.parametrize(
    ("part", "number"), [(0, math.nan), (1, math.nan), (2, math.nan), (0, math.inf), (1, math.inf), (2, -math.inf)]
)
@pytest.mark.parametrize(("dtype", "cache_dtype"), KINDS)
def test_what_is_not_finite_shows_in_its_head_alone(
    dtype: torch.dtype, cache_dtype: torch.dtype, part: int, number: float
) -> None:
    qkvs, table = sequence(2, 2, 20, 64, dtype)
    clean = run(qkvs, table, op.new_cache(2, 2, 20, 64, cache_dtype))
    qkvs[18, 1, part, 0, 5] = number
    outs = run(qkvs, table, op.new_cache(2, 2, 20, 64, cache_dtype))
    for t in (18, 19):
        hit = torch.zeros(2, 2, dtype=torch.bool)
        hit[1, 0] = t == 18 or part != 0  # a bad query is gone with its step
        assert torch.equal(outs[t].isfinite().all(-1), ~hit) and torch.equal(outs[t][~hit], clean[t][~hit])


def test_sharp_rows_do_not_overflow() -> None:
    cache = op.new_cache(1, 1, 3, 32, torch.float32)
    for position, height in enumerate((1000.0, -1000.0, 0.0)):
        qkv = torch.full((1, 3, 1, 32), height)
        qkv[:, 0] = 1000.0
        qkv[:, 2] = position
        out = op.decode_attention(qkv, cache, position, rotary=None, backend="cpp")
    assert out.min() >= 0 and out.max() < 1e-36  # all weight on position 0


@pytest.mark.parametrize(("positions", "size"), [(1100, 6), (2, 512)])
def test_whole_numbers_stay_in_32_bits(positions: int, size: int) -> None:
    """The largest codes everywhere, of more positions, or entries, than one exact sum may hold."""
    cache = op.new_cache(1, 1, positions, size, torch.int8)
    for part, number in zip(cache[:4], (127, 127, 1 / 127, 1 / 127), strict=True):
        part.fill_(number)
    out = op.decode_attention(torch.ones(1, 3, 1, size), cache, positions - 1, rotary=None, backend="cpp")
    torch.testing.assert_close(out, torch.ones(1, 1, size), rtol=1e-5, atol=0)


def test_a_cut_cache_is_the_cache_of_its_rows() -> None:
    qkvs, table = sequence(3, 2, 4, 64, torch.bfloat16)
    whole, own = (op.new_cache(rows, 2, 4, 64, torch.int8) for rows in (3, 2))
    assert all(
        torch.equal(a, b)
        for a, b in zip(run(qkvs[:, :2], table, whole.first_rows(2)), run(qkvs[:, :2], table, own), strict=True)
    )
    assert not whole.k[2].any() and whole.k[1].any()


def call(cache: kv_cache.KVCache, **changes: Any) -> Tensor:
    return op.decode_attention(
        **{"qkv": torch.ones(2, 3, 1, 4), "cache": cache, "position": 0, "rotary": None, **changes}
    )


def test_each_layout_goes_to_the_backend_that_reads_it() -> None:
    rows, blocks = op.new_rows(2, 1, 5, 4, torch.float32), op.new_cache(2, 1, 5, 4, torch.float32)
    assert torch.equal(call(rows), torch.ones(2, 1, 4)) and torch.equal(call(blocks), torch.ones(2, 1, 4))
    with pytest.raises(dispatch.BackendUnavailable, match="the cache is in rows; it reads blocks"):
        call(rows, backend="cpp")
    with pytest.raises(ValueError, match='in blocks, which only backend "cpp" reads'):
        call(blocks, backend="reference")
    with pytest.raises(dispatch.BackendUnavailable, match="the cache is in blocks"):
        call(blocks, backend="triton")
    with pytest.raises(ValueError, match='in blocks, which only backend "cpp" reads, for float32 or bfloat16'):
        call(op.new_cache(2, 1, 5, 4, torch.int8), qkv=torch.ones(2, 3, 1, 4, dtype=torch.float16))
    for how in ({"backend": "reference"}, {"qkv_dtype": torch.float16}):
        assert op.new_cache(2, 1, 5, 4, torch.int8, **how).layout is None
    assert [op.new_cache(2, 1, 5, size, torch.float32).layout for size in (5, 514)] == [None, None]
    with dispatch.use_backend("reference"):
        assert op.new_cache(2, 1, 5, 4, torch.float32).layout is None


def test_bad_blocks_are_refused() -> None:
    blocks = op.new_cache(2, 1, 5, 4, torch.float32)
    with pytest.raises(IndexError, match=r"in 0 \.\.\. 4 \(the cache holds 5\), got 5"):  # though the padding has room
        call(blocks, position=5)
    with pytest.raises(ValueError, match=r"in blocks must be \(1, 1, 1, 4, 16, 1\)"):
        call(blocks, qkv=torch.ones(1, 3, 1, 4))
    with pytest.raises(ValueError, match="E 4, for this qkv"):
        call(blocks._replace(layout=kv_cache.Blocks(5, 3)))
    int8 = op.new_cache(2, 1, 5, 4, torch.int8)
    with pytest.raises(ValueError, match=r"k_scale must be \(2, 1, 16\) float32"):
        call(int8._replace(k_scale=int8.k_scale[:, :, :5].contiguous()))
    with pytest.raises(TypeError, match="in blocks is float32, bfloat16 or int8"):
        kv_cache.new_blocks(2, 1, 5, 4, torch.float64)

"""One decoding step of attention in one launch: rotary, append to the cache, attend over what is there.

A program owns one (row, head): a stream of at most T x E keys and values, read once. Rows x heads is 768 (B, 64 rows)
to 2560 (XL, 128), several programs for each multiprocessor, so the sequence is not split further. The step is bound by
bytes: at position p it moves 4 (p + 1) E bytes a program in bfloat16, half of that (plus 8 bytes of scales a position)
with an 8-bit cache.
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_fast.ops import error_flag
from star_fast.ops.dispatch import Cost
from star_fast.ops.kv_cache import LARGEST_CODE, KVCache
from star_fast.ops.triton.launching import Kernel, accumulator, why_not_device
from star_fast.ops.triton.rotary import turn
from star_fast.ops.triton.tiles import DECODE_ATTENTION


@triton.jit
def load_turned_row(
    ptr, table_ptr, inside, E: tl.constexpr, BLOCK_E: tl.constexpr, ROTARY: tl.constexpr, ACC: tl.constexpr
):
    """One head's vector of E numbers, zero past E, turned by the table's row at `table_ptr`."""
    cols = tl.arange(0, BLOCK_E)
    x = tl.load(ptr + cols, mask=inside, other=0.0).to(ACC)
    if ROTARY:
        table = tl.load(table_ptr + cols, mask=inside, other=0.0)
        x = tl.reshape(turn(x, table, 1, 1, BLOCK_E, ACC), (BLOCK_E,))
    return x


@triton.jit
def append(
    ptr,
    scale_ptr,
    x,
    inside,
    valid,
    EIGHT_BIT: tl.constexpr,
    ROUND: tl.constexpr,
    LARGEST: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write one vector to the cache (8-bit: as codes and scale) if `valid`; returns it as stored."""
    cols = tl.arange(0, x.shape[0])
    if EIGHT_BIT:
        x = x.to(tl.float32)
        scale = tl.max(tl.abs(x), 0) / LARGEST
        tl.store(scale_ptr, scale, mask=valid)
        x = x / tl.where(scale == 0.0, 1.0, scale)
        if ROUND:
            x = tl.floor(x + 0.5)
        else:
            # To the 4 significant bits of e4m3, ties to even, so that the conversion is exact: the interpreter loses
            # the carry there
            bits = x.to(tl.int32, bitcast=True)
            x = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        stored = x.to(ptr.dtype.element_ty)
        x = stored.to(tl.float32).to(ACC) * scale
    else:
        stored = x.to(ptr.dtype.element_ty)
        x = stored.to(ACC)
    tl.store(ptr + cols, stored, mask=inside & valid)
    return x


@triton.jit(do_not_specialize=["position"])
def decode_attention_step(
    qkv_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    table_ptr,
    out_ptr,
    flag_ptr,
    position,
    row_stride,
    part_stride,
    head_stride,
    n_heads,
    n_positions,
    ON_DEVICE: tl.constexpr,
    SCALE: tl.constexpr,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROTARY: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    ROUND: tl.constexpr,
    LARGEST: tl.constexpr,
    BAD: tl.constexpr,
    ACC: tl.constexpr,
):
    """Each of the BLOCK_T slots runs its own softmax over positions slot, slot + BLOCK_T, ...; merged, with the current
    one, at the end.
    """
    stream = tl.program_id(0).to(tl.int64)
    valid = True
    if ON_DEVICE:
        position = tl.load(position)
        valid = (position >= 0) & (position < n_positions)
        tl.atomic_or(flag_ptr, BAD, mask=(position < 0) | (position >= n_positions))
        position = tl.where(valid, position, 0).to(tl.int32)
    cols = tl.arange(0, BLOCK_E)
    inside = cols < E
    first = stream * n_positions
    here = first + position
    q_ptr = qkv_ptr + (stream // n_heads) * row_stride + (stream % n_heads) * head_stride
    row_table_ptr = table_ptr
    if ROTARY:
        row_table_ptr = table_ptr + position * E
    # (BLOCK_E,)
    q = load_turned_row(q_ptr, row_table_ptr, inside, E, BLOCK_E, ROTARY, ACC).to(qkv_ptr.dtype.element_ty).to(ACC)
    k_now = load_turned_row(q_ptr + part_stride, row_table_ptr, inside, E, BLOCK_E, ROTARY, ACC)
    v_now = load_turned_row(q_ptr + 2 * part_stride, row_table_ptr, inside, E, BLOCK_E, False, ACC)
    k_scale_here, v_scale_here = k_scale_ptr, v_scale_ptr
    if EIGHT_BIT:
        k_scale_here, v_scale_here = k_scale_ptr + here, v_scale_ptr + here
    k_now = append(k_ptr + here * E, k_scale_here, k_now, inside, valid, EIGHT_BIT, ROUND, LARGEST, ACC)
    v_now = append(v_ptr + here * E, v_scale_here, v_now, inside, valid, EIGHT_BIT, ROUND, LARGEST, ACC)

    top = tl.full((BLOCK_T,), -1e30, ACC)  # finite, so that an empty slot's weights are 0 and not NaN
    total = tl.zeros((BLOCK_T,), ACC)
    acc = tl.zeros((BLOCK_T, BLOCK_E), ACC)
    for start in tl.range(0, position, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        past = rows < position
        offsets = (first + rows)[:, None] * E + cols[None, :]  # (BLOCK_T, BLOCK_E)
        mask = past[:, None]
        if E != BLOCK_E:
            mask = mask & inside[None, :]
        k = tl.load(k_ptr + offsets, mask=mask, other=0.0).to(tl.float32 if EIGHT_BIT else ACC).to(ACC)
        v = tl.load(v_ptr + offsets, mask=mask, other=0.0).to(tl.float32 if EIGHT_BIT else ACC).to(ACC)
        scores = tl.sum(k * q[None, :], 1) * SCALE  # (BLOCK_T,)
        if EIGHT_BIT:
            scores *= tl.load(k_scale_ptr + first + rows, mask=past, other=0.0)
        scores = tl.where(past, scores, top)
        new_top = tl.maximum(top, scores)
        weights = tl.where(past, tl.exp2(scores - new_top), 0.0)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + weights
        if EIGHT_BIT:
            weights *= tl.load(v_scale_ptr + first + rows, mask=past, other=0.0)
        acc = acc * shrink[:, None] + weights[:, None] * v  # (BLOCK_T, BLOCK_E)
        top = new_top
    score_now = tl.sum(k_now * q, 0) * SCALE
    highest = tl.maximum(tl.max(top, 0), score_now)
    share, share_now = tl.exp2(top - highest), tl.exp2(score_now - highest)
    out = tl.sum(acc * share[:, None], 0) + v_now * share_now  # (BLOCK_E,)
    out = out / (tl.sum(total * share, 0) + share_now)
    tl.store(out_ptr + stream * E + cols, out.to(out_ptr.dtype.element_ty), mask=inside)


def _cost(a: SimpleNamespace) -> Cost:
    """Of the last position, with the whole cache before it: where the position is on the device,
    nobody here knows it.
    """
    streams, row_bytes = a.grid[0], 2 * a.E * a.k_ptr.element_size() + (8 if a.EIGHT_BIT else 0)
    moved = streams * (a.n_positions * row_bytes + 4 * a.E * a.qkv_ptr.element_size()) + (4 * a.E if a.ROTARY else 0)
    return Cost(moved, 4 * streams * a.E * a.n_positions)


STEP = Kernel("decode_attention", decode_attention_step, _cost)


def run(qkv: Tensor, cache: KVCache, position: int | Tensor, *, rotary: Tensor | None) -> Tensor:
    """See ops/decode_attention.py."""
    rows, _, heads, size = qkv.shape
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    rotary = None if rotary is None else rotary.contiguous()
    out = qkv.new_empty((rows, heads, size))
    on_device = isinstance(position, Tensor)
    if rows:
        STEP.launch(
            (rows * heads,),
            (
                qkv,
                cache.k,
                cache.v,
                cache.k_scale,
                cache.v_scale,
                rotary,
                out,
                error_flag.flag_for(qkv) if on_device else None,
                position,
                *qkv.stride()[:3],
                heads,
                cache.k.shape[2],
            ),
            **_settings(size, qkv.dtype, cache.k.dtype, rotary is not None, on_device),
        )
    return out


@functools.cache  # a Python launch costs more than this kernel runs
def _settings(size: int, dtype: torch.dtype, cache_dtype: torch.dtype, rotary: bool, on_device: bool) -> dict[str, Any]:
    padded = max(16, triton.next_power_of_2(size))
    tile = DECODE_ATTENTION[padded]
    return {
        "ON_DEVICE": on_device,
        "SCALE": size**-0.5 * math.log2(math.e),
        "E": size,
        "BLOCK_T": tile.block[0],
        "BLOCK_E": padded,
        "ROTARY": rotary,
        "EIGHT_BIT": cache_dtype in LARGEST_CODE,
        "ROUND": cache_dtype == torch.int8,
        "LARGEST": LARGEST_CODE.get(cache_dtype, 1.0),
        "BAD": error_flag.POSITION_OUT_OF_RANGE,
        "ACC": accumulator(dtype),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def why_not(qkv: Tensor, cache: KVCache, position: int | Tensor, *, rotary: Tensor | None) -> str | None:
    """None if the kernel can serve this call."""
    if cache.layout is not None:
        return "the cache is in blocks; it reads rows, which new_cache makes for it"
    if qkv.shape[-1] > 128:
        return f"the kernel takes head sizes up to 128, got {qkv.shape[-1]}"
    if (
        cache.k.dtype == torch.float8_e4m3fn
        and qkv.is_cuda
        and torch.cuda.is_available()  # fake CUDA tensors need none
        and torch.cuda.get_device_capability(qkv.device) < (8, 9)
    ):
        return "a float8_e4m3fn cache needs compute capability 8.9 or more; int8 works everywhere"
    return why_not_device(qkv)

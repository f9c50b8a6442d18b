"""The key-value cache of decoding and how it lies in memory, which is the business of the backend that reads it.

"Rows" is the plain layout: k and v (R, H, T, E), scales (R, H, T). "Blocks" is what the C++ backend reads: its vector
lanes are positions, so the scores of 16 positions come out of a product as one vector, without a sum across lanes. With
P = T rounded up to 16 positions, and entries side by side that fill 32 bits:

    k        (R, H, P/16, ceil(E/g), 16, g)    g entries of a position, g = 1 (float32), 2 (bfloat16), 4 (int8)
    v        (R, H, P/t, W, t)                 t positions, t = 4 (int8), else 1; W = E rounded up to 16
    scales   (R, H, P)

Rows of the batch come first in every part of either layout.

Letters: R rows, H heads, T positions, E head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 16  # positions; csrc/decode_step.h has the same numbers
# Largest code of an 8-bit cache: a row is stored as codes * scale with scale = max|row| / LARGEST_CODE.
LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


class Blocks(NamedTuple):
    """The layout of a blocked cache: what its padded shapes do not tell."""

    positions: int  # T
    size: int  # E


class KVCache(NamedTuple):
    """Keys (rotary applied) and values of the positions decoded so far; later positions, and padding, hold anything."""

    k: Tensor  # rows: (R, H, T, E); dtype of the model, or int8 or float8_e4m3fn with scales
    v: Tensor  # rows: (R, H, T, E), same dtype
    k_scale: Tensor | None = None  # rows: (R, H, T) float32: key = code * scale
    v_scale: Tensor | None = None  # rows: (R, H, T) float32
    layout: Blocks | None = None  # None: rows

    @property
    def positions(self) -> int:
        """T, the most positions it holds."""
        return self.k.shape[2] if self.layout is None else self.layout.positions

    def first_rows(self, count: int) -> KVCache:
        """A view of the first `count` rows."""
        k_scale, v_scale = (None if scale is None else scale[:count] for scale in (self.k_scale, self.v_scale))
        return self._replace(k=self.k[:count], v=self.v[:count], k_scale=k_scale, v_scale=v_scale)


def new_rows(
    rows: int, heads: int, positions: int, head_size: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> KVCache:
    """A cache of zeros in rows; `dtype` int8 or float8_e4m3fn gives an 8-bit cache with its scales."""
    return _cache(
        (rows, heads, positions, head_size),
        (rows, heads, positions, head_size),
        (rows, heads, positions),
        dtype,
        device,
        torch.zeros,
    )


def new_blocks(
    rows: int,
    heads: int,
    positions: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    zeros: Callable[..., Tensor] = torch.zeros,
) -> KVCache:
    """A cache of zeros in blocks; `dtype` float32, bfloat16 or int8; `zeros` as torch.zeros makes
    its keys and values.
    """
    layout = Blocks(positions, head_size)
    return _cache(*blocked_shapes(rows, heads, layout, dtype), dtype, device, zeros)._replace(layout=layout)


def blocked_shapes(
    rows: int, heads: int, layout: Blocks, dtype: torch.dtype
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of k, v and a scale of a blocked cache."""
    group, together = _side_by_side(dtype)
    padded = _rounded_up(layout.positions, BLOCK)
    return (
        (rows, heads, padded // BLOCK, -(-layout.size // group), BLOCK, group),
        (rows, heads, padded // together, _rounded_up(layout.size, BLOCK), together),
        (rows, heads, padded),
    )


def in_rows(cache: KVCache) -> KVCache:
    """The same contents in rows: a blocked cache copied, one in rows as it is. For tests and debugging."""
    if cache.layout is None:
        return cache
    positions, size = cache.layout
    k = cache.k.transpose(3, 4).flatten(4).flatten(2, 3)[:, :, :positions, :size].contiguous()
    v = cache.v.transpose(3, 4).flatten(2, 3)[:, :, :positions, :size].contiguous()
    k_scale, v_scale = (
        None if scale is None else scale[:, :, :positions].contiguous() for scale in (cache.k_scale, cache.v_scale)
    )
    return KVCache(k, v, k_scale, v_scale)


def in_blocks(cache: KVCache) -> KVCache:
    """The same contents in blocks: a cache in rows copied, a blocked one as it is; padding is zero."""
    if cache.layout is not None:
        return cache
    rows, heads, positions, size = cache.k.shape
    blocked = new_blocks(rows, heads, positions, size, cache.k.dtype, cache.k.device)
    group, together = _side_by_side(cache.k.dtype)
    padded = _rounded_up(positions, BLOCK)

    def padded_to(width: int, x: Tensor) -> Tensor:
        out = x.new_zeros(rows, heads, padded, width)
        out[:, :, :positions, :size] = x
        return out

    blocked.k.copy_(
        padded_to(_rounded_up(size, group), cache.k).unflatten(3, (-1, group)).unflatten(2, (-1, BLOCK)).transpose(3, 4)
    )
    blocked.v.copy_(padded_to(_rounded_up(size, BLOCK), cache.v).unflatten(2, (-1, together)).transpose(3, 4))
    for mine, theirs in ((blocked.k_scale, cache.k_scale), (blocked.v_scale, cache.v_scale)):
        if mine is not None and theirs is not None:
            mine[:, :, :positions] = theirs
    return blocked


def refuse_blocks(cache: KVCache) -> None:
    """Raise ValueError for a cache in blocks: called by what reads rows."""
    if cache.layout is not None:
        raise ValueError(
            'decode_attention: this cache is in blocks, which only backend "cpp" reads, for float32 or bfloat16 '
            "qkv; make it by new_cache with "
            "the backend and qkv_dtype of the calls, or convert it by kv_cache.in_rows"
        )


def _side_by_side(dtype: torch.dtype) -> tuple[int, int]:
    """Entries of a position, of keys, and positions, of values, that lie side by side in 32 bits."""
    if dtype not in (torch.float32, torch.bfloat16, torch.int8):
        raise TypeError(f"decode_attention: a cache in blocks is float32, bfloat16 or int8, got {dtype}")
    return 4 // dtype.itemsize, 4 if dtype == torch.int8 else 1


def _rounded_up(n: int, to: int) -> int:
    return -(-n // to) * to


def _cache(
    k: tuple[int, ...],
    v: tuple[int, ...],
    scale: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str,
    zeros: Callable[..., Tensor],
) -> KVCache:
    cache = KVCache(zeros(k, dtype=dtype, device=device), zeros(v, dtype=dtype, device=device))
    if dtype not in LARGEST_CODE:
        return cache
    return cache._replace(k_scale=torch.zeros(scale, device=device), v_scale=torch.zeros(scale, device=device))

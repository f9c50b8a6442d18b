"""Backend "cpp" of decode_attention, on the CPU: rotary, append and attention in one pass over a cache in blocks
(csrc/decode_attention_cpu.cpp).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_fast import _C  # noqa: F401 (registers the operators; importing this module fails where they were not built)
from star_fast.ops.dispatch import Launch
from star_fast.ops.kv_cache import KVCache, new_blocks

if not hasattr(torch.ops.star_fast, "large_pages"):
    raise ImportError(
        "star_fast._C is an older build without decode_attention in blocks: build it again (python setup.py "
        "build_ext --inplace)"
    )

_DTYPES = (torch.float32, torch.bfloat16)
_LARGEST_HEAD = 512  # so many products of 8 and 16 bits fit 32


@torch.library.register_fake("star_fast::decode_attention_blocks")
@torch.library.register_fake("star_fast::large_pages")
def _(*arguments: Any) -> None:
    """They write into what they are given and return nothing: no shape to tell."""


def run(qkv: Tensor, cache: KVCache, position: int, *, rotary: Tensor | None) -> Tensor:
    """See ops/decode_attention.py."""
    out = qkv.new_empty(qkv.shape[0], qkv.shape[2], qkv.shape[3])
    qkv = qkv if qkv.stride(3) == 1 else qkv.contiguous()
    rotary = None if rotary is None else rotary.float().contiguous()
    torch.ops.star_fast.decode_attention_blocks(
        qkv, cache.k, cache.v, cache.k_scale, cache.v_scale, position, rotary, out
    )
    return out


def new_cache(
    rows: int,
    heads: int,
    positions: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    qkv_dtype: torch.dtype | None,
) -> KVCache | None:
    """A cache in blocks; None where `run` will not be called: another device, dtype or head size than it takes."""
    if (
        torch.device(device).type != "cpu"
        or dtype not in (*_DTYPES, torch.int8)
        or (qkv_dtype or torch.float32) not in _DTYPES
        or _why_not_size(head_size)
    ):
        return None
    return new_blocks(rows, heads, positions, head_size, dtype, device, zeros=_zeros_in_large_pages)


def _zeros_in_large_pages(shape: tuple[int, ...], **kind: Any) -> Tensor:
    memory = torch.empty(shape, **kind)
    torch.ops.star_fast.large_pages(memory)  # before the first write: pages are laid out then
    return memory.zero_()


def why_not(qkv: Tensor, cache: KVCache, position: int | Tensor, *, rotary: Tensor | None) -> str | None:
    """None if the extension can serve this call."""
    if qkv.device.type != "cpu":
        return f"it runs on the CPU, qkv is on {qkv.device}"
    if qkv.dtype not in _DTYPES or cache.k.dtype not in (qkv.dtype, torch.int8):
        return (
            f"it takes float32 or bfloat16 with a cache of the same dtype or int8, got {qkv.dtype} and {cache.k.dtype}"
        )
    return _why_not_size(qkv.shape[3]) or (
        "the cache is in rows; it reads blocks, which new_cache makes for it" if cache.layout is None else None
    )


def _why_not_size(size: int) -> str | None:
    if size % 2:
        return "the head size is odd"
    return f"the head size is over {_LARGEST_HEAD}" if size > _LARGEST_HEAD else None


def fake(qkv: Tensor, cache: KVCache, position: int | Tensor, *, rotary: Tensor | None) -> Tensor:
    """An empty result."""
    return qkv.new_empty(qkv.shape[0], qkv.shape[2], qkv.shape[3])


def launches(qkv: Tensor, cache: KVCache, position: int | Tensor, *, rotary: Tensor | None) -> list[Launch]:
    """None: it is no kernel."""
    return []

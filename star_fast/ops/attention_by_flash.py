"""Causal attention by the flash-attn package, where it is really installed and no key is hidden."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from star_fast.ops import attention_by_sdpa
from star_fast.ops.dispatch import Launch
from star_fast.ops.rotary import rotate


def run(qkv: Tensor, keep: Tensor | None = None, *, rotary: Tensor | None = None, overwrite: bool = False) -> Tensor:
    """See ops/masked_attention.py; rotary is applied before, by torch's own operations (`rotary.rotate`)."""
    from flash_attn import flash_attn_func

    q, k, v = qkv.unbind(2)
    if rotary is not None:
        table = rotary[: qkv.shape[1], None]
        q, k = rotate(q, table), rotate(k, table)
    return flash_attn_func(q, k, v, causal=True, deterministic=True)


@functools.cache
def installed() -> bool:
    """Whether flash-attn is there with its compiled module; the Python part alone can do nothing."""
    return all(importlib.util.find_spec(name) is not None for name in ("flash_attn", "flash_attn_2_cuda"))


def why_not(
    qkv: Tensor, keep: Tensor | None = None, *, rotary: Tensor | None = None, overwrite: bool = False
) -> str | None:
    """None if flash-attn's compiled module is there and takes this call."""
    if keep is not None:
        return "a key mask is given, which flash-attn has no argument for"
    if not installed():
        return "flash-attn is not installed (its compiled module flash_attn_2_cuda is missing)"
    if qkv.device.type != "cuda" or qkv.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn takes float16 or bfloat16 on CUDA, got {qkv.dtype} on {qkv.device}"
    if qkv.shape[-1] > 256 or qkv.stride(-1) != 1:
        return (
            f"flash-attn takes head sizes up to 256 with unit stride, got {qkv.shape[-1]} with stride {qkv.stride(-1)}"
        )
    return None


fake, moved_bytes = attention_by_sdpa.fake, attention_by_sdpa.moved_bytes


def launches(
    qkv: Tensor, keep: Tensor | None = None, *, rotary: Tensor | None = None, overwrite: bool = False
) -> list[Launch]:
    """Rotary's launches where it is wanted, then the fused attention kernel."""
    return [
        *attention_by_sdpa.eager_rotary_launches(qkv, rotary),
        Launch("flash_attn_func", (qkv.shape[0], qkv.shape[3])),
    ]

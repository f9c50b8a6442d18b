"""Causal attention by torch's scaled_dot_product_attention, where no key is hidden: torch brings a fused kernel for that on CUDA."""

from __future__ import annotations

from torch import Tensor

from star_fast.ops.dispatch import Launch
from star_fast.ops.masked_attention import reference


def run(qkv: Tensor, keep: Tensor | None = None, *, rotary: Tensor | None = None) -> Tensor:
    """See ops/masked_attention.py; rotary is applied before, by elementwise torch operations."""
    return reference(qkv, keep, rotary=rotary)


def why_not(qkv: Tensor, keep: Tensor | None = None, *, rotary: Tensor | None = None) -> str | None:
    """None if this call has no key mask (with one, torch would read a (B, T, T) mask from memory)."""
    return None if keep is None else "a key mask is given, and scaled_dot_product_attention would need it as a (B, T, T) matrix"


def fake(qkv: Tensor, keep: Tensor | None = None, *, rotary: Tensor | None = None) -> Tensor:
    """An empty result."""
    batch, positions, _, heads, size = qkv.shape
    return qkv.new_empty(batch, positions, heads, size)


def launches(qkv: Tensor, keep: Tensor | None = None, *, rotary: Tensor | None = None) -> list[Launch]:
    """The fused attention kernel; torch's own launches for rotary are not listed one by one."""
    batch, _, _, heads, _ = qkv.shape
    return [*([Launch("torch elementwise rotary (q, k)", (2,))] if rotary is not None else []),
            Launch("torch scaled_dot_product_attention", (batch, heads))]

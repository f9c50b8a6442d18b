"""Causal attention by torch's scaled_dot_product_attention, where no key is hidden: torch brings a fused kernel for
that on CUDA.
"""

from __future__ import annotations

from torch import Tensor

from star_fast.ops.dispatch import Launch
from star_fast.ops.masked_attention import reference
from star_fast.ops.rotary import rotate_bytes, rotate_launches


def run(qkv: Tensor, keep: Tensor | None = None, *, rotary: Tensor | None = None, overwrite: bool = False) -> Tensor:
    """See ops/masked_attention.py; rotary is applied before, by torch's own operations (`rotary.rotate`)."""
    return reference(qkv, keep, rotary=rotary)


def why_not(
    qkv: Tensor, keep: Tensor | None = None, *, rotary: Tensor | None = None, overwrite: bool = False
) -> str | None:
    """None if this call has no key mask (with one, torch would read a (B, T, T) mask from memory)."""
    return (
        None
        if keep is None
        else "a key mask is given, and scaled_dot_product_attention would need it as a (B, T, T) matrix"
    )


def fake(qkv: Tensor, keep: Tensor | None = None, *, rotary: Tensor | None = None, overwrite: bool = False) -> Tensor:
    """An empty result."""
    batch, positions, _, heads, size = qkv.shape
    return qkv.new_empty(batch, positions, heads, size)


def launches(
    qkv: Tensor, keep: Tensor | None = None, *, rotary: Tensor | None = None, overwrite: bool = False
) -> list[Launch]:
    """Rotary's launches where it is wanted, then the fused attention kernel."""
    return [
        *eager_rotary_launches(qkv, rotary),
        Launch("torch scaled_dot_product_attention", (qkv.shape[0], qkv.shape[3])),
    ]


def moved_bytes(
    qkv: Tensor, keep: Tensor | None = None, *, rotary: Tensor | None = None, overwrite: bool = False
) -> int:
    """q, k, v read and the result written, one float32 a query (its statistic); rotary of q and k comes before and
    moves several times as much.
    """
    batch, positions, _, heads, size = qkv.shape
    rows = batch * positions * heads
    return rows * (4 * size * qkv.element_size() + 4) + (
        0 if rotary is None else 2 * rotate_bytes(rows * size, qkv.dtype)
    )


def eager_rotary_launches(qkv: Tensor, rotary: Tensor | None) -> list[Launch]:
    """Torch's launches that turn q and k, none without rotary."""
    return (
        []
        if rotary is None
        else [launch for name in "qk" for launch in rotate_launches(name, qkv.numel() // 3, qkv.dtype)]
    )

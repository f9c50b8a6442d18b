"""Backend "cpp": the compiled operators of star_fast._C (csrc/, built by setup.py). Importing this module fails where
they were not built.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_fast import _C
from star_fast.ops.dispatch import Launch
from star_fast.ops.sample_tokens import bad_rows_flag

HAS_CUDA: bool = _C.has_cuda  # whether the CUDA kernels were built in


@torch.library.register_fake("star_fast::sample_tokens")
def _(*arguments: Any) -> None:
    """Writes `out` and returns nothing: no shape to tell."""


def run(
    logits: Tensor,
    *,
    seed: int | Tensor,
    image_index: Tensor,
    position: int | Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    uncond: Tensor | None,
    guidance: float,
    out: Tensor | None,
) -> Tensor:
    """See ops/sample_tokens.py."""
    if out is None:
        out = image_index.new_empty(logits.shape[0])
    bad_rows = None if logits.device.type == "cpu" else bad_rows_flag(logits.device)
    seed_at, seed = (seed, 0) if isinstance(seed, Tensor) else (None, seed)
    position_at, position = (position, 0) if isinstance(position, Tensor) else (None, position)
    torch.ops.star_fast.sample_tokens(
        _unit_stride(logits),
        None if uncond is None else _unit_stride(uncond),
        image_index.contiguous(),
        seed_at,
        seed,
        position_at,
        position,
        temperature,
        top_k,
        top_p,
        guidance,
        out,
        bad_rows,
    )
    return out


def why_not(logits: Tensor, **settings: Any) -> str | None:
    """None if the extension can serve this call."""
    if logits.device.type == "cpu" or (logits.device.type == "cuda" and HAS_CUDA):
        return None
    return f"star_fast._C was built {'with' if HAS_CUDA else 'without'} CUDA, the logits are on {logits.device}"


def fake(logits: Tensor, *, image_index: Tensor, out: Tensor | None, **settings: Any) -> Tensor:
    """An empty result."""
    return image_index.new_empty(logits.shape[0]) if out is None else out


def launches(logits: Tensor, **settings: Any) -> list[Launch]:
    """One block a row."""
    return [Launch("sample_tokens_kernel", (logits.shape[0],))]


def _unit_stride(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()

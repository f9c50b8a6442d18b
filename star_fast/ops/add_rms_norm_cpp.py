"""Backend "cpp" of add_rms_norm: residual add and norm of a decoding step in one pass on the CPU (csrc/between_cpu.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from star_fast.ops.between_cpp import why_not_decoding_rows
from star_fast.ops.dispatch import Launch


def run(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dropout: float, seed: int) -> tuple[Tensor, Tensor]:
    """See ops/add_rms_norm.py."""
    x = x.contiguous()
    normed = torch.empty_like(x)
    new_residual = None if residual is None else torch.empty_like(x)
    torch.ops.star_fast.add_rms_norm(x, None if residual is None else residual.contiguous(), weight.contiguous(), eps, normed, new_residual)
    return normed, x if new_residual is None else new_residual


def why_not(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dropout: float, seed: int) -> str | None:
    """None if the extension can serve this call."""
    return "it has no dropout" if dropout else why_not_decoding_rows(x, x.shape[-1], residual, weight)


def fake(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dropout: float, seed: int) -> tuple[Tensor, Tensor]:
    """Empty results."""
    return torch.empty_like(x), x if residual is None else torch.empty_like(x)


def launches(*arguments: object) -> list[Launch]:
    """None: it is no kernel."""
    return []

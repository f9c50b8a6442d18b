"""Backend "cpp" of add_rms_norm: residual add, dropout and norm in one pass on the CPU, and one pass back
(csrc/between_cpu.cpp).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_fast.ops.add_rms_norm import keys, threshold
from star_fast.ops.between_cpp import why_not_rows
from star_fast.ops.dispatch import Launch


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dropout: float, seed: int
    ) -> tuple[Tensor, Tensor | None]:
        x, weight = x.contiguous(), weight.contiguous()
        mask = _mask(dropout, seed)
        normed = torch.empty_like(x)
        new_residual = torch.empty_like(x) if residual is not None or dropout else None
        torch.ops.star_fast.add_rms_norm(
            x, None if residual is None else residual.contiguous(), weight, eps, *mask, normed, new_residual
        )
        ctx.save_for_backward(x if new_residual is None else new_residual, weight)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.mask, ctx.dropout = eps, mask, dropout
        return normed, new_residual

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dnormed: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        h, weight = ctx.saved_tensors
        wants_x, wants_residual, wants_weight = ctx.needs_input_grad[:3]
        dx = torch.empty_like(h) if wants_x else None
        dresidual = torch.empty_like(h) if wants_residual and (ctx.dropout or not wants_x) else None
        dweight = torch.empty(weight.shape, dtype=torch.float32)
        torch.ops.star_fast.add_rms_norm_backward(
            h,
            weight,
            *(None if g is None else g.contiguous() for g in (dnormed, dsum)),
            ctx.eps,
            *ctx.mask,
            dresidual,
            dx,
            dweight,
        )
        # Without dropout both inputs of the sum have one gradient.
        return (
            dx,
            dx if wants_residual and dresidual is None else dresidual,
            dweight.to(weight.dtype) if wants_weight else None,
            None,
            None,
            None,
        )


def _mask(dropout: float, seed: int) -> tuple[int, int, int, float]:
    """Row key, column key, limit, scale; scale 0: no dropout."""
    return (*keys(seed), threshold(dropout), 1 / (1 - dropout)) if dropout else (0, 0, 0, 0.0)


def run(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dropout: float, seed: int
) -> tuple[Tensor, Tensor]:
    """See ops/add_rms_norm.py."""
    normed, new_residual = _AddRMSNorm.apply(x, residual, weight, eps, dropout, seed)
    return normed, x if new_residual is None else new_residual


def why_not(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dropout: float, seed: int) -> str | None:
    """None if the extension can serve this call."""
    return why_not_rows(x, x.shape[-1])


def fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dropout: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Empty results."""
    return torch.empty_like(x), torch.empty_like(x) if residual is not None or dropout else x


def launches(*arguments: object) -> list[Launch]:
    """None: it is no kernel."""
    return []

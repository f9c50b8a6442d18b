"""Batch norm over the rows that all ranks hold: statistics and gradients are those of one rank that holds them all."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from star_fast.config import ConfigError

_EPS = 1e-5  # torch.nn.BatchNorm1d's


class BatchNorm(nn.Module):
    """y = (x - mean) / sqrt(variance + 1e-5) * weight + bias, statistics over all rows of x on all ranks: (..., D) ->
    (..., D), dtype of x.

    Ranks may hold different numbers of rows, at least one each; every rank must call it, forward and backward (torch's
    SyncBatchNorm, which does the same, needs GPUs). Computed in float32 (float64 for float64), the variance from
    deviations. There are no running statistics: it is for training only.

    Raises:
        ConfigError: there is one row in all, which has no variance.

    Source:
        Ioffe and Szegedy (arXiv 1502.03167), algorithm 1; over all ranks as in SimSiam (arXiv 2011.10566).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Every rank calls it."""
        exact = torch.promote_types(x.dtype, torch.float32)
        rows_ND = x.flatten(0, -2).to(exact)
        if len(rows_ND) == 1 and _ranks() == 1:
            raise ConfigError(
                "method.projector_norm: expected 'none' for a micro-batch of a single projected feature, which "
                "has no variance, got 'batch'"
            )
        sums = sum_over_ranks(torch.cat([rows_ND.sum(0), rows_ND.new_full((1,), len(rows_ND))]))
        count = sums[-1].detach()
        deviations = rows_ND - sums[:-1] / count
        variance = sum_over_ranks((deviations * deviations).sum(0)) / count
        normed = deviations * (variance + _EPS).rsqrt() * self.weight.to(exact) + self.bias.to(exact)
        return normed.to(x.dtype).view(x.shape)


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of every rank's `x`, on every rank. The gradient is that of the sum of all ranks' losses, so backward is the
    same sum, of the gradients.
    """
    return _SumOverRanks.apply(x) if _ranks() > 1 else x


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        total = dout.clone()  # not in place: autograd may share it
        dist.all_reduce(total)
        return total

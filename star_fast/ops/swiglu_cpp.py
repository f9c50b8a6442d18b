"""Backend "cpp" of swiglu: one pass on the CPU, and one pass back (csrc/between_cpu.cpp)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_fast.ops.between_cpp import why_not_rows
from star_fast.ops.dispatch import Launch


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w1w3: Tensor) -> Tensor:
        w1w3 = w1w3.contiguous()
        out = fake(w1w3)
        torch.ops.star_fast.swiglu(w1w3, out)
        ctx.save_for_backward(w1w3)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        (w1w3,) = ctx.saved_tensors
        dw1w3 = torch.empty_like(w1w3)
        torch.ops.star_fast.swiglu_backward(w1w3, dout.contiguous(), dw1w3)
        return dw1w3


def run(w1w3: Tensor) -> Tensor:
    """See ops/swiglu.py."""
    return _SwiGLU.apply(w1w3)


def why_not(w1w3: Tensor) -> str | None:
    """None if the extension can serve this call."""
    return why_not_rows(w1w3, w1w3.shape[-1] // 2)


def fake(w1w3: Tensor) -> Tensor:
    """An empty result."""
    return w1w3.new_empty(*w1w3.shape[:-1], w1w3.shape[-1] // 2)


def launches(w1w3: Tensor) -> list[Launch]:
    """None: it is no kernel."""
    return []

"""Backend "cpp" of group_norm_silu: two passes over channels-last images on the CPU, for inference
(csrc/group_norm_cpu.cpp).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from star_fast import _C  # noqa: F401 (registers the operators; importing this module fails where they were not built)
from star_fast.ops.dispatch import Launch

_BLOCK = 32  # a row of whole pixels fills so many entries, or a multiple

if not hasattr(torch.ops.star_fast, "group_norm_silu"):
    raise ImportError(
        "star_fast._C is an older build without group_norm_silu: build it again (python setup.py build_ext --inplace)"
    )


@torch.library.register_fake("star_fast::group_norm_silu")
def _(*arguments: Any) -> None:
    """Writes its output and returns nothing: no shape to tell."""


def run(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, out: Tensor | None) -> Tensor:
    """See ops/group_norm_silu.py."""
    out = torch.empty_like(x) if out is None else out
    torch.ops.star_fast.group_norm_silu(x, weight.contiguous(), bias.contiguous(), groups, eps, silu, out)
    return out


def why_not(x: Tensor, weight: Tensor, bias: Tensor, *settings: object) -> str | None:
    """None if the extension can serve this call."""
    if x.device.type != "cpu":
        return f"it runs on the CPU, the call is on {x.device}"
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        return "it has no gradient: it is for inference"
    if (
        x.dtype not in (torch.float32, torch.bfloat16)
        or x.is_contiguous()
        or not x.is_contiguous(memory_format=torch.channels_last)
    ):
        return (
            f"it takes float32 or bfloat16, channels last and nothing else, got {x.dtype} of shape {tuple(x.shape)} "
            f"and strides {x.stride()}"
        )
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    if not x.numel() or channels * pixels % math.lcm(channels, _BLOCK):
        return (
            f"it takes images whose pixels fill whole rows of a multiple of {_BLOCK} entries, got shape "
            f"{tuple(x.shape)}"
        )
    return None


def fake(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, out: Tensor | None) -> Tensor:
    """An empty result."""
    return torch.empty_like(x) if out is None else out


def launches(*arguments: object) -> list[Launch]:
    """None: it is no kernel."""
    return []

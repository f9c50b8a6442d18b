"""Backend "cpp" of int8_linear: one pass that rounds the rows, one that multiplies and scales back
(csrc/int8_cpu.cpp).
"""

from __future__ import annotations

import torch
from torch import Tensor

from star_fast import _C  # noqa: F401 (registers the operators; importing this module fails where they were not built)
from star_fast.ops.dispatch import Launch
from star_fast.ops.int8_linear import Int8Weight

if not hasattr(torch.ops.star_fast, "int8_linear"):
    raise ImportError(
        "star_fast._C is an older build without int8_linear: build it again (python setup.py build_ext --inplace)"
    )


def run(x: Tensor, weight: Int8Weight) -> Tensor:
    """See ops/int8_linear.py."""
    return torch.ops.star_fast.int8_linear(
        x.contiguous(), weight.packed, weight.scale, weight.correction, weight.shape[0]
    )


def why_not(x: Tensor, weight: Int8Weight) -> str | None:
    """None: it serves every call."""
    return None  # int8_linear has refused what is not on the CPU


def fake(x: Tensor, weight: Int8Weight) -> Tensor:
    """An empty result."""
    return x.new_empty(x.shape[0], weight.shape[0])


def launches(x: Tensor, weight: Int8Weight) -> list[Launch]:
    """None: it is no kernel."""
    return []

"""Backend "cpp" of swiglu: the rows of a decoding step in one pass on the CPU (csrc/between_cpu.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from star_fast.ops.between_cpp import why_not_decoding_rows
from star_fast.ops.dispatch import Launch


def run(w1w3: Tensor) -> Tensor:
    """See ops/swiglu.py."""
    out = fake(w1w3)
    torch.ops.star_fast.swiglu(w1w3.contiguous(), out)
    return out


def why_not(w1w3: Tensor) -> str | None:
    """None if the extension can serve this call."""
    return why_not_decoding_rows(w1w3, w1w3.shape[-1] // 2)


def fake(w1w3: Tensor) -> Tensor:
    """An empty result."""
    return w1w3.new_empty(*w1w3.shape[:-1], w1w3.shape[-1] // 2)


def launches(w1w3: Tensor) -> list[Launch]:
    """None: it is no kernel."""
    return []

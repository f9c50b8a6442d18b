"""The current CUDA device: Triton launches, graph captures and events happen on it, whatever device their tensors are
on.
"""

from __future__ import annotations

import contextlib

import torch

_ALREADY_THERE = contextlib.nullcontext()


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A block in which `device` is the current one. Costs one look where it is that already; nothing on the CPU."""
    if device.type != "cuda" or device.index is None or device.index == torch.cuda.current_device():
        return _ALREADY_THERE
    return torch.cuda.device(device)

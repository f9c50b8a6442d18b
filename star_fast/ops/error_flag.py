"""Bad values found on a CUDA device: noted there without a wait, raised when the host next asks, once per batch.

Checking a tensor's value on the host would stall the stream (and cannot be part of a CUDA graph), so kernels set a bit
of one int32 per device instead. Who ends a batch (the decoder, the training step) calls `raise_if_set`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# Bits of the flag, and what each means.
POSITION_OUT_OF_RANGE = 1
TARGET_OUT_OF_RANGE = 2
SLOT_OUT_OF_RANGE = 4
_MEANINGS = {
    POSITION_OUT_OF_RANGE: "a decoding position was outside 0 ... T-1 of its cache; "
    "that step's output is meaningless and nothing was "
    "appended",
    TARGET_OUT_OF_RANGE: "a target was outside 0 ... V-1 of the codebook; the loss is meaningless",
    SLOT_OUT_OF_RANGE: "a contrast pair named a slot outside 0 ... S-1; the contrastive loss is meaningless",
}

_flags: dict[torch.device, Tensor] = {}


def flag(device: torch.device) -> Tensor:
    """The device's flag: (1,) int32, 0 = nothing noted. Made at first use, which must not be inside a CUDA graph
    capture.
    """
    if device not in _flags:
        if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the error flag of {device} must exist before a CUDA graph is captured: run the step once "
                "outside the capture first"
            )
        _flags[device] = torch.zeros(1, dtype=torch.int32, device=device)
    return _flags[device]


def flag_for(tensor: Tensor) -> Tensor:
    """The flag of the device that `tensor` is on; for a FakeTensor a fake one, which is not kept."""
    return tensor.new_empty(1, dtype=torch.int32) if isinstance(tensor, FakeTensor) else flag(tensor.device)


def note(bad: Tensor, bit: int) -> None:
    """Set `bit` of the flag where `bad` (0-d bool, on the flag's device) is True; no host synchronisation."""
    flag_for(bad).bitwise_or_(bad.to(torch.int32) * bit)


def noted(device: torch.device) -> str:
    """What kernels on `device` noted since the last call, "" for nothing, and clear it. Waits for the device."""
    value = int(_flags[device].item()) if device in _flags else 0
    if value:
        _flags[device].zero_()
    return "; ".join(meaning for bit, meaning in _MEANINGS.items() if value & bit)


def raise_if_set(device: torch.device) -> None:
    """Raise IndexError saying what `noted` says, if anything. Where ranks wait for each other all must agree first:
    Engine.raise_if_noted.
    """
    if found := noted(device):
        raise IndexError(found)

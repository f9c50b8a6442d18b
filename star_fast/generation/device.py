"""Where this process runs: its rank in the job, and its device."""

from __future__ import annotations

import os
import re

import torch

from star_fast.errors import UserError

_DEVICE = re.compile(r"cpu|cuda(?::(?P<index>[0-9]{1,4}))?")
_MOST_RANKS = 10**6


def rank_and_ranks() -> tuple[int, int]:
    """RANK and WORLD_SIZE as launchers set them; 0 and 1 without a launcher. Raises UserError when they are no such
    numbers.
    """
    ranks = _from_environment("WORLD_SIZE", 1, 1, _MOST_RANKS)
    return _from_environment("RANK", 0, 0, ranks - 1), ranks


def pick_device(name: str = "") -> torch.device:
    """The device called `name`: "cpu", "cuda:N", or "cuda": this rank's GPU (LOCAL_RANK). "" is "cuda" where there is
    one, else "cpu".

    Raises:
        UserError: no such name, or torch finds no such device.
    """
    found = _DEVICE.fullmatch(name)
    if name and not found:
        raise UserError(f"device: expected cpu, cuda or cuda:N, got {name[:80]!r}")
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (not name and not devices):
        return torch.device("cpu")
    if not devices:
        raise UserError(f"device: {name} was asked for, but torch finds no CUDA device; use cpu, or leave it empty")
    if found and found["index"] is not None:
        index = int(found["index"])
        if index >= devices:
            raise UserError(
                f"device: {name} was asked for, but torch finds {devices} CUDA devices: expected cuda:0 ... "
                f"cuda:{devices - 1}"
            )
        return torch.device("cuda", index)
    return torch.device("cuda", _from_environment("LOCAL_RANK", 0, 0, devices - 1))


def take_device(name: str = "") -> torch.device:
    """`pick_device`, made the current device of this thread: where a rank starts, so that nothing of it lands on
    another rank's GPU.

    Raises:
        UserError: as pick_device.
    """
    device = pick_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32: what models draw images in."""
    return torch.bfloat16 if device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() else torch.float32


def _from_environment(name: str, default: int, least: int, most: int) -> int:
    told = os.environ.get(name, str(default))
    if not (told.isascii() and told.isdecimal() and len(told) < 10 and least <= int(told) <= most):
        raise UserError(
            f"{name}: expected a whole number in {least} ... {most} in the environment, as launchers set it, got "
            f"{told[:80]!r}; "
            "unset it to run without a launcher"
        )
    return int(told)

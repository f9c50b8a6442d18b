"""Steps of optimizers, watched and died in: how a test kills a training of tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


class Killed(BaseException):
    """What no clean-up code catches by name."""


def killed(monkeypatch: pytest.MonkeyPatch, step: int, train: Callable[[], object]) -> None:
    """Run `train`, which dies within that step of an optimizer."""

    def dies(optimizer: torch.optim.AdamW, number: int) -> None:
        if number == step:
            raise Killed

    with monkeypatch.context() as patched:
        steps_of(patched, dies)
        with pytest.raises(Killed):
            train()


def steps_of(monkeypatch: pytest.MonkeyPatch, seen: Callable[[torch.optim.AdamW, int], None]) -> None:
    """Call `seen` with each optimizer after each of its steps, and the number of that step."""
    step, counts = torch.optim.AdamW.step, {}

    def watched(optimizer: torch.optim.AdamW, *arguments: Any) -> None:
        step(optimizer, *arguments)
        counts[id(optimizer)] = counts.get(id(optimizer), 0) + 1
        seen(optimizer, counts[id(optimizer)])

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)

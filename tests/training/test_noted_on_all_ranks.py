"""A bad value that a kernel noted on one rank stops every rank at the same step, none of them inside a collective."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from star_fast.ops import error_flag
from star_fast.training.engine import Engine

CPU = torch.device("cpu")


@pytest.mark.parametrize("noting", [0, 1, None])
def test_all_ranks_stop_together(noting: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(error_flag, "_flags", {})
    asked, stopped = [], []
    for rank in range(2):  # one after the other: what any_rank answers is the same for both
        if rank == noting:
            error_flag.note(torch.tensor(True), error_flag.TARGET_OUT_OF_RANGE)
        engine = SimpleNamespace(device=CPU, any_rank=lambda flag: asked.append(flag) or noting is not None)
        try:
            Engine.raise_if_noted(engine)
        except IndexError as error:
            stopped.append(str(error))
    assert asked == [rank == noting for rank in range(2)]  # every rank joins the collective, whatever it found
    assert len(stopped) == (0 if noting is None else 2)
    if noting is not None:
        assert "a target was outside" in stopped[noting] and "another rank" in stopped[1 - noting]
    assert error_flag.noted(CPU) == ""

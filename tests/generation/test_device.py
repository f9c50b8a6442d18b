"""Which device a rank takes, and what is said where it is not there."""

from __future__ import annotations

import pytest
import torch

from star_fast.errors import UserError
from star_fast.generation.device import pick_device


def test_names_where_there_are_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name, device in (("", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")):
        assert pick_device(name) == torch.device(device)
    for name in ("cuda:2", "cuda:99"):
        with pytest.raises(UserError, match=rf"device: {name} was asked for, but torch finds 2 CUDA devices: expected cuda:0 \.\.\. cuda:1"):
            pick_device(name)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"LOCAL_RANK: expected a whole number in 0 \.\.\. 1"):
        pick_device()


def test_names_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("") == pick_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0", "cuda:99"):
        with pytest.raises(UserError, match="torch finds no CUDA device"):
            pick_device(name)
    for name in ("foo", "meta", "mps", "cpu:1", "cuda:", "cuda:-1", "cuda:1\n", " cpu", "CUDA", "cuda:٣"):
        with pytest.raises(UserError, match="expected cpu, cuda or cuda:N") as caught:
            pick_device(name)
        assert "\n" not in str(caught.value)

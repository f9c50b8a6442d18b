"""Which device a rank takes, and what is said where it is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import star_fast
from star_fast.errors import UserError
from star_fast.generation import sample
from star_fast.generation.device import pick_device
from star_fast.generation.sample import sample_images
from star_fast.generation.sample_config import SampleConfig
from tests.cuda_double import CudaDouble, needs_no_gpu


def test_names_where_there_are_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name, device in (("", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")):
        assert pick_device(name) == torch.device(device)
    for name in ("cuda:2", "cuda:99"):
        with pytest.raises(
            UserError,
            match=rf"device: {name} was asked for, but torch finds 2 CUDA devices: expected cuda:0 \.\.\. cuda:1",
        ):
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


@needs_no_gpu
def test_a_rank_starts_on_its_own_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sampling on rank 1 must not find GPU 0 current when it loads its model."""

    class Loading(Exception):
        """The model is asked for."""

    def loading(config: SampleConfig, device: torch.device) -> None:
        raise Loading(str(device), torch.cuda.current_device())

    monkeypatch.setattr(sample, "prepare_drawing", loading)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with CudaDouble(), pytest.raises(Loading) as caught:
        sample_images(SampleConfig(out=str(tmp_path / "images.npz")))
    assert caught.value.args == ("cuda:1", 1)


def test_whoever_picks_a_device_takes_it() -> None:
    package = Path(star_fast.__file__).parent
    picking = {
        path.relative_to(package).as_posix() for path in package.rglob("*.py") if "pick_device(" in path.read_text()
    }
    # The probe looks before it reads anything, and takes the device afterwards; a caller of the API keeps the current
    # device that was his.
    assert picking == {"generation/device.py", "evaluation/probe.py", "api.py"}
    taking = {
        path.relative_to(package).as_posix() for path in package.rglob("*.py") if "take_device(" in path.read_text()
    }
    assert taking >= {"generation/sample.py", "evaluation/probe.py", "evaluation/evaluate.py", "data_commands.py"}

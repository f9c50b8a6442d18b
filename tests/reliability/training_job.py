"""A small training run as a user starts it, for the tests of what can go wrong with one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from star_fast.train import main as train_main
from tests.training.store import write_store

SMALL = [
    "--preset",
    "tiny",
    "--model.width",
    "32",
    "--model.blocks",
    "2",
    "--method.projector-width",
    "24",
    "--train.images-per-step",
    "8",
    "--train.tensorboard",
    "False",
    "--train.log-every-steps",
    "1",
    "--optim.warmup-steps",
    "0",
]


class Training:
    """Runs train.py's main in this process, on a small code store, and keeps what it said."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
        self.run, self.monkeypatch, self.capfd = folder / "run", monkeypatch, capfd
        self.codes = folder / "codes"
        write_store(self.codes)

    def __call__(self, *more: str) -> tuple[int, str]:
        """(exit status, what stderr ends with: the error line if there is one)."""
        self.monkeypatch.setattr(
            sys, "argv", ["train.py", *SMALL, "--data.codes", str(self.codes), "--run", str(self.run), *more]
        )
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            self.monkeypatch.delenv(name, raising=False)
        status = train_main()
        self.out, self.err = self.capfd.readouterr()
        assert "Traceback" not in self.out + self.err
        return status, next((line for line in self.err.splitlines() if line.startswith("error: ")), "")

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.run / "checkpoints").iterdir())

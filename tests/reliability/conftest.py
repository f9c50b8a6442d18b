"""What the tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reliability.training_job import Training


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Training:
    return Training(tmp_path, monkeypatch, capfd)

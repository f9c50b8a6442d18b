"""A run folder with a report, to be broken, and what a refusal looks like."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from star_fast.errors import UserError
from star_fast.evaluation.classifier import ClassifierConfig
from star_fast.evaluation.report import ReportConfig, write_report
from tests.evaluation.conftest import finished_run as finished_run  # a fixture

QUICK: dict[str, Any] = {
    "samples_per_class": 2,
    "attention_images": 1,
    "attention_queries": 1,
    "classifier": ClassifierConfig(epochs=1, channels=4),
    "device": "cpu",
}


@pytest.fixture(scope="module")
def reported(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a report; root is still the finished run's."""
    run = tmp_path_factory.mktemp("reported") / "run"
    shutil.copytree(finished_run / "run", run)
    write_report(ReportConfig(run, source=str(finished_run / "images"), **QUICK))
    return run


@pytest.fixture
def run(reported: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(reported, tmp_path / "run"))


@contextlib.contextmanager
def one_line(says: str) -> Iterator[None]:
    with pytest.raises(UserError, match=says) as caught:
        yield
    assert str(caught.value).isprintable()


def figures_of(run: Path) -> dict[str, Any]:
    """A report's figures, without what may differ between two reports of one run."""
    figures = json.loads(
        (run / "report.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
    )
    del figures["report"]
    return figures

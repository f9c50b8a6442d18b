"""Settings of a report and a probe that make no sense, devices and memory that are not there: one line each."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

from star_fast import cli
from star_fast.evaluation import report_material
from star_fast.evaluation.limits import explain_out_of_memory, require_memory
from star_fast.evaluation.report import ReportConfig, write_report
from star_fast.generation.device import pick_device
from tests.evaluation.conftest import finished_run as finished_run  # a fixture
from tests.reliability.reported_run import QUICK, one_line


@pytest.mark.parametrize(
    "name",
    [
        "foo",
        "cuda:99",
        "cuda:x",
        "cuda:-1",
        "meta",
        "mps",
        "cpu:7",
        "xpu",
        "cuda:" + "9" * 99,
        "\udc80",
        "a\nb",
        "\x00",
    ],
)
def test_devices_that_are_not_there(name: str) -> None:
    with one_line("^device: "):
        pick_device(name)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("samples_per_class", 0),
        ("samples_per_class", 10**15),
        ("samples_per_class", 10**400),
        ("batch_images", 0),
        ("batch_images", 10**15),
        ("attention_images", 10**15),
        ("attention_queries", 10**15),
        ("attention_queries", -1),
        ("guidance", 0.5),
        ("guidance", math.nan),
        ("guidance", math.inf),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", 1e300),
        ("top_k", -1),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("seed", -1),
        ("seed", 10**30),
        ("probe_train_views", 0),
        ("probe_max_train_images", -1),
    ],
)
def test_numbers_out_of_range(field: str, value: float, tmp_path: Path) -> None:
    with one_line(f"--{field.replace('_', '-')}|{field}"):
        ReportConfig(tmp_path, **{field: value})


def test_more_samples_than_memory_should_hold(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(finished_run / "run", tmp_path / "run"))
    monkeypatch.setattr(report_material, "MOST_SAMPLE_BYTES", 8 * 8 * 3 * 100 + 1)
    with one_line("--samples-per-class: expected at most 100 images of 8 x 8 pixels of each of 3 classes, got 101"):
        write_report(ReportConfig(run, **{**QUICK, "samples_per_class": 101}))


def test_memory_that_is_not_there_is_one_line() -> None:
    with one_line("ten images take .* GiB of memory, this machine has .*; take fewer"):
        require_memory(10**18, "ten images", "take fewer")
    for error in (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA\nout"),
    ):
        with one_line("out of memory: .*; take fewer"), explain_out_of_memory("take fewer"):
            raise error
    with pytest.raises(RuntimeError, match="other"), explain_out_of_memory("take fewer"):
        raise RuntimeError("other")


@pytest.mark.parametrize("command", ["report", "probe"])
def test_help_explains_itself(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert not any(
        word in text for word in (".md", "Config", "contrast_depth", "`star-fast report`", "`star-fast probe`")
    )

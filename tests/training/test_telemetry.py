"""training.telemetry with a clock that the test turns: rates, times, and which steps are logged."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from star_fast.training.telemetry import Telemetry
from star_fast.training.watch import Diverged, LossWatch


class Clock:
    """Stands still unless it is told to move."""

    now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def telemetry(folder: Path, first: int = 0, total: int = 10, log_every: int = 4) -> Telemetry:
    return Telemetry(folder, first, total, 32, log_every=log_every, main=True, tensorboard=False, watch=LossWatch(0.0))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rates_and_times_are_of_training_alone(tmp_path: Path, clock: Clock) -> None:
    told = telemetry(tmp_path)
    for step in range(10):
        clock.now += 2.0
        told.step(step, torch.full((5,), float(step)), torch.tensor(10.0 + step), 0.1 * step)
        if step == 3:
            clock.now += 100.0  # a validation, which begins after the line of step 4
            told.validation(4, 1.25)
    told.close()
    trained = [line for line in lines(tmp_path) if "loss" in line]
    assert [line["step"] for line in trained] == [4, 8, 10]
    assert [line["loss"] for line in trained] == [1.5, 5.5, 8.5]  # means of steps 0 ... 3, 4 ... 7 and 8, 9
    assert [line["grad_norm"] for line in trained] == [13.0, 17.0, 19.0] and [
        line["lr"] for line in trained
    ] == pytest.approx([0.3, 0.7, 0.9])
    assert [line["images"] for line in trained] == [128, 256, 320]
    assert [line["images_per_s"] for line in trained] == pytest.approx([16.0, 16.0, 16.0])
    # The wall's time, validation included
    assert [line["time_s"] for line in trained] == pytest.approx([8.0, 116.0, 120.0])
    assert [line for line in lines(tmp_path) if "val_ar" in line] == [{"step": 4, "images": 128, "val_ar": 1.25}]


def test_a_resume_counts_on_from_what_was_spent(tmp_path: Path, clock: Clock) -> None:
    kept = [{"step": 4, "loss": 1.0, "time_s": 70.0}, {"step": 5, "val_ar": 2.0}]
    damaged = {"step": 3, "loss": 1.0, "time_s": 10**400}  # no float holds it
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [damaged, *kept, {"step": 6, "loss": 1.0, "time_s": 90.0}])
    )
    told = telemetry(tmp_path, first=5)
    for step in range(5, 10):
        clock.now += 1.0
        told.step(step, torch.zeros(5), torch.tensor(0.0), 0.1)
    told.close()
    assert lines(tmp_path)[:2] == kept
    assert [(line["step"], line["time_s"], line["images_per_s"]) for line in lines(tmp_path)[2:]] == [
        (8, 73.0, 32.0),
        (10, 75.0, 32.0),
    ]


def test_a_new_run_begins_a_new_file(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0, "time_s": 70.0}\n')
    told = telemetry(tmp_path, total=1)
    clock.now += 3.0
    told.step(0, torch.ones(5), torch.tensor(0.0), 0.1)
    told.close()
    assert [(line["step"], line["time_s"]) for line in lines(tmp_path)] == [(1, 3.0)]


def test_a_gradient_that_is_not_finite_is_noticed_at_the_next_log_line_by_its_step(
    tmp_path: Path, clock: Clock
) -> None:
    """AdamW has skipped it on the device: losses stay finite."""
    noted = telemetry(tmp_path)
    for step in range(3):
        noted.step(step, torch.ones(5), torch.tensor(float("inf") if step == 1 else 1.0), 0.1)
    with pytest.raises(Diverged, match="step 2: the gradient's norm is not finite"):
        noted.step(3, torch.ones(5), torch.tensor(1.0), 0.1)
    noted.close()


def test_what_a_step_waits_for_data_and_what_is_made_in_the_background(tmp_path: Path, clock: Clock) -> None:
    background = {"views_s": 100.0}  # of earlier intervals
    told = Telemetry(
        tmp_path, 0, 4, 32, log_every=2, main=True, tensorboard=False, watch=LossWatch(0.0), background=background
    )

    def batches() -> Any:
        for number in range(4):
            clock.now += 0.5 * number
            background["views_s"] += 3.0
            yield number

    seen = []
    for step in told.waiting_for(batches()):
        seen.append(step)
        clock.now += 7.0
        told.step(step, torch.zeros(5), torch.tensor(1.0), 0.1)
    told.close()
    assert seen == [0, 1, 2, 3]
    # A step: half of 0 + 0.5, half of 1 + 1.5
    assert [(line["data_s"], line["views_s"]) for line in lines(tmp_path)] == [(0.25, 3.0), (1.25, 3.0)]

"""A run whose loss or weights are not finite stops, says where, and keeps what was good; a jump of the loss is
reported.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from star_fast.model.weights import load_model
from star_fast.training.watch import LEAST_STEPS, WINDOW_STEPS, Diverged, LossWatch
from tests.reliability.training_job import Training


def test_an_absurd_learning_rate_stops_the_run_and_exports_nothing(training: Training) -> None:
    status, line = training(
        "--train.max-steps",
        "8",
        "--train.log-every-steps",
        "3",
        "--optim.lr-per-256-images",
        "1e18",
        "--optim.clip-norm",
        "0",
    )
    assert status == 2
    assert "the loss is not finite (loss nan" in line
    assert "there is no checkpoint yet" in line
    assert not (training.run / "model").exists()
    assert not (training.run / "checkpoints").exists()
    (listed,) = training.run.glob("diverged-step-*.json")
    told = json.loads(listed.read_text())
    step = int(listed.stem.removeprefix("diverged-step-"))
    assert told["step"] == step >= 2
    assert f"step {step}: " in line
    assert len(told["images"]) == len(told["keys"]) == 8
    for text in (training.run / "metrics.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=pytest.fail)


def poisoned_step(monkeypatch: pytest.MonkeyPatch, bad_step: int, where: str) -> None:
    """From `bad_step` on (counted from 1) the student's weights, or only the loss, are NaN."""
    from star_fast.training.engine import Engine

    healthy = Engine.step

    def step(self: Engine, batches: list, number: int, lr: float) -> tuple:
        losses, norm = healthy(self, batches, number, lr)
        if number + 1 >= bad_step:
            if where == "weights":
                self.masters.tensors()[0].view(-1)[5] = float("nan")
            else:
                losses = losses * float("nan")
        return losses, norm

    monkeypatch.setattr(Engine, "step", step)


@pytest.mark.parametrize("where", ["loss", "weights"])
def test_the_last_good_checkpoint_outlives_a_nan(
    training: Training, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Weights that break between two log lines are noticed before they are saved."""
    poisoned_step(monkeypatch, 6, where)
    status, line = training(
        "--train.max-steps",
        "12",
        "--train.save-every-steps",
        "2",
        "--train.keep-checkpoints",
        "1",
        "--train.log-every-steps",
        "5",
    )
    assert status == 2
    assert "step 6: " in line
    assert "not finite" in line
    assert str(training.run / "checkpoints/step-0000004") in line
    assert training.checkpoints() == ["step-0000004"]
    assert not (training.run / "model").exists()
    monkeypatch.undo()
    status, _ = training("--train.max-steps", "12", "--optim.lr-per-256-images", "0.01", "--resume")
    assert status == 0
    assert "Resuming with other settings than before: optim.lr_per_256_images 0.02 -> 0.01" in training.out
    load_model(training.run / "model")


def test_the_watch_reports_a_spike_once_and_takes_a_new_level_for_granted() -> None:
    watch, rng = LossWatch(6.0), np.random.default_rng(0)
    losses = 5 + 0.1 * rng.standard_normal(3 * WINDOW_STEPS)
    assert not any(watch.see(step, {"loss": loss}) for step, loss in enumerate(losses, 1))
    step = len(losses)
    above = watch.see(step + 1, {"loss": 7.0})
    assert 15 < above < 25
    assert watch.episode == step + 1
    assert watch.see(step + 2, {"loss": 7.0}) is None
    assert watch.see(step + 3, {"loss": 5.0}) is None
    assert watch.episode is None
    assert watch.see(step + 4, {"loss": 7.0}) > 6
    later = [
        watch.see(step + 5 + index, {"loss": 7.0 + 0.1 * value})
        for index, value in enumerate(rng.standard_normal(20 * WINDOW_STEPS))
    ]
    assert not any(later)  # one report for a jump that stays
    assert watch.episode is None
    with pytest.raises(Diverged, match=r"step 9: the loss is not finite \(loss inf, ar 1\)"):
        watch.see(9, {"loss": float("inf"), "ar": 1.0})
    quiet = LossWatch(0.0)
    assert not any(quiet.see(step, {"loss": float(step)}) for step in range(1, 4 * LEAST_STEPS))


def test_a_spike_keeps_the_checkpoint_before_it_and_can_stop_the_run(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    from star_fast.training.engine import Engine

    healthy = Engine.step

    def step(self: Engine, batches: list, number: int, lr: float) -> tuple:
        losses, norm = healthy(self, batches, number, 0.0)
        return losses.clone().fill_(3 + 0.01 * (number % 3) + 5 * (number >= 60)), norm

    monkeypatch.setattr(Engine, "step", step)
    size = [
        "--train.save-every-steps",
        "8",
        "--train.keep-checkpoints",
        "1",
        "--train.validate-every-steps",
        "0",
        "--train.max-steps",
        "80",
    ]
    status, _ = training(*size)
    assert status == 0
    assert "step 61: loss 8 lies" in training.err
    assert training.checkpoints() == ["step-0000056", "step-0000080"]  # the last before the spike is spared
    lines = [json.loads(text) for text in (training.run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "spike_deviations" in line] == [61]
    shutil.rmtree(training.run)
    status, line = training(*size, "--train.stop-on-spike", "True")
    assert status == 2
    assert "step 61: " in line
    assert "train.stop_on_spike is set" in line
    assert training.checkpoints() == ["step-0000056"]

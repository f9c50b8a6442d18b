"""The classifier of a report: damaged, of another training, killed while it is saved, diverging, absurdly set."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from star_fast.evaluation import classifier as classifier_module
from star_fast.evaluation.classifier import Classifier, ClassifierConfig, train_classifier
from star_fast.evaluation.report import ReportConfig, write_report
from star_fast.storage import sha256_of_file
from tests.evaluation.conftest import finished_run as finished_run  # a fixture
from tests.reliability.reported_run import QUICK, figures_of, one_line
from tests.reliability.reported_run import reported as reported  # fixtures
from tests.reliability.reported_run import run as run


def damage_by_flip(folder: Path) -> None:
    file = folder / "classifier.safetensors"
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(data)


def damage_by_other_weights(folder: Path) -> None:
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8)
    record = (folder / "classifier.json").read_bytes()
    train_classifier(images, torch.arange(20) % 3, 3, QUICK["classifier"]).save(folder)
    (folder / "classifier.json").write_bytes(record)


def changed_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Damage that a matching sha256 covers."""

    def damage(folder: Path) -> None:
        weights = safetensors.torch.load_file(folder / "classifier.safetensors")
        change(weights)
        safetensors.torch.save_file(weights, folder / "classifier.safetensors")
        changed_record(weights_sha256=sha256_of_file(folder / "classifier.safetensors"))(folder)

    return damage


def changed_record(**values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        record = json.loads((folder / "classifier.json").read_text()) | values
        (folder / "classifier.json").write_text(json.dumps(record))

    return damage


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a flipped bit": damage_by_flip,
    "weights of another training": damage_by_other_weights,
    "a wrong shape": changed_weights(lambda weights: weights.update({"to_classes.bias": torch.zeros(1)})),
    "a wrong dtype": changed_weights(
        lambda weights: weights.update({"to_classes.bias": torch.zeros(3, dtype=torch.int64)})
    ),
    "a missing tensor": changed_weights(lambda weights: weights.pop("to_classes.bias")),
    "NaN": changed_weights(lambda weights: weights["to_classes.weight"].fill_(math.nan)),
    "no weights": lambda folder: (folder / "classifier.safetensors").unlink(),
    "a record cut short": lambda folder: (folder / "classifier.json").write_text('{"side": 8, '),
    "a record of an earlier version": lambda folder: changed_record(weights_sha256="")(folder),
    "a thousand million classes": changed_record(num_classes=10**9),
    "a thousand million pixels": changed_record(side=10**9),
    "a thousand million channels": changed_record(channels=10**9),
    "a record of text": changed_record(side="8"),
    "a record of 10^400": changed_record(side=10**400),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_classifier_is_refused(damage: Callable[[Path], Any], run: Path) -> None:
    damage(run / "classifier")
    with one_line("remove the folder to train the classifier again"):
        Classifier.load(run / "classifier")


def test_sizes_fit_the_file_before_anything_is_made(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that asks for the largest network there may be costs nothing while its weights are small."""
    changed_record(num_classes=2**24, channels=2**8, side=2**10)(run / "classifier")
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_: pytest.fail("a network was filled"))
    with one_line("classifier.safetensors"):
        Classifier.load(run / "classifier")


def test_a_report_trains_a_damaged_classifier_again_and_says_so(
    run: Path, reported: Path, finished_run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage_by_other_weights(run / "classifier")
    with caplog.at_level(logging.WARNING):
        write_report(ReportConfig(run, source=str(finished_run / "images"), **QUICK))
    assert [record.message.endswith("trained again") for record in caplog.records] == [True]
    for name in ("classifier.json", "classifier.safetensors"):
        assert (run / "classifier" / name).read_bytes() == (reported / "classifier" / name).read_bytes()
    assert figures_of(run) == figures_of(reported)


def test_a_report_killed_between_weights_and_record_leaves_no_mixture(
    run: Path, reported: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it saves the classifier of other settings, and started again with the first ones: the report is the
    first one's.
    """

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    other = {**QUICK, "classifier": ClassifierConfig(epochs=1, channels=4, seed=1)}
    with monkeypatch.context() as patched:
        patched.setattr(classifier_module, "atomic_write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            write_report(ReportConfig(run, source=str(finished_run / "images"), **other))
    assert (run / "classifier/classifier.safetensors").read_bytes() != (
        reported / "classifier/classifier.safetensors"
    ).read_bytes()
    write_report(ReportConfig(run, source=str(finished_run / "images"), **QUICK))
    assert figures_of(run) == figures_of(reported)


def test_a_classifier_that_diverges_says_so() -> None:
    images = torch.randint(0, 256, (40, 1, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with one_line(r"not finite.*smaller --classifier\.lr"):
        train_classifier(
            images,
            torch.arange(40) % 2,
            2,
            ClassifierConfig(epochs=20, images_per_step=8, channels=4, lr=1e3, weight_decay=1e3),
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("epochs", 10**15),
        ("images_per_step", 1),
        ("images_per_step", 10**15),
        ("lr", 0.0),
        ("lr", math.nan),
        ("lr", 1e30),
        ("weight_decay", -1.0),
        ("weight_decay", math.inf),
        ("channels", 0),
        ("channels", 10**9),
        ("largest_side", 10**9),
        ("max_images", -1),
        ("seed", -1),
    ],
)
def test_numbers_of_the_classifier_out_of_range(field: str, value: float) -> None:
    with one_line(rf"--classifier\.{field.replace('_', '-')}: expected "):
        ClassifierConfig(**{field: value})

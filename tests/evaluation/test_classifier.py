"""The small classifier: learns a planted class, is deterministic, keeps its word after a save."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from star_fast.errors import UserError
from star_fast.evaluation.classifier import Classifier, ClassifierConfig, input_side, to_input, train_classifier

CONFIG = ClassifierConfig(epochs=8, images_per_step=16, channels=4, largest_side=24)


def bars(count: int, side: int, channels: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with a bright bar: class 0 lying, class 1 standing."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    images = torch.randint(0, 90, (count, channels, side, side), generator=generator, dtype=torch.uint8)
    third = side // 3
    images[labels == 0, :, third : 2 * third] += 120
    images[labels == 1, :, :, third : 2 * third] += 120
    return images, labels


@pytest.mark.parametrize(("side", "channels"), [(12, 1), (80, 3)])
def test_learns_and_survives_a_save(side: int, channels: int, tmp_path: Path) -> None:
    images, labels = bars(160, side, channels, 0)
    fresh, fresh_labels = bars(60, side, channels, 1)
    classifier = train_classifier(images, labels, 2, CONFIG)
    verdict = classifier.judge(fresh, images_per_step=7)
    assert verdict.accuracy(fresh_labels) > 0.9
    assert verdict.features.shape == (60, 64) and verdict.probs.shape == (60, 2)
    torch.testing.assert_close(verdict.probs.sum(1), torch.ones(60))
    classifier.save(tmp_path)
    again = Classifier.load(tmp_path)
    assert torch.equal(again.judge(fresh, images_per_step=7).features, verdict.features)
    assert again.record == classifier.record


def test_same_seed_same_classifier() -> None:
    images, labels = bars(64, 12, 1, 0)
    state = torch.random.get_rng_state()
    first, second = (
        train_classifier(images, labels, 2, ClassifierConfig(epochs=2, images_per_step=16, channels=4))
        .judge(images)
        .probs
        for _ in range(2)
    )
    other = (
        train_classifier(images, labels, 2, ClassifierConfig(epochs=2, images_per_step=16, channels=4, seed=1))
        .judge(images)
        .probs
    )
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's randomness is left alone


def test_input_size_and_range() -> None:
    assert [input_side(*size, 64) for size in ((28, 28), (32, 32), (48, 40), (256, 256))] == [28, 32, 48, 64]
    x = to_input(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 1, 2, 2), 2)
    assert x.min() == -1 and x.max() == 1
    constant = to_input(torch.full((1, 3, 200, 200), 51, dtype=torch.uint8), 64)
    torch.testing.assert_close(constant, torch.full((1, 3, 64, 64), 51 / 127.5 - 1))


def test_bad_input_says_what_came(tmp_path: Path) -> None:
    images, labels = bars(20, 12, 1, 0)
    with pytest.raises(UserError, match="one label each, got 20 images"):
        train_classifier(images, labels[:5], 2, CONFIG)
    with pytest.raises(ValueError, match="must be uint8"):
        to_input(images.float(), 12)
    classifier = train_classifier(images, labels, 2, ClassifierConfig(epochs=1, channels=4))
    with pytest.raises(UserError, match="1 channels, as it was trained on, got 3"):
        classifier.judge(images.expand(-1, 3, -1, -1))
    classifier.save(tmp_path)
    (tmp_path / "classifier.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"its sha256 is not the one in classifier\.json"):
        Classifier.load(tmp_path)

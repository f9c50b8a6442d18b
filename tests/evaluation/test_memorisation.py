"""evaluation.memorisation against loops: who is nearest, what counts as too near, and codes that are a training
image's.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from star_fast.evaluation.memorisation import memorisation, nearest
from tests.training.store import write_store


def distance(a: list[float], b: list[float]) -> float:
    dot, norms = sum(x * y for x, y in zip(a, b, strict=True)), (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5
    return max(0.0, 1 - dot / norms)


def test_the_nearest_by_a_loop() -> None:
    features, training = torch.randn(7, 5, dtype=torch.float64), torch.randn(1100, 5, dtype=torch.float64)
    found, places = nearest(features, training, 3)
    for row, (near, indices) in enumerate(zip(found.tolist(), places.tolist(), strict=True)):
        expected = sorted(
            (distance(features[row].tolist(), other), index) for index, other in enumerate(training.tolist())
        )[:3]
        assert near == pytest.approx([value for value, _ in expected], abs=1e-6) and indices == [
            index for _, index in expected
        ]
    assert nearest(features, training[:2], 3)[0].shape == (7, 2)


def test_copies_are_found_and_honest_samples_are_not(tmp_path: Path) -> None:
    store = write_store(tmp_path)
    rows = store.train_indices[:40]
    generator = torch.Generator().manual_seed(0)
    training, held_out, fresh = (torch.randn(count, 8, generator=generator) for count in (40, 300, 200))
    codes = torch.full((200, 16), 15)
    codes[3], codes[7] = store.codes(rows[5:6], [2])[0, 0], store.codes(rows[39:], [0])[0, 0]
    honest = memorisation(fresh, held_out, training, codes, store, rows)
    assert (honest.training_images, honest.samples, honest.same_codes) == (40, 200, 2) and honest.below_limit < 0.05
    limit = sorted(min(distance(a, b) for b in training.tolist()) for a in held_out.tolist())
    # 1 % of 300: between the third and the fourth
    assert limit[2] <= honest.limit <= limit[3] and abs(honest.held_out_median_distance - limit[149]) < 2e-3
    copied = memorisation(torch.cat([training * 3, fresh[:160]]), held_out, training, codes, store, rows)
    assert 0.2 <= copied.below_limit < 0.25  # forty of two hundred

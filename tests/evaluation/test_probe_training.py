"""Training and judging of probes against arithmetic written out here: one layer at a time, float64 where rounding
matters, loops for neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from star_fast.errors import UserError
from star_fast.evaluation import probe_training
from star_fast.evaluation.probe_features import InMemory
from star_fast.evaluation.probe_training import Schedule, accuracies, neighbour_accuracies, step_images, train_probes

CLASSES = 5


def planted(count: int, heads: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    directions = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(99))
    return torch.randn(count, heads, width, generator=generator) + 0.7 * directions[labels][:, None], labels


def by_hand(
    features: torch.Tensor, labels: torch.Tensor, schedule: Schedule, lr: float, head: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One layer in float64: weight with the bias as its last row (D+1, C), running mean and variance (D,)."""
    count, heads, width = features.shape
    generator = torch.Generator().manual_seed(schedule.seed)
    start = torch.zeros(heads, width + 1, CLASSES)
    torch.nn.init.trunc_normal_(start[:, :width], std=0.01, generator=generator)
    weight, velocity = start[head].double(), torch.zeros(width + 1, CLASSES, dtype=torch.float64)
    mean, variance = torch.zeros(width, dtype=torch.float64), torch.ones(width, dtype=torch.float64)
    batch = step_images(count, schedule.images_per_step)
    for epoch in range(schedule.epochs):
        order = torch.randperm(count, generator=generator)
        torch.randint(1, (count,), generator=generator)  # which view
        for step in range(count // batch):
            chosen = order[step * batch : (step + 1) * batch]
            x = features[chosen, head].double()
            batch_mean, spread = x.mean(0), ((x - x.mean(0)) ** 2).mean(0)
            mean, variance = 0.9 * mean + 0.1 * batch_mean, 0.9 * variance + 0.1 * spread * batch / (batch - 1)
            x = torch.cat([(x - batch_mean) / (spread + 1e-6).sqrt(), torch.ones(batch, 1, dtype=torch.float64)], 1)
            scores = (x @ weight).exp()
            error = scores / scores.sum(1, keepdim=True)
            error[range(batch), labels[chosen]] -= 1
            gradient = x.t() @ error / batch
            velocity = 0.9 * velocity + gradient * 0.001 * weight.norm() / gradient.norm()
            at = epoch + step / (count // batch)
            warm = (
                at / schedule.warmup_epochs
                if at < schedule.warmup_epochs
                else 0.5
                * (1 + math.cos(math.pi * (at - schedule.warmup_epochs) / (schedule.epochs - schedule.warmup_epochs)))
            )
            weight = weight - lr * warm * velocity
    return weight, mean, variance


@pytest.mark.parametrize("group_bytes", [2**28, 1], ids=["all heads together", "one head after the other"])
def test_layers_are_what_plain_arithmetic_gives(group_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every head and every learning rate: as if it were alone."""
    monkeypatch.setattr(probe_training, "_GROUP_BYTES", group_bytes)
    features, labels = planted(300, 3, 6, seed=1)
    schedule = Schedule((6.4, 0.5), 5, 2, 64, 7)
    probes = train_probes(InMemory([features]), labels, CLASSES, schedule)
    for number, lr in enumerate(schedule.lr):
        for head in range(3):
            weight, mean, variance = by_hand(features, labels, schedule, lr, head)
            torch.testing.assert_close(probes.weight[number, head].double(), weight, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(probes.mean[head].double(), mean, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(probes.variance[head].double(), variance, rtol=1e-5, atol=1e-6)
    assert (probes.weight[0] - probes.weight[1]).abs().max() > 0.01
    judged, truth = planted(100, 3, 6, seed=2)
    right = torch.zeros(2, 3)
    for number in range(2):
        for head in range(3):
            x = (judged[:, head] - probes.mean[head]) / (probes.variance[head] + 1e-6).sqrt()
            named = (x @ probes.weight[number, head, :-1] + probes.weight[number, head, -1]).argmax(1)
            right[number, head] = (named == truth).double().mean()
    torch.testing.assert_close(accuracies(probes, InMemory([judged]), truth), right.double())
    assert right[0].min() > 0.4  # chance is 0.2


def test_learning_rates_share_the_features_and_nothing_else() -> None:
    features, labels = planted(200, 2, 6, seed=3)
    alone = [
        train_probes(InMemory([features]), labels, CLASSES, Schedule((lr,), 4, 1, 64, 0)).weight[0]
        for lr in (1.0, 20.0)
    ]
    together = train_probes(InMemory([features]), labels, CLASSES, Schedule((1.0, 20.0), 4, 1, 64, 0)).weight
    assert torch.equal(together[0], alone[0]) and torch.equal(together[1], alone[1])


def test_one_learning_rate_may_run_away() -> None:
    features, labels = planted(200, 1, 6, seed=3)
    schedule = Schedule((1.0, 1e6), 60, 0, 64, 0)
    assert train_probes(InMemory([features]), labels, CLASSES, schedule).finite() == [True, False]
    with pytest.raises(UserError, match="not finite; give a smaller --lr than 1"):
        train_probes(InMemory([features * math.nan]), labels, CLASSES, schedule)


def test_neighbours_by_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """DINO's vote, pair by pair in float64; blocks and pieces smaller than the sets, so that candidates meet across
    them.
    """
    train, labels = planted(90, 2, 4, seed=4)
    judged, truth = planted(50, 2, 4, seed=5)
    expected = []
    for head in range(2):
        right = 0
        for query, label in zip(judged[:, head].double(), truth.tolist(), strict=True):
            cosines = [((query @ key) / (query.norm() * key.norm())).item() for key in train[:, head].double()]
            votes = [0.0] * CLASSES
            for index in sorted(range(len(cosines)), key=lambda index: -cosines[index])[:20]:
                votes[labels[index]] += math.exp(cosines[index] / 0.07)
            right += votes.index(max(votes)) == label
        expected.append(right / 50)

    class InBlocks(InMemory):
        def blocks(self) -> Iterator[torch.Tensor]:
            yield from self.views[0].split(13)

    monkeypatch.setattr(probe_training, "BLOCK_IMAGES", 8)
    # Two blocks: the judged ones are gone through in two turns
    monkeypatch.setattr(probe_training, "_QUERY_BYTES", 2 * 13 * (2 * 4 * 4 + 12 * 20 * 2))
    got = neighbour_accuracies(InBlocks([train]), labels, InBlocks([judged]), truth, CLASSES)
    assert got.tolist() == pytest.approx(expected)
    assert all(0.4 < share < 1 for share in expected)
    # Fewer than 20 there are
    few = neighbour_accuracies(InMemory([train[:3]]), labels[:3], InMemory([judged]), truth, CLASSES)
    assert few.shape == (2,)

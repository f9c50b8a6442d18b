"""ops.sample_tokens: the draws against exact probabilities, computed by sorting in float64. Fixed seeds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.token_draws import draw, logits_of, needs_extension


def exact_probabilities(logits: Tensor, top_k: int, top_p: float, temperature: float) -> Tensor:
    """(V,) float64 by sorting; fails where top-p falls too close to a boundary to tell by float64."""
    scaled, order = (logits.double() / temperature).sort(descending=True)
    probs = scaled.softmax(0)
    if top_k:
        probs = torch.where(torch.arange(len(probs)) < top_k, probs, 0)
        probs = probs / probs.sum()
    if top_p < 1:
        before = probs.cumsum(0) - probs
        assert (before - top_p).abs().min() > 1e-5, "choose other logits"
        probs = torch.where(before <= top_p, probs, 0)
    return torch.zeros_like(probs).scatter(0, order, probs / probs.sum())


GRID = [(k, p, t) for k in (0, 1, 7, 150) for p in (1.0, 0.9, 0.35) for t in (0.6, 1.0, 1.8)]


@needs_extension
def test_a_million_draws_stay_in_the_allowed_set() -> None:
    per_setting = -(-1_000_000 // len(GRID))
    for case, (top_k, top_p, temperature) in enumerate(GRID):
        logits = logits_of(1, 300, case)
        tokens = draw(
            logits.expand(per_setting, -1),
            "cpp",
            seed=case,
            position=3,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
        )
        probs = exact_probabilities(logits[0], top_k, top_p, temperature)
        counts = torch.bincount(tokens, minlength=300)
        assert counts[probs == 0].sum() == 0, (top_k, top_p, temperature)
        assert (counts[probs > 1e-3] > 0).all(), (top_k, top_p, temperature)


def chi_square_p(counts: Tensor, probs: Tensor) -> float:
    """Probability of a statistic as large as this or larger; cells that expect under 5 are put together."""
    expected = probs * counts.sum()
    small = expected < 5
    counts = torch.cat([counts[~small], counts[small].sum()[None]]).double()
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    if len(expected) == 1:
        return 1.0
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2, dtype=torch.float64), statistic / 2))


@pytest.mark.parametrize("varied", ["image_index", "position", "seed"])
def test_frequencies(varied: str) -> None:
    """Over 36 settings, 20 000 draws each: no p-value below 1e-4, and the median is an ordinary one."""
    values = []
    for case, (top_k, top_p, temperature) in enumerate(GRID if varied == "image_index" else GRID[:4]):
        logits, n = logits_of(1, 19, 50 + case), 20_000 if varied == "image_index" else 2_000
        settings = {"top_k": top_k, "top_p": top_p, "temperature": temperature}
        if varied == "image_index":
            tokens = draw(logits.expand(n, -1), seed=case, position=2**20, **settings)
        else:
            one = torch.tensor([case])
            tokens = torch.cat(
                [draw(logits, image_index=one, **{"seed": 5, "position": 5, varied: i}, **settings) for i in range(n)]
            )
        probs = exact_probabilities(logits[0], top_k, top_p, temperature)
        counts = torch.bincount(tokens, minlength=19)
        assert counts[probs == 0].sum() == 0
        values.append(chi_square_p(counts, probs))
    assert min(values) > 1e-4, values
    many = [p for p in values if p < 1]
    assert not many or 0.05 < sorted(many)[len(many) // 2] < 0.95, values

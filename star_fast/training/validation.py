"""The held-out images as fixed batches: the plain view (centre) of each, true labels, nothing
hidden, nothing dropped.
"""

from __future__ import annotations

import torch

from star_fast.config import RunConfig
from star_fast.data.codes import CodeStore
from star_fast.method.batch import Batch

MOST_IMAGES = 10_000


def held_out_batches(store: CodeStore, config: RunConfig, rank: int, ranks: int) -> list[Batch]:
    """This rank's share of at most MOST_IMAGES held-out images, every ranks-th one, in batches of at most 64."""
    images = store.held_out_indices[:MOST_IMAGES][rank::ranks]
    batches = []
    for start in range(0, len(images), 64):
        chunk = images[start : start + 64]
        targets = store.codes(chunk, [store.plain_view]).flatten(0, 1)
        batches.append(
            Batch(
                targets[:, :-1].contiguous(), store.labels[chunk], targets, None, torch.zeros(0, dtype=torch.int64), 0
            )
        )
    return batches

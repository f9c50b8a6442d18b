"""Does the model draw its training images again? Samples against their nearest training images, judged by how near
held-out images come to these.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from star_fast.data.codes import CodeStore

MOST_TRAINING_IMAGES = 5000  # compared with
SHOWN_NEIGHBOURS = 3
# This share of held-out images is nearer to a training image than its quantile; so many samples are expected to be
_LIMIT = 0.01
_ROWS = 512  # of a block of distances


@dataclass(frozen=True)
class Memorisation:
    """How near samples come to training images, in 1 - cosine of a classifier's features."""

    training_images: int  # compared with
    samples: int
    median_distance: float  # of samples to their nearest training image
    held_out_median_distance: float  # of held-out images
    limit: float  # the distance below which 1 % of the held-out images lie
    below_limit: float  # share of samples below it
    same_codes: int  # samples whose codes are, all of them, those of a view of these training images


def nearest(features: Tensor, training: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """Distances (N, count) float32, rising, and places (N, count) int64, of the nearest of `training` (M, D) to each of
    `features` (N, D): 1 - cosine.
    """
    training = F.normalize(training.float(), dim=1)
    parts = [
        (1 - F.normalize(part.float(), dim=1) @ training.t())
        .clamp_min(0)
        .topk(min(count, len(training)), dim=1, largest=False)
        for part in features.split(_ROWS)
    ]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def memorisation(
    samples: Tensor, held_out: Tensor, training: Tensor, sample_codes: Tensor, store: CodeStore, rows: Tensor
) -> Memorisation:
    """Features (N, D) of samples, (N', D) of held-out images, (M, D) of the training images that are the store's
    `rows`; codes (N, T) of the samples.
    """
    ours, theirs = (nearest(features, training)[0][:, 0] for features in (samples, held_out))
    limit = torch.quantile(theirs.double(), _LIMIT).item()
    known: set[bytes] = set()
    for part in rows.split(_ROWS):
        codes = store.codes(part, range(len(store.views)))
        known.update(row.numpy().tobytes() for row in codes.flatten(0, 1))
    same = sum(row.numpy().tobytes() in known for row in sample_codes)
    return Memorisation(
        len(rows),
        len(samples),
        ours.median().item(),
        theirs.median().item(),
        limit,
        (ours < limit).double().mean().item(),
        same,
    )

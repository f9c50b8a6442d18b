"""The five metrics of the ADM suite (Dhariwal and Nichol 2021) from Inception's features: FID, sFID, Inception Score,
precision, recall.

    FID         Fréchet distance of the pool features (2048) of samples and of the reference
    sFID        the same of the spatial features (2023)
    IS          exp of the mean KL divergence of each image's class distribution from their mean, in groups of 5000
                in the order that they come
    precision, recall   manifolds.py, on the pool features

Everything but the distances of precision and recall is float64. Features come in batches and are not kept, except the
pool features, which precision and recall need: 8 KiB an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from star_fast.errors import UserError
from star_fast.evaluation.frechet import frechet_distance
from star_fast.evaluation.manifolds import NEIGHBOURS, Distances, precision_recall
from star_fast.evaluation.moments import Moments

if TYPE_CHECKING:
    from star_fast.evaluation.inception import Features

POOL_WIDTH, SPATIAL_WIDTH = 2048, 2023  # the second: 17 x 17 places, 7 channels
SPLIT_IMAGES = 5000  # of a group of the Inception Score


class InceptionScore:
    """Streaming Inception Score: each group of `split_images` gives exp(mean over images of KL(p | mean p)); the last
    may be smaller, as in ADM.

    mean KL = mean of sum p log p - sum q log q with q the mean of p, so two sums are all that is kept of a group.
    """

    def __init__(self, split_images: int = SPLIT_IMAGES) -> None:
        self.split_images, self.images = split_images, 0
        self._scores: list[float] = []
        self._clear()

    def _clear(self) -> None:
        self._in_group, self._plogp, self._p = 0, 0.0, 0.0

    def add(self, logits: Tensor) -> None:
        """Take logits (n, classes). Raises UserError where one is not finite."""
        if not logits.isfinite().all():
            raise UserError("logits: NaN or infinity among them; the network's weights are damaged")
        while len(logits):
            part, logits = logits.split(
                [took := min(len(logits), self.split_images - self._in_group), len(logits) - took]
            )
            logp = part.double().log_softmax(1)
            p = logp.exp()
            self._plogp, self._p = self._plogp + torch.special.xlogy(p, p).sum(), self._p + p.sum(0)
            self._in_group += took
            self.images += took
            if self._in_group == self.split_images:
                self._scores.append(self._group())
                self._clear()

    def _group(self) -> float:
        mean = self._p / self._in_group
        return torch.exp(self._plogp / self._in_group - torch.special.xlogy(mean, mean).sum()).item()

    def scores(self) -> list[float]:
        """One a group. Raises UserError without any image."""
        if not self.images:
            raise UserError("Inception Score: of no images")
        return self._scores + ([self._group()] if self._in_group else [])


class Gaussians(NamedTuple):
    """What FID and sFID need to know of a set: means and covariances, float64."""

    mu: NDArray[np.float64]  # (2048,)
    sigma: NDArray[np.float64]  # (2048, 2048)
    # (2023,); None, with sigma_s: statistics of other codes, which have no spatial features
    mu_s: NDArray[np.float64] | None
    sigma_s: NDArray[np.float64] | None  # (2023, 2023)


class FeatureStatistics:
    """What the metrics need of a set of images, gathered batch by batch.

    Args:
        keep_every, keep_most: pool features of every so-many-th image are kept for precision and recall, at most so
            many; None: no limit.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        split_images: int = SPLIT_IMAGES,
        keep_every: int = 1,
        keep_most: int | None = None,
    ) -> None:
        self.pool_moments = Moments(POOL_WIDTH, device, "pool features")
        self.spatial_moments = Moments(SPATIAL_WIDTH, device, "spatial features")
        self.inception_score = InceptionScore(split_images)
        self._keep_every, self._keep_most = keep_every, keep_most
        self._pool: list[Tensor] = []
        self._kept = 0

    @property
    def images(self) -> int:
        """How many have come."""
        return self.pool_moments.rows

    def add(self, features: Features) -> None:
        """The next images' features, on any device."""
        first = -self.images % self._keep_every
        kept = features.pool[first :: self._keep_every]
        if self._keep_most is not None:
            kept = kept[: self._keep_most - self._kept]
        self.pool_moments.add(features.pool)
        self.spatial_moments.add(features.spatial)
        self.inception_score.add(features.logits)
        self._pool.append(kept.to("cpu", torch.float32, copy=True))  # a view would keep the whole batch
        self._kept += len(kept)

    def gaussians(self) -> Gaussians:
        """Means and covariances of both kinds of features."""
        return Gaussians(*self.pool_moments.result(), *self.spatial_moments.result())

    def pool(self) -> Tensor:
        """(N, 2048) float32 on the CPU: the pool features kept."""
        if len(self._pool) != 1:
            whole, end = torch.empty(self._kept, POOL_WIDTH), self._kept
            while self._pool:  # each part is let go as soon as it is copied: torch.cat would hold all twice
                part = self._pool.pop()
                whole[end - len(part) : end] = part
                end -= len(part)
            self._pool = [whole]
        return self._pool[0]


@dataclass(frozen=True)
class AdmMetrics:
    """The five figures."""

    fid: float
    sfid: float | None  # None: the reference has no statistics of spatial features
    inception_score: float  # mean over groups
    inception_score_spread: float  # standard deviation over groups; 0 with a single one
    precision: float | None  # None: the reference holds no images or features to measure it with
    recall: float | None


def adm_metrics(
    samples: FeatureStatistics,
    reference: Gaussians,
    reference_pool: Tensor | None,
    *,
    neighbours: int = NEIGHBOURS,
    distances: Distances = "float32",
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> AdmMetrics:
    """The five metrics of samples against a reference.

    Args:
        reference_pool: (N', 2048) float32 for precision and recall, or None.
        device: where matrices are decomposed and distances computed.

    Raises:
        UserError: too few images, features that are not finite, or a reference whose covariance is none.
    """
    own = samples.gaussians()
    fid, sfid = _distance("FID", own[:2], reference[:2], device), None
    if reference.mu_s is not None:
        sfid = _distance("sFID", own[2:], reference[2:], device)
    scores = samples.inception_score.scores()
    shares = None
    if reference_pool is not None:
        shares = precision_recall(
            samples.pool().to(device), reference_pool.to(device), neighbours, distances, progress=progress
        )
    return AdmMetrics(fid, sfid, float(np.mean(scores)), float(np.std(scores)), *(shares or (None, None)))


def _distance(name: str, mine: tuple[Any, Any], theirs: tuple[Any, Any], device: torch.device | str) -> float:
    """Of two means and covariances."""
    try:
        return frechet_distance(*mine, *theirs, device=device)
    except ValueError as error:
        raise UserError(f"{name}: {error}; the reference's statistics are damaged or of other features") from error

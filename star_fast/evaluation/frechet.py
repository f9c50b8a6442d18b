"""The Fréchet distance between two sets of features. What the features are makes its name: on the features of the small
classifier of classifier.py it is the "classifier Fréchet distance", which is not FID and not comparable with any
published FID; on Inception's it is FID or sFID (adm.py).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Float64 = NDArray[np.float64]


def moments(features: ArrayLike) -> tuple[Float64, Float64]:
    """Mean and covariance of (N, D) features, N >= 2, in float64: ((D,), (D, D)); the covariance divides by N - 1, as
    every FID code does.

    Raises:
        ValueError: not (N, D), fewer than two rows, or a value that is not finite.
    """
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[0] < 2:
        raise ValueError(f"moments: features must be (N, D) with N >= 2, got shape {rows.shape}")
    if not np.isfinite(rows).all():
        raise ValueError("moments: features must be finite, got NaN or infinity")
    mean = rows.mean(axis=0)
    centred = rows - mean
    return mean, centred.T @ centred / (rows.shape[0] - 1)


def frechet_distance(
    mean_a: ArrayLike, cov_a: ArrayLike, mean_b: ArrayLike, cov_b: ArrayLike, *, device: torch.device | str = "cpu"
) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians: |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a
    cov_b)^(1/2)).

    The trace of (cov_a cov_b)^(1/2) is the sum of the roots of the eigenvalues of the symmetric product A cov_b A, A =
    cov_a^(1/2): that is the sum of the singular values of cov_a^(1/2) cov_b^(1/2), which is what is computed, for it
    loses no digits to squaring. Symmetric eigenproblems only: no matrix square root that may turn complex, and
    covariances of deficient rank (fewer samples than features) need no jitter. The usual scipy.linalg.sqrtm(cov_a
    cov_b) agrees where both are well conditioned; on deficient ones it may fail, and FID codes then add 1e-6 to both
    diagonals, which moves the result by up to the order of 1e-3 sqrt(D tr) and is not done here.

    Args:
        mean_a, mean_b: (D,). cov_a, cov_b: (D, D), symmetric and positive semi-definite.
        device: where the (D, D) matrices are decomposed.

    Returns:
        A number >= 0, in the features' unit squared; float64 throughout.

    Raises:
        ValueError: shapes that do not belong together, a covariance with an eigenvalue below -1e-6 of its largest, or
            numbers so large that float64 does not hold what comes of them.
    """
    mean_a, cov_a, mean_b, cov_b = (np.asarray(value, dtype=np.float64) for value in (mean_a, cov_a, mean_b, cov_b))
    size = mean_a.shape[0] if mean_a.ndim == 1 else -1
    if mean_b.shape != (size,) or cov_a.shape != (size, size) or cov_b.shape != (size, size):
        raise ValueError(
            f"frechet_distance: expected (D,), (D, D), (D,), (D, D), got {mean_a.shape}, {cov_a.shape}, "
            f"{mean_b.shape}, {cov_b.shape}"
        )
    try:
        roots = [_root(torch.from_numpy(cov).to(device)) for cov in (cov_a, cov_b)]
        overlap = torch.linalg.svdvals(roots[0] @ roots[1]).sum().item()
    except torch.linalg.LinAlgError as error:
        raise ValueError(
            "frechet_distance: the covariances have no eigenvalues within float64 "
            f"({' '.join(str(error).split())[:100]})"
        ) from error
    with np.errstate(over="ignore", invalid="ignore"):  # said below
        distance = float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap)
    if not math.isfinite(distance):
        raise ValueError(
            f"frechet_distance: means or covariances too large for float64, the distance comes out as {distance}"
        )
    return max(distance, 0.0)


def frechet_distance_of_features(features_a: ArrayLike, features_b: ArrayLike) -> float:
    """`frechet_distance` of the moments of two feature sets (N, D) and (N', D). With few samples it is biased upwards:
    compare equal counts only.
    """
    return frechet_distance(*moments(features_a), *moments(features_b))


def _root(cov: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix; eigenvalues that rounding made
    negative count as 0.
    """
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    if values[0] < -1e-6 * max(values[-1].item(), 1e-300):
        raise ValueError(
            f"frechet_distance: a covariance must be positive semi-definite, got an eigenvalue of {values[0]:.3e} "
            f"(largest {values[-1]:.3e})"
        )
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T

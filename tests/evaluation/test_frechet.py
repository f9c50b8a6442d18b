"""Fréchet distance against closed forms that need no matrix root."""

from __future__ import annotations

import numpy as np
import pytest

from star_fast.evaluation.frechet import frechet_distance, frechet_distance_of_features, moments


def test_diagonal_closed_form() -> None:
    rng = np.random.default_rng(0)
    mean_a, mean_b = rng.normal(size=(2, 12))
    spread_a, spread_b = rng.uniform(0.1, 3.0, size=(2, 12))
    expected = sum((mean_a[i] - mean_b[i]) ** 2 + (spread_a[i] - spread_b[i]) ** 2 for i in range(12))
    got = frechet_distance(mean_a, np.diag(spread_a**2), mean_b, np.diag(spread_b**2))
    assert got == pytest.approx(expected, rel=1e-12)


def test_rotated_commuting_covariances() -> None:
    """Covariances with common eigenvectors: the same sum over eigenvalues, in any basis."""
    rng = np.random.default_rng(1)
    basis, _ = np.linalg.qr(rng.normal(size=(9, 9)))
    spread_a, spread_b = rng.uniform(0.0, 2.0, size=(2, 9))
    spread_a[:3] = 0  # rank-deficient
    got = frechet_distance(
        np.zeros(9), basis @ np.diag(spread_a**2) @ basis.T, np.zeros(9), basis @ np.diag(spread_b**2) @ basis.T
    )
    assert got == pytest.approx(((spread_a - spread_b) ** 2).sum(), rel=1e-7)


def test_two_by_two_that_do_not_commute() -> None:
    """In two dimensions tr((AB)^(1/2)) = sqrt(tr(AB) + 2 sqrt(det AB))."""
    a, b = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.3], [-0.3, 3.0]])
    root_trace = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    expected = np.trace(a) + np.trace(b) - 2 * root_trace
    assert frechet_distance(np.zeros(2), a, np.zeros(2), b) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(np.zeros(2), b, np.zeros(2), a) == pytest.approx(expected, rel=1e-12)


def test_features_same_set_shift_and_few_samples() -> None:
    rng = np.random.default_rng(2)
    features = rng.normal(size=(7, 20))  # fewer samples than features
    assert frechet_distance_of_features(features, features) == pytest.approx(0, abs=1e-10)
    assert frechet_distance_of_features(features, features + 0.5) == pytest.approx(20 * 0.25, rel=1e-9)


def test_moments_match_numpy() -> None:
    features = np.random.default_rng(3).normal(size=(11, 4)).astype(np.float32)
    mean, cov = moments(features)
    assert mean.dtype == cov.dtype == np.float64
    np.testing.assert_allclose(cov, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-12)


def test_bad_input_says_what_came() -> None:
    with pytest.raises(ValueError, match=r"N >= 2, got shape \(1, 3\)"):
        moments(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="finite"):
        moments(np.full((3, 2), np.nan))
    with pytest.raises(ValueError, match="expected"):
        frechet_distance(np.zeros(2), np.eye(3), np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="positive semi-definite"):
        frechet_distance(np.zeros(2), -np.eye(2), np.zeros(2), np.eye(2))


@pytest.mark.parametrize(
    ("mean", "cov"),
    [(1e200, 1.0), (0.0, 1.7e308), (0.0, 1e300)],
    ids=["mean", "sum of the covariance", "product of the roots"],
)
def test_numbers_beyond_float64_are_an_error_and_no_infinite_distance(mean: float, cov: float) -> None:
    huge = np.full((3, 3), cov)
    with pytest.raises(ValueError, match=r"frechet_distance: .*float64"):
        frechet_distance(np.full(3, mean), huge, np.zeros(3), huge if cov > 1e305 else np.eye(3) * 1e308)

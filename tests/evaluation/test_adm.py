"""The five metrics against formulas written here: numpy and scipy in float64, plain loops, torch-fidelity's own
functions, closed forms.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from star_fast.errors import UserError
from star_fast.evaluation import adm, manifolds
from star_fast.evaluation.adm import FeatureStatistics, InceptionScore, adm_metrics
from star_fast.evaluation.frechet import frechet_distance
from star_fast.evaluation.inception import Features
from star_fast.evaluation.manifolds import precision_recall
from star_fast.evaluation.moments import Moments

scipy_linalg = pytest.importorskip("scipy.linalg")


def feature_sets(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Correlated, far from zero: what a sum of squares without a shift would lose digits on."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    return torch.randn(rows, width, generator=generator) @ mixing + 30 + seed


def streamed(features: torch.Tensor, batches: tuple[int, ...]) -> Moments:
    found = Moments(features.shape[1])
    for part in features.split(batches):
        found.add(part)
    return found


def test_moments_of_any_batches_are_those_of_the_whole() -> None:
    features = feature_sets(300, 24)
    rows = features.double().numpy()
    for batches in ((300,), (1, 1, 2, 96, 200), (299, 1), (0, 150, 150)):
        mean, cov = streamed(features, batches).result()
        np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-14)
        np.testing.assert_allclose(cov, np.cov(rows, rowvar=False), rtol=1e-11, atol=1e-13)


def test_moments_keep_their_digits_far_from_zero() -> None:
    """A spread of 1 around 10^6: E[x x'] - E[x] E[x]' would leave four digits."""
    rows = np.random.default_rng(0).normal(1e6, 1.0, (500, 3))
    _, cov = streamed(torch.from_numpy(rows), (100,) * 5).result()
    centred = rows - 1e6
    np.testing.assert_allclose(cov, np.cov(centred, rowvar=False), rtol=1e-8)


def test_moments_refuse_what_is_no_feature() -> None:
    with pytest.raises(UserError, match="pool features: NaN or infinity"):
        Moments(2, name="pool features").add(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(UserError, match="of 1 images; a covariance needs at least 2"):
        streamed(torch.ones(1, 2), (1,)).result()
    with pytest.raises(ValueError, match=r"expected \(n, 3\), got \(4, 2\)"):
        Moments(3).add(torch.ones(4, 2))


def test_fid_is_the_one_of_scipy_and_of_torch_fidelity() -> None:
    a, b = feature_sets(400, 40, 1), feature_sets(350, 40, 2)
    own = frechet_distance(*streamed(a, (100,) * 4).result(), *streamed(b, (350,)).result())
    (mean_a, cov_a), (mean_b, cov_b) = (
        (x.double().numpy().mean(0), np.cov(x.double().numpy(), rowvar=False)) for x in (a, b)
    )
    root = scipy_linalg.sqrtm(cov_a @ cov_b).real
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert own == pytest.approx(expected, rel=1e-9)
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    theirs = fidelity.fid_statistics_to_metric(
        *(fidelity.fid_features_to_statistics(x.double()) for x in (a, b)), verbose=False
    )
    assert own == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)


def test_fid_of_known_sets() -> None:
    """Identical sets; a shift, even of sets with fewer images than features, whose covariances are singular; a scaling
    in closed form.
    """
    rows = feature_sets(15, 40).double()  # rank 14
    moments = streamed(rows, (15,)).result()
    assert frechet_distance(*moments, *moments) == pytest.approx(0, abs=1e-8)
    shifted = streamed(rows + 0.25, (5, 10)).result()
    assert frechet_distance(*moments, *shifted) == pytest.approx(40 * 0.25**2, rel=1e-7)
    doubled = streamed(2 * rows, (15,)).result()  # of S and 4 S: |m|^2 + tr(S + 4 S - 2 * 2 S) = |m|^2 + tr S
    assert frechet_distance(*moments, *doubled) == pytest.approx(
        (moments[0] ** 2).sum() + np.trace(moments[1]), rel=1e-9
    )


def test_fid_of_disjoint_subspaces() -> None:
    """Covariances with nothing in common, each singular: the roots' product is 0, and the distance is the sum of both
    traces.
    """
    a, b = np.diag([3.0, 2.0, 0.0, 0.0]), np.diag([0.0, 0.0, 5.0, 0.5])
    assert frechet_distance(np.zeros(4), a, np.zeros(4), b) == pytest.approx(10.5, rel=1e-12)


def plain_inception_score(logits: np.ndarray, split: int) -> list[float]:
    scores = []
    for start in range(0, len(logits), split):
        rows = [
            np.exp(row - row.max()) / np.exp(row - row.max()).sum()
            for row in logits[start : start + split].astype(np.float64)
        ]
        mean = sum(rows) / len(rows)
        scores.append(
            np.exp(np.mean([sum(p * np.log(p / q) for p, q in zip(row, mean, strict=True) if p > 0) for row in rows]))
        )
    return scores


def test_inception_score_is_the_plain_one_group_by_group() -> None:
    logits = 3 * torch.randn(70, 12, generator=torch.Generator().manual_seed(0))
    score = InceptionScore(split_images=20)
    for part in logits.split((7, 33, 0, 30)):
        score.add(part)
    assert score.scores() == pytest.approx(plain_inception_score(logits.numpy(), 20), rel=1e-12)
    assert len(score.scores()) == 4  # the last of 10
    fidelity = pytest.importorskip("torch_fidelity.metric_isc")
    with pytest.raises(UserError, match="logits: NaN or infinity"):
        InceptionScore().add(torch.tensor([[0.0, torch.inf]]))
    whole = InceptionScore(split_images=7)
    whole.add(logits)
    theirs = fidelity.isc_features_to_metric(logits, splits=10, shuffle=False)
    assert np.mean(whole.scores()) == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert np.std(whole.scores()) == pytest.approx(theirs["inception_score_std"], rel=1e-9)


def test_inception_score_of_known_sets() -> None:
    """One certain class each, all equally often: the number of classes. The same class for all: 1."""
    certain = InceptionScore()
    certain.add(1e4 * torch.eye(10).repeat(6, 1))
    assert certain.scores() == pytest.approx([10], rel=1e-12)
    same = InceptionScore()
    same.add(torch.randn(1, 10).repeat(50, 1))
    assert same.scores() == pytest.approx([1], rel=1e-12)


def plain_precision_recall(samples: torch.Tensor, real: torch.Tensor, k: int) -> tuple[float, float]:
    """A double loop in float64."""
    a, b = samples.double().numpy(), real.double().numpy()

    def radii(points: np.ndarray) -> list[float]:
        return [sorted(((p - q) ** 2).sum() for q in points)[k] for p in points]

    a_radii, b_radii = radii(a), radii(b)
    precision = np.mean([any(((p - q) ** 2).sum() <= radius for q, radius in zip(b, b_radii, strict=True)) for p in a])
    recall = np.mean([any(((q - p) ** 2).sum() <= radius for p, radius in zip(a, a_radii, strict=True)) for q in b])
    return float(precision), float(recall)


@pytest.mark.parametrize("blocks", [(2048, 4096), (7, 13)], ids=["one block", "many blocks"])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_precision_and_recall_equal_a_double_loop(
    monkeypatch: pytest.MonkeyPatch, blocks: tuple[int, int], offset: float
) -> None:
    """At an offset of 1000 a squared distance of about 10 is a difference of numbers near 10^7, and float32 alone
    decides nothing: float64 does.
    """
    monkeypatch.setattr(manifolds, "_ROWS", blocks[0])
    monkeypatch.setattr(manifolds, "_COLUMNS", blocks[1])
    monkeypatch.setattr(manifolds, "_MOST_WAITING", 500 if blocks[0] == 7 else 2**22)
    generator = torch.Generator().manual_seed(3)
    samples, real = (
        torch.randn(60, 6, generator=generator) * 0.8 + offset,
        torch.randn(75, 6, generator=generator) + 0.4 + offset,
    )
    found = precision_recall(samples, real)
    assert tuple(found) == pytest.approx(plain_precision_recall(samples, real, 3), abs=1e-12)
    assert 0.05 < found.recall < found.precision < 0.99


def test_precision_and_recall_of_copies_and_ties() -> None:
    """Points on a grid tie everywhere, and copies have radius 0; balls hold their surface."""
    grid = torch.cartesian_prod(*[torch.arange(4.0)] * 3)
    copies = torch.cat([grid[:20], grid[:20], grid[:20], grid[:20] + 0.1, grid[5:6].repeat(30, 1)])
    for samples, real in ((grid, copies), (copies, grid), (copies, copies)):
        assert tuple(precision_recall(samples, real, 3)) == pytest.approx(
            plain_precision_recall(samples, real, 3), abs=1e-12
        )
    constant = torch.full((50, 8), 0.3)
    assert precision_recall(constant, constant.clone()) == (1, 1)
    assert precision_recall(constant, torch.full((50, 8), 0.3000001)) == (0, 0)


def test_precision_and_recall_of_clusters_of_near_copies() -> None:
    """As of a model that knows few images: within a cluster distances are far below float32's error, and more points
    are near than are kept.
    """
    generator = torch.Generator().manual_seed(7)
    places = 40 * torch.randn(4, 6, generator=generator)
    samples = places.repeat(25, 1) + 1e-4 * torch.randn(100, 6, generator=generator)
    real = places[1:].repeat(20, 1) + 1.3e-4 * torch.randn(60, 6, generator=generator)
    found = precision_recall(samples, real)
    assert tuple(found) == pytest.approx(plain_precision_recall(samples, real, 3), abs=1e-12)
    assert 0.1 < found.precision < 0.75 and 0.1 < found.recall < 1


def test_precision_and_recall_known_sets_and_torch_fidelity() -> None:
    samples = torch.randn(80, 5, generator=torch.Generator().manual_seed(0))
    assert precision_recall(samples, samples.clone()) == (1, 1)
    assert precision_recall(samples, samples + 100) == (0, 0)
    fidelity = pytest.importorskip("torch_fidelity.metric_prc")
    real = torch.randn(90, 5, generator=torch.Generator().manual_seed(1))
    theirs = fidelity.calculate_precision_recall_full(samples.double(), real.double(), 3)
    assert tuple(precision_recall(samples, real)) == pytest.approx(theirs, abs=1e-6)  # its means are float32


def test_half_distances_are_adms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float16 roundings step by step in numpy: features, squares, norms, products, sums; a block that overflows goes in
    float32.
    """
    monkeypatch.setattr(manifolds, "ADM_BLOCK", 32)
    generator = torch.Generator().manual_seed(5)
    samples, real = torch.randn(50, 6, generator=generator) * 3, torch.randn(70, 6, generator=generator) * 3 + 1

    def distances(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        made = np.empty((len(u), len(v)))
        for i in range(0, len(u), 32):
            for j in range(0, len(v), 32):
                a, b = u[i : i + 32].astype(np.float16), v[j : j + 32].astype(np.float16)
                norms = [(x * x).astype(np.float32).sum(1).astype(np.float16) for x in (a, b)]
                product = (a.astype(np.float32) @ b.astype(np.float32).T).astype(np.float16)
                block = np.maximum((norms[0][:, None] - np.float16(2) * product) + norms[1], 0)
                if not np.isfinite(block).all():
                    block = ((u[i : i + 32, None].astype(np.float64) - v[None, j : j + 32]) ** 2).sum(2)
                made[i : i + 32, j : j + 32] = block
        return made

    for scale in (1.0, 200.0):  # at 200 float16 overflows
        u, v = (scale * samples).numpy(), (scale * real).numpy()
        with np.errstate(over="ignore", invalid="ignore"):
            u_radii, v_radii = (np.sort(distances(x, x), 1)[:, 3] for x in (u, v))
            between = distances(u, v)
        expected = ((between <= v_radii[None]).any(1).mean(), (between <= u_radii[:, None]).any(0).mean())
        assert tuple(precision_recall(torch.from_numpy(u), torch.from_numpy(v), distances="float16")) == pytest.approx(
            expected, abs=1e-12
        )


def test_precision_needs_enough_images_of_one_width() -> None:
    with pytest.raises(UserError, match="more than 3 samples, got 3"):
        precision_recall(torch.ones(3, 2), torch.ones(9, 2))
    with pytest.raises(ValueError, match="expected float32"):
        precision_recall(torch.ones(9, 2), torch.ones(9, 3))


def test_the_suite_gives_each_metric_its_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adm, "POOL_WIDTH", 10)
    monkeypatch.setattr(adm, "SPATIAL_WIDTH", 8)
    sets = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        sets.append(
            Features(*(torch.randn(60, width, generator=generator) * (1 + 0.2 * seed) for width in (10, 8, 12)))
        )
    samples, reference = FeatureStatistics(split_images=25), FeatureStatistics(keep_every=7, keep_most=6)
    for start in range(0, 60, 16):
        samples.add(Features(*(part[start : start + 16] for part in sets[0])))
        reference.add(Features(*(part[start : start + 16] for part in sets[1])))
    assert torch.equal(reference.pool(), sets[1].pool[::7][:6])
    assert torch.equal(samples.pool(), sets[0].pool)
    found = adm_metrics(samples, reference.gaussians(), sets[1].pool)

    def fid(a: torch.Tensor, b: torch.Tensor) -> float:
        rows = [x.double().numpy() for x in (a, b)]
        covariances = [np.cov(x, rowvar=False) for x in rows]
        root = scipy_linalg.sqrtm(covariances[0] @ covariances[1]).real
        return float(((rows[0].mean(0) - rows[1].mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root))

    scores = plain_inception_score(sets[0].logits.numpy(), 25)
    assert found.fid == pytest.approx(fid(sets[0].pool, sets[1].pool), rel=1e-9)
    assert found.sfid == pytest.approx(fid(sets[0].spatial, sets[1].spatial), rel=1e-9)
    assert (found.inception_score, found.inception_score_spread) == pytest.approx(
        (np.mean(scores), np.std(scores)), rel=1e-9
    )
    assert (found.precision, found.recall) == pytest.approx(plain_precision_recall(sets[0].pool, sets[1].pool, 3))
    alone = adm_metrics(samples, reference.gaussians(), None)
    assert (alone.precision, alone.recall) == (None, None)


@pytest.mark.gpu
def test_a_gpu_finds_what_the_cpu_finds() -> None:
    a, b = feature_sets(500, 64, 1), feature_sets(400, 64, 1) + 0.1
    on_gpu = [Moments(64, "cuda") for _ in range(2)]
    for found, rows in zip(on_gpu, (a, b), strict=True):
        for part in rows.split(150):
            found.add(part)
    for found, rows in zip(on_gpu, (a, b), strict=True):
        np.testing.assert_allclose(
            found.result()[1], np.cov(rows.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-12
        )
    moments = [found.result() for found in on_gpu]
    assert frechet_distance(*moments[0], *moments[1], device="cuda") == pytest.approx(
        frechet_distance(*moments[0], *moments[1]), rel=1e-9
    )
    assert precision_recall(a.cuda(), b.cuda()) == precision_recall(a, b)  # exact on both, TF32 or not
    halves = [precision_recall(x, y, distances="float16") for x, y in ((a.cuda(), b.cuda()), (a, b))]
    assert tuple(halves[0]) == pytest.approx(tuple(halves[1]), abs=0.02)

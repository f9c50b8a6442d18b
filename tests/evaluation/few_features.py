"""`star-fast evaluate` with a network of a few features in Inception's place, and images to give it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from star_fast import cli
from star_fast.evaluation import adm, evaluate, reference
from star_fast.evaluation.inception import WEIGHTS_SHA256, Features

WIDTHS = (12, 10, 6)  # of pool and spatial features, classes


class FewFeatures:
    """In Inception's place: fixed random functions of an image's 4 x 4 block means."""

    sha256, device = WEIGHTS_SHA256, torch.device("cpu")

    def __call__(self, images: torch.Tensor) -> Features:
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        means = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)
        generator = torch.Generator().manual_seed(0)
        return Features(*(torch.tanh(means @ torch.randn(48, width, generator=generator)) for width in WIDTHS))

    def record(self) -> dict[str, str]:
        return {"network": "few features", "weights_sha256": self.sha256, "resize": "block means"}


@pytest.fixture
def few_features(monkeypatch: pytest.MonkeyPatch) -> FewFeatures:
    network = FewFeatures()
    for module in (adm, reference):
        monkeypatch.setattr(module, "POOL_WIDTH", WIDTHS[0])
        monkeypatch.setattr(module, "SPATIAL_WIDTH", WIDTHS[1])
    monkeypatch.setattr(evaluate, "open_inception", lambda *arguments: network)
    return network


def pictures(count: int, size: int = 16, seed: int = 0) -> np.ndarray:
    """(N, H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(size // 4, 1).repeat(size // 4, 2)


def features_of(images: np.ndarray) -> list[np.ndarray]:
    return [part.double().numpy() for part in FewFeatures()(torch.from_numpy(images).permute(0, 3, 1, 2))]


def moments_of(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rows.mean(0), np.cov(rows, rowvar=False)


def write_adm_reference(path: Path, images: np.ndarray, statistics_of: np.ndarray, save=np.savez) -> None:
    """As the ADM suite publishes them: the statistics are of more images than lie in the file."""
    pool, spatial, _ = features_of(statistics_of)
    (mu, sigma), (mu_s, sigma_s) = moments_of(pool), moments_of(spatial)
    save(path, arr_0=images, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)


def run(*arguments: object, **options: object) -> int:
    """The exit status of `star-fast evaluate`; options are given as names, or as they stand on a command line."""
    named = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    return cli.main(["evaluate", *map(str, (*arguments, *named))])


def measured(*arguments: object, out: Path, **options: object) -> dict:
    """What `star-fast evaluate`, which must succeed, writes to `out`."""
    assert run(*arguments, out=out, **options) == 0
    return result(out)


def result(path: Path) -> dict:
    return json.loads(path.read_text())

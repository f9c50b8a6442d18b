"""A network of a few numbers in Inception's place: what is tried is how files are read, not convolutions. Everything
around it is the real thing.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_fast.errors import UserError
from star_fast.evaluation import adm, inception, reference
from star_fast.evaluation.adm import FeatureStatistics
from star_fast.evaluation.inception import Inception, open_inception
from star_fast.evaluation.reference import write_reference
from star_fast.storage import sha256_of_file

WEIGHTS = "measured/inception.pth"
# As written here; as the ADM suite publishes them
REFERENCE, ADM_REFERENCE = "measured/reference.npz", "measured/adm.npz"
_POOL, _SPATIAL, _CLASSES = 6, 28, 5


class _Network(nn.Module):
    """What star_fast.evaluation.inception needs of torch-fidelity's network."""

    def __init__(self) -> None:
        super().__init__()
        self.Mixed_6d = nn.ModuleDict({"branch1x1": nn.ModuleDict({"conv": nn.Conv2d(3, 7, 1)})})
        self.pool, self.fc = nn.Linear(_SPATIAL, _POOL), nn.Linear(_POOL, _CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (N, 3, H, W) -> pool (N, 6), logits (N, 5)."""
        pool = self.pool(self.Mixed_6d.branch1x1.conv(F.adaptive_avg_pool2d(images.float() / 255, 2)).flatten(1))
        return pool, self.fc(pool)


def _build(state: dict[str, Tensor] | None) -> nn.Module:
    network = _Network()
    if state is not None:
        network.load_state_dict(state)
    return network.eval().requires_grad_(False)


def _no_download(path: Path) -> NoReturn:
    raise UserError("--download: nothing is fetched here")


@contextlib.contextmanager
def small_network() -> Iterator[None]:
    """Within the block Inception is the network above, and nothing is ever fetched."""
    with contextlib.ExitStack() as stack:
        for module in (adm, reference):
            stack.enter_context(mock.patch.multiple(module, POOL_WIDTH=_POOL, SPATIAL_WIDTH=_SPATIAL))
        stack.enter_context(mock.patch.multiple(inception, _build=_build, _download=_no_download))
        yield


def save_weights(path: str | Path) -> None:
    """Weights of the small network, always the same."""
    torch.manual_seed(0)
    torch.save(_Network().state_dict(), path)


def make_measured(images: np.ndarray) -> None:
    """Weights and both kinds of reference, of images (N, H, W, 3) uint8, below the working folder."""
    Path(WEIGHTS).parent.mkdir()
    save_weights(WEIGHTS)
    with small_network():
        network = Inception(torch.load(WEIGHTS, weights_only=True), sha256=sha256_of_file(WEIGHTS))
        statistics = FeatureStatistics()
        statistics.add(network(torch.from_numpy(images).permute(0, 3, 1, 2)))
        write_reference(REFERENCE, statistics, network, {})
        gaussians = statistics.gaussians()
    np.savez(
        ADM_REFERENCE,
        arr_0=images,
        mu=gaussians.mu,
        sigma=gaussians.sigma,
        mu_s=gaussians.mu_s,
        sigma_s=gaussians.sigma_s,
    )


@functools.cache
def weights_sha256() -> str:
    """Of the good file WEIGHTS; to be asked for first while it is there."""
    return sha256_of_file(WEIGHTS)


def open_small() -> Inception:
    """The network with the weights in WEIGHTS, whatever their hash; where there are none to take it of, the published
    one is asked for.
    """
    try:
        digest = sha256_of_file(WEIGHTS)
    except UserError:
        digest = ""
    return open_inception(WEIGHTS, digest)


def make_gallery(picture: Path, folder: Path, copies: int) -> None:
    """A folder of images of one size."""
    folder.mkdir(parents=True)
    for index in range(copies):
        shutil.copy(picture, folder / f"{index}.png")

"""What samples are measured against: an ADM reference file as it is published, or one made of own images. Both are .npz
files.

    mu, sigma        (2048,), (2048, 2048)   of the pool features
    mu_s, sigma_s    (2023,), (2023, 2023)   of the spatial features
    arr_0            (N, H, W, 3) uint8      images for precision and recall (ADM's 10 000 are not those of mu, sigma)
    pool             (N, 2048) float32       in their place where this project wrote the file: their pool features
    inception_sha256 (32,) uint8             of the network's weights, where this project wrote the file

A file without `mu` and `sigma` is taken for images whose statistics are still to be found, as ADM's evaluator does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from star_fast.errors import UserError
from star_fast.evaluation.adm import POOL_WIDTH, SPATIAL_WIDTH, FeatureStatistics, Gaussians
from star_fast.evaluation.inception import Inception
from star_fast.evaluation.limits import require_memory
from star_fast.evaluation.npz_reading import NpzFile
from star_fast.generation.npz_stream import IMAGES_MEMBER
from star_fast.storage import atomic_write_json, atomic_writer, sha256_of_file

_HINT = (
    "expected a reference of the ADM suite (mu, sigma, mu_s, sigma_s, arr_0), or one that star-fast evaluate "
    "--make-reference wrote"
)


@dataclass(frozen=True)
class Reference:
    """A reference file's content."""

    gaussians: Gaussians
    pool: Tensor | None  # (N, 2048) float32 for precision and recall
    record: dict[str, Any]  # for the protocol


def read_reference(path: str | Path, inception: Inception, batch_images: int, *, progress: bool = True) -> Reference:
    """Read a reference; its images, if it holds any and no features, go through the network.

    Raises:
        UserError, StorageError: no such file, damaged, or made with other weights of the network.
    """
    record: dict[str, Any] = {"file": Path(path).name, "sha256": sha256_of_file(path)}
    with NpzFile(path, _HINT) as file:
        _require_same_network(file, inception)
        pool, found = None, None
        if "pool" in file:
            rows = file.header("pool").shape[0] if file.header("pool").shape else 0
            require_memory(
                4 * POOL_WIDTH * rows,
                f"{path}: the features of {rows:,} images",
                "make the reference with fewer --precision-images",
            )
            pool = torch.from_numpy(np.ascontiguousarray(file.array("pool", (-1, POOL_WIDTH)), np.float32))
            if not pool.isfinite().all():
                raise UserError(f"{path}: pool: NaN or infinity among them; {_HINT}")
            record |= {"precision_images": len(pool), "precision_from": "features"}
        elif IMAGES_MEMBER in file:
            count, height, width = file.image_shape(IMAGES_MEMBER)
            found = FeatureStatistics(inception.device)
            for images in _batches(file, batch_images, count, progress):
                found.add(inception(images))
            pool = found.pool()
            record |= {"precision_images": count, "precision_from": f"images of {width} x {height} pixels"}
        if "mu" in file and "sigma" in file:
            gaussians, record["statistics"] = _stored(file), "stored"
        elif found is not None:
            gaussians, record["statistics"] = found.gaussians(), f"of the {found.images:,} images"
        else:
            raise UserError(
                f"{path}: neither mu and sigma nor {IMAGES_MEMBER} in it; it holds "
                f"{', '.join(file.names[:20]) or 'nothing'}; {_HINT}"
            )
    if pool is None:
        record |= {"precision_images": 0, "precision_from": "nothing: no precision and recall"}
    return Reference(gaussians, pool, record)


def write_reference(
    path: str | Path, statistics: FeatureStatistics, inception: Inception, record: dict[str, Any]
) -> None:
    """Write a reference made of own images, whole or not at all; `record` goes beside it as NAME.json. Raises
    StorageError where it cannot be written.
    """
    gaussians = statistics.gaussians()
    assert gaussians.mu_s is not None and gaussians.sigma_s is not None, "only files of others lack them"
    atomic_write_json(Path(path).with_suffix(".json"), record)
    with atomic_writer(path) as file:
        np.savez(
            file,
            mu=gaussians.mu,
            sigma=gaussians.sigma,
            mu_s=gaussians.mu_s,
            sigma_s=gaussians.sigma_s,
            pool=statistics.pool().numpy(),
            inception_sha256=np.frombuffer(bytes.fromhex(inception.sha256), np.uint8),
        )


def _stored(file: NpzFile) -> Gaussians:
    def pair(mean: str, cov: str, width: int) -> tuple[np.ndarray, np.ndarray]:
        found = file.array(mean, (width,)).astype(np.float64), file.array(cov, (width, width)).astype(np.float64)
        if not all(np.isfinite(values).all() for values in found):
            raise UserError(f"{file.path}: {mean}, {cov}: NaN or infinity among them; {_HINT}")
        return found

    spatial = pair("mu_s", "sigma_s", SPATIAL_WIDTH) if "mu_s" in file and "sigma_s" in file else (None, None)
    return Gaussians(*pair("mu", "sigma", POOL_WIDTH), *spatial)


def _require_same_network(file: NpzFile, inception: Inception) -> None:
    if "inception_sha256" in file:
        told = file.array("inception_sha256", (32,), "u").astype(np.uint8).tobytes().hex()
        if told != inception.sha256:
            raise UserError(
                f"{file.path}: its statistics were made with weights of Inception of sha256 {told}, samples would "
                "be measured with "
                f"{inception.sha256 or 'random ones'}; use the same for both"
            )


def _batches(file: NpzFile, size: int, count: int, progress: bool) -> Iterator[Tensor]:
    with tqdm(desc="reference images", total=count, unit="image", disable=not progress, leave=False) as bar:
        for images in file.images(IMAGES_MEMBER, size):
            yield torch.from_numpy(images).permute(0, 3, 1, 2)
            bar.update(len(images))

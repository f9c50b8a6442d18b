"""What is odd about a set of images that is to be measured: seen while they pass, said before anyone believes the
numbers.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from torch import Tensor

ENOUGH_IMAGES = 50_000  # FID's bias falls with their number; published figures use so many


class PixelChecks:
    """Looks at batches as they pass; nothing is kept but a hash of 8 bytes an image."""

    def __init__(self) -> None:
        self.images, self.shape = 0, (0, 0)
        self._all = hashlib.sha256()
        self._seen: set[bytes] = set()
        self._copies = self._constant = self._largest = 0
        self._smallest = 255

    def see(self, images: Tensor) -> None:
        """uint8 (n, C, H, W) on the CPU."""
        rows = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
        self.shape = rows.shape[1:3]
        self._all.update(rows.data)
        low, high = rows.min((1, 2, 3)), rows.max((1, 2, 3))
        self._constant += int((low == high).sum())
        self._smallest, self._largest = min(self._smallest, int(low.min())), max(self._largest, int(high.max()))
        for row in rows:
            digest = hashlib.blake2b(row, digest_size=8).digest()
            self._copies += digest in self._seen
            self._seen.add(digest)
            self.images += 1

    def record(self) -> dict[str, Any]:
        """What was seen. pixels_sha256 is of all pixels in order, N x H x W x C: the same images give it from a .npz, a
        folder of PNGs or a sampler.
        """
        return {
            "images": self.images,
            "height": self.shape[0],
            "width": self.shape[1],
            "pixels_sha256": self._all.hexdigest(),
            "duplicates": self._copies,
            "constant_images": self._constant,
            "lowest": self._smallest,
            "highest": self._largest,
        }

    def warnings(self) -> list[str]:
        """One line for each thing that is odd."""
        found = []
        if self.images < ENOUGH_IMAGES:
            found.append(
                f"{self.images:,} samples, published figures use {ENOUGH_IMAGES:,}: FID and sFID come out higher "
                "with fewer; "
                "compare equal counts only"
            )
        if self.images and self._largest <= 1:
            found.append(
                f"all values lie in {self._smallest} ... {self._largest}: images in 0 ... 1 that were cut to "
                "whole numbers? Expected 0 ... 255"
            )
        elif self.images and self._largest - self._smallest < 64:
            found.append(
                f"all values lie in {self._smallest} ... {self._largest}: expected images that use most of 0 ... 255"
            )
        if self._constant:
            found.append(f"{self._constant:,} images are of a single colour")
        if self._copies:
            found.append(f"{self._copies:,} images are copies of others, bit for bit")
        return found


def label_warnings(labels: np.ndarray | None) -> list[str]:
    """Of the labels (N,) int64 asked for, where they are known: whether each class that occurs does
    so equally often.
    """
    if labels is None or not len(labels):
        return []
    counts = np.unique(labels, return_counts=True)[1]
    if counts.max() - counts.min() <= 1:
        return []
    return [
        f"labels are not balanced: between {counts.min():,} and {counts.max():,} images a class, {len(counts):,} "
        "classes"
    ]

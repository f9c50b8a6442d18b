"""The shapes that tests, benchmarks and the kernel resource table share: one row a preset, and two more for attention.

`B` counts images of one rank and micro-batch, `M` views; sequences are B*M, rows of flattened tensors N = B*M*T.
"""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of one training micro-batch (letters: head of model/transformer.py)."""

    B: int  # images
    M: int  # views of each image
    T: int  # positions
    K: int  # contrast positions
    V: int  # codebook entries
    D: int  # width
    H: int  # heads
    E: int  # head size
    F: int  # feed-forward width
    L: int  # blocks

    @property
    def sequences(self) -> int:
        """Sequences of a micro-batch: B*M."""
        return self.B * self.M

    @property
    def rows(self) -> int:
        """Rows of a flattened (B*M, T, ...) tensor: N."""
        return self.B * self.M * self.T


SHAPES = {
    #             B   M    T  K      V     D   H    E     F   L
    "unit": Shape(3, 2, 17, 3, 37, 64, 2, 32, 256, 2),  # interpreter tests: odd T and V, small everything
    "tiny": Shape(32, 2, 49, 4, 256, 128, 4, 32, 512, 6),  # the built-in digits
    "B": Shape(32, 2, 256, 4, 16384, 768, 12, 64, 2048, 12),
    "L": Shape(32, 2, 256, 4, 16384, 1024, 16, 64, 2816, 24),
    "XL": Shape(32, 2, 256, 4, 16384, 1280, 20, 64, 3584, 36),
    "XL-384": Shape(16, 2, 576, 4, 16384, 1280, 20, 64, 3584, 36),  # images of 384 pixels
    "E96": Shape(32, 2, 256, 4, 16384, 768, 8, 96, 2048, 12),  # B with eight heads: three quarters of a tile
    "3B": Shape(8, 2, 256, 4, 16384, 3200, 32, 100, 8704, 24),  # a head size that is no power of two
}

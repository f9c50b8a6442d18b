"""Many images of a source to their views: by Pillow in threads, or decoded by DALI. Which of the two is a setting, and
part of what a store is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import PIL
from torch import Tensor

from star_fast.config import DataConfig
from star_fast.data.sources import ImageSource, UnreadableImage
from star_fast.data.views import ImageViews, cut_views, read_views, square_sizes

if TYPE_CHECKING:
    from star_fast.data.dali import Refused, Views


class ViewReader(Protocol):
    """Reads images of a source and cuts them into views (see views.py)."""

    decoder: str  # what turns files into pixels, with its version: for the code store's manifest

    def __call__(self, indices: Sequence[int]) -> list[ImageViews | UnreadableImage]:
        """The views of each image, or why there are none. Raises DataError where the memory does not hold an image."""
        ...

    def counts(self) -> dict[str, int]:
        """How many images each way of decoding has had so far."""
        ...


def view_reader(
    source: ImageSource, data: DataConfig, image_size: int, channels: int, *, seed: int = 0, workers: int = 2
) -> ViewReader:
    """The reader that `data.decoder` names. Raises UserError where it needs what is not here."""
    kind = _Pillow if data.decoder == "pillow" else _Dali
    return kind(source, data, image_size, channels, seed, workers)


def processors_of_this_rank() -> int:
    """Processors of this machine that a rank may take for threads: its share, by the number of ranks here, or (where
    the launcher does not tell) in all.
    """
    told = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    ranks = int(told) if told.isascii() and told.isdecimal() and len(told) < 7 else 1
    # Not every system knows affinities
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, processors // max(1, ranks))


class _Pillow:
    """The definition of correct, in threads."""

    decoder = f"Pillow {PIL.__version__}"

    def __init__(
        self, source: ImageSource, data: DataConfig, image_size: int, channels: int, seed: int, workers: int
    ) -> None:
        self.source, self.data, self.image_size, self.channels, self.seed = source, data, image_size, channels, seed
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="views")
        self._read = 0

    def _one(self, index: int) -> ImageViews | UnreadableImage:
        try:
            return read_views(self.source, index, self.data, self.image_size, self.channels, self.seed)
        except UnreadableImage as error:
            return error

    def __call__(self, indices: Sequence[int]) -> list[ImageViews | UnreadableImage]:
        self._read += len(indices)
        return list(self._pool.map(self._one, indices))

    def counts(self) -> dict[str, int]:
        return {"pillow": self._read}


class _Dali(_Pillow):
    """Files decoded by DALI, squares cut as `views.make_squares` cuts them; images without a file of their own by
    Pillow.
    """

    def __init__(
        self, source: ImageSource, data: DataConfig, image_size: int, channels: int, seed: int, workers: int
    ) -> None:
        from star_fast.data.dali import DaliSquares
        from star_fast.data.dali_pipelines import dali_version

        super().__init__(source, data, image_size, channels, seed, workers)
        device: Literal["cpu", "mixed"] = "mixed" if data.decoder == "dali-gpu" else "cpu"
        self._squares = DaliSquares(square_sizes(data, image_size), channels, device=device, threads=workers)
        self.decoder = f"DALI {dali_version()} ({'GPU' if device == 'mixed' else 'CPU'}), {self.decoder}"

    def _file(self, index: int) -> bytes | UnreadableImage | None:
        try:
            return self.source.encoded(index)
        except UnreadableImage as error:
            return error

    def _cut(self, index: int, squares: Views | Refused) -> ImageViews | UnreadableImage:
        key = self.source.files[index]
        if not isinstance(squares, list):
            return UnreadableImage(key, squares.reason)
        views = cut_views([_as_array(square) for square in squares], int(index), self.data, self.image_size, self.seed)
        return ImageViews(views, int(self.source.labels[index]), key)

    def __call__(self, indices: Sequence[int]) -> list[ImageViews | UnreadableImage]:
        files = list(self._pool.map(self._file, indices))
        found: dict[int, ImageViews | UnreadableImage] = {}
        encoded = [place for place, file in enumerate(files) if isinstance(file, bytes)]
        squares = self._squares([file for file in files if isinstance(file, bytes)])
        cut = self._pool.map(self._cut, (indices[place] for place in encoded), squares)
        found |= zip(encoded, cut, strict=True)
        without = [place for place, file in enumerate(files) if file is None]
        found |= zip(without, super().__call__([indices[place] for place in without]), strict=True)
        return [file if isinstance(file, UnreadableImage) else found[place] for place, file in enumerate(files)]

    def counts(self) -> dict[str, int]:
        counts = dict(self._squares.counts)
        return {**counts, "pillow": counts["pillow"] + self._read}


def _as_array(square: np.ndarray | Tensor) -> np.ndarray:
    return square if isinstance(square, np.ndarray) else square.cpu().numpy()

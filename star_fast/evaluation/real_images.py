"""The real images behind a code store: what a classifier learns from and what samples are held against.

How an image was cut before it became codes is the store's affair, not the run's: a run may have been trained with any
settings of its own on a store that was made with others. So everything about views comes from the store's manifest.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from star_fast.config import DataConfig
from star_fast.data.codes import CodeStore
from star_fast.data.origin import images_of, require_same_images
from star_fast.data.sources import DataError, ImageSource, UnreadableImage
from star_fast.data.views import make_views
from star_fast.errors import UserError, printable
from star_fast.evaluation.limits import require_memory
from star_fast.records import require
from star_fast.storage import to_record

log = logging.getLogger(__name__)

LLAMAGEN_CODES = "LlamaGen codes"  # the source's kind in the manifest of an imported store
_MOST_SIDE = 2**14  # pixels of an image before it is cropped


@dataclass(frozen=True)
class StoredViews:
    """How a store's views were made: the manifest's view_settings."""

    kind: Literal["ten-crop", "small-affine"]
    crop_ranges: tuple[float, ...] = ()  # ten-crop
    crop_range: float = 0.0  # what stores made by earlier versions have instead
    seed: int = 0  # small-affine

    def __post_init__(self) -> None:
        if self.kind == "ten-crop":
            ranges = self.ranges
            require(
                1 <= min(ranges) <= max(ranges) <= _MOST_SIDE, "crop_ranges", ranges, f"numbers of 1 ... {_MOST_SIDE}"
            )
        require(self.seed >= 0, "seed", self.seed, "0 or more")

    @property
    def ranges(self) -> tuple[float, ...]:
        """The crop ranges."""
        return self.crop_ranges or (self.crop_range,)


def stored_views(store: CodeStore) -> StoredViews:
    """How the store's views were made. Raises UserError where the manifest does not tell in a way
    that is known here.
    """
    return to_record(
        store.manifest.get("view_settings"),
        f"{store.path}/manifest.json, view_settings",
        StoredViews,
        "leave --source out, or prepare the codes again with this version",
        ignore_unknown=True,
    )


class RealImages:
    """Reads the plain view (see CodeStore) of the images that a store's rows stand for, cut as the store's own settings
    say.
    """

    def __init__(self, store: CodeStore, source: ImageSource) -> None:
        views = stored_views(store)
        self.store, self.source, self.view, self.seed = store, source, store.plain_view, views.seed
        self.data = DataConfig(views=views.kind, affine_views=len(store.views))
        if views.kind == "ten-crop":
            self.data = DataConfig(views=views.kind, crop_ranges=views.ranges)
            require(
                store.image_size * max(views.ranges) <= _MOST_SIDE,
                f"{store.path}/manifest.json: crop_ranges",
                views.ranges,
                f"images of at most {_MOST_SIDE} pixels before they are cropped to {store.image_size}",
            )
        self.channels: int = store.manifest.get("image_channels", 3)
        require_same_images(store, source, "source")
        self._indices = store.source_indices()
        if len(source) <= self._indices[-1]:
            raise UserError(f"source: holds {len(source)} images, fewer than {store.path} was made of")

    def read(self, rows: Tensor, title: str = "real images") -> Tensor:
        """(N, C, H, W) uint8 of the store's rows (N,)."""
        shape = (len(rows), self.channels, self.store.image_size, self.store.image_size)
        require_memory(
            int(np.prod(shape, dtype=object)),
            f"{len(rows):,} real images of {shape[-1]} x {shape[-1]} pixels",
            "use fewer: --classifier.max-images",
        )
        images = np.empty(shape, dtype=np.uint8)
        for place, row in enumerate(tqdm(rows.tolist(), desc=title, unit="image", leave=False)):
            index = int(self._indices[row])
            try:
                images[place] = make_views(
                    self.source[index].image,
                    index,
                    self.data,
                    self.store.image_size,
                    self.channels,
                    self.seed,
                    only=self.view,
                )
            except UnreadableImage as error:
                raise UserError(f"source: {error}; it could be read when the codes were made") from error
        return torch.from_numpy(images)


def open_real_images(store: CodeStore, source: str) -> RealImages | None:
    """The images behind `store`, from `source` (a name as `star-fast prepare` takes it; empty: from where the store
    says that they were found).

    Returns None where no source is given and the store does not say, or they are no longer there; then a line says so.

    Raises:
        UserError: other images than the store's; or the store was imported from LlamaGen's codes, of which no images
            are known.
    """
    kind = store.manifest["source"].get("kind")
    if kind == LLAMAGEN_CODES and source:
        raise UserError(
            f"source: {store.path} was imported from codes as extracted by LlamaGen; which images they were made "
            "of, and how these were cut, "
            "is not recorded, so nothing can be compared with real images: leave --source out"
        )
    try:
        images = images_of(store, source)
    except DataError as error:
        if source:
            raise
        log.warning("%s; without --source this report does without real images", printable(str(error)))
        return None
    if images is None:
        return None
    if kind == "folder" and "pixels" not in store.manifest:
        log.warning(
            "%s: made by an earlier version, which left pictures unturned that EXIF turns and made 16-bit ones "
            "white; if there are any in the source, "
            "they are not compared as they were encoded. Prepare the codes again to be sure",
            printable(store.path),
        )
    return RealImages(store, images)


def why_unknown(store: CodeStore) -> str:
    """Why there are no real images to look at, when open_real_images found none; for the page."""
    if store.manifest["source"].get("kind") == LLAMAGEN_CODES:
        return "the codes were imported as extracted by LlamaGen; the images behind them are not recorded."
    return "the real images behind the codes are not known. Give the folder that the codes were made of: --source."

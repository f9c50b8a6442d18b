"""The real images behind a code store: what a classifier learns from and what samples are held against."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from star_fast.config import DataConfig
from star_fast.data.codes import CodeStore
from star_fast.data.sources import BUILT_IN, ImageSource, UnreadableImage, open_source
from star_fast.data.views import make_views
from star_fast.errors import UserError
from star_fast.evaluation.runs import plain_view


class RealImages:
    """Reads the plain view (see runs.plain_view) of the images that a store's rows stand for."""

    def __init__(self, store: CodeStore, source: ImageSource, data: DataConfig) -> None:
        self.store, self.source, self.data, self.view = store, source, data, plain_view(store)
        self.channels: int = store.manifest.get("image_channels", 3)
        found, expected = source.description(), store.manifest["source"]
        if found != expected:
            differing = ", ".join(f"{key} {expected.get(key)!r} there and {found.get(key)!r} here" for key in sorted({*found, *expected})
                                  if found.get(key) != expected.get(key))
            raise UserError(f"source: not the images that {store.path} was made of ({differing}); give the folder that was given to `star-fast prepare`")
        self._indices = _source_indices(store, source)

    def read(self, rows: Tensor, title: str = "real images") -> Tensor:
        """(N, C, H, W) uint8 of the store's rows (N,)."""
        images = []
        for row in tqdm(rows.tolist(), desc=title, unit="image", leave=False):
            index = self._indices[row]
            try:
                image = self.source[index].image
            except UnreadableImage as error:
                raise UserError(f"source: {error}; it could be read when the codes were made") from error
            images.append(make_views(image, index, self.data, self.store.image_size, self.channels, only=self.view))
        return torch.from_numpy(np.stack(images))


def open_real_images(store: CodeStore, source: str, data: DataConfig) -> RealImages | None:
    """The images behind `store`, from `source` (a name as `star-fast prepare` takes it; empty: the built-in set if the store is made of it).

    Returns None where the store was not made of built-in images and no source is given. Raises UserError for other images than the store's.
    """
    built_in = store.manifest["source"].get("kind") == "built-in digits"
    if not source and not built_in:
        return None
    return RealImages(store, open_source(source or BUILT_IN), data)


def _source_indices(store: CodeStore, source: ImageSource) -> list[int]:
    """The source index of each row: the same numbers unless images were skipped; then by name."""
    if len(source) == len(store):
        return list(range(len(store)))
    names = getattr(source, "files", None)
    if names is None:
        raise UserError(f"source: holds {len(source)} images, {store.path} {len(store)}; expected the images that the codes were made of")
    place = {name: index for index, name in enumerate(names)}
    keys = store.keys()
    missing = [key for key in keys if key not in place]
    if missing:
        raise UserError(f"source: {missing[0]} and {len(missing) - 1} more images that {store.path} was made of are not there")
    return [place[key] for key in keys]

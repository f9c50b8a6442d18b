"""What every source of images offers, and what is said when an image or a whole source is not what the job needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from star_fast.data.decoding import reason_of
from star_fast.errors import UserError
from star_fast.storage import StorageError, read_bytes

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
# Of one image's file where it is read whole: the largest image there may be, uncompressed, with 16 bits a channel
MOST_FILE_BYTES = 2**30
# Beyond that a set in which most images have a label of their own, of several words, is taken for one of captions
_MOST_CLASSES = 1000
_MOST_DIGITS = 18


class DataError(UserError, ValueError):
    """Images, classes or codes are not what the job needs. The message is one line: what was expected, what is there,
    what to do.
    """


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
    """Images with labels, read one at a time, in an order that is the same on every machine."""

    class_names: tuple[str, ...]
    labels: np.ndarray  # (images,) int64, known without decoding anything
    skipped: list[dict[str, str]]  # what was left out before any image was read: {"key", "reason"} each

    @property
    def files(self) -> Sequence[str]:
        """The key of each image."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Image number `index`; raises UnreadableImage when it cannot be decoded. Several threads may ask at once."""
        ...

    def encoded(self, index: int) -> bytes | None:
        """The file of image number `index` as it is stored; None where there is none. Raises UnreadableImage when it
        cannot be read.
        """
        ...

    def description(self) -> dict[str, Any]:
        """What the images are, with a sha256 that changes when they do; goes into the code store's manifest."""
        ...


def read_sample(read: Callable[[], Image.Image], label: int, key: str, place: str | Path) -> Sample:
    """The sample whose image `read` decodes.

    Args:
        place: the folder or archive that it lies in: named where the machine is at fault, left out of the reason where
            the image is.

    Raises:
        UnreadableImage: the image cannot be decoded. DataError: the memory does not hold it.
    """
    try:
        return Sample(read(), label, key)
    except MemoryError as error:
        raise DataError(
            f"{place}/{key}: the memory that is free does not hold its pixels; free some, then run the same command"
        ) from error
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's decoders fail with a dozen exception types on damaged files
        raise UnreadableImage(key, reason_of(error).replace(f"{place}/", "").removeprefix(f"{key}: ")) from error


def read_file(folder: Path, key: str) -> bytes:
    """The bytes of an image's file. Raises UnreadableImage."""
    try:
        return read_bytes(folder / key, "expected an image file", MOST_FILE_BYTES)
    except StorageError as error:
        raise UnreadableImage(key, str(error).replace(f"{folder}/", "").removeprefix(f"{key}: ")) from error


def ordered_classes(texts: Sequence[str], numbers: Sequence[int] | np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """Classes in the order of their names, or of their values where all are whole numbers.

    Args:
        texts: each class once. numbers: of each image, the place of its class in `texts`.

    Returns:
        The class names, and labels (images,) int64.

    Raises:
        DataError: so many classes that they must be captions.
    """
    if len(texts) > max(_MOST_CLASSES, len(numbers) // 2) and sum(" " in text for text in texts) > len(texts) // 2:
        raise DataError(
            f"{len(numbers)} images have {len(texts)} different labels, such as {texts[0][:60]!r}; expected "
            "classes that several images share, "
            "these look like captions"
        )
    if all(map(is_number, texts)):
        order = sorted(range(len(texts)), key=lambda place: (int(texts[place]), texts[place]))
    else:
        order = sorted(range(len(texts)), key=texts.__getitem__)
    rank = np.empty(len(texts), dtype=np.int64)
    rank[order] = np.arange(len(texts))
    return tuple(texts[place] for place in order), rank[np.asarray(numbers, dtype=np.int64)]


def is_number(text: str) -> bool:
    """Whether a class is given as a whole number, in digits that Python reads in no time."""
    return text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS

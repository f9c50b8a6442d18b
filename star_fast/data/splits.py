"""Which images are held out: a share of every class, or a source of their own. Tokenizer training, code store and
classifier share this one split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from star_fast.data.image_source import DataError, ImageSource, Sample, UnreadableImage, is_number

HELD_OUT_PREFIX = "held out/"  # of the keys of images that come from the held-out source


class WithHeldOut:
    """Two sources as one: the training images first, then the held-out ones, with the classes of the first.

    Classes of the held-out source are matched by name; it need not have all of them. Where its classes are whole
    numbers and none of them is a class name of the training images, they count the training classes from 0 (as lists of
    ImageNet's validation images do).

    Raises:
        DataError: a class of the held-out source that the training images do not have.
    """

    def __init__(self, train: ImageSource, held_out: ImageSource) -> None:
        self.train, self.held_out = train, held_out
        self.class_names = train.class_names
        self.labels = np.concatenate([train.labels, _matched(train.class_names, held_out.class_names)[held_out.labels]])
        self.files: Sequence[str] = _Joined(train.files, held_out.files)
        self.skipped = [
            *train.skipped,
            *({**entry, "key": HELD_OUT_PREFIX + entry["key"]} for entry in held_out.skipped),
        ]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        if index < len(self.train):
            return self.train[index]
        try:
            return self.held_out[index - len(self.train)]._replace(label=int(self.labels[index]), key=self.files[index])
        except UnreadableImage as error:
            raise UnreadableImage(HELD_OUT_PREFIX + error.key, error.reason) from error

    def encoded(self, index: int) -> bytes | None:
        """The file of an image as it is stored; None where there is none."""
        if index < len(self.train):
            return self.train.encoded(index)
        try:
            return self.held_out.encoded(index - len(self.train))
        except UnreadableImage as error:
            raise UnreadableImage(HELD_OUT_PREFIX + error.key, error.reason) from error

    def description(self) -> dict[str, Any]:
        """That of the training images with that of the held-out ones in it."""
        return {**self.train.description(), "held_out": self.held_out.description()}


class _Joined(Sequence[str]):
    """The keys of both sources, without a second copy of them."""

    def __init__(self, train: Sequence[str], held_out: Sequence[str]) -> None:
        self._train, self._held_out = train, held_out

    def __len__(self) -> int:
        return len(self._train) + len(self._held_out)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return (
            self._train[place]
            if place < len(self._train)
            else HELD_OUT_PREFIX + self._held_out[place - len(self._train)]
        )

    def __iter__(self) -> Iterator[str]:
        yield from self._train
        for key in self._held_out:
            yield HELD_OUT_PREFIX + key


def _matched(train: Sequence[str], held_out: Sequence[str]) -> np.ndarray:
    """The training label of each held-out class."""
    places = {name: place for place, name in enumerate(train)}
    if all(map(is_number, held_out)) and not any(name in places for name in held_out):
        places = {name: int(name) for name in held_out if int(name) < len(train)}
    if unknown := [name for name in held_out if name not in places]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise DataError(
            f"held-out source: its class {unknown[0]!r}{more} is none of the {len(train)} classes of the training "
            "images "
            f"({', '.join(train[:5])}{' ...' if len(train) > 5 else ''}); expected the same names"
        )
    return np.array([places[name] for name in held_out], dtype=np.int64)


def split_of(source: ImageSource, held_out_share: float) -> tuple[np.ndarray, np.ndarray]:
    """Sorted int64 indices of a source's train and held-out images: its own split where it has one, else
    `split_indices` of its labels.

    Raises:
        DataError: a share that is not in [0, 1); or not 0 where the source says itself which images are held out.
    """
    if not isinstance(source, WithHeldOut):
        return split_indices(source.labels, held_out_share)
    if held_out_share:
        raise DataError(
            "held_out_share: expected 0 with a held-out source, whose images are the held-out ones, got "
            f"{held_out_share!r}"
        )
    return np.arange(len(source.train)), np.arange(len(source.train), len(source))


def split_indices(labels: np.ndarray, held_out_share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The split by image: sorted int64 indices of train and held-out images, the same share of every class held out.

    Of a class with n images round(share * n) are held out, but at least 1 (if the share is not 0) and at most n - 1, so
    that no class is missing on either side; a class with one image is in train only. Depends on the labels, the share
    and the seed alone.
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
    """A permutation of 0 ... n-1 drawn from `key`: the same on every machine and NumPy version (raw bits are,
    Generator.permutation may change).
    """
    return np.argsort(random_bits(n, *key), kind="stable")


def random_bits(n: int, *key: int) -> np.ndarray:
    """n uint64 drawn from the Philox stream that the whole numbers `key` name."""
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(n)


def class_sizes(labels: np.ndarray, class_names: tuple[str, ...]) -> dict[str, int]:
    """Images of each class."""
    count = Counter(np.asarray(labels).tolist())
    return {name: count[index] for index, name in enumerate(class_names)}

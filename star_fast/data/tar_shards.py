"""Images in tar files, in the layout of webdataset: NAME.jpg and, beside it, NAME.cls, NAME.json or NAME.txt with its
class.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from star_fast.data.decoding import decode_image
from star_fast.data.folders import folder_entries
from star_fast.data.image_source import (
    IMAGE_SUFFIXES,
    MOST_FILE_BYTES,
    DataError,
    Sample,
    UnreadableImage,
    ordered_classes,
    read_sample,
)
from star_fast.data.tar_members import TarFault, TarMember, tar_members
from star_fast.errors import printable
from star_fast.storage import parse_json, require_regular

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
_LABELS = ("cls", "json", "txt")  # the first of them that a sample has is its label
_JSON_KEYS = ("label", "class")
_MOST_LABEL_BYTES = {"cls": 2**10, "json": 2**20, "txt": 2**10}
_MOST_SHARDS = 10**6
_BRACES = re.compile(r"\{([^{}]*)\}")


class TarShards:
    """Images in tar files. Order: that of the shards' names, and within a shard its own. Keys are SHARD/NAME.jpg.

    The headers are read once, when the source is opened; afterwards each image is read from its place. What belongs to
    one sample has one name up to the last dot and lies together, as webdataset writes it. The class is a whole number
    or a name: the text of NAME.cls, "label" or "class" in NAME.json, the text of NAME.txt. Of a shard that is cut short
    or damaged, what comes before the fault is taken.

    Args:
        shards: a .tar file, a folder that holds some, or a pattern such as train-{000..099}.tar.
        progress: show a bar while the headers are read.

    Raises:
        DataError: no such file, a compressed one, or no image with a class in any of them.
    """

    def __init__(self, shards: str | Path, *, progress: bool = True) -> None:
        self._shards = find_shards(shards)
        self._place = str(shards)
        self._folder = os.path.commonpath([os.path.abspath(path.parent) for path in self._shards])
        self.skipped: list[dict[str, str]] = []
        self._shard, self._offset, self._size, classes = array("I"), array("Q"), array("Q"), array("I")
        self.files = _Names()
        digest, texts = hashlib.sha256(), dict[str, int]()
        with tqdm(
            total=sum(require_regular(path, "expected a tar file") for path in self._shards),
            desc="tar headers",
            unit="B",
            unit_scale=True,
            disable=not progress,
            dynamic_ncols=True,
        ) as bar:
            for number, path in enumerate(self._shards):
                for name, member, text in self._samples(path, digest, bar):
                    self._shard.append(number)
                    self._offset.append(member.offset)
                    self._size.append(member.size)
                    self.files.append(name)
                    classes.append(texts.setdefault(text, len(texts)))
        if not classes:
            first = (
                f"; the first thing left out: {self.skipped[0]['key']}: {self.skipped[0]['reason']}"
                if self.skipped
                else ""
            )
            raise DataError(
                f"{shards}: no image with a class in {len(self._shards)} tar files; expected NAME.jpg and "
                'NAME.cls, NAME.json with a "label", or '
                f"NAME.txt beside it{first}"
            )
        self.class_names, self.labels = ordered_classes(list(texts), np.frombuffer(classes, dtype=np.uintc))
        self._sha256 = digest.hexdigest()
        self._drop_repeats()

    def _drop_repeats(self) -> None:
        """Leave out images whose key an earlier one has: a tar file may hold several files of one name."""
        # A set of a million keys would take 200 MB
        hashes = np.fromiter(map(hash, self.files), dtype=np.int64, count=len(self))
        order = np.argsort(hashes, kind="stable")
        again = order[1:][hashes[order[1:]] == hashes[order[:-1]]]
        if not len(again):
            return
        seen: dict[str, list[int]] = {}
        for index in np.flatnonzero(np.isin(hashes, hashes[again])).tolist():
            seen.setdefault(self.files[index], []).append(index)
        dropped = sorted(index for indices in seen.values() for index in indices[1:])
        self.skipped += [
            {"key": self.files[index], "reason": "its name occurs twice in its tar file; the first is taken"}
            for index in dropped
        ]
        kept = np.delete(np.arange(len(self)), dropped).tolist()
        self.files, names = _Names(), self.files
        for index in kept:
            self.files.append(names[index])
        self._shard, self._offset, self._size = (
            array(old.typecode, [old[index] for index in kept]) for old in (self._shard, self._offset, self._size)
        )
        self.labels = self.labels[kept]

    def __len__(self) -> int:
        return len(self._offset)

    def __getitem__(self, index: int) -> Sample:
        return read_sample(
            lambda: decode_image(self.encoded(index)), int(self.labels[index]), self.files[index], self._place
        )

    def encoded(self, index: int) -> bytes:
        """The file of image number `index`. Raises UnreadableImage.

        The shard is opened for this one image: microseconds beside its decoding, and no number of threads, forks or
        shards runs out of open files.
        """
        path, offset, size = self._shards[self._shard[index]], self._offset[index], self._size[index]
        if size > MOST_FILE_BYTES:
            raise UnreadableImage(self.files[index], f"expected at most {MOST_FILE_BYTES:,} bytes, it has {size:,}")
        try:
            with open(path, "rb", buffering=0) as shard:
                data = os.pread(shard.fileno(), size, offset)
        except OSError as error:
            raise UnreadableImage(self.files[index], f"cannot be read: {error.strerror or error}") from error
        if len(data) != size:
            raise UnreadableImage(
                self.files[index], f"its tar file has become shorter: expected {size:,} bytes, got {len(data):,}"
            )
        return data

    def description(self) -> dict[str, Any]:
        """The hash covers every header (name, size and time of each file) and every label, not the images' content:
        that would take reading all of it.
        """
        return {
            "kind": "tar shards",
            "name": Path(self._place).name,
            "shards": len(self._shards),
            "images": len(self),
            "sha256_of_headers_and_labels": self._sha256,
        }

    def _samples(self, path: Path, digest: Any, bar: tqdm) -> Iterator[tuple[str, TarMember, str]]:
        """Key, image and class of each sample in a shard."""
        shard = os.path.relpath(path, self._folder)
        size = require_regular(path, "expected a tar file")
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
        try:
            sample = _PartialSample(shard)
            position = 0
            try:
                for member in tar_members(descriptor, size):
                    bar.update(member.offset - position)
                    position = member.offset
                    digest.update(member.header)
                    name, refused = _checked_name(member)
                    if not name:
                        continue
                    if refused:
                        self.skipped.append({"key": f"{shard}/{os.fsdecode(name)}", "reason": refused})
                        continue
                    stem, suffix = os.path.splitext(name)
                    if stem != sample.stem:
                        yield from sample.finished(self.skipped)
                        sample = _PartialSample(shard, stem)
                    ending = os.fsdecode(suffix[1:]).lower()
                    if "." + ending in IMAGE_SUFFIXES:
                        sample.images.append((name, member))
                    elif ending in _LABELS:
                        content = _content(descriptor, member, _MOST_LABEL_BYTES[ending])
                        digest.update(content or b"")
                        sample.labels[ending] = content
            except (TarFault, OSError) as fault:
                self.skipped.append(
                    {
                        "key": shard,
                        "reason": f"{getattr(fault, 'strerror', None) or fault}; "
                        f"what comes after {_told(sample)} is left "
                        "out",
                    }
                )
            yield from sample.finished(self.skipped)
            bar.update(size - position)
        finally:
            os.close(descriptor)


class _PartialSample:
    """What was found of one sample so far."""

    def __init__(self, shard: str, stem: bytes = b"") -> None:
        self.shard, self.stem = shard, stem
        self.images: list[tuple[bytes, TarMember]] = []
        self.labels: dict[str, bytes | None] = {}

    def finished(self, skipped: list[dict[str, str]]) -> Iterator[tuple[str, TarMember, str]]:
        """The sample, if it has an image and a class; else what is wrong goes to `skipped`."""
        keys = [f"{self.shard}/{os.fsdecode(name)}" for name, _ in self.images]
        if not self.images:
            if self.labels:
                skipped.append(
                    {"key": f"{self.shard}/{os.fsdecode(self.stem)}", "reason": "a label without an image beside it"}
                )
            return
        ending = next((ending for ending in _LABELS if ending in self.labels), "")
        text, reason = (
            _class_text(ending, self.labels[ending])
            if ending
            else ("", "no class: expected a .cls, .json or .txt of the same name right beside it")
        )
        skipped += [{"key": key, "reason": reason} for key in keys if reason]
        if not reason:
            skipped += [{"key": key, "reason": f"a second image of that name; {keys[0]} is taken"} for key in keys[1:]]
            yield keys[0], self.images[0][1], text


class _Names(Sequence[str]):
    """Many short texts in one piece of memory: a million keys as Python's strings take 100 MB more."""

    def __init__(self) -> None:
        self._bytes, self._ends = bytearray(), array("Q")

    def append(self, name: str) -> None:
        self._bytes += os.fsencode(name)
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return os.fsdecode(bytes(self._bytes[self._ends[place - 1] if place else 0 : self._ends[place]]))


def find_shards(shards: str | Path) -> list[Path]:
    """The tar files that a name stands for (see TarShards), in order of their names. Raises DataError where it stands
    for none, or for compressed ones.
    """
    name = str(shards)
    if _BRACES.search(name):
        paths = [Path(one) for one in _expanded(name)]
        if missing := [path for path in paths if not os.path.isfile(path)]:
            raise DataError(
                f"{name}: {len(missing)} of its {len(paths)} files are not there, the first is {missing[0]}"
            )
    elif os.path.isdir(name):
        paths = [
            Path(entry.path)
            for entry in folder_entries(Path(name), "a folder of tar files")
            if entry.name.lower().endswith((".tar", *_COMPRESSED))
        ]
    else:
        paths = [Path(name)]
    if not paths:
        raise DataError(f"{name}: holds no tar files")
    for path in paths:
        require_regular(path, "expected a tar file")
        if path.name.lower().endswith(_COMPRESSED) or _begins_compressed(path):
            raise DataError(
                f"{path}: a compressed tar file; single images are read from their places, which needs plain tar: "
                "uncompress it first"
            )
    return paths


def _expanded(pattern: str) -> Iterator[str]:
    """The names that a pattern with {000..099} or {a,b} in it stands for."""
    pieces = _BRACES.split(pattern)  # text and inner of braces in turn
    choices = []
    for inner in pieces[1::2]:
        numbers = re.fullmatch(r"([0-9]{1,9})\.\.([0-9]{1,9})", inner)
        if numbers:
            width = len(numbers[1]) if numbers[1].startswith("0") else 0
            choices.append(
                [
                    str(number).zfill(width)
                    for number in range(int(numbers[1]), min(int(numbers[2]), int(numbers[1]) + _MOST_SHARDS) + 1)
                ]
            )
        else:
            choices.append(inner.split(","))
    found = list(islice(product(*choices), _MOST_SHARDS + 1))
    if not found or len(found) > _MOST_SHARDS:
        raise DataError(
            f"{pattern}: stands for {'more than a million' if found else 'no'} files; expected a range such as "
            f"{{000..099}}"
        )
    for chosen in found:
        yield "".join(text + choice for text, choice in zip(pieces[::2], (*chosen, ""), strict=True))


def _begins_compressed(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(6).startswith(_MAGIC)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _checked_name(member: TarMember) -> tuple[bytes, str]:
    """A member's name without './' before it (empty for what is hidden), and why it is not taken."""
    name, refused = member.name, member.refused
    while name.startswith(b"./"):
        name = name[2:].lstrip(b"/")
    parts = name.split(b"/")
    if b".." in parts or name.startswith(b"/"):
        return name, "its name leads out of the tar file"
    return b"" if parts[-1].startswith(b".") else name, f"{refused}, not a file" if refused else ""


def _content(descriptor: int, member: TarMember, most: int) -> bytes | None:
    """A small file; None where it is none."""
    if member.size > most:
        return None
    return (
        member.ahead[: member.size]
        if member.size <= len(member.ahead)
        else os.pread(descriptor, member.size, member.offset)
    )


def _class_text(ending: str, content: bytes | None) -> tuple[str, str]:
    """The class that a label file gives, or why it gives none."""
    if content is None:
        return "", f"no class: its .{ending} has more than {_MOST_LABEL_BYTES[ending]:,} bytes"
    text: Any = None
    with contextlib.suppress(ValueError):
        if ending != "json":
            text = content.decode("utf-8-sig").strip()
        elif isinstance(found := parse_json(content), dict):
            text = next((found[key] for key in _JSON_KEYS if key in found), None)
    if isinstance(text, int) and not isinstance(text, bool) and 0 <= text < 2**53:
        text = str(text)
    if not isinstance(text, str) or not text.strip() or len(text) > _MOST_LABEL_BYTES["cls"]:
        return (
            "",
            f"no class: its .{ending} holds no {'label or class that is a ' if ending == 'json' else ''}name or "
            "whole number",
        )
    return text.strip(), ""


def _told(sample: _PartialSample) -> str:
    return printable(os.fsdecode(sample.stem)) if sample.stem else "its beginning"

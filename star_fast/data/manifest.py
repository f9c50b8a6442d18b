"""The records of a code store, manifest.json and progress.json: their schema, and what is said where two of them
differ.
"""

from __future__ import annotations

import json
import os
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from star_fast.records import require
from star_fast.storage import StorageError, read_json, to_record

FORMAT = "star_fast code store"
FORMAT_VERSION = 1
MANIFEST_FILE, PROGRESS_FILE = "manifest.json", "progress.json"
CODES_FILE, LABELS_FILE, KEYS_FILE = FILES = ("codes.bin", "labels.bin", "keys.jsonl")
SKIPPED_FILE = "skipped.csv"
HINT = "a code store is a folder written by `star-fast prepare`"
DAMAGED = "copy it again or prepare the codes again"
_MOST_SIDE = 2**20  # pixels of an image
# Entries that finished stores of earlier versions lack; nothing else about them is different
_ADDED_LATER = {"pixels", "precision"}


@dataclass(frozen=True)
class FileRecord:
    """A file of the store, as the manifest knows it."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class SplitRecord:
    """Which rows are held out."""

    held_out_share: float
    held_out: Any  # list of int, rising; there may be a million, so it is checked as a whole


@dataclass(frozen=True)
class SkippedRecord:
    """An image that is not in the store."""

    key: str
    reason: str
    index: int = -1  # its number in the source; -1: left out before the source was numbered


@dataclass(frozen=True)
class Manifest:
    """What manifest.json must hold for a store to be read. Sizes are bounded here, and by the files' own sizes when the
    store is opened.
    """

    images: int
    views: list[str]
    positions: int
    grid: tuple[int, ...]
    image_size: int
    codebook: int
    class_names: list[str]
    tokenizer_sha256: str
    source: dict[str, Any]
    split: SplitRecord
    skipped: list[SkippedRecord]
    files: dict[str, FileRecord]
    job_sha256: str = ""
    image_channels: int = 3
    view_settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.images >= 1, "images", self.images, "at least 1")
        require(len(self.views) >= 1, "views", self.views, "at least one view")
        require(len(self.class_names) >= 1, "class_names", self.class_names, "at least one class")
        require(
            len(self.grid) == 2 and min(self.grid) >= 1 and self.grid[0] * self.grid[1] == self.positions,
            "grid",
            self.grid,
            f"height and width with a product of positions = {self.positions}",
        )
        for name, most in (("image_size", _MOST_SIDE), ("image_channels", 2**4), ("codebook", 2**16)):
            require(1 <= getattr(self, name) <= most, name, getattr(self, name), f"1 ... {most}")
        held_out = self.split.held_out
        require(
            isinstance(held_out, list)
            and set(map(type, held_out)) <= {int}
            and all(map(int.__lt__, held_out, held_out[1:]))
            and (not held_out or 0 <= held_out[0] <= held_out[-1] < self.images),
            "split.held_out",
            held_out,
            "rising row numbers below images",
        )
        for name in FILES:
            require(name in self.files, "files", sorted(self.files), f"an entry {name}")


@dataclass(frozen=True)
class SkippedSoFarRecord:
    """An image that will not be in the store."""

    index: int
    key: str
    reason: str


@dataclass(frozen=True)
class Progress:
    """What progress.json must hold for an unfinished store to go on."""

    job_sha256: str
    next_index: int
    rows: int
    skipped: list[SkippedSoFarRecord]
    bytes: dict[str, int]
    sha256: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(
            self.rows >= 0 and self.rows + len(self.skipped) == self.next_index,
            "next_index",
            self.next_index,
            f"rows = {self.rows} and {len(self.skipped)} skipped images together",
        )
        require(
            all(0 <= entry.index < self.next_index for entry in self.skipped),
            "skipped",
            self.skipped,
            "images below next_index",
        )
        for name in FILES:
            require(self.bytes.get(name, -1) >= 0, "bytes", self.bytes, f"the size of {name}")


def is_finished(path: str | Path) -> bool:
    """Whether folder `path` holds a code store with nothing left to do."""
    return os.path.exists(Path(path) / MANIFEST_FILE)


def is_begun(path: str | Path) -> bool:
    """Whether folder `path` holds codes, all of them or some."""
    return is_finished(path) or os.path.exists(Path(path) / PROGRESS_FILE)


def read_manifest(path: Path) -> tuple[dict[str, Any], Manifest]:
    """The manifest of the store in folder `path`, as it is and as a checked record. Raises StorageError when it is not
    what `star-fast prepare` writes.
    """
    file = path / MANIFEST_FILE
    manifest = read_json(file, HINT)
    if manifest.get("format") != FORMAT or manifest.get("format_version") != FORMAT_VERSION:
        raise StorageError(
            f"{file}: expected '{FORMAT}' version {FORMAT_VERSION}, got {str(manifest.get('format'))[:80]!r} version "
            f"{str(manifest.get('format_version'))[:80]}; prepare the codes again with this version"
        )
    if missing := [
        f.name
        for f in fields(Manifest)
        if f.default is MISSING and f.default_factory is MISSING and f.name not in manifest
    ]:
        raise StorageError(f"{file}: lacks {', '.join(missing)}; prepare the codes again")
    return manifest, to_record(manifest, file, Manifest, DAMAGED, ignore_unknown=True)


def read_progress(path: Path) -> dict[str, Any]:
    """What is recorded of the unfinished store in folder `path`. Raises StorageError when it is damaged."""
    file, hint = path / PROGRESS_FILE, f"delete {path} to start afresh"
    progress = read_json(file, hint)
    record = to_record(progress, file, Progress, hint, ignore_unknown=True)
    return {**progress, "sha256": record.sha256, "about": record.about}


def recorded_until(path: Path) -> int:
    """How many source images the store in folder `path` has got through so far; 0 where there is none yet, 2^63 where
    it is finished.
    """
    try:
        return read_progress(path)["next_index"]
    except StorageError:  # not there yet, or no longer; what is damaged is for the rank that writes it to say
        return 2**63 if is_finished(path) else 0


def tokenizer_of(path: Path) -> str:
    """`weights_hash()` of the tokenizer that the store in folder `path` was made or begun with; empty where there is
    none (or it does not say).
    """
    if is_finished(path):
        return read_manifest(path)[1].tokenizer_sha256
    found = read_progress(path)["about"].get("tokenizer_sha256", "") if is_begun(path) else ""
    return found if isinstance(found, str) else ""


def differences(there: dict[str, Any], asked: dict[str, Any]) -> str:
    """The first entry of `asked` that is another one `there`, with both values, for people; empty where all agree."""
    for name, wanted in json.loads(json.dumps(asked)).items():
        if name not in there:
            if name not in _ADDED_LATER and there:
                return f"{name}: not known there, {_short(wanted)} here"
        elif there[name] != wanted:
            inner = isinstance(wanted, dict) and isinstance(there[name], dict)
            keys = [key for key in wanted if there[name].get(key) != wanted[key]] if inner else []
            place, found, here = (
                (f"{name}.{keys[0]}", there[name].get(keys[0]), wanted[keys[0]])
                if keys
                else (name, there[name], wanted)
            )
            return f"{place}: {_short(found)} there, {_short(here)} here"
    return ""


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."

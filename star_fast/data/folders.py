"""Image files in a folder with one subfolder per class, and the walk over files that folders of every kind share."""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from star_fast.data.decoding import read_image
from star_fast.data.image_source import IMAGE_SUFFIXES, DataError, Sample, read_file, read_sample
from star_fast.storage import sha256_of_bytes

_TRAIN_NAMES = ("train", "training")
_HELD_OUT_NAMES = ("val", "validation", "valid", "test", "testing")  # the likelier one first


class FilesInFolder:
    """What sources of image files below a folder share: reading one of them."""

    folder: Path
    files: list[str]  # relative to folder, with '/'
    labels: np.ndarray  # (images,) int64

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        key = self.files[index]
        return read_sample(lambda: read_image(self.folder / key), int(self.labels[index]), key, self.folder)

    def encoded(self, index: int) -> bytes:
        """The file of image number `index`. Raises UnreadableImage."""
        return read_file(self.folder, self.files[index])


class ImageFolder(FilesInFolder):
    """Images in class subfolders: FOLDER/class name/anything/image.jpg. Classes and files in sorted order; how a file
    becomes pixels: decoding.py.

    Hidden entries, and files of other kinds beside the images, are ignored. Every other image that is left out is in
    `skipped`: one beside the class folders, one below a link to a folder (links are not followed, a class folder itself
    may be one), a link to nothing, a pipe under an image's name.

    Raises:
        DataError: the folder does not exist or cannot be read, no class subfolder holds an image, or its subfolders are
            train/ and val/, not classes.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        entries = folder_entries(self.folder, "FOLDER/class name/image files")
        _require_classes(self.folder, entries)
        self.files: list[str] = []  # relative to folder, with '/'
        self.skipped: list[dict[str, str]] = []
        self._sizes: list[int] = []
        labels: list[int] = []
        names: list[str] = []
        loose = [entry.name for entry in entries if not os.path.isdir(entry) and is_image(entry.name)]
        for entry in (entry for entry in entries if os.path.isdir(entry)):
            if entry.is_symlink() and _leads_back(entry.path, self.folder):
                self.skipped.append({"key": entry.name + "/", "reason": "a link to a folder that it lies in"})
                continue
            found, left_out = images_below(entry.path, entry.name)
            self.skipped += left_out
            if not found:
                self.skipped.append({"key": entry.name + "/", "reason": "a class folder without images"})
                continue
            self.files += sorted(found)
            self._sizes += [found[key] for key in sorted(found)]
            labels += [len(names)] * len(found)
            names.append(entry.name)
        if not self.files:
            instead = (
                f"{len(loose)} lie in the folder itself, without a class"
                if loose
                else f"looked for {', '.join(sorted(IMAGE_SUFFIXES))}"
            )
            raise DataError(
                f"{self.folder}: no images in class subfolders ({instead}); expected FOLDER/class name/image files"
                + (", or a list of labels for them: a CSV file of names and labels" if loose else "")
            )
        self.skipped += [{"key": name, "reason": "lies beside the class folders, so it has no class"} for name in loose]
        self.class_names = tuple(names)
        self.labels = np.asarray(labels, dtype=np.int64)

    def description(self) -> dict[str, Any]:
        """The hash covers every file's path and size, not its content: reading a whole ImageNet for a hash would take
        an hour.
        """
        return {
            "kind": "folder",
            "folder": self.folder.resolve().name,
            "images": len(self),
            "sha256_of_paths_and_sizes": sha256_of_listing(zip(self.files, self._sizes, strict=True)),
        }


def folder_entries(folder: Path, expected: str) -> list[os.DirEntry[str]]:
    """What lies in a source's folder, by name, without what is hidden. Raises DataError, saying what was `expected`,
    where it is none or cannot be read.
    """
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: not a folder; expected {expected}, or 'digits' for the built-in images")
    try:
        return _entries(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror or error}") from error


def is_image(name: str) -> bool:
    """Whether a file's name ends as those of images do."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def images_below(folder: str, key: str = "") -> tuple[dict[str, int], list[dict[str, str]]]:
    """The size in bytes of each image below a folder, by its path with '/' from `key` (the folder's own name) on; and
    what was left out, with reasons.
    """
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
            name = f"{prefix}/{entry.name}" if prefix else entry.name
            if entry.is_dir(follow_symlinks=False):
                waiting.append((entry.path, name))
            elif entry.is_symlink() and os.path.isdir(entry):
                # os.path.isdir is False, where DirEntry.is_dir raises, for a link to itself
                skipped.append({"key": name + "/", "reason": "a link to a folder, which is not followed"})
            elif is_image(entry.name):
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


def sha256_of_listing(entries: Iterable[tuple[Any, ...]]) -> str:
    """The sha256 of a list of files: a line of path, size and whatever else for each."""
    return sha256_of_bytes(
        "".join("\t".join(map(str, entry)) + "\n" for entry in entries).encode(errors="surrogateescape")
    )


def _require_classes(folder: Path, entries: list[os.DirEntry[str]]) -> None:
    """Refuse a root whose subfolders are parts of a data set, each with the classes in it: trained on as it stands it
    would teach two classes, train and val.

    Only where the training part holds nothing but folders: a class of locomotives may well be called train.
    """
    parts = {entry.name.lower(): entry for entry in entries if os.path.isdir(entry)}
    train = next((parts[name] for name in _TRAIN_NAMES if name in parts), None)
    held_out = next((parts[name] for name in _HELD_OUT_NAMES if name in parts), None)
    if train is None or (held_out is None and len(parts) > 1):
        return
    try:
        inside = _entries(train.path)
    except OSError:
        return
    if any(is_image(entry.name) for entry in inside) or not any(os.path.isdir(entry) for entry in inside):
        return
    command = f"star-fast prepare {shlex.quote(str(folder / train.name))}"
    if held_out is not None:
        command += f" --held-out-source {shlex.quote(str(folder / held_out.name))}"
    raise DataError(
        f"{folder}: holds {train.name}/{f' and {held_out.name}/' if held_out is not None else ''}, which are "
        "parts of a data set and not classes; "
        f"give the folder whose subfolders are the classes: {command}"
    )


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """What lies in a folder, by name, without what is hidden."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _leads_back(link: str, folder: Path) -> bool:
    """Whether a link in `folder` leads to the folder itself or one above it: every image would be found again, under
    another class.
    """
    target, here = Path(link).resolve(), folder.resolve()
    return target == here or target in here.parents

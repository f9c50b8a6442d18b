"""Image files in one folder with a list of their labels, as ImageNet's validation images are distributed."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from star_fast.data.folders import FilesInFolder, folder_entries, images_below, sha256_of_listing
from star_fast.data.image_source import DataError, is_number, ordered_classes
from star_fast.storage import require_regular

FILE_COLUMNS = (
    "file",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "path",
    "image",
    "image_path",
    "image_name",
    "img",
    "imageid",
    "image_id",
    "id",
    "name",
)
LABEL_COLUMNS = (
    "label",
    "labels",
    "class",
    "class_name",
    "classname",
    "target",
    "category",
    "wnid",
    "synset",
    "predictionstring",
)
_HINT = (
    f"expected a text file with a file name and a label in each line, or columns headed {FILE_COLUMNS[0]} and "
    f"{LABEL_COLUMNS[0]}"
)
_MOST_BYTES = 2**27  # of a list of labels: ten million images
_MOST_USELESS = 1000  # rows that are listed one by one: a list may be that of a whole data set, the folder a part of it
_MOST_LABEL = 1000  # letters
# Kaggle's ImageNet lists: the class and its boxes, "n01440764 10 20 30 40", perhaps several times over
_BOXES = "predictionstring"


class _Row(NamedTuple):
    line: int
    file: str
    label: str


class LabelledFolder(FilesInFolder):
    """Images in one folder, or in folders below it, with their labels in a CSV file. Files in sorted order.

    The list has columns headed as in FILE_COLUMNS and LABEL_COLUMNS, or two columns without a heading; separated by
    comma, semicolon, tab or space. Files are named relative to the folder, with or without their suffix. Labels are
    class names or whole numbers. What one of the two has and the other has not is in `skipped`, and so is a row that
    says again what another said; of such rows the first thousand one by one.

    Args:
        labels: the list's path, or its name in the folder.

    Raises:
        DataError: no folder, no images in it, no list or none that can be read, no row that names an image, or two rows
            that give one image two classes.
    """

    def __init__(self, folder: str | Path, labels: str | Path) -> None:
        self.folder = Path(folder)
        folder_entries(self.folder, "a folder of image files")
        sizes, self.skipped = images_below(str(self.folder))
        if not sizes:
            raise DataError(f"{self.folder}: no images in it to go with the labels in {labels}")
        self.list = (
            Path(labels) if os.path.exists(labels) or not os.path.exists(self.folder / labels) else self.folder / labels
        )
        by_stem: dict[str, str | None] = {}
        for file in sizes:  # None: two files differ in the suffix alone, so that without it neither is meant
            stem = os.path.splitext(file)[0]
            by_stem[stem] = None if stem in by_stem else file
        found: dict[str, _Row] = {}
        useless: list[dict[str, str]] = []
        more = 0
        for row in read_rows(self.list):
            name = os.path.normpath(row.file)
            key = name if name in sizes else by_stem.get(name)
            if key is not None and key not in found:
                found[key] = row
                continue
            if key is not None and found[key].label != row.label:
                raise DataError(
                    f"{self.list}: {key} is of class {found[key].label!r} in line {found[key].line} and of class "
                    f"{row.label!r} in line {row.line}; "
                    "expected one class for each image"
                )
            reason = f"there is no image {row.file}" if key is None else f"names {key} again, with the same label"
            if len(useless) < _MOST_USELESS:
                useless.append({"key": f"{self.list.name}, line {row.line}", "reason": reason})
            else:
                more += 1
        if not found:
            first = (
                f"{useless[0]['key']}: {useless[0]['reason']}, the folder holds {min(sizes)}"
                if useless
                else "it has no rows"
            )
            raise DataError(f"{self.list}: none of its rows names an image in {self.folder} ({first}); {_HINT}")
        if more:
            useless.append(
                {"key": self.list.name, "reason": f"{more} more rows name no image here, or one that another row named"}
            )
        self.files = sorted(found)
        self.skipped += useless
        self.skipped += [
            {"key": key, "reason": f"has no row in {self.list.name}"} for key in sorted(sizes) if key not in found
        ]
        self._sizes = [sizes[key] for key in self.files]
        places: dict[str, int] = {}
        numbers = [places.setdefault(found[key].label, len(places)) for key in self.files]
        self.class_names, self.labels = ordered_classes(list(places), numbers)

    def description(self) -> dict[str, Any]:
        """The hash covers every file's path and size, as that of ImageFolder does, and its label as
        the list gives it.
        """
        listing = sha256_of_listing(zip(self.files, self._sizes, np.asarray(self.labels).tolist(), strict=True))
        return {
            "kind": "labelled folder",
            "folder": self.folder.resolve().name,
            "labels": self.list.name,
            "images": len(self),
            "sha256_of_paths_sizes_and_labels": listing,
        }


def read_rows(path: str | Path) -> Iterator[_Row]:
    """The rows of a list of labels, one after the other: it may be as long as ImageNet.

    Raises:
        DataError: no ordinary file, too large, not CSV, a row without a file name or a label, or columns whose meaning
            is not known.
    """
    size = require_regular(path, _HINT)
    if size > _MOST_BYTES:
        raise DataError(f"{path}: expected at most {_MOST_BYTES:,} bytes, it has {size:,}; {_HINT}")
    try:
        # Names of files need not be UTF-8; what is not stays as the file system gives it.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            start = [line for line in file.read(2**16).splitlines() if line.strip()][:20]
            delimiter = _delimiter(start)
            file.seek(0)
            rows = (
                _split_at_last_space(file) if delimiter == " " else csv.reader(file, delimiter=delimiter, strict=True)
            )
            yield from _labelled(path, rows)
    except (OSError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}; {_HINT}") from error


def _delimiter(lines: list[str]) -> str:
    """What parts the columns: what occurs equally often in each of the first lines, else what occurs in the first of
    them.
    """
    first = lines[0] if lines else ""
    likely = [mark for mark in "\t;," if mark in first]
    # The last one may have been cut
    even = [mark for mark in likely if len({line.count(mark) for line in lines[:-1] or lines}) == 1]
    return (even or likely or [" "])[0]


def _split_at_last_space(lines: Iterator[str]) -> Iterator[list[str]]:
    for line in lines:
        yield line.rsplit(maxsplit=1)


def _labelled(path: str | Path, rows: Iterator[list[str]]) -> Iterator[_Row]:
    """The file and the label of each row, by the heading or by the two columns."""
    file_column, label_column, boxes, first = 0, 1, False, True
    for line, cells in enumerate(rows, 1):
        row = [cell.strip() for cell in cells]
        if not any(row):
            continue
        if first:
            first = False
            heading = [cell.lower() for cell in row]
            of_file = next((name for name in FILE_COLUMNS if name in heading), None)
            of_label = next((name for name in LABEL_COLUMNS if name in heading), None)
            if of_file and of_label:
                file_column, label_column, boxes = heading.index(of_file), heading.index(of_label), of_label == _BOXES
                continue
            # Tiny ImageNet's list has a box after the two
            if len(row) != 2 and not (len(row) == 6 and all(map(is_number, row[2:]))):
                raise DataError(
                    f"{path}: expected two columns, or a heading with one of {', '.join(FILE_COLUMNS)} and one of "
                    f"{', '.join(LABEL_COLUMNS)}; "
                    f"got {len(row)} columns: {', '.join(row)[:200]}"
                )
        if len(row) <= max(file_column, label_column) or not row[file_column] or not row[label_column]:
            raise DataError(f"{path}, line {line}: expected a file name and a label, got {','.join(row)[:100]!r}")
        label = row[label_column].split()[0] if boxes else row[label_column]
        if len(label) > _MOST_LABEL or "\0" in row[file_column]:
            raise DataError(
                f"{path}, line {line}: expected a file name and a label of at most {_MOST_LABEL} letters, got "
                f"{','.join(row)[:100]!r}"
            )
        yield _Row(line, row[file_column], label)

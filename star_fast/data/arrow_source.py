"""Images of a Hugging Face data set that was saved with `save_to_disk`, read through the package datasets where it is
installed.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np

from star_fast.data.decoding import decode_image
from star_fast.data.image_source import DataError, Sample, UnreadableImage, ordered_classes, read_file, read_sample
from star_fast.storage import read_json, sha256_of_bytes

# Of a column without class names, the likelier one first
_LABEL_NAMES = ("label", "labels", "class", "fine_label", "target")
_STATE, _SPLITS = "state.json", "dataset_dict.json"


def is_saved_dataset(folder: str | Path) -> bool:
    """Whether a folder is one that `save_to_disk` wrote."""
    return any(os.path.isfile(Path(folder) / name) for name in (_STATE, _SPLITS))


class ArrowDataset:
    """Images and labels of a data set on disk, in its own order. Keys are row numbers.

    The columns are found by their types: the one of images; the one of class labels, else one of whole numbers or texts
    that is called like a label.

    Raises:
        DataError: the package is not installed, the folder holds several splits or cannot be read, or the columns
            cannot be told.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if os.path.isfile(self.folder / _SPLITS) and not os.path.isfile(self.folder / _STATE):
            splits = read_json(self.folder / _SPLITS, "expected the list of splits that save_to_disk writes").get(
                "splits"
            )
            names = [str(name) for name in splits] if isinstance(splits, list) else []
            raise DataError(
                f"{self.folder}: holds {len(names)} splits; give one of them: "
                f"{', '.join(str(self.folder / name) for name in names)[:1000]}"
            )
        package = importlib.util.find_spec("datasets")
        if package is None or package.origin is None:  # None: a folder of that name where the command was started
            raise DataError(
                f"{self.folder}: a Hugging Face data set, which the package datasets reads; it is not installed: "
                "pip install 'star_fast[hf]'"
            )
        import datasets  # takes seconds: only when asked for

        try:
            table = datasets.load_from_disk(os.fspath(self.folder))
            image = _image_column(self.folder, table.features, datasets.Image)
            label, class_names = _label_column(self.folder, table.features, datasets.ClassLabel)
            self._rows = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
            values = np.asarray(table.select_columns([label]).with_format("numpy")[:][label])
        except DataError:
            raise
        except Exception as error:  # of the package, Arrow and JSON
            raise DataError(
                f"{self.folder}: cannot be read as a data set that save_to_disk wrote: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error
        self._column = image
        self._take(values, class_names)
        if not len(self):
            raise DataError(f"{self.folder}: none of its {len(values)} rows has a label in column {label!r}")
        self._sha256 = sha256_of_bytes(
            f"{table._fingerprint} {[_sizes(file) for file in table.cache_files]}".encode()
            + values.astype("U").tobytes()
        )

    def _take(self, values: np.ndarray, names: tuple[str, ...] | None) -> None:
        """Choose the rows that have a label; those of data sets without labels for a part have -1, or nothing."""
        if names is not None:
            labelled = (values >= 0) & (values < len(names))
        elif values.dtype.kind in "iu":
            labelled = values >= 0
        else:
            labelled = np.array(
                [isinstance(value, (str, int, np.integer)) and bool(str(value).strip()) for value in values], dtype=bool
            )
        self._row = np.flatnonzero(labelled)
        self.skipped = [{"key": _key(row), "reason": "has no label"} for row in np.flatnonzero(~labelled).tolist()]
        self.files = [_key(row) for row in self._row.tolist()]
        if names is not None:
            self.class_names, self.labels = names, values[labelled].astype(np.int64)
        else:
            places: dict[str, int] = {}
            numbers = [places.setdefault(str(value), len(places)) for value in values[labelled].tolist()]
            self.class_names, self.labels = ordered_classes(list(places), numbers)

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, index: int) -> Sample:
        return read_sample(
            lambda: decode_image(self.encoded(index)), int(self.labels[index]), self.files[index], self.folder
        )

    def encoded(self, index: int) -> bytes:
        """The file of image number `index`, without decoding it. Raises UnreadableImage."""
        key = self.files[index]
        try:
            entry = self._rows[int(self._row[index])][self._column]
        except Exception as error:  # Arrow's, for a damaged file
            raise UnreadableImage(key, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
        if not entry or not (entry.get("bytes") or entry.get("path")):
            raise UnreadableImage(key, "its row holds no image")
        if entry.get("bytes"):
            return entry["bytes"]
        try:
            return read_file(self.folder, entry["path"])
        except UnreadableImage as error:
            raise UnreadableImage(key, error.reason) from error

    def description(self) -> dict[str, Any]:
        """The hash covers the data set's fingerprint, which every change of it makes anew, its files' sizes and the
        labels.
        """
        return {
            "kind": "Hugging Face data set",
            "folder": self.folder.resolve().name,
            "images": len(self),
            "sha256_of_fingerprint_and_labels": self._sha256,
        }


def _image_column(folder: Path, features: Any, kind: type) -> str:
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        raise DataError(
            f"{folder}: expected one column of images, found {len(found)} among {', '.join(features)[:300]}"
        )
    return found[0]


def _label_column(folder: Path, features: Any, kind: type) -> tuple[str, tuple[str, ...] | None]:
    """The column of labels, and the names of its classes where it has some."""
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    chosen = found if len(found) == 1 else [name for name in _LABEL_NAMES if name in found][:1]
    if chosen:
        return chosen[0], tuple(features[chosen[0]].names)
    types = {name: str(getattr(feature, "dtype", "")) for name, feature in features.items()}
    plain = [name for name in _LABEL_NAMES if types.get(name, "").startswith(("int", "uint", "string", "large_string"))]
    if found or not plain:
        raise DataError(
            f"{folder}: expected one column of class labels, or one called {' or '.join(_LABEL_NAMES)}; found "
            f"{', '.join(features)[:300]}"
        )
    return plain[0], None


def _sizes(file: dict[str, Any]) -> tuple[str, int]:
    path = file["filename"]
    return os.path.basename(path), os.path.getsize(path)


def _key(row: int) -> str:
    return f"row {row:07d}"

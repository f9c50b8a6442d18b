"""The code store: all codes of a data set in one memory-mapped array beside a manifest that says what they are.

codes.bin      uint16 little-endian, (images, views, T)
labels.bin     int32 little-endian, (images,)
keys.jsonl     one JSON string per image: its name within the source
skipped.csv    key and reason of every image of the source that is not in the store
manifest.json  everything else; written last, so a folder without it is unfinished
progress.json  while it is unfinished: how much of each file counts, and its sha256
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from star_fast.data.manifest import (
    CODES_FILE,
    DAMAGED,
    FILES,
    HINT,
    KEYS_FILE,
    LABELS_FILE,
    MANIFEST_FILE,
    PROGRESS_FILE,
    SKIPPED_FILE,
    read_manifest,
)
from star_fast.data.sources import DataError, split_indices
from star_fast.data.views import plain_view
from star_fast.storage import StorageError, parse_json, read_bytes, require_regular, sha256_of_bytes, sha256_of_file

_JUDGING_SHARE = 0.1  # of the training images, where none are held out
_VERIFIED_BYTES = 2**24  # of codes.bin, looked at at once


class Judging(NamedTuple):
    """Which rows a probe or a classifier learns from, and which it is judged on."""

    learn: Tensor  # (N,) int64
    judge: Tensor  # (N',) int64
    judged_on: str  # what `judge` are, for people


class CodeStore:
    """A finished store, opened for reading. Rows are numbered 0 ... images-1; views as in `views`.

    Attributes: path; manifest (dict); views, class_names (tuples of str); positions (T); grid (h, w); image_size
    (pixels); codebook (V); tokenizer_hash (sha256 of the tokenizer's weights); plain_view (the view that shows an image
    as it is: the centre crop of ten-crop codes, else view 0); labels, train_indices, held_out_indices (int64 tensors).
    """

    def __init__(self, path: Path, manifest: dict[str, Any], codes: np.ndarray, labels: np.ndarray) -> None:
        """Use `open`, which checks what is given here."""
        self.path, self.manifest, self._codes = path, manifest, codes
        self.views: tuple[str, ...] = tuple(manifest["views"])
        self.class_names: tuple[str, ...] = tuple(manifest["class_names"])
        self.positions: int = manifest["positions"]
        self.grid: tuple[int, int] = tuple(manifest["grid"])
        self.image_size: int = manifest["image_size"]
        self.codebook: int = manifest["codebook"]
        self.tokenizer_hash: str = manifest["tokenizer_sha256"]
        self.plain_view = plain_view(self.views)
        self.labels = torch.from_numpy(labels.astype(np.int64))
        held_out = torch.zeros(len(labels), dtype=torch.bool)
        held_out[torch.tensor(manifest["split"]["held_out"], dtype=torch.int64)] = True
        self.train_indices = (~held_out).nonzero().flatten()
        self.held_out_indices = held_out.nonzero().flatten()

    @classmethod
    def open(cls, path: str | Path) -> CodeStore:
        """Open the store in folder `path`; codes are mapped, not read.

        Raises:
            StorageError: missing, unfinished, of another format version, a manifest that contradicts itself or its
                files' sizes, or labels that are not the ones it was made with.
        """
        path = Path(path)
        if not os.path.exists(path / MANIFEST_FILE) and os.path.exists(path / PROGRESS_FILE):
            raise StorageError(f"{path}: an unfinished code store; run the same `star-fast prepare` again to finish it")
        manifest, record = read_manifest(path)
        shape = (record.images, len(record.views), record.positions)
        labels = np.frombuffer(_checked(path / LABELS_FILE, 4 * shape[0], read=True), dtype="<i4")
        if sha256_of_bytes(labels.tobytes()) != record.files[LABELS_FILE].sha256:
            raise StorageError(
                f"{path / LABELS_FILE}: its content is not what {MANIFEST_FILE} recorded; prepare the codes again"
            )
        if not 0 <= labels.min() <= labels.max() < len(record.class_names):
            raise StorageError(
                f"{path / LABELS_FILE}: labels must lie in 0 ... {len(record.class_names) - 1}, the classes of "
                f"{MANIFEST_FILE}, got "
                f"{labels.min()} ... {labels.max()}; {DAMAGED}"
            )
        _checked(path / CODES_FILE, 2 * shape[0] * shape[1] * shape[2])
        try:
            codes = np.memmap(path / CODES_FILE, dtype="<u2", mode="r", shape=shape)
        except (OSError, ValueError) as error:  # no permission; or cut short this very moment
            raise StorageError(f"{path / CODES_FILE}: cannot be mapped: {error}") from error
        return cls(path, manifest, codes, labels)

    def __len__(self) -> int:
        return len(self.labels)

    def codes(
        self, image_indices: Tensor | np.ndarray | Sequence[int], views: Tensor | np.ndarray | Sequence[int]
    ) -> Tensor:
        """Codes (B, M, T) int64 of rows `image_indices` (B,): `views` is (B, M), views of each row, or (M,), the same
        for all.

        Raises:
            DataError: wrong shapes, or a row or view that the store does not have.
        """
        rows, columns = np.asarray(image_indices, dtype=np.int64), np.asarray(views, dtype=np.int64)
        if rows.ndim != 1 or columns.ndim not in (1, 2) or (columns.ndim == 2 and len(columns) != len(rows)):
            raise DataError(
                f"codes: expected image_indices (B,) and views (B, M) or (M,), got {rows.shape} and {columns.shape}"
            )
        for name, values, size in (("image_indices", rows, len(self)), ("views", columns, len(self.views))):
            if values.size and not 0 <= values.min() <= values.max() < size:
                raise DataError(f"codes: {name} must lie in 0 ... {size - 1}, got {values.min()} ... {values.max()}")
        return torch.from_numpy(self._codes[rows[:, None], columns].astype(np.int64))

    def judging(self) -> Judging:
        """The split for probes and classifiers: the held-out images judge; where there are none, a tenth of the
        training images, which the model has seen.

        Raises:
            DataError: too few images for a tenth of them to be one.
        """
        if len(self.held_out_indices):
            return Judging(self.train_indices, self.held_out_indices, "held-out images")
        learn, judge = (torch.from_numpy(part) for part in split_indices(self.labels.numpy(), _JUDGING_SHARE))
        if not len(judge):
            raise DataError(
                f"{self.path}: holds no images out and has only one of each class, so nothing can be judged; "
                "prepare more images"
            )
        return Judging(learn, judge, "training images that the model has seen, since none are held out")

    def class_index(self, name: str) -> int:
        """The label of a class name. Raises DataError, listing what exists, for one that does not."""
        return class_index(self.class_names, name)

    def require_tokenizer(self, weights_hash: str) -> None:
        """Raise DataError unless the codes were made by the tokenizer with this `weights_hash()`."""
        if weights_hash != self.tokenizer_hash:
            raise DataError(
                f"{self.path}: its codes were made by tokenizer {self.tokenizer_hash[:12]}, the tokenizer given "
                f"is {weights_hash[:12]}; "
                "give that tokenizer, or prepare the codes again with this one"
            )

    def keys(self) -> list[str]:
        """The name of each row's image within the source. Raises StorageError where keys.jsonl is
        not one string a row.
        """
        path = self.path / KEYS_FILE
        lines = read_bytes(path, HINT).split(b"\n")
        if lines.pop() or len(lines) != len(self):
            raise StorageError(f"{path}: expected {len(self)} whole lines, got {len(lines)}; {DAMAGED}")
        keys = []
        for number, line in enumerate(lines, 1):
            try:
                keys.append(parse_json(line))
            except ValueError:
                keys.append(None)
            if not isinstance(keys[-1], str):
                raise StorageError(
                    f"{path}, line {number}: expected the name of an image as a JSON string, got {line[:60]!r}; "
                    f"{DAMAGED}"
                )
        return keys

    def source_indices(self) -> np.ndarray:
        """(images,) int64: the number, in the source, of the image that each row stands for."""
        skipped = [entry["index"] for entry in self.manifest["skipped"] if entry.get("index", -1) >= 0]
        return np.delete(np.arange(len(self) + len(skipped)), skipped)

    def verify(self, progress: bool = False) -> None:
        """Read every file whole: its sha256 must be the manifest's, codes and keys what they may be. Raises
        StorageError at the first fault.
        """
        # Stores of earlier versions have no list
        for name in (*FILES, *(name for name in (SKIPPED_FILE,) if name in self.manifest["files"])):
            with tqdm(
                total=self.manifest["files"][name]["bytes"],
                desc=name,
                unit="B",
                unit_scale=True,
                disable=not progress,
                dynamic_ncols=True,
            ) as bar:
                if sha256_of_file(self.path / name, bar.update) != self.manifest["files"][name]["sha256"]:
                    raise StorageError(
                        f"{self.path / name}: damaged (its sha256 is not the manifest's); copy it again or "
                        "prepare the codes again"
                    )
        self.keys()
        rows = max(1, _VERIFIED_BYTES // self._codes[0].nbytes)
        for start in range(0, len(self), rows):
            if (largest := self._codes[start : start + rows].max()) >= self.codebook:
                raise StorageError(
                    f"{self.path / CODES_FILE}: codes must lie in 0 ... {self.codebook - 1}, got {largest} in "
                    f"rows {start} ... "
                    f"{min(start + rows, len(self)) - 1}; prepare the codes again"
                )


def class_index(class_names: Sequence[str], name: str) -> int:
    """Index of `name` in `class_names`. Raises DataError, listing (up to 20 of) what exists, for
    one that is not there.
    """
    if name in class_names:
        return list(class_names).index(name)
    more = f" ... ({len(class_names)} in all)" if len(class_names) > 20 else ""
    raise DataError(f"no class is named {name!r}; there are: {', '.join(class_names[:20])}{more}")


def _checked(path: Path, size: int, read: bool = False) -> bytes:
    """Check that a file has `size` bytes, and read it if asked."""
    found = require_regular(path, HINT)
    if found != size:
        raise StorageError(
            f"{path}: expected {size} bytes by the manifest, got {found}: truncated or mixed up; {DAMAGED}"
        )
    return read_bytes(path, HINT) if read else b""

"""The code store: all codes of a data set in one memory-mapped array beside a manifest that says what they are.

    codes.bin      uint16 little-endian, (images, views, T)
    labels.bin     int32 little-endian, (images,)
    keys.jsonl     one JSON string per image: its name within the source
    manifest.json  everything else; written last, so a folder without it is unfinished
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from star_fast.data.sources import DataError, split_indices
from star_fast.storage import StorageError, atomic_write_json, explain_write_errors, read_bytes, read_json, sha256_of_bytes, sha256_of_file

FORMAT = "star_fast code store"
FORMAT_VERSION = 1
MANIFEST_FILE, PROGRESS_FILE = "manifest.json", "progress.json"
CODES_FILE, LABELS_FILE, KEYS_FILE = "codes.bin", "labels.bin", "keys.jsonl"
_HINT = "a code store is a folder written by `star-fast prepare`"
_NEEDED = ("images", "views", "positions", "grid", "image_size", "codebook", "class_names", "tokenizer_sha256", "source", "split", "skipped", "files")


class CodeStore:
    """A finished store, opened for reading. Rows are numbered 0 ... images-1; views as in `views`.

    Attributes: path; manifest (dict); views, class_names (tuples of str); positions (T); grid (h, w); image_size (pixels); codebook (V);
    tokenizer_hash (sha256 of the tokenizer's weights); labels, train_indices, held_out_indices (int64 tensors).
    """

    def __init__(self, path: Path, manifest: dict[str, Any], codes: np.ndarray, labels: np.ndarray) -> None:
        self.path, self.manifest, self._codes = path, manifest, codes
        self.views: tuple[str, ...] = tuple(manifest["views"])
        self.class_names: tuple[str, ...] = tuple(manifest["class_names"])
        self.positions: int = manifest["positions"]
        self.grid: tuple[int, int] = tuple(manifest["grid"])
        self.image_size: int = manifest["image_size"]
        self.codebook: int = manifest["codebook"]
        self.tokenizer_hash: str = manifest["tokenizer_sha256"]
        self.labels = torch.from_numpy(labels.astype(np.int64))
        held_out = torch.zeros(len(labels), dtype=torch.bool)
        held_out[torch.tensor(manifest["split"]["held_out"], dtype=torch.int64)] = True
        self.train_indices = (~held_out).nonzero().flatten()
        self.held_out_indices = held_out.nonzero().flatten()

    @classmethod
    def open(cls, path: str | Path) -> CodeStore:
        """Open the store in folder `path`; codes are mapped, not read.

        Raises:
            StorageError: missing, unfinished, of another format version, or a file of another size (truncated) or labels of another hash.
        """
        path = Path(path)
        if not (path / MANIFEST_FILE).exists() and (path / PROGRESS_FILE).exists():
            raise StorageError(f"{path}: an unfinished code store; run the same `star-fast prepare` again to finish it")
        manifest = read_json(path / MANIFEST_FILE, _HINT)
        if manifest.get("format") != FORMAT or manifest.get("format_version") != FORMAT_VERSION:
            raise StorageError(f"{path / MANIFEST_FILE}: expected '{FORMAT}' version {FORMAT_VERSION}, got {manifest.get('format')!r} version "
                               f"{manifest.get('format_version')!r}; prepare the codes again with this version")
        if missing := [name for name in _NEEDED if name not in manifest]:
            raise StorageError(f"{path / MANIFEST_FILE}: lacks {', '.join(missing)}; prepare the codes again")
        shape = (manifest["images"], len(manifest["views"]), manifest["positions"])
        labels = np.frombuffer(_checked(path / LABELS_FILE, 4 * shape[0], read=True), dtype="<i4")
        if sha256_of_bytes(labels.tobytes()) != manifest["files"][LABELS_FILE]["sha256"]:
            raise StorageError(f"{path / LABELS_FILE}: its content is not what {MANIFEST_FILE} recorded; prepare the codes again")
        _checked(path / CODES_FILE, 2 * shape[0] * shape[1] * shape[2])
        return cls(path, manifest, np.memmap(path / CODES_FILE, dtype="<u2", mode="r", shape=shape), labels)

    def __len__(self) -> int:
        return len(self.labels)

    def codes(self, image_indices: Tensor | Sequence[int], views: Tensor | Sequence[int]) -> Tensor:
        """Codes (B, M, T) int64 of rows `image_indices` (B,): `views` is (B, M), views of each row, or (M,), the same for all.

        Raises:
            DataError: wrong shapes, or a row or view that the store does not have.
        """
        rows, columns = np.asarray(image_indices, dtype=np.int64), np.asarray(views, dtype=np.int64)
        if rows.ndim != 1 or columns.ndim not in (1, 2) or (columns.ndim == 2 and len(columns) != len(rows)):
            raise DataError(f"codes: expected image_indices (B,) and views (B, M) or (M,), got {rows.shape} and {columns.shape}")
        for name, values, size in (("image_indices", rows, len(self)), ("views", columns, len(self.views))):
            if values.size and not 0 <= values.min() <= values.max() < size:
                raise DataError(f"codes: {name} must lie in 0 ... {size - 1}, got {values.min()} ... {values.max()}")
        return torch.from_numpy(self._codes[rows[:, None], columns].astype(np.int64))

    def class_index(self, name: str) -> int:
        """The label of a class name. Raises DataError, listing what exists, for one that does not."""
        return class_index(self.class_names, name)

    def require_tokenizer(self, weights_hash: str) -> None:
        """Raise DataError unless the codes were made by the tokenizer with this `weights_hash()`."""
        if weights_hash != self.tokenizer_hash:
            raise DataError(f"{self.path}: its codes were made by tokenizer {self.tokenizer_hash[:12]}, the tokenizer given is {weights_hash[:12]}; "
                            "give that tokenizer, or prepare the codes again with this one")

    def keys(self) -> list[str]:
        """The name of each row's image within the source."""
        return [json.loads(line) for line in read_bytes(self.path / KEYS_FILE, _HINT).decode().splitlines()]

    def verify(self) -> None:
        """Read every file whole and compare its sha256 with the manifest's. Raises StorageError at the first that differs."""
        for name, about in self.manifest["files"].items():
            if sha256_of_file(self.path / name) != about["sha256"]:
                raise StorageError(f"{self.path / name}: damaged (its sha256 is not the manifest's); copy it again or prepare the codes again")


def class_index(class_names: Sequence[str], name: str) -> int:
    """Index of `name` in `class_names`. Raises DataError, listing (up to 20 of) what exists, for one that is not there."""
    if name in class_names:
        return list(class_names).index(name)
    more = f" ... ({len(class_names)} in all)" if len(class_names) > 20 else ""
    raise DataError(f"no class is named {name!r}; there are: {', '.join(class_names[:20])}{more}")


class StoreWriter:
    """Writes a store chunk by chunk; killed at any moment, it goes on from the last chunk that was recorded, to the same bytes.

    Args:
        out: folder of the store.
        about: the manifest's entries that are known beforehand. They identify the job: another job's folder is refused.

    Attributes: complete (the folder already holds this job's finished store); next_index (the first source image not yet recorded).

    Raises:
        StorageError: `out` holds a store, finished or not, of another job, or cannot be written.
    """

    def __init__(self, out: str | Path, about: dict[str, Any]) -> None:
        self.out, self.about = Path(out), about
        self._job = sha256_of_bytes(json.dumps(about, sort_keys=True).encode())
        self.next_index, self.rows, self.skipped = 0, 0, []
        known = next((self.out / name for name in (MANIFEST_FILE, PROGRESS_FILE) if (self.out / name).exists()), None)
        self.complete = known is not None and known.name == MANIFEST_FILE
        if known is not None:
            progress = read_json(known, "delete the folder to start afresh")
            if progress.get("job_sha256") != self._job:
                raise StorageError(f"{self.out}: already holds codes of another source, tokenizer, view setting or split; "
                                   "choose another folder or delete this one")
            if not self.complete:
                self.next_index, self.rows, self.skipped, self._bytes = (progress[name] for name in ("next_index", "rows", "skipped", "bytes"))
        if not self.complete:
            with explain_write_errors(self.out):
                self.out.mkdir(parents=True, exist_ok=True)
                for name in (CODES_FILE, LABELS_FILE, KEYS_FILE):
                    self._cut(name, self._bytes[name] if known is not None else 0)

    def _cut(self, name: str, size: int) -> None:
        """Drop what was written after the last record, or start the file."""
        path = self.out / name
        with open(path, "r+b" if path.exists() else "wb") as file:
            if file.seek(0, os.SEEK_END) < size:
                raise StorageError(f"{path}: shorter than {PROGRESS_FILE} recorded; delete {self.out} to start afresh")
            file.truncate(size)

    def append(self, codes: np.ndarray, labels: Sequence[int], keys: Sequence[str], next_index: int, skipped: Sequence[dict[str, Any]] = ()) -> None:
        """Record a chunk: codes (n, A, T) of n source images with labels and keys, what was skipped ({"index", "key", "reason"}), where to go on."""
        expected = (len(labels), len(self.about["views"]), self.about["positions"])
        if codes.shape != expected or len(keys) != len(labels):
            raise DataError(f"code store: expected codes {expected} and {len(labels)} keys, got {codes.shape} and {len(keys)}")
        if codes.size and not 0 <= codes.min() <= codes.max() < self.about["codebook"]:
            raise DataError(f"code store: codes must lie in 0 ... {self.about['codebook'] - 1}, got {codes.min()} ... {codes.max()}")
        content = {CODES_FILE: codes.astype("<u2").tobytes(), LABELS_FILE: np.asarray(labels, dtype="<i4").tobytes(),
                   KEYS_FILE: "".join(json.dumps(key) + "\n" for key in keys).encode()}
        sizes = {}
        for name, data in content.items():
            with explain_write_errors(self.out / name), open(self.out / name, "ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                sizes[name] = file.tell()
        self.next_index, self.rows, self._bytes = next_index, self.rows + len(labels), sizes
        self.skipped = [*self.skipped, *skipped]
        record = {"job_sha256": self._job, "next_index": next_index, "rows": self.rows, "skipped": self.skipped, "bytes": sizes}
        atomic_write_json(self.out / PROGRESS_FILE, record)

    def finish(self, source_labels: np.ndarray, held_out_share: float, skipped_before: Sequence[dict[str, Any]] = ()) -> CodeStore:
        """Write the manifest and open the store.

        The split is that of the source, `split_indices(source_labels, held_out_share)`; images that could not be read are then left out of it.
        """
        if not self.complete:
            gone = np.zeros(len(source_labels), dtype=bool)
            gone[[entry["index"] for entry in self.skipped]] = True
            held_out = np.zeros(len(source_labels), dtype=bool)
            held_out[split_indices(source_labels, held_out_share)[1]] = True
            paths = [self.out / name for name in (CODES_FILE, LABELS_FILE, KEYS_FILE)]
            files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)} for path in paths}
            atomic_write_json(self.out / MANIFEST_FILE, {
                "format": FORMAT, "format_version": FORMAT_VERSION, "images": self.rows, **self.about,
                "split": {"held_out_share": held_out_share, "held_out": np.flatnonzero(held_out[~gone]).tolist()},
                "skipped": [{"key": entry["key"], "reason": entry["reason"]} for entry in [*skipped_before, *self.skipped]],
                "files": files, "job_sha256": self._job})
        for left_over in (self.out / PROGRESS_FILE, *self.out.glob(f".{PROGRESS_FILE}.*.tmp"), *self.out.glob(f".{MANIFEST_FILE}.*.tmp")):
            left_over.unlink(missing_ok=True)  # a kill amid an atomic write leaves its temporary file
        return CodeStore.open(self.out)


def _checked(path: Path, size: int, read: bool = False) -> bytes:
    """Check that a file has `size` bytes, and read it if asked."""
    try:
        found = path.stat().st_size
    except OSError as error:
        raise StorageError(f"{path}: not found; {_HINT}") from error
    if found != size:
        raise StorageError(f"{path}: expected {size} bytes by the manifest, got {found}: truncated or mixed up; copy it again or prepare the codes again")
    return read_bytes(path, _HINT) if read else b""

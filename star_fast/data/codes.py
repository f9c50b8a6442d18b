"""The code store: all codes of a data set in one memory-mapped array beside a manifest that says what they are.

    codes.bin      uint16 little-endian, (images, views, T)
    labels.bin     int32 little-endian, (images,)
    keys.jsonl     one JSON string per image: its name within the source
    manifest.json  everything else; written last, so a folder without it is unfinished
    progress.json  while it is unfinished: how much of each file counts, and its sha256
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from star_fast.data.manifest import (
    CODES_FILE,
    DAMAGED,
    FILES,
    FORMAT,
    FORMAT_VERSION,
    HINT,
    KEYS_FILE,
    LABELS_FILE,
    MANIFEST_FILE,
    PROGRESS_FILE,
    differences,
    is_finished,
    read_manifest,
    read_progress,
)
from star_fast.data.sources import DataError, split_indices
from star_fast.storage import (
    StorageError,
    atomic_write_json,
    explain_write_errors,
    parse_json,
    read_bytes,
    remove_leftovers,
    require_regular,
    sha256_of_bytes,
    sha256_of_file,
)

_VERIFIED_BYTES = 2**24  # of codes.bin, looked at at once


class CodeStore:
    """A finished store, opened for reading. Rows are numbered 0 ... images-1; views as in `views`.

    Attributes: path; manifest (dict); views, class_names (tuples of str); positions (T); grid (h, w); image_size (pixels); codebook (V);
    tokenizer_hash (sha256 of the tokenizer's weights); labels, train_indices, held_out_indices (int64 tensors).
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
        self.labels = torch.from_numpy(labels.astype(np.int64))
        held_out = torch.zeros(len(labels), dtype=torch.bool)
        held_out[torch.tensor(manifest["split"]["held_out"], dtype=torch.int64)] = True
        self.train_indices = (~held_out).nonzero().flatten()
        self.held_out_indices = held_out.nonzero().flatten()

    @classmethod
    def open(cls, path: str | Path) -> CodeStore:
        """Open the store in folder `path`; codes are mapped, not read.

        Raises:
            StorageError: missing, unfinished, of another format version, a manifest that contradicts itself or its files' sizes, or labels that are not
                the ones it was made with.
        """
        path = Path(path)
        if not os.path.exists(path / MANIFEST_FILE) and os.path.exists(path / PROGRESS_FILE):
            raise StorageError(f"{path}: an unfinished code store; run the same `star-fast prepare` again to finish it")
        manifest, record = read_manifest(path)
        shape = (record.images, len(record.views), record.positions)
        labels = np.frombuffer(_checked(path / LABELS_FILE, 4 * shape[0], read=True), dtype="<i4")
        if sha256_of_bytes(labels.tobytes()) != record.files[LABELS_FILE].sha256:
            raise StorageError(f"{path / LABELS_FILE}: its content is not what {MANIFEST_FILE} recorded; prepare the codes again")
        if not 0 <= labels.min() <= labels.max() < len(record.class_names):
            raise StorageError(f"{path / LABELS_FILE}: labels must lie in 0 ... {len(record.class_names) - 1}, the classes of {MANIFEST_FILE}, got "
                               f"{labels.min()} ... {labels.max()}; {DAMAGED}")
        _checked(path / CODES_FILE, 2 * shape[0] * shape[1] * shape[2])
        try:
            codes = np.memmap(path / CODES_FILE, dtype="<u2", mode="r", shape=shape)
        except (OSError, ValueError) as error:  # no permission; or cut short this very moment
            raise StorageError(f"{path / CODES_FILE}: cannot be mapped: {error}") from error
        return cls(path, manifest, codes, labels)

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
        """The name of each row's image within the source. Raises StorageError where keys.jsonl is not one string a row."""
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
                raise StorageError(f"{path}, line {number}: expected the name of an image as a JSON string, got {line[:60]!r}; {DAMAGED}")
        return keys

    def verify(self) -> None:
        """Read every file whole: its sha256 must be the manifest's, codes and keys what they may be. Raises StorageError at the first fault."""
        for name in FILES:
            if sha256_of_file(self.path / name) != self.manifest["files"][name]["sha256"]:
                raise StorageError(f"{self.path / name}: damaged (its sha256 is not the manifest's); copy it again or prepare the codes again")
        self.keys()
        rows = max(1, _VERIFIED_BYTES // self._codes[0].nbytes)
        for start in range(0, len(self), rows):
            if (largest := self._codes[start: start + rows].max()) >= self.codebook:
                raise StorageError(f"{self.path / CODES_FILE}: codes must lie in 0 ... {self.codebook - 1}, got {largest} in rows {start} ... "
                                   f"{min(start + rows, len(self)) - 1}; prepare the codes again")


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
        self._hashes = {name: hashlib.sha256() for name in FILES}
        self._bytes = dict.fromkeys(FILES, 0)
        self.next_index, self.rows, self.skipped = 0, 0, []
        self.complete = is_finished(self.out)
        if self.complete:
            self._require_same(read_manifest(self.out)[0])
            return
        expected = {}
        if os.path.exists(self.out / PROGRESS_FILE):
            progress = read_progress(self.out)
            if progress["job_sha256"] != self._job:
                self._require_same(progress["about"], begun=True)
            self.next_index, self.rows, self.skipped, self._bytes = (progress[name] for name in ("next_index", "rows", "skipped", "bytes"))
            expected = progress["sha256"]
        with explain_write_errors(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                self._cut(name, expected.get(name, ""))

    def _require_same(self, there: dict[str, Any], *, begun: bool = False) -> None:
        """Refuse a folder whose store is of another job than ours, naming what differs; of a begun one it is known that something does."""
        what = differences(there, self._about_but_classes() if begun else self.about)
        if what or begun:
            raise StorageError(f"{self.out}: already holds codes of another source, tokenizer, view setting or split "
                               f"({what or 'other classes, or begun by another version of star_fast'}); choose another folder or delete this one")

    def _cut(self, name: str, sha256: str) -> None:
        """Drop what was written after the last record, and check what was before; or start the file."""
        path, size, known = self.out / name, self._bytes[name], os.path.lexists(self.out / name)
        if known:
            require_regular(path, f"delete {self.out} to start afresh")
        with open(path, "r+b" if known else "wb") as file:
            if file.seek(0, os.SEEK_END) < size:
                raise StorageError(f"{path}: shorter than {PROGRESS_FILE} recorded; delete {self.out} to start afresh")
            file.truncate(size)
            file.seek(0)
            while known and (block := file.read(2**20)):
                self._hashes[name].update(block)
        if sha256 and self._hashes[name].hexdigest() != sha256:
            raise StorageError(f"{path}: damaged (its bytes are not the ones that {PROGRESS_FILE} recorded); delete {self.out} to start afresh")

    def append(self, codes: np.ndarray, labels: Sequence[int], keys: Sequence[str], next_index: int, skipped: Sequence[dict[str, Any]] = ()) -> None:
        """Record a chunk: codes (n, A, T) of n source images with labels and keys, what was skipped ({"index", "key", "reason"}), where to go on."""
        expected = (len(labels), len(self.about["views"]), self.about["positions"])
        if codes.shape != expected or len(keys) != len(labels):
            raise DataError(f"code store: expected codes {expected} and {len(labels)} keys, got {codes.shape} and {len(keys)}")
        if codes.size and not 0 <= codes.min() <= codes.max() < self.about["codebook"]:
            raise DataError(f"code store: codes must lie in 0 ... {self.about['codebook'] - 1}, got {codes.min()} ... {codes.max()}")
        content = {CODES_FILE: codes.astype("<u2").tobytes(), LABELS_FILE: np.asarray(labels, dtype="<i4").tobytes(),
                   KEYS_FILE: "".join(json.dumps(key) + "\n" for key in keys).encode()}
        for name, data in content.items():
            with explain_write_errors(self.out / name), open(self.out / name, "ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for name, data in content.items():
            self._hashes[name].update(data)
        self.next_index, self.rows = next_index, self.rows + len(labels)
        self._bytes = {name: self._bytes[name] + len(data) for name, data in content.items()}
        self.skipped = [*self.skipped, *skipped]
        record = {"job_sha256": self._job, "next_index": next_index, "rows": self.rows, "skipped": self.skipped, "bytes": self._bytes,
                  "sha256": {name: digest.hexdigest() for name, digest in self._hashes.items()},
                  "about": self._about_but_classes()}
        atomic_write_json(self.out / PROGRESS_FILE, record)

    def _about_but_classes(self) -> dict[str, Any]:
        """There may be many classes, and progress is written often."""
        return {name: value for name, value in self.about.items() if name != "class_names"}

    def finish(self, source_labels: np.ndarray, held_out_share: float, skipped_before: Sequence[dict[str, Any]] = ()) -> CodeStore:
        """Write the manifest and open the store.

        The split is that of the source, `split_indices(source_labels, held_out_share)`; images that could not be read are then left out of it.

        Raises:
            StorageError: a file is not what was written to it, or the images are not those of `source_labels`.
        """
        if not self.complete:
            if self.next_index != len(source_labels) or not self.rows:
                raise StorageError(f"{self.out}: holds {self.rows} of {self.next_index} images, expected {len(source_labels)} to be through; "
                                   "delete it to start afresh")
            gone = np.zeros(len(source_labels), dtype=bool)
            gone[[entry["index"] for entry in self.skipped]] = True
            held_out = np.zeros(len(source_labels), dtype=bool)
            held_out[split_indices(source_labels, held_out_share)[1]] = True
            files = {name: {"bytes": self._bytes[name], "sha256": digest.hexdigest()} for name, digest in self._hashes.items()}
            for name, about in files.items():
                if sha256_of_file(self.out / name) != about["sha256"]:
                    raise StorageError(f"{self.out / name}: damaged (its bytes are not the ones that were written); delete {self.out} to start afresh")
            atomic_write_json(self.out / MANIFEST_FILE, {
                "format": FORMAT, "format_version": FORMAT_VERSION, "images": self.rows, **self.about,
                "split": {"held_out_share": held_out_share, "held_out": np.flatnonzero(held_out[~gone]).tolist()},
                "skipped": [{"key": entry["key"], "reason": entry["reason"]} for entry in [*skipped_before, *self.skipped]],
                "files": files, "job_sha256": self._job})
        (self.out / PROGRESS_FILE).unlink(missing_ok=True)
        remove_leftovers(self.out, (PROGRESS_FILE, MANIFEST_FILE))
        return CodeStore.open(self.out)


def _checked(path: Path, size: int, read: bool = False) -> bytes:
    """Check that a file has `size` bytes, and read it if asked."""
    found = require_regular(path, HINT)
    if found != size:
        raise StorageError(f"{path}: expected {size} bytes by the manifest, got {found}: truncated or mixed up; {DAMAGED}")
    return read_bytes(path, HINT) if read else b""

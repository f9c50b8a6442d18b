"""Writing a code store: chunk by chunk, each recorded before the next, so that a killed job goes on
to the same bytes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import star_fast
from star_fast.data.codes import CodeStore
from star_fast.data.manifest import (
    CODES_FILE,
    FILES,
    FORMAT,
    FORMAT_VERSION,
    KEYS_FILE,
    LABELS_FILE,
    MANIFEST_FILE,
    PROGRESS_FILE,
    SKIPPED_FILE,
    differences,
    is_finished,
    read_manifest,
    read_progress,
)
from star_fast.data.sources import DataError, split_indices
from star_fast.storage import (
    StorageError,
    atomic_write_bytes,
    atomic_write_json,
    explain_write_errors,
    remove_leftovers,
    require_regular,
    sha256_of_bytes,
    sha256_of_file,
)


class StoreWriter:
    """Writes a store chunk by chunk; killed at any moment, it goes on from the last chunk that was recorded, to the
    same bytes.

    Args:
        out: folder of the store.
        about: the manifest's entries that are known beforehand. They identify the job: another job's folder is refused.

    Attributes: complete (the folder already holds this job's finished store); next_index (the first source image not
    yet recorded).

    Raises:
        StorageError: `out` holds a store, finished or not, of another job, or cannot be written.
    """

    def __init__(self, out: str | Path, about: dict[str, Any]) -> None:
        self.out, self.about = Path(out), about
        self._job = job_hash(about)
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
            self.next_index, self.rows, self.skipped, self._bytes = (
                progress[name] for name in ("next_index", "rows", "skipped", "bytes")
            )
            expected = progress["sha256"]
        with explain_write_errors(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                self._cut(name, expected.get(name, ""))

    def _require_same(self, there: dict[str, Any], *, begun: bool = False) -> None:
        """Refuse a folder whose store is of another job than ours, naming what differs; of a begun one it is known that
        something does.
        """
        what = differences(there, self._about_but_classes() if begun else self.about)
        if what or begun:
            raise StorageError(
                f"{self.out}: already holds codes of another source, tokenizer, view setting or split "
                f"({what or 'other classes, or begun by another version of star_fast'}); choose another folder or "
                "delete this one"
            )

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
            raise StorageError(
                f"{path}: damaged (its bytes are not the ones that {PROGRESS_FILE} recorded); delete {self.out} "
                "to start afresh"
            )

    def append(
        self,
        codes: np.ndarray,
        labels: Sequence[int],
        keys: Sequence[str],
        next_index: int,
        skipped: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Record a chunk: codes (n, A, T) of n source images with labels and keys, what was skipped ({"index", "key",
        "reason"}), where to go on.
        """
        expected = (len(labels), len(self.about["views"]), self.about["positions"])
        if codes.shape != expected or len(keys) != len(labels):
            raise DataError(
                f"code store: expected codes {expected} and {len(labels)} keys, got {codes.shape} and {len(keys)}"
            )
        if codes.size and not 0 <= codes.min() <= codes.max() < self.about["codebook"]:
            raise DataError(
                f"code store: codes must lie in 0 ... {self.about['codebook'] - 1}, got {codes.min()} ... {codes.max()}"
            )
        content = {
            CODES_FILE: codes.astype("<u2").tobytes(),
            LABELS_FILE: np.asarray(labels, dtype="<i4").tobytes(),
            KEYS_FILE: "".join(json.dumps(key) + "\n" for key in keys).encode(),
        }
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
        record = {
            "job_sha256": self._job,
            "next_index": next_index,
            "rows": self.rows,
            "skipped": self.skipped,
            "bytes": self._bytes,
            "sha256": {name: digest.hexdigest() for name, digest in self._hashes.items()},
            "about": self._about_but_classes(),
        }
        atomic_write_json(self.out / PROGRESS_FILE, record)

    def _about_but_classes(self) -> dict[str, Any]:
        """There may be many classes, and progress is written often."""
        return {name: value for name, value in self.about.items() if name != "class_names"}

    def finish(
        self,
        source_labels: np.ndarray,
        held_out_share: float,
        skipped_before: Sequence[dict[str, Any]] = (),
        *,
        held_out: np.ndarray | None = None,
        more: dict[str, Any] | None = None,
    ) -> CodeStore:
        """Write the list of what was skipped and the manifest, and open the store.

        The split is that of the source: the images numbered `held_out`, or by `split_indices(source_labels,
        held_out_share)`; images that could not be read are then left out of it. `more` are entries of the manifest that
        were not known before.

        Raises:
            StorageError: a file is not what was written to it, or the images are not those of `source_labels`.
        """
        if not self.complete:
            if self.next_index != len(source_labels) or not self.rows:
                raise StorageError(
                    f"{self.out}: holds {self.rows} of {self.next_index} images, expected {len(source_labels)} to "
                    "be through; "
                    "delete it to start afresh"
                )
            gone = np.zeros(len(source_labels), dtype=bool)
            gone[[entry["index"] for entry in self.skipped]] = True
            held = np.zeros(len(source_labels), dtype=bool)
            held[split_indices(source_labels, held_out_share)[1] if held_out is None else held_out] = True
            files = {
                name: {"bytes": self._bytes[name], "sha256": digest.hexdigest()}
                for name, digest in self._hashes.items()
            }
            for name, about in files.items():
                if sha256_of_file(self.out / name) != about["sha256"]:
                    raise StorageError(
                        f"{self.out / name}: damaged (its bytes are not the ones that were written); delete "
                        f"{self.out} to start afresh"
                    )
            skipped = [*({"key": entry["key"], "reason": entry["reason"]} for entry in skipped_before), *self.skipped]
            listing = _as_csv(skipped)
            atomic_write_bytes(self.out / SKIPPED_FILE, listing)
            files[SKIPPED_FILE] = {"bytes": len(listing), "sha256": sha256_of_bytes(listing)}
            atomic_write_json(
                self.out / MANIFEST_FILE,
                {
                    "format": FORMAT,
                    "format_version": FORMAT_VERSION,
                    "images": self.rows,
                    **self.about,
                    **(more or {}),
                    "versions": {
                        "star_fast": star_fast.__version__,
                        "torch": torch.__version__,
                        "numpy": np.__version__,
                    },
                    "split": {"held_out_share": held_out_share, "held_out": np.flatnonzero(held[~gone]).tolist()},
                    "skipped": skipped,
                    "files": files,
                    "job_sha256": self._job,
                },
            )
        (self.out / PROGRESS_FILE).unlink(missing_ok=True)
        remove_leftovers(self.out, (PROGRESS_FILE, MANIFEST_FILE, SKIPPED_FILE))
        return CodeStore.open(self.out)


def job_hash(about: dict[str, Any]) -> str:
    """What names a job: a sha256 of the manifest's entries that are known beforehand."""
    return sha256_of_bytes(json.dumps(about, sort_keys=True).encode())


def _as_csv(skipped: Sequence[dict[str, Any]]) -> bytes:
    """skipped.csv: a line an image, what no text file can hold escaped."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(
        [("key", "reason"), *((entry["key"], entry["reason"]) for entry in skipped)]
    )
    return file.getvalue().encode(errors="backslashreplace")

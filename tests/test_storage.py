"""storage: files are whole or absent, and what goes wrong is one clear line."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from star_fast import storage
from star_fast.storage import StorageError


def test_writes_whole_files_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    storage.atomic_write_json(path, {"x": [1, "é"]})
    assert storage.read_json(path, "") == {"x": [1, "é"]}
    storage.atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"new" and [p.name for p in path.parent.iterdir()] == ["b.json"]
    assert storage.sha256_of_file(path) == storage.sha256_of_bytes(b"new") == hashlib.sha256(b"new").hexdigest()


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    storage.atomic_write_bytes(path, b"old")

    def interrupted() -> None:
        with storage.atomic_writer(path) as file:
            file.write(b"half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["weights"]


def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    storage.atomic_write_bytes(tmp_path / "file", b"old")
    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(StorageError, match=r"file: the disk is full .* MiB free\)"):
        storage.atomic_write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_unreadable_and_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("[1]")
    with pytest.raises(StorageError, match="cannot be written"):
        storage.atomic_write_bytes(tmp_path / "file" / "below", b"")
    with pytest.raises(StorageError, match="null byte"):
        storage.atomic_write_bytes(tmp_path / "a\0b", b"")
    with pytest.raises(StorageError, match="expected a JSON object, got list; the hint"):
        storage.read_json(tmp_path / "file", "the hint")
    with pytest.raises(StorageError, match="not found; the hint"):
        storage.read_bytes(tmp_path / "absent", "the hint")
    with pytest.raises(StorageError, match="expected an ordinary file, found a folder"):
        storage.sha256_of_file(tmp_path)


def test_json_that_would_fill_the_memory_is_refused_before_it_is_parsed() -> None:
    assert storage.parse_json(b"[" + b"1," * 1000 + b"1]") == [1] * 1001
    with pytest.raises(ValueError, match="MB in memory, expected at most 250"):
        storage.parse_json(b"[" + b"[]," * 4_000_000 + b"0]")

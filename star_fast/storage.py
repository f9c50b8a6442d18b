"""Files that are whole or absent: atomic writes, hashes, and one-line errors for what goes wrong with files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from star_fast.errors import UserError


class StorageError(UserError):
    """A file is missing, damaged, of another version, or cannot be written. The message is one line: what was expected, what is there, what to do."""


@contextlib.contextmanager
def explain_write_errors(path: str | Path) -> Iterator[None]:
    """Turn a full disk, a missing permission and the like, met inside, into a StorageError about `path`."""
    try:
        yield
    except OSError as error:
        path = Path(path)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
            free_mib = shutil.disk_usage(there).free / 2**20
            raise StorageError(f"{path}: the disk is full or the quota used up ({free_mib:.0f} MiB free); free some, then run the same command") from error
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def atomic_writer(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write to. On leaving without an error it is synced and takes the name `path`; else it is removed and `path` stays as it was.

    Missing parent folders are made. The temporary file lies beside `path` (same file system, so that the rename is atomic) and bears the process's id.

    Raises:
        StorageError: the disk is full or the place cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def atomic_write_bytes(path: str | Path, data: bytes | memoryview) -> None:
    """Write `data` to `path`, whole or not at all (see atomic_writer)."""
    with atomic_writer(path) as file:
        file.write(data)


def atomic_write_json(path: str | Path, value: Any) -> None:
    """Write `value` as readable JSON to `path`, whole or not at all (see atomic_writer)."""
    atomic_write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def sync_folder(folder: str | Path) -> None:
    """Make the names in `folder` (new files, renames) survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bytes(path: str | Path, hint: str) -> bytes:
    """The file's content. Raises StorageError with `hint` (what should be there, or what to do) when it is missing or cannot be read."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise StorageError(f"{path}: not found; {hint}") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}; {hint}") from error


def read_json(path: str | Path, hint: str) -> dict[str, Any]:
    """The JSON object in a file. Raises StorageError with `hint` when it is missing, cannot be read, or is not a JSON object."""
    data = read_bytes(path, hint)
    try:
        value = json.loads(data)
    except ValueError as error:
        raise StorageError(f"{path}: truncated or not JSON ({error}); {hint}") from error
    if not isinstance(value, dict):
        raise StorageError(f"{path}: expected a JSON object, got {type(value).__name__}; {hint}")
    return value


def sha256_of_bytes(data: bytes | memoryview) -> str:
    """Hexadecimal sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: str | Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces. Raises StorageError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error

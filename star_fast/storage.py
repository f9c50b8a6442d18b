"""Files that are whole or absent: atomic writes, hashes, and one-line errors for what goes wrong with files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

from star_fast.errors import ConfigError, UserError
from star_fast.records import from_dict

Record = TypeVar("Record")
_HASHED_AT_ONCE_BYTES = 2**18  # one piece of memory, used again: it stays in a core's cache
_MOST_JSON_BYTES = 2**28  # of a file that is read whole and parsed
# What it may take when parsed; the largest honest file, a manifest of 14 million images, takes 90 MB
_MOST_JSON_MEMORY = 250 * 10**6
# As atomic_writer and save_model name what they have not finished
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+\.tmp", re.DOTALL)


class StorageError(UserError):
    """A file is missing, damaged, of another version, or cannot be written. The message is one line: what was expected,
    what is there, what to do.
    """


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
            raise StorageError(
                f"{path}: the disk is full or the quota used up ({free_mib:.0f} MiB free); free some, then run "
                "the same command"
            ) from error
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
    except ValueError as error:
        if "null byte" not in str(error) and "null character" not in str(error):
            raise
        raise StorageError(f"{path}: expected the name of a file, got a null byte in it") from error


def temporary_beside(path: str | Path) -> Path:
    """The name under which this process writes what will become `path`: hidden, beside it, with the process's id."""
    path = Path(path)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def atomic_writer(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write to. On leaving without an error it is synced and takes the name `path`; else it is removed
    and `path` stays as it was.

    Missing parent folders are made. The temporary file lies beside `path` (same file system, so that the rename is
    atomic).

    Raises:
        StorageError: the disk is full or the place cannot be written.
    """
    path = Path(path)
    with explain_write_errors(path):
        temporary = temporary_beside(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def atomic_write_bytes(path: str | Path, data: bytes | memoryview) -> None:
    """Write `data` to `path`, whole or not at all (see atomic_writer)."""
    with atomic_writer(path) as file:
        file.write(data)


def json_bytes(value: Any, indent: int | None = 1) -> bytes:
    """`value` as JSON in UTF-8 that every reader accepts, with a line break at its end. Raises ValueError on NaN and
    infinity, which JSON does not know.
    """
    try:
        return (json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except UnicodeEncodeError:  # a name of a file that is no UTF-8
        return (json.dumps(value, indent=indent, allow_nan=False) + "\n").encode()


def atomic_write_json(path: str | Path, value: Any) -> None:
    """Write `value` as readable JSON to `path`, whole or not at all (see atomic_writer)."""
    atomic_write_bytes(path, json_bytes(value))


def sync_folder(folder: str | Path) -> None:
    """Make the names in `folder` (new files, renames) survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: str | Path, names: Iterable[str] | None = None) -> None:
    """Remove the temporary files and folders that dead processes left in `folder`; only those of the files `names`,
    where given.

    To be called by the holder of the folder's lock (locks.py): then nobody else is writing.
    """
    wanted = None if names is None else set(names)
    for entry in Path(folder).iterdir() if Path(folder).is_dir() else ():
        found = _TEMPORARY.fullmatch(entry.name)
        if found and (wanted is None or found["name"] in wanted):
            with contextlib.suppress(OSError):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def require_regular(path: str | Path, hint: str) -> int:
    """The size in bytes of the file at `path`. Raises StorageError with `hint` when it is missing or no ordinary file:
    a pipe or a device may never end.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise StorageError(f"{path}: not found; {hint}") from error
    except (OSError, ValueError) as error:  # a null byte or an over-long name
        raise StorageError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}; {hint}") from error
    if not stat.S_ISREG(status.st_mode):
        raise StorageError(
            f"{path}: expected an ordinary file, found "
            f"{'a folder' if stat.S_ISDIR(status.st_mode) else 'a pipe, socket or device'}; {hint}"
        )
    return status.st_size


def read_bytes(path: str | Path, hint: str, most_bytes: int | None = None) -> bytes:
    """The file's content.

    Raises:
        StorageError: with `hint` (what should be there, or what to do): it is missing, no ordinary file, larger than
            `most_bytes`, or cannot be read.
    """
    size = require_regular(path, hint)
    if most_bytes is not None and size > most_bytes:
        raise StorageError(f"{path}: expected at most {most_bytes:,} bytes, it has {size:,}; {hint}")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}; {hint}") from error


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text. Raises ValueError for anything else, NaN and infinity, nesting beyond Python's depth,
    and what would fill the memory.
    """
    if isinstance(data, bytes):
        lists, mappings, commas = map(data.count, (b"[", b"{", b","))
    else:
        lists, mappings, commas = map(data.count, ("[", "{", ","))
    # Measured: a list takes 75 bytes, a mapping 215, a number up to 48, and a text is there three times while it is
    # parsed.
    memory = 3 * len(data) + 64 * lists + 230 * mappings + 32 * commas
    if memory > _MOST_JSON_MEMORY:
        raise ValueError(
            f"would take {memory / 1e6:,.0f} MB in memory, expected at most {_MOST_JSON_MEMORY / 1e6:,.0f}"
        )
    try:
        return json.loads(data, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def read_json(path: str | Path, hint: str) -> dict[str, Any]:
    """The JSON object in a file. Raises StorageError with `hint` when it is missing, cannot be read, or is not a JSON
    object.
    """
    data = read_bytes(path, hint, _MOST_JSON_BYTES)
    try:
        value = parse_json(data)
    except ValueError as error:
        raise StorageError(f"{path}: truncated or not JSON ({error}); {hint}") from error
    if not isinstance(value, dict):
        raise StorageError(f"{path}: expected a JSON object, got {type(value).__name__}; {hint}")
    return value


def read_record(path: str | Path, cls: type[Record], hint: str, *, ignore_unknown: bool = False) -> Record:
    """The JSON file at `path` as the dataclass `cls`, which is its schema (records.py).

    Raises:
        StorageError: with `hint`: as read_json, or a field is missing, unknown or of another type; the line names it.
    """
    return to_record(read_json(path, hint), path, cls, hint, ignore_unknown=ignore_unknown)


def to_record(value: Any, path: str | Path, cls: type[Record], hint: str, *, ignore_unknown: bool = False) -> Record:
    """`value`, as read from `path`, as the dataclass `cls`. Raises StorageError as read_record does."""
    try:
        return from_dict(cls, value, ignore_unknown=ignore_unknown)
    except ConfigError as error:
        raise StorageError(f"{path}: {error}; {hint}") from error


def sha256_of_bytes(data: bytes | memoryview) -> str:
    """Hexadecimal sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: str | Path, seen: Callable[[int], object] | None = None) -> str:
    """Hexadecimal sha256 of a file, read in pieces; `seen` is told how many bytes each had. Raises StorageError when it
    cannot be read.
    """
    require_regular(path, "expected a file to take the sha256 of")
    digest, piece = hashlib.sha256(), bytearray(_HASHED_AT_ONCE_BYTES)
    try:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(piece):
                digest.update(memoryview(piece)[:count])
                if seen is not None:
                    seen(count)
        return digest.hexdigest()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error

"""An open file that never gives more than it holds: every read is held against its length first."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from star_fast.errors import UserError
from star_fast.storage import StorageError, read_json, require_regular

_MOST_DIMENSIONS = 8


class Damaged(Exception):
    """What is wrong with a file's contents, in a few words without its name."""


class StoredTensor(NamedTuple):
    """A tensor in a file, all of it within the file's length."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int  # of its first number, in bytes

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)


class BoundedFile:
    """A regular file, open for reading. Errors of reading, and its becoming shorter meanwhile, are UserErrors."""

    def __init__(self, path: Path, file: Any, size: int) -> None:
        self.path, self.size, self._file = path, size, file

    def bytes(self, start: int, length: int) -> bytes:
        """A few bytes of a header. Raises Damaged where the file has no such place."""
        if start < 0 or length < 0 or start + length > self.size:
            raise Damaged(f"{length:,} bytes at {start:,} expected in a file of {self.size:,}")
        data = bytearray(length)
        self._read(memoryview(data), start)
        return bytes(data)

    def tensor(self, start: int, count: int, dtype: torch.dtype) -> Tensor:
        """`count` numbers as a new tensor (count,). Raises Damaged where the file has no such place."""
        if start < 0 or start + count * dtype.itemsize > self.size:
            raise Damaged(f"{count:,} numbers at {start:,} expected in a file of {self.size:,} bytes")
        made = torch.empty(count, dtype=dtype)
        self._read(_bytes_of(made), start)
        return made

    def read(self, stored: StoredTensor, out: Tensor) -> None:
        """Fill `out`, a tensor of the stored one's shape, casting to its dtype."""
        if stored.dtype == out.dtype and out.is_contiguous() and stored.stride == contiguous(stored.shape):
            self._read(_bytes_of(out), stored.start)
        else:
            out.copy_(
                self.tensor(stored.start, span(stored.shape, stored.stride), stored.dtype).as_strided(
                    stored.shape, stored.stride
                )
            )

    def sha256(self) -> str:
        """Hexadecimal, of the whole file."""
        with self._explain():
            self._file.seek(0)
            return hashlib.file_digest(self._file, "sha256").hexdigest()

    def _read(self, view: memoryview, start: int) -> None:
        with self._explain():
            self._file.seek(start)
            while len(view):
                count = self._file.readinto(view)  # at most 2 GiB at once
                if not count:
                    raise UserError(f"{self.path}: became shorter while it was read; copy or download it again")
                view = view[count:]

    @contextlib.contextmanager
    def _explain(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror or error}") from error


@contextlib.contextmanager
def open_bounded(path: str | Path, hint: str) -> Iterator[BoundedFile]:
    """Open a file. Raises StorageError with `hint` where there is none, or no ordinary one; UserError where it cannot
    be read.
    """
    path, size = Path(path), require_regular(path, hint)
    try:
        # Closed below; errors of opening are explained apart from those of the block.
        file = open(path, "rb", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}; {hint}") from error
    with file:
        yield BoundedFile(path, file, size)


def read_small_json(path: Path, hint: str, most_bytes: int) -> dict[str, Any]:
    """The JSON object in a file of at most so many bytes (each may become twenty in memory). Raises StorageError as
    storage.read_json does.
    """
    if (size := require_regular(path, hint)) > most_bytes:
        raise StorageError(f"{path}: expected at most {most_bytes:,} bytes, it has {size:,}; {hint}")
    return read_json(path, hint)


def are_sizes(values: Any) -> TypeGuard[Sequence[int]]:
    """Whether these are a few whole numbers from 0 on, small enough to be sizes in a file."""
    return (
        isinstance(values, (tuple, list))
        and len(values) <= _MOST_DIMENSIONS
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor without gaps."""
    return tuple(math.prod(shape[dimension + 1 :]) for dimension in range(len(shape)))


def span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Numbers from the first of a strided tensor to its last, gaps included."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if math.prod(shape) else 0


def short(text: object, most: int = 80) -> str:
    """At most so many characters of a text that comes from a file."""
    text = str(text)
    return text if len(text) <= most else text[: most - 3] + "..."


def shown(value: object) -> str:
    """A value from a file for a message: numbers and text as they are; what may be nested, or endless, by its kind."""
    if value is None or isinstance(value, (str, float, bool)) or (isinstance(value, int) and abs(value) < 2**64):
        return short(repr(value))
    return f"a {type(value).__name__}"


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data

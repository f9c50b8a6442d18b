"""Reading .npz files of others: every size is held against the file before it is believed, nothing is unpickled, and
images come in batches.
"""

from __future__ import annotations

import contextlib
import io
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np

from star_fast.generation.npz_file import DAMAGE
from star_fast.storage import StorageError, require_regular

_MOST_HEADER_BYTES = 10_000  # of a .npy header, as numpy limits it
_MOST_MEMBERS = 1000
_MOST_SIDE = 2**14  # pixels
_BATCH_BYTES = 2**28


class Header(NamedTuple):
    """What a member says it is; its length bears it out."""

    dtype: np.dtype
    shape: tuple[int, ...]
    crc: int  # of the member's bytes, as the archive's directory has it


class NpzFile:
    """A .npz, open for reading; a context manager.

    Args:
        hint: what should be there, or what to do about a damaged file: the end of every message.

    Raises:
        StorageError: missing, no ordinary file, or no .npz. Of every method: what it reads is damaged or not as
            described.
    """

    def __init__(self, path: str | Path, hint: str) -> None:
        self.path, self.hint = Path(path), hint
        require_regular(path, hint)
        with self._explained():
            self._archive = zipfile.ZipFile(path)
            if len(self._archive.infolist()) > _MOST_MEMBERS:
                raise ValueError(f"{len(self._archive.infolist())} members")
            self._members = {info.filename.removesuffix(".npy"): info for info in self._archive.infolist()}
        self._headers: dict[str, Header] = {}

    def __enter__(self) -> NpzFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    def __contains__(self, name: str) -> bool:
        return name in self._members

    @property
    def names(self) -> list[str]:
        """Of its arrays."""
        return list(self._members)

    def header(self, name: str) -> Header:
        """Of the array `name`."""
        if name not in self._headers:
            with self._explained(name), self._open(name) as file:
                self._headers[name] = self._read_header(name, file)
        return self._headers[name]

    def array(self, name: str, shape: tuple[int, ...], kinds: str = "f") -> np.ndarray:
        """The array `name` (all of it in memory), which must have this shape (-1: any length) and a dtype of one of
        these kinds.
        """
        found = self.header(name)
        if (
            found.dtype.kind not in kinds
            or len(found.shape) != len(shape)
            or any(a not in (-1, b) for a, b in zip(shape, found.shape, strict=True))
        ):
            raise StorageError(
                f"{self.path}: {name}: expected {shape} of kind {kinds}, found {found.shape} {found.dtype}; {self.hint}"
            )
        with self._explained(name), self._open(name) as file:
            self._read_header(name, file)
            return self._values(file, found.dtype, found.shape)

    def image_shape(self, name: str) -> tuple[int, int, int]:
        """(N, H, W) of the images in the array `name`, which must be uint8 (N, H, W, 3)."""
        found = self.header(name)
        if found.dtype.kind == "f":
            raise StorageError(
                f"{self.path}: {name}: expected uint8 images in 0 ... 255, found {found.dtype}: whether its "
                "numbers mean 0 ... 1, -1 ... 1 or "
                "0 ... 255 is not known; convert them"
            )
        if (
            found.dtype != np.uint8
            or len(found.shape) != 4
            or found.shape[3] != 3
            or not all(0 < side <= _MOST_SIDE for side in found.shape[1:3])
        ):
            raise StorageError(
                f"{self.path}: {name}: expected uint8 images (N, H, W, 3), found {found.dtype} {found.shape}; "
                f"{self.hint}"
            )
        return found.shape[:3]

    def images(self, name: str, batch: int) -> Iterator[np.ndarray]:
        """Batches (n, H, W, 3) uint8, n at most `batch`, of the images in the array `name`; the archive's checksum is
        checked at the end.
        """
        count, height, width = self.image_shape(name)
        batch = max(1, min(batch, _BATCH_BYTES // (3 * height * width)))
        with self._explained(name), self._open(name) as file:
            self._read_header(name, file)
            for start in range(0, count, batch):
                yield self._values(file, np.dtype(np.uint8), (min(batch, count - start), height, width, 3))
            file.read(1)  # the end: now zipfile compares the checksum

    def _open(self, name: str) -> IO[bytes]:
        if name not in self._members:
            raise StorageError(
                f"{self.path}: no array {name}; it holds {', '.join(self.names[:20]) or 'nothing'}; {self.hint}"
            )
        return self._archive.open(self._members[name])

    def _read_header(self, name: str, file: IO[bytes]) -> Header:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file, max_header_size=_MOST_HEADER_BYTES)
        values = self._members[name].file_size - file.tell()
        if (
            dtype.hasobject
            or (fortran and len(shape) > 1)
            or values != math.prod(shape) * dtype.itemsize
            or any(side < 0 for side in shape)
        ):
            raise ValueError(
                f"its header says {dtype} {shape}{' in Fortran order' if fortran else ''}, it has {values:,} bytes"
            )
        if (
            self._members[name].compress_type == zipfile.ZIP_STORED
            and self._members[name].header_offset + values > self.path.stat().st_size
        ):
            raise ValueError(f"its header says {dtype} {shape}, the file has {self.path.stat().st_size:,} bytes")
        return Header(dtype, shape, self._members[name].CRC)

    @staticmethod
    def _values(file: IO[bytes], dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        array = np.empty(shape, dtype)
        view = array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")
        filled = 0
        while filled < len(view):
            took = cast("io.BufferedIOBase", file).readinto(view[filled:])  # a zip archive's member is one
            if not took:
                raise ValueError(f"ends {len(view) - filled:,} bytes early")
            filled += took
        return array

    @contextlib.contextmanager
    def _explained(self, name: str = "") -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except DAMAGE as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise StorageError(
                f"{self.path}: {f'{name}: ' if name else ''}damaged or no .npz: {said}; {self.hint}"
            ) from error

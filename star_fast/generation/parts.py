"""One drawn batch on its way into the file: a .npy followed by four bytes, the checksum of all before them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np

from star_fast.storage import StorageError, atomic_writer, read_bytes

_CRC = struct.Struct("<I")


def write_part(path: Path, images: np.ndarray) -> None:
    """Write images (n, H, W, 3) uint8, whole or not at all. Raises StorageError when the place is full or cannot be
    written.
    """
    header, data = _header(images.shape), np.ascontiguousarray(images).reshape(-1).data
    with atomic_writer(path) as file:
        file.write(header)
        file.write(data)
        file.write(_CRC.pack(zlib.crc32(data, zlib.crc32(header))))


def read_part(path: Path, shape: tuple[int, int, int, int]) -> np.ndarray:
    """The images of this shape (n, H, W, 3) in the file at `path`.

    Raises:
        StorageError: it is not what write_part wrote.
    """
    header = _header(shape)
    size = len(header) + int(np.prod(shape)) + _CRC.size
    data = read_bytes(path, "expected a batch of images", size)
    if (
        len(data) != size
        or not data.startswith(header)
        or _CRC.unpack_from(data, size - _CRC.size)[0] != zlib.crc32(memoryview(data)[: -_CRC.size])
    ):
        raise StorageError(f"{path}: damaged: expected {shape[0]} images {shape[1:]} and their checksum")
    return np.frombuffer(data, np.uint8, int(np.prod(shape)), len(header)).reshape(shape)


def _header(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)})
    return stream.getvalue()

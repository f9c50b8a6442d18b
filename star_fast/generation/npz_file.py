"""Reading a finished .npz of images: as an array that stays on the disk, and byte by byte, to see that it is whole."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from star_fast.generation.npz_stream import BIG_BYTES, IMAGES_MEMBER, PIECE_BYTES
from star_fast.storage import StorageError, require_regular

LABELS_MEMBER = "arr_1"  # the name under which ADM's own samplers store labels
_MOST_HEADER_BYTES = 10_000  # of a .npy header, as numpy limits it
# What zipfile and numpy raise on files that are damaged or none of theirs.
_DAMAGE = (OSError, EOFError, LookupError, ValueError, ArithmeticError, RuntimeError, SyntaxError, MemoryError, struct.error, zipfile.BadZipFile, zlib.error)


class _Member(NamedTuple):
    """Where the bytes of a stored (not compressed) .npy lie in its .npz."""

    start: int
    size: int
    crc: int


def map_images(path: str | Path) -> np.ndarray:
    """`arr_0` of a .npz as a read-only array that is read from the disk where it is used.

    Raises:
        StorageError: no .npz with stored images in `arr_0`.
    """
    require_regular(path, f"expected a .npz with images in {IMAGES_MEMBER}")
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            member = _find(archive, file, IMAGES_MEMBER)
            file.seek(member.start)
            shape, dtype, header_bytes = _npy_header(file.read(min(member.size, _MOST_HEADER_BYTES)))
        return np.memmap(path, dtype, "r", member.start + header_bytes, shape)
    except _DAMAGE as error:
        raise StorageError(f"{path}: expected a .npz with images in {IMAGES_MEMBER}: {_said(error)}") from error


def check_npz(path: str | Path, images: int, image_shape: tuple[int, int, int], labels: np.ndarray, images_crc: int, frame_crc: int | None, hint: str) -> None:
    """See that a finished file is whole: every byte against its checksums, then shape, dtype and labels.

    Args:
        labels: (N,) int64, as they must be.
        images_crc, frame_crc: NpzStream's `crc` and `frame_crc` when the file was written; frame_crc None: not known.
        hint: what to do about a damaged file.

    Raises:
        StorageError: with `hint`; what is wrong.
    """
    there = require_regular(path, hint)
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            member = _find(archive, file, IMAGES_MEMBER)
            with tqdm(desc=f"checking {Path(path).name}", unit="B", unit_scale=True, total=there, disable=there < BIG_BYTES, leave=False) as progress:
                found_frame = _crc(file, member.start, 0, progress)
                found_images = _crc(file, member.size, 0, progress)
                found_frame = _crc(file, there - file.tell(), found_frame, progress)
            _require(found_images == member.crc, f"checksum {member.crc:08x} of {IMAGES_MEMBER} by the file itself", f"{found_images:08x}")
            _require(found_images == images_crc, f"checksum {images_crc:08x} of {IMAGES_MEMBER} by its record", f"{found_images:08x}")
            _require(frame_crc in (None, found_frame), f"checksum {frame_crc or 0:08x} of all but the images", f"{found_frame:08x}")
            file.seek(member.start)
            shape, dtype, _ = _npy_header(file.read(min(member.size, _MOST_HEADER_BYTES)))
            _require((shape, dtype) == ((images, *image_shape), np.uint8), f"uint8 images of shape {(images, *image_shape)}", f"{dtype} {shape}")
            _require(archive.getinfo(f"{LABELS_MEMBER}.npy").file_size <= labels.nbytes + _MOST_HEADER_BYTES, f"{len(labels)} labels", "many more")
            found = np.lib.format.read_array(io.BytesIO(archive.read(f"{LABELS_MEMBER}.npy")), allow_pickle=False)
            _require(found.dtype == labels.dtype and np.array_equal(found, labels), "the labels of the plan", "others")
    except _DAMAGE as error:
        raise StorageError(f"{path}: damaged: {_said(error)}; {hint}") from error


def _find(archive: zipfile.ZipFile, file: io.BufferedReader, name: str) -> _Member:
    """The member `name`. Its bytes lie in the file."""
    info = archive.getinfo(f"{name}.npy")
    _require(info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size, f"{name} stored as it is", "it compressed")
    file.seek(info.header_offset + 26)
    start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    size = os.fstat(file.fileno()).st_size
    _require(start + info.file_size <= size, f"{start + info.file_size:,} bytes and more", f"{size:,}")
    file.seek(0)
    return _Member(start, info.file_size, info.CRC)


def _npy_header(data: bytes) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, dtype, and the number of bytes before the first value."""
    stream = io.BytesIO(data)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[np.lib.format.read_magic(stream)]
    shape, fortran, dtype = read(stream)
    _require(not fortran and not dtype.hasobject, "plain numbers in C order", f"{dtype}")
    return shape, dtype, stream.tell()


def _crc(file: io.BufferedReader, count: int, crc: int, progress: tqdm) -> int:
    while count:
        piece = file.read(min(count, PIECE_BYTES))
        _require(bool(piece), f"{count:,} more bytes", "the end of the file")
        crc, count = zlib.crc32(piece, crc), count - len(piece)
        progress.update(len(piece))
    return crc


def _require(condition: bool, expected: str, found: str) -> None:
    if not condition:
        raise ValueError(f"expected {expected}, found {found}")


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__

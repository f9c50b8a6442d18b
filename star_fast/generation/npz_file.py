"""Reading a finished .npz of images: as an array that stays on the disk, and byte by byte, to see that it is whole."""

from __future__ import annotations

import os
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from star_fast.generation.npz_stream import BIG_BYTES, IMAGES_MEMBER, PIECE_BYTES
from star_fast.storage import StorageError, require_regular

LABELS_MEMBER = "arr_1"  # the name under which ADM's own samplers store labels
_MOST_HEADER_BYTES = 10_000  # of a .npy header, as numpy limits it
# What zipfile raises on files that are damaged or none of its own.
DAMAGE = (
    OSError,
    EOFError,
    LookupError,
    ValueError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    SyntaxError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


class _Member(NamedTuple):
    """Where the bytes of a stored (not compressed) .npy lie in its .npz."""

    start: int
    size: int
    crc: int


def map_images(path: str | Path, images: int, image_shape: tuple[int, int, int]) -> np.ndarray:
    """`arr_0` of a .npz as a read-only array (N, H, W, 3) uint8 that is read from the disk where it is used.

    Raises:
        StorageError: no .npz with these images, stored as they are.
    """
    shape = (images, *image_shape)
    require_regular(path, f"expected a .npz with images in {IMAGES_MEMBER}")
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            member = _find(archive, file, IMAGES_MEMBER)
            file.seek(member.start)
            header_bytes = _npy_start(file.read(min(member.size, _MOST_HEADER_BYTES)), "|u1", shape)
        return np.memmap(path, np.uint8, "r", member.start + header_bytes, shape)
    except DAMAGE as error:
        raise StorageError(f"{path}: expected a .npz with images in {IMAGES_MEMBER}: {_said(error)}") from error


def check_npz(
    path: str | Path,
    images: int,
    image_shape: tuple[int, int, int],
    labels: np.ndarray,
    images_crc: int,
    frame_crc: int | None,
    hint: str,
) -> None:
    """See that a finished file is whole: every byte against its checksums, then shape, dtype and labels.

    Args:
        labels: (N,) int64, as they must be.
        images_crc, frame_crc: NpzStream's `crc` and `frame_crc` when the file was written; frame_crc None: not known.
        hint: what to do about a damaged file.

    Raises:
        StorageError: with `hint`; what is wrong.
    """
    there, least = require_regular(path, hint), images * int(np.prod(image_shape))
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            member = _find(archive, file, IMAGES_MEMBER)
            with tqdm(
                desc=f"checking {Path(path).name}",
                unit="B",
                unit_scale=True,
                total=there,
                disable=there < BIG_BYTES,
                leave=False,
            ) as progress:
                found_frame = _crc(file, member.start, 0, progress)
                found_images = _crc(file, member.size, 0, progress)
                found_frame = _crc(file, there - file.tell(), found_frame, progress)
            _require(
                found_images == member.crc,
                f"checksum {member.crc:08x} of {IMAGES_MEMBER} by the file itself",
                f"{found_images:08x}",
            )
            _require(
                found_images == images_crc,
                f"checksum {images_crc:08x} of {IMAGES_MEMBER} by its record",
                f"{found_images:08x}",
            )
            _require(
                frame_crc in (None, found_frame),
                f"checksum {frame_crc or 0:08x} of all but the images",
                f"{found_frame:08x}",
            )
            file.seek(member.start)
            start = _npy_start(file.read(min(member.size, _MOST_HEADER_BYTES)), "|u1", (images, *image_shape))
            _require(member.size - start == least, f"{least:,} bytes of pixels", f"{member.size - start:,}")
            _require(
                archive.getinfo(f"{LABELS_MEMBER}.npy").file_size <= labels.nbytes + _MOST_HEADER_BYTES,
                f"{len(labels)} labels",
                "many more",
            )
            found = archive.read(f"{LABELS_MEMBER}.npy")
            _require(
                found[_npy_start(found, "<i8", labels.shape) :] == labels.astype("<i8").tobytes(),
                "the labels of the plan",
                "others",
            )
    except DAMAGE as error:
        raise StorageError(f"{path}: damaged: {_said(error)}; {hint}") from error


def _find(archive: zipfile.ZipFile, file: BinaryIO, name: str) -> _Member:
    """The member `name`. Its bytes lie in the file."""
    info = archive.getinfo(f"{name}.npy")
    _require(
        info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size,
        f"{name} stored as it is",
        "it compressed",
    )
    file.seek(info.header_offset + 26)
    start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    size = os.fstat(file.fileno()).st_size
    _require(start + info.file_size <= size, f"{start + info.file_size:,} bytes and more", f"{size:,}")
    file.seek(0)
    return _Member(start, info.file_size, info.CRC)


def _npy_start(data: bytes, descr: str, shape: tuple[int, ...]) -> int:
    """Where the values begin in the .npy `data`, whose header must say this dtype and shape. Compared as text: nothing
    in it is evaluated.
    """
    _require(data[:6] == b"\x93NUMPY" and data[6:8] in (b"\1\0", b"\2\0"), "the start of a .npy", repr(data[:8]))
    size = 2 if data[6] == 1 else 4
    start = 8 + size + int.from_bytes(data[8 : 8 + size], "little")
    header, expected = (
        data[8 + size : start].rstrip(),
        f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}",
    )
    _require(start <= len(data) and header == expected.encode(), expected, repr(header[:100]))
    return start


def _crc(file: BinaryIO, count: int, crc: int, progress: tqdm) -> int:
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

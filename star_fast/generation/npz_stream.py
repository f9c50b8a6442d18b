"""One .npz of images written as they come: `arr_0` uint8 (N, H, W, 3), never held in memory, and what was written survives a kill.

A .npz is a zip file of .npy members. All sizes are known before the first image, so the headers are written first and images are appended; only the
checksum in the local header waits for the end. Members are stored uncompressed with 64-bit sizes (50 000 images of 256 px are 9.8 GB) and without dates:
the same images give the same bytes.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from star_fast.storage import StorageError, explain_write_errors, sync_folder

IMAGES_MEMBER = "arr_0"
_PIECE_BYTES = 16 * 2**20  # read at once when an existing file is checked
_CRC_OFFSET = 14  # of the checksum in a zip local header
_DATE = 33  # 1 January 1980
_VERSION = 45  # of zip: 64-bit sizes
_SIZE_ELSEWHERE = 0xFFFFFFFF  # "see the 64-bit field"


class NpzStream:
    """A growing .npz. Images go into `path`; `finish` completes it and gives it its final name.

    Args:
        path: of the unfinished file; one that is there already is continued.
        images: N, how many there will be.
        image_shape: (H, W, 3).
        whole: an unfinished file is cut back to a multiple of this many images (a batch that was being written when the process died).

    Raises:
        StorageError: `path` holds something else, or cannot be written.
    """

    def __init__(self, path: str | Path, images: int, image_shape: tuple[int, int, int], whole: int = 1) -> None:
        self.path, self.images, self.image_shape = Path(path), images, image_shape
        self.header = images_header(images, image_shape)
        self.image_bytes = int(np.prod(image_shape))
        self.crc = zlib.crc32(self.header[_npy_start(IMAGES_MEMBER):])
        with explain_write_errors(self.path):
            self.file = open(self.path, "r+b" if self.path.exists() else "w+b")  # noqa: SIM115 (closed by close or finish)
            self.written = self._resume(whole)

    def append(self, images: np.ndarray) -> None:
        """Add images (n, H, W, 3) uint8 after those written. On return they are on the disk.

        Raises:
            ValueError: another shape or dtype, or more than N in all. StorageError: the disk is full.
        """
        if images.dtype != np.uint8 or images.shape[1:] != self.image_shape or self.written + len(images) > self.images:
            raise ValueError(f"NpzStream: expected at most {self.images - self.written} uint8 images {self.image_shape}, got {images.dtype} {images.shape}")
        data = np.ascontiguousarray(images).reshape(-1).data
        with explain_write_errors(self.path):
            self.file.write(data)
            self._sync()
        self.crc = zlib.crc32(data, self.crc)
        self.written += len(images)

    def finish(self, final: str | Path, **arrays: np.ndarray) -> None:
        """Add small arrays under their names, complete the zip file and rename it to `final`: whole or not there.

        Raises:
            ValueError: images are missing. StorageError: the disk is full.
        """
        if self.written != self.images:
            raise ValueError(f"NpzStream: {self.written} of {self.images} images written")
        with explain_write_errors(self.path):
            npy_bytes = len(self.header) - _npy_start(IMAGES_MEMBER) + self.images * self.image_bytes
            directory = _directory_entry(IMAGES_MEMBER, self.crc, npy_bytes, 0)
            for name, array in arrays.items():
                stream = io.BytesIO()
                np.lib.format.write_array(stream, array, version=(1, 0), allow_pickle=False)
                data = stream.getvalue()
                directory += _directory_entry(name, zlib.crc32(data), len(data), self.file.tell())
                self.file.write(_local_header(name, zlib.crc32(data), len(data)) + data)
            self.file.write(_directory_end(directory, 1 + len(arrays), self.file.tell()))
            self.file.seek(_CRC_OFFSET)
            self.file.write(struct.pack("<I", self.crc))
            self._sync()
            self.close()
            os.replace(self.path, final)
            sync_folder(Path(final).parent)

    def close(self) -> None:
        """Close the file; an unfinished one can be continued later."""
        self.file.close()

    def _resume(self, whole: int) -> int:
        """Check what is there, cut it back to whole batches, bring the checksum up to date; returns the number of images kept."""
        there = os.fstat(self.file.fileno()).st_size
        start = self.file.read(len(self.header))
        if _without_crc(start) != _without_crc(self.header)[:len(start)]:
            raise StorageError(f"{self.path}: not the unfinished file of {self.images} images {self.image_shape}; delete it to start again")
        kept = max(0, min(self.images, (there - len(self.header)) // self.image_bytes))
        if kept < self.images:
            kept -= kept % whole
        if len(start) < len(self.header) or kept == 0:
            self.file.seek(0)
            self.file.write(self.header)
        end = len(self.header) + kept * self.image_bytes
        self.file.truncate(end)
        self.file.seek(len(self.header))
        for piece in _pieces(self.file, end - len(self.header)):
            self.crc = zlib.crc32(piece, self.crc)
        self.file.seek(end)
        self._sync()
        return kept

    def _sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())


def images_on_disk(path: str | Path, images: int, image_shape: tuple[int, int, int]) -> int:
    """How many images another process has appended to the unfinished file at `path`; 0 if there is none."""
    try:
        there = os.stat(path).st_size
    except FileNotFoundError:
        return 0
    return max(0, min(images, (there - len(images_header(images, image_shape))) // int(np.prod(image_shape))))


def map_images(path: str | Path) -> np.ndarray:
    """`arr_0` of an .npz as a read-only array that is read from the disk where it is used (loaded whole if the file is compressed).

    Raises:
        StorageError: not a .npz with images in `arr_0`.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{IMAGES_MEMBER}.npy") as member:
            info = archive.getinfo(f"{IMAGES_MEMBER}.npy")
            version = np.lib.format.read_magic(member)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read_header(member)
            npy_header_bytes = member.tell()
        if info.compress_type != zipfile.ZIP_STORED:
            with np.load(path) as arrays:
                return arrays[IMAGES_MEMBER]
        with open(path, "rb") as file:
            file.seek(info.header_offset + 26)
            name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
        return np.memmap(path, dtype, "r", info.header_offset + 30 + name_bytes + extra_bytes + npy_header_bytes, shape)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise StorageError(f"{path}: expected a .npz with images in {IMAGES_MEMBER}: {error}") from error


def images_header(images: int, image_shape: tuple[int, int, int]) -> bytes:
    """Everything before the first pixel: the zip local header (checksum still 0) and the .npy header."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (images, *image_shape)})
    npy_header = stream.getvalue()
    return _local_header(IMAGES_MEMBER, 0, len(npy_header) + images * int(np.prod(image_shape))) + npy_header


def _npy_start(name: str) -> int:
    return len(_local_header(name, 0, 0))


def _local_header(name: str, crc: int, size: int) -> bytes:
    """APPNOTE.TXT 4.3.7 with the 64-bit sizes of 4.5.3."""
    member = f"{name}.npy".encode()
    extra = struct.pack("<HHQQ", 1, 16, size, size)
    fixed = struct.pack("<4sHHHHHIIIHH", b"PK\3\4", _VERSION, 0, 0, 0, _DATE, crc, _SIZE_ELSEWHERE, _SIZE_ELSEWHERE, len(member), len(extra))
    return fixed + member + extra


def _directory_entry(name: str, crc: int, size: int, offset: int) -> bytes:
    """APPNOTE.TXT 4.3.12."""
    member = f"{name}.npy".encode()
    extra = struct.pack("<HHQQQ", 1, 24, size, size, offset)
    fixed = struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", _VERSION, _VERSION, 0, 0, 0, _DATE, crc, _SIZE_ELSEWHERE, _SIZE_ELSEWHERE, len(member), len(extra),
                        0, 0, 0, 0, _SIZE_ELSEWHERE)
    return fixed + member + extra


def _directory_end(directory: bytes, members: int, offset: int) -> bytes:
    """The directory and its three end records: APPNOTE.TXT 4.3.14 to 4.3.16."""
    end64 = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, _VERSION, _VERSION, 0, 0, members, members, len(directory), offset)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, offset + len(directory), 1)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, members, members, len(directory), _SIZE_ELSEWHERE, 0)
    return directory + end64 + locator + end


def _without_crc(header: bytes) -> bytes:
    return header[:_CRC_OFFSET] + header[_CRC_OFFSET + 4:]


def _pieces(file: io.BufferedRandom, count: int) -> Iterator[bytes]:
    while count:
        piece = file.read(min(count, _PIECE_BYTES))
        if not piece:
            raise StorageError("an unfinished .npz became shorter while it was read; is another process writing it?")
        count -= len(piece)
        yield piece

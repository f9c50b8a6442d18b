"""One .npz of images written as they come: `arr_0` uint8 (N, H, W, 3), never held in memory, and what was written
survives a kill.

A .npz is a zip file of .npy members. All sizes are known before the first image, so the headers are written first and
images are appended; only the checksum in the local header waits for the end. Members are stored uncompressed with
64-bit sizes (50 000 images of 256 px are 9.8 GB) and without dates: the same images give the same bytes.

Beside the unfinished file lies a journal of one short line a batch with the batch's checksum, written when the batch is
on the disk. Whoever goes on believes no batch that its line does not vouch for.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from star_fast.storage import explain_write_errors, require_regular, sync_folder

IMAGES_MEMBER = "arr_0"
PIECE_BYTES = 16 * 2**20  # read at once when an existing file is checked
BIG_BYTES = 2**30  # a file of this size takes seconds to check: that shows a bar
# Of the journal: images up to here, checksum of the batch's bytes, checksum of the line so far
_LINE_BYTES = 20 + 1 + 8 + 1 + 8 + 1
_CRC_OFFSET = 14  # of the checksum in a zip local header
_DATE = 33  # 1 January 1980
_VERSION = 45  # of zip: 64-bit sizes
_SIZE_ELSEWHERE = 0xFFFFFFFF  # "see the 64-bit field"


class NpzStream:
    """A growing .npz. Images go into `path`; `finish` completes it and gives it its final name.

    Args:
        path: of the unfinished file; one that is there already is continued, from its first batch that is not what its
            journal says.
        images: N, how many there will be.
        image_shape: (H, W, 3).
        batch: images are appended in batches of this many; the last may be smaller.

    Attributes:
        written: images in the file.
        cut: images that were in it when it was opened and are no longer.
        lost: those of them that another process, which looks at sizes alone, may have taken for safe.

    Raises:
        StorageError: `path` is no ordinary file, or cannot be written.
    """

    def __init__(self, path: str | Path, images: int, image_shape: tuple[int, int, int], batch: int) -> None:
        self.path, self.images, self.image_shape, self.batch = Path(path), images, image_shape, batch
        self.header = images_header(images, image_shape)
        self.image_bytes = int(np.prod(image_shape))
        self.crc = zlib.crc32(self.header[_npy_start(IMAGES_MEMBER) :])
        self.written = 0
        there, claimed = (
            _images_in(self.path, images, image_shape),
            images_appended(self.path, images, image_shape, batch),
        )
        with explain_write_errors(self.path):
            for existing in (self.path, journal_path(self.path)):
                if existing.exists():
                    require_regular(
                        existing, "expected what an interrupted sampling job leaves there; delete it to start again"
                    )
            self.file, self.journal = (
                open(there, "r+b" if there.exists() else "w+b")  # noqa: SIM115 (closed by close or finish)
                for there in (self.path, journal_path(self.path))
            )
            self._resume()
            sync_folder(self.path.parent)
        self.cut, self.lost = there - self.written, claimed - self.written

    def append(self, images: np.ndarray) -> None:
        """Add the next batch (n, H, W, 3) uint8. On return it is on the disk, then vouched for in the journal.

        Raises:
            ValueError: another shape or dtype, or not the number of images that comes next. StorageError: the disk is
                full.
        """
        count = min(self.batch, self.images - self.written)
        if images.dtype != np.uint8 or images.shape != (count, *self.image_shape) or not count:
            raise ValueError(
                f"NpzStream: expected {count} uint8 images {self.image_shape}, got {images.dtype} {images.shape}"
            )
        data = np.ascontiguousarray(images).reshape(-1).data
        with explain_write_errors(self.path):
            self.file.write(data)
            _sync(self.file)
            self.journal.write(_journal_line(self.written + count, zlib.crc32(data)))
            _sync(self.journal)
        self.crc = zlib.crc32(data, self.crc)
        self.written += count

    def frame_crc(self, **arrays: np.ndarray) -> int:
        """Checksum of all bytes of the finished file that `crc` does not cover: with it, every byte of the file is
        vouched for.
        """
        return zlib.crc32(self._tail(arrays), zlib.crc32(_with_crc(self.header[: _npy_start(IMAGES_MEMBER)], self.crc)))

    def map(self) -> np.ndarray:
        """The images written so far, read-only, read from the disk where they are used."""
        return np.memmap(self.path, np.uint8, "r", len(self.header), (self.written, *self.image_shape))

    def finish(self, final: str | Path, **arrays: np.ndarray) -> None:
        """Add small arrays under their names, complete the zip file and rename it to `final`: whole or not there.

        Raises:
            ValueError: images are missing. StorageError: the disk is full.
        """
        if self.written != self.images:
            raise ValueError(f"NpzStream: {self.written} of {self.images} images written")
        with explain_write_errors(self.path):
            self.file.write(self._tail(arrays))
            self.file.seek(_CRC_OFFSET)
            self.file.write(struct.pack("<I", self.crc))
            _sync(self.file)
            self.close()
        with explain_write_errors(final):
            os.replace(self.path, final)
            sync_folder(Path(final).parent)

    def close(self) -> None:
        """Close the file; an unfinished one can be continued later."""
        self.file.close()
        self.journal.close()

    def _tail(self, arrays: dict[str, np.ndarray]) -> bytes:
        """What follows the last image: the small members and the zip directory."""
        npy_bytes = len(self.header) - _npy_start(IMAGES_MEMBER) + self.images * self.image_bytes
        start = len(self.header) + self.images * self.image_bytes
        directory, members = _directory_entry(IMAGES_MEMBER, self.crc, npy_bytes, 0), b""
        for name, array in arrays.items():
            stream = io.BytesIO()
            np.lib.format.write_array(stream, array, version=(1, 0), allow_pickle=False)
            data = stream.getvalue()
            directory += _directory_entry(name, zlib.crc32(data), len(data), start + len(members))
            members += _local_header(name, zlib.crc32(data), len(data)) + data
        return members + _directory_end(directory, 1 + len(arrays), start + len(members))

    def _resume(self) -> None:
        """Keep the batches that are what their journal lines say, up to the first that is not; cut off the rest."""
        if _without_crc(self.file.read(len(self.header))) == _without_crc(self.header):
            there = os.fstat(self.file.fileno()).st_size
            with tqdm(
                desc="checking what is there",
                unit="B",
                unit_scale=True,
                total=there,
                disable=there < BIG_BYTES,
                leave=False,
            ) as progress:
                while (line := self.journal.read(_LINE_BYTES)) and self._vouched(line, progress):
                    pass
        else:
            self.file.seek(0)
            self.file.write(self.header)
        # The journal first: it must never vouch for what is not there.
        for file, end in (
            (self.journal, _LINE_BYTES * -(-self.written // self.batch)),
            (self.file, len(self.header) + self.written * self.image_bytes),
        ):
            file.truncate(end)
            file.seek(end)
            _sync(file)

    def _vouched(self, line: bytes, progress: tqdm) -> bool:
        """Whether the next batch is what this journal line says; if so it counts as written."""
        count, batch_crc, crc = min(self.batch, self.images - self.written), 0, self.crc
        left = count * self.image_bytes
        while left and (piece := self.file.read(min(left, PIECE_BYTES))):
            batch_crc, crc = zlib.crc32(piece, batch_crc), zlib.crc32(piece, crc)
            left -= len(piece)
            progress.update(len(piece))
        if left or not count or line != _journal_line(self.written + count, batch_crc):
            return False
        self.written, self.crc = self.written + count, crc
        return True


def journal_path(path: Path) -> Path:
    """The journal of the unfinished file at `path`."""
    return path.with_suffix(".journal")


def images_appended(path: Path, images: int, image_shape: tuple[int, int, int], batch: int) -> int:
    """How many images another process has appended to the unfinished file at `path`, by the sizes of file and journal;
    0 if there is none.
    """
    return min(_size(journal_path(path)) // _LINE_BYTES * batch, _images_in(path, images, image_shape))


def _images_in(path: Path, images: int, image_shape: tuple[int, int, int]) -> int:
    """Whole images in the unfinished file at `path`, by its size."""
    return min(images, max(0, _size(path) - len(images_header(images, image_shape))) // int(np.prod(image_shape)))


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # not there, or a link that leads nowhere: opening it says so in one line
        return 0


def images_header(images: int, image_shape: tuple[int, int, int]) -> bytes:
    """Everything before the first pixel: the zip local header (checksum still 0) and the .npy header."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "|u1", "fortran_order": False, "shape": (images, *image_shape)}
    )
    npy_header = stream.getvalue()
    return _local_header(IMAGES_MEMBER, 0, len(npy_header) + images * int(np.prod(image_shape))) + npy_header


def _npy_start(name: str) -> int:
    return len(_local_header(name, 0, 0))


def _local_header(name: str, crc: int, size: int) -> bytes:
    """APPNOTE.TXT 4.3.7 with the 64-bit sizes of 4.5.3."""
    member = f"{name}.npy".encode()
    extra = struct.pack("<HHQQ", 1, 16, size, size)
    fixed = struct.pack(
        "<4sHHHHHIIIHH",
        b"PK\3\4",
        _VERSION,
        0,
        0,
        0,
        _DATE,
        crc,
        _SIZE_ELSEWHERE,
        _SIZE_ELSEWHERE,
        len(member),
        len(extra),
    )
    return fixed + member + extra


def _directory_entry(name: str, crc: int, size: int, offset: int) -> bytes:
    """APPNOTE.TXT 4.3.12."""
    member = f"{name}.npy".encode()
    extra = struct.pack("<HHQQQ", 1, 24, size, size, offset)
    fixed = struct.pack(
        "<4sHHHHHHIIIHHHHHII",
        b"PK\1\2",
        _VERSION,
        _VERSION,
        0,
        0,
        0,
        _DATE,
        crc,
        _SIZE_ELSEWHERE,
        _SIZE_ELSEWHERE,
        len(member),
        len(extra),
        0,
        0,
        0,
        0,
        _SIZE_ELSEWHERE,
    )
    return fixed + member + extra


def _directory_end(directory: bytes, members: int, offset: int) -> bytes:
    """The directory and its three end records: APPNOTE.TXT 4.3.14 to 4.3.16."""
    end64 = struct.pack(
        "<4sQHHIIQQQQ", b"PK\6\6", 44, _VERSION, _VERSION, 0, 0, members, members, len(directory), offset
    )
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, offset + len(directory), 1)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, members, members, len(directory), _SIZE_ELSEWHERE, 0)
    return directory + end64 + locator + end


def _without_crc(header: bytes) -> bytes:
    return _with_crc(header, 0)


def _with_crc(header: bytes, crc: int) -> bytes:
    return header[:_CRC_OFFSET] + struct.pack("<I", crc) + header[_CRC_OFFSET + 4 :]


def _journal_line(images: int, crc: int) -> bytes:
    start = f"{images:020d} {crc:08x}".encode()
    return start + f" {zlib.crc32(start):08x}\n".encode()


def _sync(file: io.BufferedRandom) -> None:
    file.flush()
    os.fsync(file.fileno())

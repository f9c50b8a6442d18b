"""torch's .pt files, read without running anything that they hold and without allocating more than their own bytes call
for.

Such a file is a zip archive: a pickle, and one member for each storage. Its directory is read first and every size in
it held against the file's length; members must be stored as they are (torch.save never packs them); the pickle is read
without running it (plain_pickle.py); a tensor must lie within its storage. Files of torch before 1.6 have no directory
that could be checked, and are refused: load and save them again with torch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor

from star_fast.errors import UserError
from star_fast.model.bounded_file import BoundedFile, Damaged, StoredTensor, are_sizes, open_bounded, short, span
from star_fast.model.plain_pickle import MOST_BYTES, Foreign, PickledTensor, Storage, read_plain

_MOST_DIRECTORY_BYTES = 2**20  # a member takes some hundred; each byte may become twenty in memory
_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
    "Untyped": torch.uint8,
}
# Records of a zip archive, little-endian, as PKWARE's APPNOTE.TXT describes them.
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_END_64_LOCATOR = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_MEMBER = struct.Struct("<4s5H3L2H")
_IN_64_BITS = 2**32 - 1  # says that the number stands in a field of 64 bits


def load_plain(
    path: Path,
    *,
    allowed: Sequence[type[Any] | tuple[type[Any], str]] = (),
    map_location: Any = "cpu",
    meaning: str = "a torch checkpoint",
) -> Any:
    """The content of a .pt file: tensors, plain data and the `allowed` classes.

    Args:
        allowed: classes whose instances are data: nothing of theirs runs but, where the pickle calls it with numbers
            and text alone, the class itself.
        map_location: a device for the tensors; anything else means the CPU.
        meaning: what the file should be, for messages.

    Raises:
        UserError: missing, no ordinary file, damaged, or it holds anything else.
    """
    classes = {
        f"{cls.__module__}.{cls.__qualname__}" if name is None else name: cls
        for cls, name in (item if isinstance(item, tuple) else (item, None) for item in allowed)
    }
    device = torch.device(map_location) if isinstance(map_location, (str, torch.device)) else torch.device("cpu")
    with open_bounded(path, f"expected {meaning}") as file:
        return read_archive(file, meaning, lambda archive: read_plain(archive.pickle, archive.reader(device), classes))


def write_archive(content: Any, file: BinaryIO) -> None:
    """torch.save into an open file. Raises OSError where the file cannot be written; torch by itself then reports a
    position that it did not expect.
    """
    target = _Written(file)
    try:
        torch.save(content, cast("IO[bytes]", target))  # write and flush are all that it asks of a file
    except RuntimeError as error:
        if target.error is None:
            raise
        raise target.error from error


class _Written:
    """A file that remembers the error that a write met."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def describe(file: BoundedFile, meaning: str) -> Any:
    """The content of an open .pt file with a StoredTensor for each tensor: plain data, nothing of a tensor's size.
    Raises UserError as load_plain does.
    """
    return read_archive(file, meaning, lambda archive: read_plain(archive.pickle, archive.locate))


def read_archive(file: BoundedFile, meaning: str, read: Callable[[Archive], Any]) -> Any:
    """What `read` makes of the archive; what is wrong with it becomes a UserError."""
    try:
        return read(Archive(file))
    except Foreign as error:
        raise UserError(
            f"{file.path}: holds {short(error)}, which is neither tensor nor plain data; such files can run code "
            "and are not loaded"
        ) from error
    except Damaged as error:
        raise UserError(
            f"{file.path}: truncated or not {meaning} ({short(error, 200)}); copy or download it again"
        ) from error


class Archive:
    """The zip archive in a .pt file. Raises Damaged where it is not one that torch.save may have written."""

    def __init__(self, file: BoundedFile) -> None:
        self._file, self._members, self._read_bytes = file, dict(_members(file)), 0
        self._storages: dict[str, Tensor] = {}
        pickles = [name for name in self._members if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Damaged("expected one data.pkl in the archive")
        self._root = pickles[0].removesuffix("data.pkl")
        if self._short_member("byteorder", 16) not in (b"", b"little"):
            raise Damaged("expected little-endian numbers")
        self.pickle = self._short_member("data.pkl", MOST_BYTES)

    def locate(self, tensor: PickledTensor) -> StoredTensor:
        """Where a tensor lies in the file."""
        storage, offset, shape, stride = tensor[:4]
        if (
            not isinstance(storage, Storage)
            or not are_sizes(shape)
            or not are_sizes(stride)
            or len(shape) != len(stride)
            or not are_sizes([offset])
        ):
            raise Damaged("a tensor without storage, sizes or strides")
        dtype = getattr(torch, tensor.dtype) if storage.kind == "Untyped" and tensor.dtype else _DTYPES[storage.kind]
        start, length = self._member(storage)
        held = length // dtype.itemsize
        if max(offset + span(shape, stride), math.prod(shape)) > held:
            raise Damaged(
                f"a tensor of shape {tuple(shape)} says to hold more numbers than the {held:,} of its storage"
            )
        return StoredTensor(dtype, tuple(shape), tuple(stride), start + offset * dtype.itemsize)

    def reader(self, device: torch.device) -> Callable[[PickledTensor], Tensor]:
        """What reads tensors onto a device; those that share a storage in the file share memory."""

        def read(tensor: PickledTensor) -> Tensor:
            stored, storage = self.locate(tensor), tensor.storage
            start, length = self._member(storage)
            if storage.key not in self._storages:
                self._read_bytes += length
                if self._read_bytes > self._file.size:
                    raise Damaged("storages that lie upon each other")
                self._storages[storage.key] = self._file.tensor(start, length, torch.uint8).to(device)
            numbers = self._storages[storage.key][: length // stored.dtype.itemsize * stored.dtype.itemsize].view(
                stored.dtype
            )
            return numbers.as_strided(stored.shape, stored.stride, (stored.start - start) // stored.dtype.itemsize)

        return read

    def _short_member(self, name: str, most: int) -> bytes:
        start, length = self._members.get(self._root + name, (0, 0))
        if length > most:
            raise Damaged(f"archive member {name} of {length:,} bytes; expected at most {most:,}")
        return self._file.bytes(start, length)

    def _member(self, storage: Storage) -> tuple[int, int]:
        name = f"{self._root}data/{storage.key}"
        if name not in self._members:
            raise Damaged(f"the numbers of a tensor are missing: no archive member {short(name)}")
        return self._members[name]


def _members(file: BoundedFile) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name, (start, length)) of each member."""
    directory = file.bytes(*_directory(file))
    at = 0
    while at < len(directory):
        if len(directory) - at < _ENTRY.size:
            raise Damaged("a damaged zip directory")
        (
            signature,
            _,
            _,
            flags,
            method,
            _,
            _,
            _,
            packed,
            length,
            name_length,
            extra_length,
            comment_length,
            _,
            _,
            _,
            place,
        ) = _ENTRY.unpack_from(directory, at)
        name_end = at + _ENTRY.size + name_length
        name = directory[at + _ENTRY.size : name_end].decode("utf-8", "surrogateescape")
        length, packed, place = _in_64_bits(directory[name_end : name_end + extra_length], length, packed, place)
        at = name_end + extra_length + comment_length
        if signature != b"PK\1\2" or at > len(directory):
            raise Damaged("a damaged zip directory")
        if method or flags & 1 or packed != length:
            raise Damaged(f"archive member {short(name)} is compressed or encrypted, which torch.save never does")
        signature, *_, name_length, extra_length = _MEMBER.unpack(file.bytes(place, _MEMBER.size))
        start = place + _MEMBER.size + name_length + extra_length
        if signature != b"PK\3\4" or start + length > file.size:
            raise Damaged(
                f"archive member {short(name)} says to have {length:,} bytes at {start:,}, in a file of {file.size:,}"
            )
        yield name, (start, length)


def _directory(file: BoundedFile) -> tuple[int, int]:
    """Start and length of the list of members. A comment after it, which torch.save never writes, is refused: then
    nobody can read another list than this.
    """
    at = file.size - _END.size
    if at < 0:
        raise Damaged("no zip archive")
    signature, _, _, _, entries, length, start, comment = _END.unpack(file.bytes(at, _END.size))
    if signature != b"PK\5\6" or comment:
        raise Damaged("no end of a zip archive; a file of torch before 1.6 must be loaded and saved again with torch")
    if entries == 2**16 - 1 or _IN_64_BITS in (length, start):
        signature, _, place, _ = _END_64_LOCATOR.unpack(file.bytes(at - _END_64_LOCATOR.size, _END_64_LOCATOR.size))
        end = _END_64.unpack(file.bytes(place, _END_64.size)) if signature == b"PK\6\7" else (b"",)
        if end[0] != b"PK\6\6":
            raise Damaged("a damaged zip archive")
        length, start = end[-2:]
    if length > _MOST_DIRECTORY_BYTES:
        raise Damaged(f"a zip directory of {length:,} bytes; expected at most {_MOST_DIRECTORY_BYTES:,}")
    return start, length


def _in_64_bits(extra: bytes, *numbers: int) -> list[int]:
    """The numbers, those of them that say so from the extra field of kind 1, where they stand one after the other."""
    while len(extra) >= 4 and _IN_64_BITS in numbers:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1 and len(extra) >= 4 + length:
            wide = iter(struct.unpack(f"<{length // 8}Q", extra[4 : 4 + length // 8 * 8]))
            return [next(wide, number) if number == _IN_64_BITS else number for number in numbers]
        extra = extra[4 + length :]
    return list(numbers)

"""What lies where in a plain tar file: one pass over its headers. Nothing is unpacked, and nothing is allocated on a
header's word.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

_BLOCK = 512
_AHEAD = 2048  # read at once: a header and what may be a small file after it
_PADDING = 2**16  # looked at after the end mark; tar fills its last 10 KB with zeros
_MOST_NAME_BYTES = 2**16  # of a long name, or of the records that hold one
_FILES = (b"0", b"\0", b"7")
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes
_KINDS = {b"1": "a link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a pipe", b"S": "a sparse file"}
_FOLDER = b"5"


class TarMember(NamedTuple):
    """A file in a tar file, or something there that is none."""

    name: bytes
    offset: int  # of its content
    size: int  # bytes
    header: bytes  # 512 bytes; holds size and time
    ahead: bytes  # the beginning of its content, perhaps all of it
    refused: str  # why it is not read: no ordinary file; empty where it is one


class TarFault(Exception):
    """Here a tar file ends too early or makes no sense: nothing that follows can be found. What
    came before is whole.
    """


def tar_members(descriptor: int, size: int) -> Iterator[TarMember]:
    """The files in a tar file of `size` bytes, in order; folders are left out.

    POSIX (pax) and GNU long names and sizes are understood.

    Raises:
        TarFault: after the last whole member, where the file does not end there as a tar file does.
    """
    position, long_name, long_size, sparse = 0, b"", -1, False
    while True:
        block = os.pread(descriptor, _AHEAD, position)
        header, ahead = block[:_BLOCK], block[_BLOCK:]
        if len(header) < _BLOCK:
            raise TarFault(
                "is cut short" if header or position < size else "ends without an end mark: it may have been cut short"
            )
        if not any(header):
            if block.strip(b"\0") or os.pread(descriptor, _PADDING, position).strip(b"\0"):
                raise TarFault("goes on after an end mark, as tar files do that were put together in one")
            return
        if not _sum_is_right(header):
            raise TarFault(f"is damaged at byte {position:,}")
        kind, length = header[156:157], _number(header[124:136])
        if kind in _WITHOUT_CONTENT:
            length = 0
        elif long_size >= 0 and kind not in b"xgLK":
            length = long_size
        start = position + _BLOCK
        if length < 0:
            raise TarFault(f"is damaged at byte {position:,}")
        if length > size - start:
            raise TarFault(
                f"is cut short: {_readable(long_name or _name(header))} should have {length:,} bytes, "
                f"{max(0, size - start):,} are left"
            )
        position = start + -(-length // _BLOCK) * _BLOCK
        if kind in b"xgLK":
            if length > _MOST_NAME_BYTES:
                raise TarFault(f"is damaged at byte {start - _BLOCK:,}: a name of {length:,} bytes")
            if kind in b"xL":
                content = ahead[:length] if length <= len(ahead) else os.pread(descriptor, length, start)
                if kind == b"L":
                    long_name = content.split(b"\0", 1)[0]
                else:
                    records = _pax_records(content, start)
                    long_name, long_size = records.get(b"path", long_name), _decimal(records.get(b"size", b""), start)
                    sparse = any(name.startswith(b"GNU.sparse") for name in records)
            continue
        if kind != _FOLDER:
            refused = "a sparse file" if sparse else "" if kind in _FILES else _KINDS.get(kind, "of an unknown kind")
            yield TarMember(long_name or _name(header), start, length, header, ahead, refused)
        long_name, long_size, sparse = b"", -1, False


def _sum_is_right(header: bytes) -> bool:
    try:
        told = int(header[148:156].replace(b"\0", b" ").split()[0], 8)
    except (ValueError, IndexError):
        return False
    rest = header[:148] + header[156:]
    unsigned = 256 + sum(rest)  # its own eight bytes count as spaces
    return told == unsigned or told == unsigned - 256 * sum(byte > 127 for byte in rest)  # old tars summed signed bytes


def _number(field: bytes) -> int:
    """A size: octal digits, or from GNU tar a binary number after the byte 0x80; -1 for what is neither."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    digits = field.strip(b"\0 ")
    try:
        return int(digits, 8) if digits.isdigit() else -1 if digits else 0
    except ValueError:  # 8 or 9
        return -1


def _name(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0", 1)[0], header[345:500].split(b"\0", 1)[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _pax_records(content: bytes, place: int) -> dict[bytes, bytes]:
    """The records "LENGTH NAME=VALUE\\n" of a pax header; LENGTH counts the whole record."""
    records, rest = {}, content.rstrip(b"\0")
    while rest:
        digits, space, _ = rest.partition(b" ")
        length = _decimal(digits, place)
        name, equals, value = rest[len(digits) + 1 : length - 1].partition(b"=")
        if not space or not equals or length < len(digits) + 3 or length > len(rest):
            raise TarFault(f"is damaged at byte {place:,}")
        records[name] = value
        rest = rest[length:]
    return records


def _decimal(digits: bytes, place: int) -> int:
    """A whole number of at most 18 digits; -1 for none."""
    if digits and not (digits.isdigit() and len(digits) <= 18):
        raise TarFault(f"is damaged at byte {place:,}")
    return int(digits) if digits else -1


def _readable(name: bytes) -> str:
    return os.fsdecode(name)[-100:]

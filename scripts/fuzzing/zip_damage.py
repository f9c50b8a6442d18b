"""Damage to zip files and to NumPy's .npy and .npz: the container stays whole, what it says becomes
absurd or hostile.
"""

from __future__ import annotations

import functools
import io
import struct
import warnings
import zipfile
import zlib
from random import Random

from scripts.fuzzing import payloads
from scripts.fuzzing.bytes_damage import SIZES, damaged


def damaged_zip(random: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """A zip file with one member changed, doubled, dropped, renamed, packed or lied about."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    way = random.choice(
        (
            "member",
            "member",
            "member",
            "double",
            "drop",
            "rename",
            "pack",
            "bomb",
            "lie",
            "lie",
            "comment",
            "folder",
            "link",
            "nested",
            "order",
            "many",
        )
    )
    index = random.randrange(len(members))
    name, content = members[index]
    method, told = zipfile.ZIP_STORED, f"zip: {way} {name}"
    if way == "member":
        change, content = damaged(random, content, other)
        members[index], told = (name, content), f"{told}: {change}"
    elif way == "double":
        members.insert(random.randrange(len(members) + 1), (name, damaged(random, content, other)[1]))
    elif way == "drop":
        del members[index]
    elif way == "rename":
        members[index] = (
            random.choice(
                (
                    f"../{name}",
                    f"/{name}",
                    name + "x",
                    name.upper(),
                    name.rsplit("/")[-1],
                    "x" * 3000,
                    "a\nb",
                    "\x1b[31m",
                    "",
                    "archive/data.pkl",
                    "data.pkl",
                    "constants.pkl",
                    "arr_0.npy",
                )
            ),
            content,
        )
    elif way == "pack":
        method = random.choice((zipfile.ZIP_DEFLATED,) * 4 + (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    elif way == "bomb":
        return told, _zip_bomb(members, index, random.choice((10**6, 10**7, 5 * 10**8)))
    elif way == "link":
        members[index] = (name, b"/etc/passwd")
    elif way == "nested":
        members[index] = (name, data)
    elif way == "order":
        random.shuffle(members)
    elif way == "many":
        members += [(f"x{i}", b"") for i in range(2000)]
    made = zipped(members, method)
    if way == "lie":
        return told, _lying_zip(random, made)
    if way == "comment":
        return told, made[:-2] + struct.pack("<H", 5) + random.choice((b"PK\5\6x", b"hello", b"he"))
    return told, made


def zipped(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file of members, in order."""
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w", method) as archive:
        warnings.simplefilter("ignore")  # doubled names are wanted
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content, method)
    return stream.getvalue()


def _zip_bomb(members: list[tuple[str, bytes]], index: int, size: int) -> bytes:
    """A zip file one of whose members unpacks to `size` zeros, as its headers say."""
    packed, crc = packed_zeros(size), _crc_of_zeros(size)
    name = members[index][0]
    made = bytearray(zipped([*members[:index], (name, packed), *members[index + 1 :]]))
    with zipfile.ZipFile(io.BytesIO(made)) as archive:
        offset, entry = archive.infolist()[index].header_offset, archive.start_dir
    for _ in range(index):
        entry += 46 + sum(struct.unpack("<HHH", made[entry + 28 : entry + 34]))
    for place in (offset + 8, entry + 10):  # method; date and time stay; checksum, packed size, size
        made[place : place + 2] = struct.pack("<H", zipfile.ZIP_DEFLATED)
        made[place + 6 : place + 18] = struct.pack("<III", crc, len(packed), size)
    return bytes(made)


@functools.cache
def packed_zeros(size: int) -> bytes:
    """A bare deflate stream of zeros, made of one piece repeated."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    pieces = [packer.compress(bytes(count)) + packer.flush(zlib.Z_FULL_FLUSH) for count in (10**6, size % 10**6)]
    return pieces[0] * (size // 10**6) + pieces[1] + b"\3\0"


@functools.cache
def _crc_of_zeros(size: int) -> int:
    crc, block = 0, bytes(10**6)
    for left in range(size, 0, -len(block)):
        crc = zlib.crc32(block[:left], crc)
    return crc


def _lying_zip(random: Random, data: bytes) -> bytes:
    """One field of one header says something else."""
    changed = bytearray(data)
    # (signature, offsets of fields of 2 or 4 bytes): local header, directory entry, end of directory
    signature, fields = random.choice(
        (
            (b"PK\3\4", ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2))),
            (b"PK\1\2", ((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (38, 4), (42, 4))),
            (b"PK\5\6", ((4, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2))),
        )
    )
    places = (
        [i for i in range(len(data)) if data.startswith(signature, i)] if len(data) < 200000 else [data.find(signature)]
    )
    offset, width = random.choice(fields)
    place = random.choice(places or [0]) + offset
    changed[place : place + width] = struct.pack("<Q", random.choice((*SIZES, len(data), len(data) * 10, 2**30)))[
        :width
    ]
    return bytes(changed)


def damaged_npy(random: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """A .npy file whose header says something absurd, or an array of objects."""
    way = random.choice(("descr", "shape", "shape", "text", "version", "objects", "length"))
    size = "(1,)" if len(data) < 300 else "(1, 2, 16)"  # a label or the codes of an image
    body = data[10 + struct.unpack("<H", data[8:10])[0] :] if data[6:7] == b"\1" else data[128:]
    if way == "objects":
        return "npy of objects", npy_of(
            "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", payloads.pickle_of_call(random)[1]
        )
    if way == "version":
        return "npy of another version", data[:6] + bytes(
            [random.choice((0, 2, 3, 4, 255)), random.choice((0, 1, 255))]
        ) + data[8:]
    if way == "length":
        return "npy header length", data[:8] + struct.pack("<H", random.choice((0, 1, 65535, 60, 119))) + data[10:]
    descr = (
        random.choice(
            (
                "'|O'",
                "'<f8'",
                "'|u1'",
                "'<u8'",
                "'|S1000000000'",
                "'<U99999999'",
                "'|V0'",
                "'<M8[ns]'",
                "[('a', '<i4')]",
                "[('a', '|O')]",
                "'x'",
                "'>i4'",
                "'<i4'",
                "None",
                "'<c16'",
                "'|b1'",
            )
        )
        if way == "descr"
        else "'<i8'"
    )
    shape = (
        random.choice(
            (
                size,
                "(10**18,)",
                f"({10**18},)",
                "(-1,)",
                "(1, -1, 16)",
                f"({2**62}, 4)",
                f"(1, {10**9}, {10**9})",
                "()",
                "(0,)",
                "(1,)",
                "(True,)",
                "(1.5,)",
                "(1, 2, 16)",
                "('a',)",
                "[1]",
                "(" + "1, " * 40 + ")",
                f"({10**30},)",
                "(1, 0, 16)",
            )
        )
        if way == "shape"
        else size
    )
    header = (
        f"{{'descr': {descr}, 'fortran_order': {random.choice(('False', 'False', 'True', '1', 'None'))}, 'shape': "
        f"{shape}, }}"
    )
    if way == "text":
        header = random.choice(
            (
                "{}",
                "",
                "__import__('os').system('true')",
                "{'descr': __import__('os')}",
                "[" * 2000,
                "(" * 200 + ")" * 200,
                "{" * 500,
                "'x'",
                "{'descr': '<i8'}",
                header + "#",
                header * 2,
                "1" * 9000,
                header.replace("'", '"'),
                "{'shape': (1,), 'shape': (2,)}",
                "\x1b[31m",
                "é",
            )
        )
    return f"npy header {header[:90]!r}", npy_of(header, body)


def npy_of(header: str, body: bytes) -> bytes:
    """A .npy file, version 1.0, with any header."""
    encoded = header.encode("latin1", "replace")
    encoded += b" " * (-(11 + len(encoded)) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(encoded)) + encoded + body


def damaged_npz(random: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """An .npz whose zip file or whose arrays are damaged; checksums of the zip file fit in half of them."""
    if random.random() < 0.5:
        return damaged_zip(random, data, other)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    index = random.randrange(len(members))
    change, content = damaged_npy(random, members[index][1], other)
    members[index] = (members[index][0], content)
    return f"{members[index][0]}: {change}", zipped(members)

"""Damage that knows nothing of what the bytes mean."""

from __future__ import annotations

import struct
from random import Random

MAGIC = {
    "zip": b"PK\3\4\x2d\0\0\0\0\0",
    "empty zip": b"PK\5\6" + bytes(18),
    "pickle": b"\x80\x02",
    "old torch": b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.",
    "npy": b"\x93NUMPY\1\0",
    "gzip": b"\x1f\x8b\x08\0",
    "PNG": b"\x89PNG\r\n\x1a\n",
    "JPEG": b"\xff\xd8\xff\xe0",
    "GIF": b"GIF89a",
    "TIFF": b"II*\0",
    "big TIFF": b"II+\0\x08\0\0\0",
    "WebP": b"RIFF\0\0\0\0WEBP",
    "BMP": b"BM",
    "PPM": b"P6 ",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n",
    "PDF": b"%PDF-1.7\n",
    "binary PostScript": b"\xc5\xd0\xd3\xc6\x1e\0\0\0\x40\0\0\0"
    + bytes(18)
    + b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
    "WMF": b"\xd7\xcd\xc6\x9a\0\0",
    "ICO": b"\0\0\1\0\1\0",
    "PSD": b"8BPS\0\1",
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n",
    "AVIF": b"\0\0\0\x1cftypavif",
    "FITS": b"SIMPLE  =                    T",
    "XBM": b"#define x_width 8\n#define x_height 8\nstatic char",
    "tar": b"././@PaxHeader".ljust(257, b"\0") + b"ustar\0",
    "HDF5": b"\x89HDF\r\n\x1a\n",
    "safetensors": struct.pack("<Q", 2) + b"{}",
    "JSON": b"{}",
    "BOM": b"\xef\xbb\xbf",
    "UTF-16": b"\xff\xfe",
    "script": b"#!/bin/sh\n",
    "ELF": b"\x7fELF",
}
SIZES = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**40,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
)


def damaged(random: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """One piece of damage to `data`; splices take from `other`. Returns what was done, and the bytes."""
    name = random.choice(list(_WAYS))
    return name, _WAYS[name](random, data, other)


def _flip(random: Random, data: bytes, _: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 8, 64))):
        if changed:
            changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _set(random: Random, data: bytes, _: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 16))):
        if changed:
            changed[random.randrange(len(changed))] = random.choice(
                (0, 1, 0x0A, 0x1B, 0x22, 0x5C, 0x7F, 0x80, 0xFF, random.randrange(256))
            )
    return bytes(changed)


def _early_flip(random: Random, data: bytes, other: bytes) -> bytes:
    """Headers lie at the start."""
    return _flip(random, data[:128], other) + data[128:]


def _truncate(random: Random, data: bytes, _: bytes) -> bytes:
    return data[
        : random.choice((0, 1, 7, 8, len(data) - 1, len(data) // 2, random.randrange(len(data) + 1))) if data else 0
    ]


def _behead(random: Random, data: bytes, _: bytes) -> bytes:
    return data[random.choice((1, 2, 8, random.randrange(len(data) + 1))) :]


def _extend(random: Random, data: bytes, _: bytes) -> bytes:
    tail = random.choice(
        (b"\0", b"\n", b"}", b"\xff" * 9, data, random.randbytes(random.choice((1, 100, 5000))), bytes(50000))
    )
    return data + tail if random.random() < 0.7 else tail + data


def _repeat(random: Random, data: bytes, _: bytes) -> bytes:
    start = random.randrange(len(data) + 1)
    piece = data[start : start + random.choice((1, 4, 16, 256))]
    return data[:start] + piece * random.choice((2, 3, 50, 1000)) + data[start:]


def _drop(random: Random, data: bytes, _: bytes) -> bytes:
    start = random.randrange(len(data) + 1)
    return data[:start] + data[start + random.choice((1, 2, 4, 8, 64, 512)) :]


def _zero(random: Random, data: bytes, _: bytes) -> bytes:
    start, count = random.randrange(len(data) + 1), random.choice((1, 4, 16, 512, len(data)))
    piece = data[start : start + count]
    return data[:start] + random.choice((b"\0", b"\xff", b" ")) * len(piece) + data[start + len(piece) :]


def _splice(random: Random, data: bytes, other: bytes) -> bytes:
    a, b = random.randrange(len(data) + 1), random.randrange(len(other) + 1)
    if random.random() < 0.5:
        return data[:a] + other[b:]
    piece = other[b : b + random.choice((4, 32, 512))]
    return data[:a] + piece + data[a + len(piece) :]


def _swap_magic(random: Random, data: bytes, _: bytes) -> bytes:
    magic = random.choice(list(MAGIC.values()))
    return magic + data[len(magic) :] if random.random() < 0.7 else magic + data


def _number(random: Random, data: bytes, _: bytes) -> bytes:
    """An absurd size where a length field may be: little or big endian, 2 to 8 bytes, mostly at the start or at the
    end.
    """
    width, order = random.choice((2, 4, 4, 8, 8)), random.choice("<>")
    number = struct.pack(f"{order}Q", random.choice(SIZES))
    number = number[:width] if order == "<" else number[8 - width :]
    start = random.choice(
        (
            0,
            2,
            4,
            8,
            16,
            20,
            24,
            random.randrange(len(data) + 1),
            max(0, len(data) - random.randrange(1, 80)),
            random.randrange(min(len(data), 200) + 1),
        )
    )
    return data[:start] + number + data[start + width :]


def _number_in_text(random: Random, data: bytes, _: bytes) -> bytes:
    """The same for headers in letters."""
    places = [i for i, byte in enumerate(data[:4096]) if 48 <= byte <= 57]
    if not places:
        return data
    start = random.choice(places)
    end = start
    while end < len(data) and 48 <= data[end] <= 57:
        end += 1
    return (
        data[:start]
        + random.choice(
            (b"-1", b"0", b"99999999999", b"1" * 400, b"1e9", b"NaN", b"", b"18446744073709551616", b"65536", b"0x10")
        )
        + data[end:]
    )


def _shuffle(random: Random, data: bytes, _: bytes) -> bytes:
    size = random.choice((1, 4, 16, 128))
    pieces = [data[i : i + size] for i in range(0, min(len(data), 20000), size)]
    if len(pieces) > 1:
        a, b = random.randrange(len(pieces)), random.randrange(len(pieces))
        pieces[a], pieces[b] = pieces[b], pieces[a]
    return b"".join(pieces) + data[20000:]


def _noise(random: Random, data: bytes, _: bytes) -> bytes:
    return random.randbytes(random.choice((0, 1, 8, 100, 4096)))


_WAYS = {
    "bits flipped": _flip,
    "bytes set": _set,
    "bits of the start flipped": _early_flip,
    "cut short": _truncate,
    "start cut off": _behead,
    "lengthened": _extend,
    "piece repeated": _repeat,
    "piece dropped": _drop,
    "piece blanked": _zero,
    "spliced": _splice,
    "other magic": _swap_magic,
    "absurd number": _number,
    "absurd number in letters": _number_in_text,
    "pieces swapped": _shuffle,
    "noise": _noise,
}

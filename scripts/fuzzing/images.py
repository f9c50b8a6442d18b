"""Good small images of every format that is read, and damage to what their headers claim."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from random import Random

import numpy as np
from PIL import Image

from scripts.fuzzing.bytes_damage import MAGIC, SIZES
from scripts.fuzzing.zip_damage import packed_zeros

FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "TIFF": "tif", "BMP": "bmp", "PPM": "ppm"}
_MODES = {
    "PNG": ("RGB", "L", "P", "RGBA", "LA", "1", "I;16"),
    "JPEG": ("RGB", "L", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("P", "L"),
    "TIFF": ("RGB", "L", "P", "RGBA", "CMYK", "1", "I;16", "F", "I", "LAB"),
    "BMP": ("RGB", "L", "P", "1"),
    "PPM": ("RGB", "L", "1"),
}
_OPTIONS = {
    "TIFF": (
        {},
        {"compression": "tiff_lzw"},
        {"compression": "tiff_deflate"},
        {"compression": "jpeg"},
        {"compression": "packbits"},
        {"big_tiff": True},
    ),
    "JPEG": ({}, {"progressive": True}, {"quality": 5}),
    "WEBP": ({}, {"lossless": True}),
}
_SIDES = (0, 1, 65535, 65536, 30000, 20000, 100000, 2**20, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


def good_images() -> dict[str, bytes]:
    """Whole images by name: every format in every mode and packing."""
    random = np.random.RandomState(0)
    pixels = Image.fromarray(random.randint(0, 256, (12, 17, 3), dtype=np.uint8))
    made = {}
    for form, suffix in FORMATS.items():
        for mode in _MODES[form]:
            for number, options in enumerate(_OPTIONS.get(form, ({},))):
                stream, exif = io.BytesIO(), Image.Exif()
                exif[0x0112] = 1 + number  # orientation
                image = (
                    Image.fromarray(random.randint(0, 65536, (12, 17), dtype=np.uint16))
                    if mode == "I;16"
                    else pixels.convert(mode)
                )
                if options.get("compression") == "jpeg" and mode not in ("RGB", "L"):
                    continue
                try:
                    image.save(
                        stream, form, **options, **({"exif": exif} if form in ("PNG", "JPEG", "WEBP", "TIFF") else {})
                    )
                except (OSError, ValueError, KeyError):  # this mode cannot be packed so
                    continue
                made[f"{mode.replace(';', '-')}-{number}.{suffix}"] = stream.getvalue()
    stream = io.BytesIO()
    pixels.save(stream, "GIF", save_all=True, append_images=[pixels.rotate(90)] * 3)
    made["moving.gif"] = stream.getvalue()
    return made


def damaged_image(random: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """An image whose header asks for much, or a small file of a huge picture."""
    if random.random() < 0.15:
        return _extreme(random)
    for start, change in (
        (MAGIC["PNG"], _png),
        (b"\xff\xd8", _jpeg),
        (b"GIF", _gif),
        (b"II", _tiff),
        (b"MM", _tiff),
        (b"RIFF", _webp),
        (b"BM", _bmp),
        (b"P", _ppm),
    ):
        if data.startswith(start):
            return change(random, data)
    return _extreme(random)


def _side(random: Random) -> int:
    return random.choice(_SIDES)


def _png(random: Random, data: bytes) -> tuple[str, bytes]:
    way = random.choice(("sides", "sides", "depth", "interlaced", "chunk", "chunk", "bomb"))
    changed = bytearray(data)
    if way == "sides":
        changed[16:24] = struct.pack(
            ">II", *random.choice(((_side(random), _side(random)), (_side(random), 12), (17, _side(random))))
        )
    elif way == "depth":
        changed[24:26] = bytes((random.choice((0, 1, 2, 3, 4, 8, 16, 255)), random.choice((0, 1, 2, 3, 4, 5, 6, 7))))
    elif way == "interlaced":
        changed[26:29] = bytes((random.choice((0, 1, 9)), random.choice((0, 1, 9)), random.choice((0, 1, 2))))
    else:
        name = random.choice(
            (
                b"zTXt",
                b"iTXt",
                b"iCCP",
                b"PLTE",
                b"tRNS",
                b"eXIf",
                b"acTL",
                b"fcTL",
                b"fdAT",
                b"IDAT",
                b"IHDR",
                b"IEND",
                b"gAMA",
                b"cHRM",
                b"pHYs",
                b"sRGB",
                b"\0\0\0\0",
            )
        )
        content = {b"zTXt": b"k\0\0", b"iTXt": b"k\0\1\0\0\0", b"iCCP": b"p\0\0"}.get(name, b"")
        if way == "bomb":
            content += _zeros(random.choice((10**5, 10**7, 10**8)))
        else:
            content += random.choice((b"", bytes(8), b"\xff" * 26, random.randbytes(40), b"x" * 3000))
        place = random.choice((33, len(data) - 12))
        changed[place:place] = (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )
    return f"PNG {way}", with_png_checksums(bytes(changed))


def _jpeg(random: Random, data: bytes) -> tuple[str, bytes]:
    place = next((i for i in range(2, len(data) - 9) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC1, 0xC2)), 2)
    changed, way = bytearray(data), random.choice(("sides", "sides", "parts", "segment"))
    if way == "sides":
        changed[place + 5 : place + 9] = struct.pack(">HH", *(min(_side(random), 65535) for _ in range(2)))
    elif way == "parts":
        changed[place + 4 : place + 5] = bytes([random.choice((0, 1, 12, 16))])
        changed[place + 9 : place + 12] = random.randbytes(3)
    else:
        segment = random.choice(
            (
                b"Exif\0\0" + random.randbytes(60),
                b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + random.randbytes(200),
                b"ICC_PROFILE\0\1\1" + random.randbytes(50),
                b"JFIF\0" + random.randbytes(9),
                b"Adobe\0\0\0\0\0\0\2",
                b"MPF\0" + random.randbytes(90),
                b"Photoshop 3.0\0" + b"8BIM" + random.randbytes(90),
            )
        )
        marker = random.choice((0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE, 0xDB, 0xC4))
        changed[2:2] = struct.pack(">BBH", 0xFF, marker, len(segment) + 2) + segment
    return f"JPEG {way}", bytes(changed)


def _gif(random: Random, data: bytes) -> tuple[str, bytes]:
    changed = bytearray(data)
    place = random.choice((6, max(0, data.find(b",", 13) + 5)))  # the screen, or the first picture
    changed[place : place + 4] = struct.pack("<HH", min(_side(random), 65535), min(_side(random), 65535))
    return "GIF sides", bytes(changed)


def _tiff(random: Random, data: bytes) -> tuple[str, bytes]:
    """One entry of the first directory: another type, count or value."""
    order, big = "<" if data[:2] == b"II" else ">", data[2:4] in (b"+\0", b"\0+")
    place = struct.unpack(f"{order}Q", data[8:16])[0] if big else struct.unpack(f"{order}I", data[4:8])[0]
    head, size, wide = (8, 20, "Q") if big else (2, 12, "I")
    if place + head > len(data):
        return "TIFF", data
    count = struct.unpack(f"{order}{'Q' if big else 'H'}", data[place : place + head])[0]
    entry = place + head + size * random.randrange(max(1, min(count, 100)))
    changed, field = bytearray(data), random.choice(("value", "value", "value", "count", "type", "tag", "entries"))
    number = struct.pack(f"{order}{wide}", random.choice(SIZES) % (2**64 if big else 2**32))
    if field == "value":
        changed[entry + size - len(number) : entry + size] = (
            number
            if random.random() < 0.6
            else struct.pack(f"{order}H", min(_side(random), 65535)) + bytes(len(number) - 2)
        )
    elif field == "count":
        changed[entry + 4 : entry + 4 + len(number)] = number
    elif field == "type":
        changed[entry + 2 : entry + 4] = struct.pack(
            f"{order}H", random.choice((0, 1, 2, 3, 4, 5, 7, 11, 12, 13, 16, 99))
        )
    elif field == "tag":
        changed[entry : entry + 2] = struct.pack(
            f"{order}H",
            random.choice(
                (
                    256,
                    257,
                    258,
                    259,
                    262,
                    273,
                    277,
                    278,
                    279,
                    284,
                    317,
                    322,
                    323,
                    324,
                    325,
                    330,
                    338,
                    339,
                    347,
                    700,
                    34665,
                    34675,
                )
            ),
        )
    else:
        changed[place : place + 2] = b"\xff\xff"
    return f"TIFF {field}", bytes(changed[: len(data)])


def _webp(random: Random, data: bytes) -> tuple[str, bytes]:
    changed, way = bytearray(data), random.choice(("size", "chunk size", "canvas", "extended"))
    if way == "size":
        changed[4:8] = struct.pack("<I", random.choice(SIZES) % 2**32)
    elif way == "chunk size":
        changed[16:20] = struct.pack("<I", random.choice(SIZES) % 2**32)
    elif way == "canvas":
        changed[24:30] = struct.pack("<I", _side(random) % 2**24)[:3] + struct.pack("<I", _side(random) % 2**24)[:3]
    else:
        chunk = (
            b"VP8X"
            + struct.pack("<II", 10, random.randrange(256))
            + struct.pack("<I", _side(random) % 2**24)[:3]
            + struct.pack("<I", _side(random) % 2**24)[:3]
        )
        changed[12:12] = chunk
        changed[4:8] = struct.pack("<I", len(changed) - 8)
    return f"WebP {way}", bytes(changed)


def _bmp(random: Random, data: bytes) -> tuple[str, bytes]:
    place = random.choice((2, 10, 14, 18, 22, 26, 28, 30, 34, 46))
    number = random.choice((*(side % 2**32 for side in (*SIZES, *_SIDES)), 2**32 - 12, 1, 3, 4, 16, 24, 32))
    return "BMP field", data[:place] + struct.pack("<I", number) + data[place + 4 :]


def _ppm(random: Random, data: bytes) -> tuple[str, bytes]:
    parts = data.split(b"\n", 3)
    parts[1:2] = [
        random.choice(
            (b"%d %d" % (_side(random), _side(random)), b"-1 -1", b"1" * 4000, b"#" * 9000, b"a b", b"17 12", b"")
        )
    ]
    if random.random() < 0.3:
        parts[0] = random.choice((b"P1", b"P2", b"P3", b"P4", b"P5", b"P7", b"Pf", b"PF", b"P0CMYK", b"Py", b"PyRGBA"))
    if random.random() < 0.3 and len(parts) > 2:
        parts[2] = random.choice((b"0", b"1", b"65535", b"65536", b"-1", b"1e400", b"nan", b"9" * 300))
    return "PPM header", b"\n".join(parts)


def _extreme(random: Random) -> tuple[str, bytes]:
    """A right image of an extreme size, of few bytes."""
    width, height = random.choice(
        (
            (1, 1),
            (1, 100000),
            (100000, 1),
            (1, 1000000),
            (20000, 20000),
            (30000, 3000),
            (60000, 60000),
            (2, 3),
            (1, 65535),
            (65535, 65535),
            (9000, 9000),
        )
    )
    bits = random.choice((1, 1, 8))
    color = random.choice((0, 0, 3)) if bits == 1 else random.choice((0, 2, 4, 6))
    row = 1 + (width * bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color] + 7) // 8
    packed = _zeros(min(row * height, 10**8))  # more is cut short: making it should not take seconds
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, random.choice((0, 0, 0, 1)))),
        *([(b"PLTE", bytes(6))] if color == 3 else []),
        (b"IDAT", packed),
        (b"IEND", b""),
    ]
    made = b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )
    return f"PNG of {width} x {height}", MAGIC["PNG"] + made


@functools.cache
def _zeros(count: int) -> bytes:
    """Zeros, as zlib packs them."""
    return b"\x78\xda" + packed_zeros(count) + struct.pack(">I", (count % 65521 << 16) | 1)  # Adler's sum of zeros


def with_png_checksums(data: bytes) -> bytes:
    """The PNG file with every chunk's checksum made right, as far as its chunks can be followed."""
    out, place = data[:8], 8
    while place + 12 <= len(data):
        length = struct.unpack(">I", data[place : place + 4])[0]
        if place + 12 + length > len(data):
            break
        chunk = data[place + 4 : place + 8 + length]
        out += data[place : place + 4] + chunk + struct.pack(">I", zlib.crc32(chunk))
        place += 12 + length
    return out + data[place:]

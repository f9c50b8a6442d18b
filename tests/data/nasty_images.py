"""A folder of images such as people really have, and what must become of each: right pixels, or left out with the
reason.

    python -m tests.data.nasty_images OUT.png     draws those that are accepted, to be looked at

Every good picture shows four quarters, in colours or grays that are known here as numbers; so truth does not come from
any decoder.
"""

from __future__ import annotations

import io
import os
import socket
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageDraw

Quarters = tuple[tuple[int, int, int], ...]  # top left, top right, bottom left, bottom right
COLOURS: Quarters = ((220, 30, 30), (30, 180, 60), (40, 60, 210), (230, 210, 40))
GRAYS: Quarters = ((230, 230, 230), (160, 160, 160), (90, 90, 90), (20, 20, 20))
BITS: Quarters = ((255, 255, 255), (0, 0, 0), (0, 0, 0), (255, 255, 255))
WIDTH, HEIGHT = 48, 32


class Nasty(NamedTuple):
    """One file and what must become of it."""

    name: str  # below the class folder
    quarters: Quarters | None = None  # of the upright picture; None: left out
    reason: str = ""  # a regular expression for why it is left out
    tolerance: int = 3  # levels that a colour may be off


def scene(quarters: Quarters = COLOURS, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """(height, width, 3) uint8: four quarters."""
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    for place, colour in enumerate(quarters):
        rows = slice(0, height // 2) if place < 2 else slice(height // 2, None)
        pixels[rows, slice(0, width // 2) if place % 2 == 0 else slice(width // 2, None)] = colour
    return pixels


def bytes_of(image: Image.Image, form: str, **more: object) -> bytes:
    """The image as a file of a format."""
    file = io.BytesIO()
    image.save(file, form, **more)
    return file.getvalue()


def png_by_hand(samples: np.ndarray, bits: int, colour_type: int, size: tuple[int, int] | None = None) -> bytes:
    """A PNG whose header says what it is told to; samples are big-endian and (height, width[, channels])."""
    width, height = size or (samples.shape[1], samples.shape[0])
    rows = b"".join(b"\0" + row.tobytes() for row in samples)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# How a camera held in each of the eight ways stores the upright picture (EXIF 2.3, tag 274).
_STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: upright[::-1, ::-1],
    4: np.flipud,
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


def _good() -> list[tuple[Nasty, bytes]]:
    """Files that hold a picture."""
    colour, other = Image.fromarray(scene()), Image.fromarray(scene(COLOURS[::-1]))
    gray = Image.fromarray(scene(GRAYS)).convert("L")
    clear = colour.convert("RGBA")
    clear.putalpha(
        Image.fromarray(np.kron([[0, 255], [128, 255]], np.ones((HEIGHT // 2, WIDTH // 2))).astype(np.uint8))
    )
    jpeg, progressive = bytes_of(colour, "JPEG", quality=95), bytes_of(colour, "JPEG", quality=95, progressive=True)
    last_scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    palette = colour.quantize(8)
    lab = ImageCms.profileToProfile(
        colour, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    deep_gray = np.asarray(gray).astype(">u2") * 257
    made: list[tuple[str, Quarters, int, bytes]] = [
        ("plain.jpg", COLOURS, 12, jpeg),
        ("gray.jpg", GRAYS, 3, bytes_of(gray, "JPEG", quality=95)),
        ("progressive.jpg", COLOURS, 12, progressive),
        ("two thousand scans.jpg", COLOURS, 12, progressive[:-2] + last_scan * 2000 + b"\xff\xd9"),
        ("garbage after the end.jpg", COLOURS, 12, jpeg + bytes(range(256)) * 40),
        ("damaged exif.jpg", COLOURS, 12, bytes_of(colour, "JPEG", quality=95, exif=b"Exif\0\0MM\0\x2a\xff\xff")),
        ("cmyk, adobe inverted.jpg", COLOURS, 12, bytes_of(colour.convert("CMYK"), "JPEG", quality=95)),
        ("cmyk.tif", COLOURS, 3, bytes_of(colour.convert("CMYK"), "TIFF")),
        ("lab.tif", COLOURS, 12, bytes_of(lab, "TIFF")),
        ("one bit.tif", BITS, 0, bytes_of(Image.fromarray(scene(BITS)).convert("1"), "TIFF", compression="group4")),
        ("three pages.tif", COLOURS, 0, bytes_of(colour, "TIFF", save_all=True, append_images=[other, other])),
        ("sixteen bits.tif", GRAYS, 1, bytes_of(Image.fromarray(deep_gray.astype(np.uint16)), "TIFF")),
        ("sixteen bits gray.png", GRAYS, 1, png_by_hand(deep_gray, 16, 0)),
        ("sixteen bits colour.png", COLOURS, 1, png_by_hand(scene().astype(">u2") * 257, 16, 2)),
        (
            "sixteen bits gray and alpha.png",
            GRAYS,
            1,
            png_by_hand(np.stack([deep_gray, deep_gray[::-1]], axis=-1), 16, 4),
        ),
        ("palette, transparent.png", COLOURS, 0, bytes_of(palette, "PNG", transparency=palette.getpixel((0, 0)))),
        ("gray and alpha.png", GRAYS, 0, bytes_of(Image.merge("LA", (gray, clear.getchannel("A"))), "PNG")),
        ("colour and alpha.png", COLOURS, 0, bytes_of(clear, "PNG")),
        ("animated.png", COLOURS, 0, bytes_of(colour, "PNG", save_all=True, append_images=[other])),
        ("animated.gif", COLOURS, 0, bytes_of(colour, "GIF", save_all=True, append_images=[other], duration=100)),
        ("transparent.gif", COLOURS, 0, bytes_of(palette, "GIF", transparency=palette.getpixel((0, 0)))),
        ("animated.webp", COLOURS, 3, bytes_of(colour, "WEBP", save_all=True, append_images=[other], lossless=True)),
        ("lossless with alpha.webp", COLOURS, 0, bytes_of(clear, "WEBP", lossless=True, exact=True)),
        ("lossy.webp", COLOURS, 20, bytes_of(colour, "WEBP")),
        ("plain.bmp", COLOURS, 0, bytes_of(colour, "BMP")),
        ("plain.ppm", COLOURS, 0, bytes_of(colour, "PPM")),
        ("sixteen bits.pgm", GRAYS, 1, b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + deep_gray.tobytes()),
        ("one pixel.png", (COLOURS[0],) * 4, 0, bytes_of(Image.new("RGB", (1, 1), COLOURS[0]), "PNG")),
        ("20000 x 10.png", COLOURS, 3, bytes_of(Image.fromarray(scene(width=20_000, height=10)), "PNG")),
        ("UPPER CASE.PNG", COLOURS, 0, bytes_of(colour, "PNG")),
        ("png by its content.jpg", COLOURS, 0, bytes_of(colour, "PNG")),
        ("jpeg by its content.png", COLOURS, 12, jpeg),
        ("größe 猫 \u202e.png", COLOURS, 0, bytes_of(colour, "PNG")),
        (os.fsdecode(b"latin-1 caf\xe9.png"), COLOURS, 0, bytes_of(colour, "PNG")),
        ("x" * 251 + ".png", COLOURS, 0, bytes_of(colour, "PNG")),
        ("new\nline \x1b[31m.png", COLOURS, 0, bytes_of(colour, "PNG")),
        ("  spaces  .png", COLOURS, 0, bytes_of(colour, "PNG")),
        ("-rf.png", COLOURS, 0, bytes_of(colour, "PNG")),
        ("a folder.jpg/inside.png", COLOURS, 0, bytes_of(colour, "PNG")),
        ("the same.png", COLOURS, 0, bytes_of(colour, "PNG")),
        ("the same again.png", COLOURS, 0, bytes_of(colour, "PNG")),
    ]
    for orientation, stored in _STORED.items():
        exif = Image.Exif()
        exif[274] = orientation
        turned = Image.fromarray(np.ascontiguousarray(stored(scene())))
        made.append((f"exif {orientation}.jpg", COLOURS, 12, bytes_of(turned, "JPEG", quality=95, exif=exif)))
        made.append((f"exif {orientation}.png", COLOURS, 0, bytes_of(turned, "PNG", exif=exif)))
    return [(Nasty(name, quarters, tolerance=tolerance), data) for name, quarters, tolerance, data in made]


def _bad() -> list[tuple[Nasty, bytes]]:
    """Files that hold none, or none that is to be decoded."""
    colour = Image.fromarray(scene())
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8))
    jpeg, png = bytes_of(noise, "JPEG"), bytes_of(noise, "PNG")
    wrong_sum = bytearray(png)
    wrong_sum[len(png) // 2] ^= 255
    floats = bytes_of(Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)), "TIFF")
    whole = bytes_of(Image.fromarray(np.full((8, 8), 7, dtype=np.int32)), "TIFF")
    bits = np.zeros((30_000, 30_000 // 8), dtype=np.uint8)
    made = [
        ("truncated.jpg", "(?i)truncated", jpeg[: len(jpeg) // 2]),
        ("only a header.jpg", "(?i)truncated|cannot identify", jpeg[:300]),
        ("truncated.png", "(?i)truncated|broken", png[: len(png) // 2]),
        ("wrong checksum.png", "(?i)broken|checksum|truncated", bytes(wrong_sum)),
        ("truncated.gif", "(?i)truncated", bytes_of(noise.quantize(200), "GIF")[:2000]),
        ("truncated.webp", "(?i)webp|truncated|cannot identify|decode", bytes_of(noise, "WEBP")[:500]),
        ("truncated.tif", "(?i)truncated", bytes_of(noise, "TIFF")[:5000]),
        ("truncated.bmp", "(?i)truncated", bytes_of(noise, "BMP")[:5000]),
        ("no bytes.jpg", "cannot identify", b""),
        ("zeros.png", "cannot identify", bytes(1000)),
        ("a text.jpg", "cannot identify", b"this is text\n" * 50),
        ("a web page.png", "cannot identify", b"<!DOCTYPE html><html><body>404 not found</body></html>"),
        ("a drawing.png", "cannot identify", b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'/>"),
        ("a program.jpg", "cannot identify", bytes_of(colour, "EPS")),
        ("another format.jpg", "cannot identify", bytes_of(colour, "TGA")),
        ("float.tif", "floating-point pixels have no known white level", floats),
        ("32 bits.tif", "32-bit pixels have no known white level", whole),
        ("bomb.png", "30000 x 30000|900000000 pixels", png_by_hand(bits, 1, 0, (30_000, 30_000))),
        ("claims more.png", "pixels", png_by_hand(bits[:1, :1], 8, 2, (100_000, 100_000))),
        ("claims something.png", "(?i)4000 x 4000 pixels|truncated", png_by_hand(bits[:1, :1], 8, 2, (4000, 4000))),
        ("100000 x 1.png", "too long and thin", bytes_of(Image.new("L", (100_000, 1)), "PNG")),
        ("no height.png", "(?i)cannot identify|invalid|zero", png_by_hand(bits[:1, :1], 8, 0, (5, 0))),
    ]
    return [(Nasty(name, reason=reason), data) for name, reason, data in made]


def make_nasty_folder(folder: Path, elsewhere: Path) -> list[Nasty]:
    """Write the files into `folder`; `elsewhere` is for what links lead to. Returns what must become of each."""
    folder.mkdir(parents=True)
    elsewhere.mkdir(parents=True)
    made = []
    for nasty, data in [*_good(), *_bad()]:
        path = folder / nasty.name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        made.append(nasty)
    (elsewhere / "far.png").write_bytes(bytes_of(Image.fromarray(scene()), "PNG"))
    (folder / "link to a file.png").symlink_to(elsewhere / "far.png")
    os.link(folder / "the same.png", folder / "the same, a hard link.png")
    made += [
        Nasty("link to a file.png", COLOURS, tolerance=0),
        Nasty("the same, a hard link.png", COLOURS, tolerance=0),
    ]
    (folder / "link to nothing.png").symlink_to(elsewhere / "nothing.png")
    (folder / "link to itself.png").symlink_to("link to itself.png")
    (folder / "one.png").symlink_to("two.png")
    (folder / "two.png").symlink_to("one.png")
    (folder / "up.png").symlink_to("..")
    os.mkfifo(folder / "pipe.jpg")
    made += [
        Nasty("link to nothing.png", reason="No such file"),
        *(Nasty(name, reason="(?i)too many levels") for name in ("link to itself.png", "one.png", "two.png")),
        Nasty("up.png/", reason="a link to a folder, which is not followed"),
        Nasty("pipe.jpg", reason="a pipe, socket or device"),
    ]
    here = os.getcwd()
    os.chdir(folder)  # a socket's address may have a hundred letters
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("socket.png")
    os.chdir(here)
    made.append(Nasty("socket.png", reason="a pipe, socket or device"))
    locked = folder / "locked.png"
    locked.write_bytes(bytes_of(Image.fromarray(scene()), "PNG"))
    locked.chmod(0)
    # Root may
    made.append(
        Nasty("locked.png", COLOURS, tolerance=0)
        if os.access(locked, os.R_OK)
        else Nasty("locked.png", reason="(?i)permission denied")
    )
    return made


def quarters_of(pixels: np.ndarray) -> np.ndarray:
    """(4, 3) int: the colours in the middle of the quarters of a picture (height, width, 3)."""
    height, width, _ = pixels.shape
    return np.array([pixels[height * y // 4, width * x // 4] for y in (1, 3) for x in (1, 3)], dtype=int)


def contact_sheet(out: Path) -> None:
    """Draw all accepted images as the source decodes them, with their names."""
    from star_fast.config import DataConfig
    from star_fast.data.sources import ImageFolder
    from star_fast.data.views import make_views

    with tempfile.TemporaryDirectory() as scratch:
        made = make_nasty_folder(Path(scratch, "images", "all"), Path(scratch, "elsewhere"))
        source = ImageFolder(Path(scratch, "images"))
        good = [nasty.name for nasty in made if nasty.quarters]
        sheet = Image.new("RGB", (10 * 130, -(-len(good) // 10) * 125), "white")
        draw = ImageDraw.Draw(sheet)
        for place, name in enumerate(good):
            image = source[source.files.index(f"all/{name}")].image
            view = make_views(image, 0, DataConfig(views="small-affine"), 80, 3, only=0).transpose(1, 2, 0)
            x, y = place % 10 * 130 + 17, place // 10 * 125 + 5
            sheet.paste(Image.fromarray(view), (x + 8, y + 8))
            draw.text((x - 12, y + 100), ascii(name)[1:-1][:20], fill="black")
        sheet.save(out)


if __name__ == "__main__":
    contact_sheet(Path(sys.argv[1]))

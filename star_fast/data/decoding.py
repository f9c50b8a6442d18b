"""One image file to pixels: upright, 8 bits a channel, or the reason why not. What a file asks for is held against its
own size before it is decoded.

EXIF rotation is applied. 16-bit gray (and 12-bit TIFF) is scaled by its white level, so that 65535 becomes 255; whole
numbers and floats without a known white level are refused. Palette, CMYK, Lab and 1-bit images stay what they are:
`make_views` converts them, and drops transparency as LlamaGen does.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from star_fast.errors import UserError
from star_fast.storage import require_regular

# The formats of the suffixes that sources take. Pillow knows many more, and one of them (EPS) starts another program to
# draw its file.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
MOST_PIXELS = 178_956_970  # of any image: Pillow's own limit
FREE_PIXELS = 12_000_000  # of an image however small its file; WebP decodes them in 200 MB
PIXELS_A_BYTE = 128  # beyond that; photographs have 1 to 50
_USUAL_SCANS = 10  # of a progressive JPEG; each is work on all its pixels
_BLOCK_VALUES = 2**20  # scaled to 8 bits at once
_ORIENTATION, _BITS, _PHOTOMETRIC = 274, 258, 262  # tags of EXIF and TIFF
_FILE_OBJECT = re.compile(r" ?<_io\.\w+ .*>", re.DOTALL)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class RefusedImage(UserError, ValueError):
    """An image that is not decoded or not cut into views; the message says why."""


def read_image(path: str | Path) -> Image.Image:
    """The first image in a file, decoded, upright, 8 bits a channel.

    Raises:
        RefusedImage: it asks for more than its bytes can be meant for, or its numbers have no known white level.
            StorageError: no ordinary file.
        MemoryError: the machine cannot hold its pixels. On damaged files Pillow raises exceptions of a dozen other
            types.
    """
    size = require_regular(path, "expected an image file")
    with open(path, "rb") as file:
        return _decode(file, size)


def decode_image(data: bytes) -> Image.Image:
    """`read_image` of a file whose bytes these are."""
    return _decode(io.BytesIO(data), len(data))


def open_image(data: bytes) -> Image.Image:
    """The image in the bytes of a file, its header read and held against their number, nothing decoded: for decoders
    other than Pillow's.
    """
    return _open(io.BytesIO(data), len(data))


def is_upright(opened: Image.Image) -> bool:
    """Whether `upright` would leave an image as it is."""
    return _orientation(opened) not in _UPRIGHT


def upright(pixels: Image.Image, opened: Image.Image) -> Image.Image:
    """`pixels`, decoded from the file that was `opened`, turned as its EXIF data say."""
    turn = _UPRIGHT.get(_orientation(opened))
    return pixels if turn is None else pixels.transpose(turn)


def reason_of(error: Exception) -> str:
    """Why an image was refused, in one line that is the same in every run: Pillow names an open file by its address in
    memory.
    """
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return kind + " ".join(_FILE_OBJECT.sub("", str(error)).split())


def _open(file: BinaryIO, size: int) -> Image.Image:
    image = Image.open(file, formats=FORMATS)
    _require_modest(image, file, size)
    return image


def _decode(file: BinaryIO, size: int) -> Image.Image:
    with _open(file, size) as image:
        white = _white_level(image)
        try:
            image.load()
        except MemoryError as error:
            # Raises MemoryError too where the machine, not the file, is to blame
            np.empty(12 * image.width * image.height, dtype=np.uint8)
            raise RefusedImage("its decoder asks for far more memory than its pixels take") from error
        return upright(image if white is None else _scaled(image, white), image)


def in_channels(image: Image.Image, channels: int) -> Image.Image:
    """The image as gray (channels 1) or RGB (channels 3), 8 bits a channel; transparency is
    dropped, as LlamaGen does.
    """
    image, mode = eight_bit(image), {1: "L", 3: "RGB"}[channels]
    if image.mode == "LAB":  # Pillow knows the way to RGB alone
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def eight_bit(image: Image.Image) -> Image.Image:
    """The image with 8 bits a channel: 16-bit gray scaled by its white level, others as they are. Raises RefusedImage
    where no white level is known.
    """
    white = _white_level(image)
    return image if white is None else _scaled(image, white)


def _require_modest(image: Image.Image, file: BinaryIO, size: int) -> None:
    """Refuse an opened, not yet decoded image that would take memory or time out of all proportion to its file."""
    pixels = image.width * image.height
    shape = f"{image.width} x {image.height} pixels"
    if pixels > MOST_PIXELS:
        raise RefusedImage(f"{shape}: more than {MOST_PIXELS:,}")
    most = FREE_PIXELS + PIXELS_A_BYTE * size
    if pixels > most:
        raise RefusedImage(f"{shape} from a file of {size:,} bytes; at most {most:,} are taken for meant")
    if image.info.get("progressive") and pixels * (scans := _jpeg_scans(file)) > _USUAL_SCANS * most:
        raise RefusedImage(f"{shape} drawn {scans} times over by a file of {size:,} bytes")


def _jpeg_scans(file: BinaryIO) -> int:
    count, last, place = 0, b"", file.tell()
    file.seek(0)
    while block := file.read(2**20):
        count += (last + block).count(b"\xff\xda")
        last = block[-1:]
    file.seek(place)
    return count


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 (upright) where the EXIF data are damaged: the picture need not be."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # as many kinds as damaged images
        return 1
    return value if isinstance(value, int) else 1


def _white_level(image: Image.Image) -> int | None:
    """The number that means white in an image of more than 8 bits, negative where it means black; None for 8 bits and
    fewer.
    """
    if image.mode == "F":
        raise RefusedImage("floating-point pixels have no known white level; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return None
    bits = 16
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]  # which TIFF images alone have
        bits = tags.get(_BITS, (16,))[0]
        if image.mode.startswith("I;16") and 8 < bits <= 16:
            return (2**bits - 1) * (-1 if tags.get(_PHOTOMETRIC) == 0 else 1)
    elif image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):  # older Pillow reads 16-bit PNG as 'I'
        return 2**bits - 1
    raise RefusedImage("signed or 32-bit pixels have no known white level; save it with 8 or 16 bits")


def _scaled(image: Image.Image, white: int) -> Image.Image:
    values = np.asarray(image)
    level = np.arange(abs(white) + 1)
    table = ((level * 255 + abs(white) // 2) // abs(white)).astype(np.uint8)
    if white < 0:
        table = table[::-1]
    made = np.empty(values.shape, dtype=np.uint8)
    rows = max(1, _BLOCK_VALUES // values.shape[1])
    for start in range(0, len(values), rows):
        made[start : start + rows] = table[np.clip(values[start : start + rows], 0, abs(white))]
    return Image.fromarray(made)

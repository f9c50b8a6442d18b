"""data.decoding: right pixels whatever the file's depth, palette and orientation; nothing is decoded that asks for more
than it can be meant for.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from star_fast.config import DataConfig
from star_fast.data import decoding
from star_fast.data.decoding import RefusedImage, decode_image, eight_bit, is_upright, open_image, read_image, reason_of
from star_fast.data.views import make_views
from star_fast.storage import StorageError
from tests.data.pictures import picture

DEEP = (np.arange(24, dtype=np.uint32).reshape(4, 6) * 65535 // 23).astype(np.uint16)  # 0 ... 65535
SCALED = (DEEP.astype(np.float64) / 257).round().astype(np.uint8)  # 255 * value / 65535


def tiff(
    values: np.ndarray,
    bits: int,
    *,
    big_endian: bool = False,
    photometric: int = 1,
    sample_format: int = 1,
    data: bytes | None = None,
) -> bytes:
    """An uncompressed gray TIFF, by hand: Pillow does not write these kinds."""
    end = ">" if big_endian else "<"
    height, width = values.shape
    data = values.astype(f"{end}u{bits // 8}").tobytes() if data is None else data
    tags = [
        (256, 3, width),
        (257, 3, height),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8),
        (277, 3, 1),
        (278, 3, height),
        (279, 4, len(data)),
        (339, 3, sample_format),
    ]
    directory = struct.pack(end + "H", len(tags))
    for tag, kind, value in tags:
        directory += struct.pack(end + "HHI", tag, kind, 1) + (
            struct.pack(end + "HH", value, 0) if kind == 3 else struct.pack(end + "I", value)
        )
    return (b"MM\0*" if big_endian else b"II*\0") + struct.pack(end + "I", 8 + len(data)) + data + directory + b"\0" * 4


def png(width: int, height: int, depth: int = 8, colour: int = 0) -> bytes:
    """A PNG of zeros, whatever its size."""
    channels = {0: 1, 2: 3, 6: 4}[colour]
    packer = zlib.compressobj(9)
    row = b"\0" * (1 + (width * depth * channels + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)),
        (b"IDAT", data),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(tmp_path: Path, data: bytes, name: str = "x.png") -> Image.Image:
    (tmp_path / name).write_bytes(data)
    return read_image(tmp_path / name)


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.fromarray(DEEP), "PNG"),
        saved(Image.fromarray(DEEP), "TIFF"),
        saved(Image.fromarray(DEEP), "PPM"),
        tiff(DEEP, 16, big_endian=True),
        tiff(65535 - DEEP, 16, photometric=0),
    ],
    ids=["png", "tiff", "pgm", "tiff big-endian", "tiff white is zero"],
)
def test_16_bits_become_8_by_their_white_level(tmp_path: Path, data: bytes) -> None:
    image = read(tmp_path, data)
    assert image.mode == "L" and np.array_equal(np.asarray(image), SCALED)
    assert SCALED[-1, -1] == 255 and SCALED[0, 0] == 0 and len(np.unique(SCALED)) == 24
    # Not read by us: right all the same
    views = make_views(Image.open(tmp_path / "x.png"), 0, DataConfig(views="small-affine", affine_views=1), 4, 1)
    assert np.array_equal(views[0], make_views(image, 0, DataConfig(views="small-affine", affine_views=1), 4, 1)[0])


def test_12_bits_are_white_at_4095(tmp_path: Path) -> None:
    values = np.array([[0, 4095], [2048, 16]])
    packed = b"".join(struct.pack(">I", (int(a) << 20) | (int(b) << 8))[:3] for a, b in values)
    assert np.asarray(read(tmp_path, tiff(values, 12, data=packed))).tolist() == [[0, 255], [128, 1]]


def test_numbers_without_a_white_level_are_refused(tmp_path: Path) -> None:
    for data in (
        saved(Image.fromarray(DEEP.astype(np.int32)), "TIFF"),
        tiff(DEEP, 16, sample_format=2),
        tiff(DEEP, 32),
    ):
        with pytest.raises(RefusedImage, match="signed or 32-bit pixels have no known white level"):
            read(tmp_path, data)
    with pytest.raises(RefusedImage, match="floating-point pixels"):
        read(tmp_path, saved(Image.fromarray(DEEP.astype(np.float32)), "TIFF"))
    with pytest.raises(RefusedImage):
        eight_bit(Image.new("I", (3, 3)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_exif_rotation_is_applied(tmp_path: Path, kind: str, orientation: int) -> None:
    upright = picture(11, 7, 3)
    turned = upright
    for number, undo in decoding._UPRIGHT.items():
        if number == orientation:  # how the camera stored it: turning by `undo` gives it back
            back = {
                Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
                Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
            }
            turned = upright.transpose(back.get(undo, undo))
    exif = Image.Exif()
    exif[274] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    found = np.asarray(read(tmp_path, saved(turned, kind, exif=exif, **options))).astype(int)
    assert found.shape == (7, 11, 3) and np.abs(found - np.asarray(upright)).max() <= (4 if kind == "JPEG" else 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_cost_the_picture(tmp_path: Path) -> None:
    for exif in (
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0garbage",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x01\0\0\0\0",
    ):
        image = read(tmp_path, saved(picture(11, 7, 3), "PNG", exif=exif))
        assert np.array_equal(np.asarray(image), np.asarray(picture(11, 7, 3)))


def test_other_modes(tmp_path: Path) -> None:
    data = DataConfig(views="small-affine", affine_views=1)
    gray, colour = picture(9, 9, 1, "L"), picture(9, 9, 1)
    palette = colour.quantize(8)
    expected = np.asarray(palette.convert("RGB"))
    for image in (
        read(tmp_path, saved(palette, "PNG", transparency=2)),
        read(tmp_path, saved(palette, "GIF", transparency=2)),
    ):
        # Transparency is dropped, colours stay
        assert np.array_equal(make_views(image, 0, data, 9, 3)[0].transpose(1, 2, 0), expected)
    alpha = gray.copy()
    alpha.putalpha(picture(9, 9, 2, "L"))
    assert alpha.mode == "LA" and np.array_equal(
        make_views(read(tmp_path, saved(alpha, "PNG")), 0, data, 9, 1)[0, 0], np.asarray(gray)
    )
    black_and_white = gray.convert("1")
    assert set(make_views(read(tmp_path, saved(black_and_white, "PNG")), 0, data, 9, 1).ravel().tolist()) == {0, 255}
    cmyk = make_views(read(tmp_path, saved(colour.convert("CMYK"), "TIFF")), 0, data, 9, 3)[0].transpose(1, 2, 0)
    assert np.abs(cmyk.astype(int) - np.asarray(colour)).max() <= 1
    lab = Image.new("LAB", (9, 9), (255, 128, 128))
    assert (
        make_views(read(tmp_path, saved(lab, "TIFF")), 0, data, 9, 1).min() > 250
        and make_views(lab, 0, data, 9, 3).min() > 250
    )


@pytest.fixture
def undecodable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding would be noticed."""

    def load(image: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)


@pytest.mark.usefixtures("undecodable")
def test_what_a_header_asks_for_is_held_against_the_files_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = png(6000, 6000, depth=1)
    assert len(whole) < 40_000
    with pytest.raises(RefusedImage, match=rf"6000 x 6000 pixels from a file of {len(whole):,} bytes; at most"):
        read(tmp_path, whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # Pillow's own limit, which is ours too
    huge = png(8, 8).replace(struct.pack(">II", 8, 8), struct.pack(">II", 13400, 13400))
    with pytest.raises(RefusedImage, match=r"13400 x 13400 pixels: more than 178,956,970"):
        read(tmp_path, huge[:29] + struct.pack(">I", zlib.crc32(huge[12:29])) + huge[33:])
    with pytest.raises(AssertionError, match="decoded"):  # a photograph's share of pixels a byte
        read(tmp_path, png(3400, 3400, depth=1))
    # 36 million pixels in as many bytes as a photograph would take
    with pytest.raises(AssertionError, match="decoded"):
        read(tmp_path, whole + b"\0" * 5_000_000)


@pytest.mark.usefixtures("undecodable")
def test_a_progressive_jpeg_cannot_be_drawn_a_thousand_times(tmp_path: Path) -> None:
    whole = saved(Image.new("L", (3000, 3000)), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    with pytest.raises(AssertionError, match="decoded"):
        read(tmp_path, whole)
    with pytest.raises(RefusedImage, match=r"3000 x 3000 pixels drawn 10\d\d times over"):
        read(tmp_path, whole[:-2] + whole[last:-2] * 1000 + whole[-2:])


def test_bytes_are_read_as_a_file_is(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[274] = 6
    files = {
        "deep": saved(Image.fromarray(DEEP), "PNG"),
        "turned": saved(picture(11, 7, 3), "JPEG", exif=turned),
        "ppm": saved(picture(9, 9, 0), "PPM"),
    }
    for name, data in files.items():
        image = read(tmp_path, data, name)
        assert np.array_equal(np.asarray(decode_image(data)), np.asarray(image))
        assert is_upright(open_image(data)) == (name != "turned")
    with pytest.raises(RefusedImage, match="6000 x 6000 pixels from a file of"):
        decode_image(png(6000, 6000, depth=1))
    with pytest.raises(RefusedImage, match="6000 x 6000 pixels from a file of"):
        open_image(png(6000, 6000, depth=1))


def test_a_reason_is_the_same_in_every_run(tmp_path: Path) -> None:
    for data in (b"", b"no image", saved(picture(50, 50, 0), "JPEG")[:-200], png(6000, 6000, depth=1)):
        reasons = set()
        for decode in (decode_image, lambda data: read(tmp_path, data)):
            with pytest.raises(Exception, match=r".") as refused:
                decode(data)
            reasons.add(reason_of(refused.value))
        assert len(reasons) == 1 and "0x" not in next(iter(reasons)) and str(tmp_path) not in next(iter(reasons))


def test_only_ordinary_files_of_the_known_kinds(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(StorageError, match="found a pipe"):
        read_image(tmp_path / "pipe.png")
    with pytest.raises(Image.UnidentifiedImageError):  # Pillow would start Ghostscript
        read(tmp_path, saved(picture(9, 9, 0), "EPS"))


def test_too_little_memory_is_not_the_files_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(image: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    # So few pixels fit: the file is to blame
    with pytest.raises(RefusedImage, match="far more memory than its pixels"):
        read(tmp_path, png(9, 9))

    def empty(size: int, dtype: type) -> np.ndarray:
        raise MemoryError

    monkeypatch.setattr(decoding.np, "empty", empty)
    with pytest.raises(MemoryError):
        read(tmp_path, png(9, 9))

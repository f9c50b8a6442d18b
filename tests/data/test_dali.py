"""data.dali on the CPU: the same bits as Pillow's path and the same refusals, whatever the file, its neighbours and the
batch.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from star_fast.config import ConfigError
from star_fast.data.augment import Augmentation, augment, crop_box
from star_fast.data.decoding import decode_image, reason_of
from star_fast.data.views import make_squares
from star_fast.errors import UserError
from tests.data.pictures import picture

pytest.importorskip("nvidia.dali", reason="DALI is not installed (pip install 'star_fast[data]')")

from star_fast.data import dali
from star_fast.data.dali import DaliAugment, DaliSquares, Refused
from star_fast.data.dali_pipelines import ENCODED, crops_pipeline, square_shape, squares_pipeline

SIZES = (35, 33)


def saved(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def speckled(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A smooth picture with hard edges and noise: what codecs and filters differ on most."""
    pixels = np.asarray(picture(width, height, seed)).astype(int)
    random = np.random.RandomState(seed)
    pixels += random.randint(-20, 21, pixels.shape)
    for _ in range(4):
        x, y = random.randint(width), random.randint(height)
        pixels[y : y + 9, x : x + 9] = 255 * random.randint(0, 2, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def relabelled(data: bytes) -> bytes:
    """A YCbCr JPEG whose components call themselves R, G and B and that says nothing else: decoders take it for RGB, or
    do not.
    """
    data = bytearray(data)
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    for number, name in enumerate(b"RGB"):
        data[frame + 10 + 3 * number] = data[scan + 5 + 2 * number] = name
    del data[2 : 2 + 2 + int.from_bytes(data[4:6], "big")]  # the JFIF segment
    return bytes(data)


BY_DALI = {
    **{
        f"4:{kind}": saved(speckled(61, 47), quality=90, subsampling=number)
        for number, kind in enumerate(("4:4", "2:2", "2:0"))
    },
    "gray": saved(speckled(60, 50, mode="L")),
    "progressive": saved(speckled(50, 66), progressive=True),
    "optimized": saved(speckled(50, 60), optimize=True),
    "restarts": saved(speckled(55, 60), restart_marker_blocks=3),
    "quality 5": saved(speckled(55, 60), quality=5),
    "enlarged": saved(speckled(20, 17)),
    "halved": saved(speckled(170, 150)),
    "halved for the smaller size alone": saved(speckled(90, 68)),
    "1 x 1": saved(speckled(1, 1)),
    "tall": saved(speckled(40, 100)),
    "wide": saved(speckled(100, 40)),
    "profile": saved(speckled(50, 60), icc_profile=b"\0" * 500),
    "Adobe's": saved(speckled(50, 60).convert("YCbCr")),
    "appended": saved(speckled(50, 60)) + b"more",
    **{f"EXIF {number}": saved(speckled(50, 40), exif=turned(number)) for number in range(1, 9)},
}
BY_PILLOW = {
    "PNG": saved(speckled(50, 60), "PNG"),
    "palette": saved(speckled(50, 60).quantize(16), "PNG", transparency=1),
    "WebP": saved(speckled(50, 60), "WEBP"),
    "alpha": saved(speckled(50, 60, mode="RGBA"), "PNG"),
    "1 bit": saved(speckled(50, 60, mode="1"), "PNG"),
    "GIF": saved(speckled(50, 60), "GIF"),
    "16 bits": saved(Image.fromarray((np.arange(3000).reshape(50, 60) * 21).astype(np.uint16)), "PNG"),
    "BMP": saved(speckled(50, 60), "BMP"),
    "turned PNG": saved(speckled(50, 40), "PNG", exif=turned(6)),
    "TIFF": saved(speckled(50, 60), "TIFF"),
    "CMYK": saved(speckled(50, 60, mode="CMYK")),
    "LAB": saved(Image.new("LAB", (50, 60), (200, 128, 90)), "TIFF"),
    "components R, G, B": relabelled(saved(speckled(50, 60))),
}
REFUSED = {
    "empty": b"",
    "text": b"no image at all",
    "cut off": saved(speckled(50, 60))[:-300],
    "too thin": saved(Image.new("L", (60_000, 1)), "PNG"),
}
ALL = BY_DALI | BY_PILLOW | REFUSED


def by_pillow(make: Callable[[Image.Image], list[np.ndarray]], data: bytes) -> list[np.ndarray] | Refused:
    """What is right: the plain path, image by image."""
    try:
        return make(decode_image(data))
    except Exception as error:
        return Refused(reason_of(error))


def same(found: object, expected: object) -> bool:
    if isinstance(expected, Refused) or isinstance(found, Refused):
        return found == expected
    return len(found) == len(expected) and all(
        np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_file_gives_pillows_bits(channels: int) -> None:
    squares = DaliSquares(SIZES, channels)
    expected = {name: by_pillow(lambda image: make_squares(image, SIZES, channels), data) for name, data in ALL.items()}
    found = dict(zip(ALL, squares(list(ALL.values())), strict=True))
    assert [name for name in ALL if not same(found[name], expected[name])] == []
    assert [name for name in ALL if isinstance(found[name], Refused)] == list(REFUSED)
    assert squares.counts == {"dali": len(BY_DALI), "pillow": len(BY_PILLOW), "refused": len(REFUSED)}
    assert found["4:2:0"][0].shape == (channels, 35, 35) and found["4:2:0"][1].std() > 20


def damaged(count: int) -> list[bytes]:
    """Whole JPEGs with bytes changed, bits flipped, a piece left out or there twice, another header, or the end cut
    off.
    """
    wholes = [BY_DALI[name] for name in ("4:4:4", "4:2:0", "gray", "progressive", "restarts", "optimized")]
    random, made = np.random.RandomState(0), []
    for number in range(count):
        data = bytearray(wholes[number % len(wholes)])
        place = random.randint(2, len(data) - 2)
        match number // len(wholes) % 6:
            case 0:
                del data[place:]
            case 1:
                data[place] ^= 1 << random.randint(8)
            case 2:
                for where in random.randint(2, len(data), 3):
                    data[where] = random.randint(256)
            case 3:
                del data[place : place + random.randint(1, 100)]
            case 4:
                data[place:place] = data[random.randint(2, place + 1) : place]
            case 5:
                frame = next(at for at in range(len(data)) if data[at : at + 2] in (b"\xff\xc0", b"\xff\xc2"))
                data[frame + random.choice([1, 5, 6, 7, 8, 11, 14, 17])] = random.choice(
                    [0x11, 0x12, 0x21, 0x41, 0xC1, 0xC2, 0xC9, 60, 200]
                )
        made.append(bytes(data))
    return made


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_refused_or_shown_as_by_pillow() -> None:
    files = damaged(720)
    expected = [by_pillow(lambda image: make_squares(image, SIZES, 3), data) for data in files]
    squares = DaliSquares(SIZES, 3, batch_images=32)
    found = squares(files)
    assert [place for place in range(len(files)) if not same(found[place], expected[place])] == []
    refused = sum(isinstance(views, Refused) for views in expected)
    assert squares.counts["refused"] == refused and 150 < refused < 400
    assert squares.counts["dali"] > 200  # damage that both decoders overlook, alike


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    files = [*BY_DALI.values(), *REFUSED.values(), *damaged(24)]
    order = np.random.RandomState(1).permutation(len(files))
    together = DaliSquares(SIZES, 3)(files)
    one_by_one = DaliSquares(SIZES, 3, batch_images=1, threads=1)
    shuffled = DaliSquares(SIZES, 3, batch_images=7, threads=3)([files[place] for place in order])
    for place, data in enumerate(files):
        assert same(one_by_one([data])[0], together[place]), place
        assert same(shuffled[list(order).index(place)], together[place]), place


def test_augmentation_is_that_of_pillow() -> None:
    settings = Augmentation(area=(0.2, 1.0))
    views = DaliAugment(settings, 2, 32, 3, seed=5, batch_images=4)
    files, indices = list(ALL.values()), [1000 + 7 * number for number in range(len(ALL))]
    first = views(files, indices, epoch=3)
    for data, index, found in zip(files, indices, first, strict=True):
        assert same(found, by_pillow(lambda image, index=index: augment(image, settings, 2, 32, 3, 5, 3, index), data))
    again = views(files[::-1], indices[::-1], epoch=3)
    assert all(same(a, b) for a, b in zip(first, again[::-1], strict=True))
    whole = [place for place, found in enumerate(first) if not isinstance(found, Refused)]
    other = views(files, indices, epoch=4)
    assert sum(same(first[place], other[place]) for place in whole) <= 3  # those of one colour stay what they are


def levels(found: np.ndarray, expected: np.ndarray) -> tuple[int, float]:
    """The largest difference, and the share of values that differ by more than one level."""
    difference = np.abs(found.astype(int) - expected.astype(int))
    return int(difference.max()), float((difference > 1).mean())


@pytest.mark.parametrize("channels", [1, 3])
def test_the_graph_for_a_gpu_run_on_the_cpu(channels: int) -> None:
    shapes = [(61, 47), (47, 61), (64, 64), (65, 36), (35, 60), (40, 39)]
    files = [saved(speckled(width, height, seed), quality=92) for seed, (width, height) in enumerate(shapes)]
    pipeline = squares_pipeline(SIZES, channels, "cpu", len(files), 1)
    pipeline.feed_input(ENCODED, [np.frombuffer(data, dtype=np.uint8) for data in files])
    for number, size in enumerate(SIZES):
        pipeline.feed_input(f"shape {number}", [square_shape(*shape, size) for shape in shapes])
    for number, output in enumerate(pipeline.run()):
        expected = np.stack([make_squares(decode_image(data), SIZES, channels)[number] for data in files]).transpose(
            0, 2, 3, 1
        )
        largest, share = levels(output.as_array(), expected)
        assert largest <= 3 and share < 1e-3


def test_the_crop_graph_for_a_gpu_run_on_the_cpu() -> None:
    settings, shapes = Augmentation(area=(0.3, 1.0)), [(60 + 5 * seed, 70 - 3 * seed) for seed in range(6)]
    files = [saved(speckled(*shape, seed), quality=92) for seed, shape in enumerate(shapes)]
    crops = [[crop_box(settings, 5, 0, index, view, *shape) for index, shape in enumerate(shapes)] for view in range(2)]
    assert {crop.mirrored for crop in crops[0] + crops[1]} == {True, False}
    pipeline = crops_pipeline(2, 32, 3, "cpu", len(files), 1)
    pipeline.feed_input(ENCODED, [np.frombuffer(data, dtype=np.uint8) for data in files])
    for view in range(2):
        pipeline.feed_input(f"crop {view}", [np.array(crop, dtype=np.float32) for crop in crops[view]])
    expected = np.stack(
        [augment(decode_image(data), settings, 2, 32, 3, 5, 0, index) for index, data in enumerate(files)]
    )
    for view, output in enumerate(pipeline.run()):
        largest, share = levels(output.as_array(), expected[:, view].transpose(0, 2, 3, 1))
        assert largest <= 9 and share < 2e-3


@pytest.fixture
def gpu_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the path for a GPU but its device: the graphs run on the CPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr("torch.Tensor.cuda", lambda tensor: tensor)
    monkeypatch.setattr(
        dali, "squares_pipeline", lambda sizes, channels, device, *rest: squares_pipeline(sizes, channels, "cpu", *rest)
    )
    monkeypatch.setattr(
        dali,
        "crops_pipeline",
        lambda views, size, channels, device, *rest: crops_pipeline(views, size, channels, "cpu", *rest),
    )


def compare(found: list[object], expected: list[object], most: int) -> None:
    for views, exact in zip(found, expected, strict=True):
        assert isinstance(views, Refused) == isinstance(exact, Refused)
        if isinstance(exact, Refused):
            assert views == exact
            continue
        for view, right in zip(views, exact, strict=True):
            assert isinstance(view, torch.Tensor) and view.is_contiguous() and tuple(view.shape) == right.shape
            assert levels(view.numpy(), right)[0] <= most


@pytest.mark.usefixtures("gpu_on_the_cpu")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("channels", [1, 3])
def test_who_decodes_what_for_a_gpu(channels: int) -> None:
    files = [*ALL.values(), *damaged(48)]
    for_gpu, plain = DaliSquares(SIZES, channels, device="mixed", batch_images=5), DaliSquares(SIZES, channels)
    first = for_gpu(list(ALL.values()))
    to_pillow = ["halved", "halved for the smaller size alone", "tall", *(f"EXIF {number}" for number in range(2, 9))]
    assert for_gpu.counts == {
        "dali": len(BY_DALI) - len(to_pillow),
        "pillow": len(BY_PILLOW) + len(to_pillow),
        "refused": len(REFUSED),
    }
    compare(for_gpu(files), plain(files), most=6)  # small images that are enlarged the most
    names = list(ALL)
    for name in [*to_pillow, *BY_PILLOW]:
        assert all(
            np.array_equal(a, b) for a, b in zip(first[names.index(name)], plain([ALL[name]])[0], strict=True)
        ), name


@pytest.mark.usefixtures("gpu_on_the_cpu")
def test_augmentation_for_a_gpu() -> None:
    files, indices = list(ALL.values()), range(100, 100 + len(ALL))
    for_gpu, plain = (
        DaliAugment(Augmentation(area=(0.3, 1.0)), 2, 32, 3, seed=5, device=device, batch_images=5)
        for device in ("mixed", "cpu")
    )
    compare(for_gpu(files, indices, 2), plain(files, indices, 2), most=12)
    assert for_gpu.counts["dali"] == plain.counts["dali"] - 7 > 10  # turned by EXIF


def test_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="channels: expected 1"):
        DaliSquares(SIZES, 2)
    with pytest.raises(ConfigError, match="device: expected 'cpu' or 'mixed', got 'gpu'"):
        DaliSquares(SIZES, 3, device="gpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="'mixed' decodes on a GPU, and none was found"):
        DaliSquares(SIZES, 3, device="mixed")
    with monkeypatch.context() as broken:
        broken.setattr(
            dali, "decode_pipeline", lambda *_: SimpleNamespace(feed_input=lambda *_: None, run=lambda: 1 / 0)
        )
        with pytest.raises(ZeroDivisionError):  # not an answer of DALI's: nothing is hidden
            DaliSquares(SIZES, 3)

        def refuse() -> None:
            raise RuntimeError("no codec")

        broken.setattr(dali, "decode_pipeline", lambda *_: SimpleNamespace(feed_input=lambda *_: None, run=refuse))
        with pytest.raises(UserError, match=r"DALI does not work here \(device 'cpu'\): it refuses a sound JPEG"):
            DaliSquares(SIZES, 3)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, package=None: None if name == "nvidia.dali" else find(name, package)
    )
    with pytest.raises(UserError, match=r"DALI is not installed; install it with pip install 'star_fast\[data\]'"):
        DaliSquares(SIZES, 3)

"""Mistakes that are easily made in the way from images to codes and that nothing else would show: each would give other
codes, or take one job for another.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from star_fast.config import DataConfig
from star_fast.data.llamagen_codes import import_llamagen_codes
from star_fast.data.prepare import collect_views, prepare
from star_fast.data.sources import BuiltinDigits, DataError, ImageFolder
from star_fast.data.store_writer import StoreWriter
from star_fast.data.views import affine_parameters, make_views, small_affine
from star_fast.storage import StorageError
from tests.data.pictures import TINY, make_folder, picture, tiny_tokenizer
from tests.data.test_prepare import write_llamagen
from tests.disk_events import watch_disk

AFFINE = DataConfig(views="small-affine", affine_views=3, held_out_share=0.25)
TEN_CROP = DataConfig(views="ten-crop", crop_ranges=(1.3,), held_out_share=0.25)


def run(folder: Path, out: Path, data: DataConfig, **more: Any) -> Any:
    return prepare(
        ImageFolder(folder), out, tiny_tokenizer(), data, chunk_images=2, batch_views=3, progress=False, **more
    )


def test_what_a_source_leaves_out_before_it_is_read_is_in_the_stores_list(tmp_path: Path) -> None:
    images = make_folder(tmp_path / "images", {"oak": 2, "elm": 2})
    (images / "bare").mkdir()
    (images / "oak" / "00.png").write_bytes(b"no image")
    store = run(images, tmp_path / "store", TEN_CROP)
    assert [entry["key"] for entry in store.manifest["skipped"]] == ["bare/", "oak/00.png"]
    assert store.manifest["skipped"][0]["reason"] == "a class folder without images"


@pytest.mark.parametrize(
    ("data", "changed", "seeds"),
    [
        (AFFINE, AFFINE, (0, 1)),
        (AFFINE, replace(AFFINE, affine_views=4), (0, 0)),
        (TEN_CROP, replace(TEN_CROP, crop_ranges=(1.2,)), (0, 0)),
        (TEN_CROP, replace(TEN_CROP, held_out_share=0.3), (0, 0)),
    ],
)
def test_a_store_of_other_views_or_another_split_is_not_taken_for_ours(
    tmp_path: Path, data: DataConfig, changed: DataConfig, seeds: tuple[int, int]
) -> None:
    images = make_folder(tmp_path / "images", {"oak": 3, "elm": 2})
    run(images, tmp_path / "store", data, seed=seeds[0])
    with pytest.raises(StorageError, match="already holds codes of another source, tokenizer, view setting or split"):
        run(images, tmp_path / "store", changed, seed=seeds[1])
    run(images, tmp_path / "store", data, seed=seeds[0])


def test_imported_codes_with_another_split_are_not_taken_for_ours(tmp_path: Path) -> None:
    write_llamagen(tmp_path / "llamagen", np.random.RandomState(0).randint(0, 16384, (8, 2, 256)), [0, 1] * 4)
    import_llamagen_codes(tmp_path / "llamagen", tmp_path / "store", "ab" * 32, held_out_share=0.25, progress=False)
    with pytest.raises(StorageError, match="already holds codes of another"):
        import_llamagen_codes(tmp_path / "llamagen", tmp_path / "store", "ab" * 32, held_out_share=0.5, progress=False)


def test_a_chunk_is_on_the_disk_before_it_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_folder(tmp_path / "images", {"oak": 3, "elm": 2})
    events = watch_disk(monkeypatch)
    run(images, tmp_path / "store", TEN_CROP)
    since: set[str] = set()
    records = []
    for kind, path, target in events:
        if kind == "sync":
            since.add(Path(path).name)
        elif kind == "rename" and target.endswith("progress.json"):
            records.append({"codes.bin", "labels.bin", "keys.jsonl"} <= since)
            since.clear()
    assert records == [True, True, True]  # five images, two a chunk


def test_codes_below_zero_are_not_written(tmp_path: Path) -> None:
    about = {
        "views": ("one",),
        "positions": 4,
        "grid": (2, 2),
        "image_size": 4,
        "codebook": 9,
        "class_names": ("a",),
        "tokenizer_sha256": "ab" * 32,
        "source": {"kind": "test"},
    }
    for codes in ([0, 1, 2, -1], [0, 1, 2, 9]):
        with pytest.raises(DataError, match=r"codes must lie in 0 \.\.\. 8"):
            StoreWriter(tmp_path, about).append(np.array([[codes]]), [0], ["a"], 1)


def test_views_in_memory_are_those_of_the_store(tmp_path: Path) -> None:
    """The tokenizer learns on the views that it will encode: small-affine ones are named by the image's number in its
    source, and by the seed.
    """
    source, wanted = ImageFolder(make_folder(tmp_path / "images", {"oak": 4, "elm": 4})), np.array([7, 1, 4])
    views = collect_views(source, wanted, AFFINE, TINY, seed=6, progress=False)
    expected = np.concatenate([make_views(source[index].image, index, AFFINE, 16, 3, seed=6) for index in wanted])
    assert np.array_equal(views.numpy(), expected)


def test_where_not_all_views_fit_in_memory_all_images_have_a_chance(tmp_path: Path) -> None:
    source = ImageFolder(make_folder(tmp_path / "images", {"oak": 12}))
    part = collect_views(source, np.arange(12), TEN_CROP, TINY, limit_bytes=20 * 3 * 16 * 16, progress=False)
    of_image = [
        {view.tobytes() for view in make_views(source[index].image, index, TEN_CROP, 16, 3)} for index in range(12)
    ]
    taken = [sum(view.numpy().tobytes() in views for view in part) for views in of_image]
    assert sum(taken) == 20 and sum(count > 0 for count in taken) >= 6  # the first two images alone have 20 views


def test_the_hash_of_the_digits_covers_their_labels() -> None:
    digits = BuiltinDigits.__new__(BuiltinDigits)  # the real ones take seconds to load
    digits.images, digits.labels = np.zeros((3, 28, 28), dtype=np.uint8), np.array([3, 1, 4])
    before = digits.description()
    digits.labels = np.array([3, 1, 5])
    assert digits.description() != before


def bicubic(image: np.ndarray, seed: int, index: int, view: int) -> np.ndarray:
    """The affine view of one channel (S, S) by the definition: for each output pixel where it comes from, and Keys'
    kernel with a = -3/4 there, in float64.
    """
    angle, scaling, right, down = affine_parameters(seed, index, view)
    size = len(image)

    def weight(distance: float) -> float:
        d, a = abs(distance), -0.75
        return (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0

    out = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            x, y = column + 0.5 - size / 2 - right * size, row + 0.5 - size / 2 - down * size
            from_x = (math.cos(angle) * x + math.sin(angle) * y) / scaling + size / 2 - 0.5
            from_y = (-math.sin(angle) * x + math.cos(angle) * y) / scaling + size / 2 - 0.5
            left, top = math.floor(from_x), math.floor(from_y)
            out[row, column] = sum(
                weight(from_x - i) * weight(from_y - j) * image[min(max(j, 0), size - 1), min(max(i, 0), size - 1)]
                for i in range(left - 1, left + 3)
                for j in range(top - 1, top + 3)
            )
    return out


def test_affine_views_pixel_by_pixel() -> None:
    """Black and white blocks: the kernel overshoots at their edges, and the edges of the image are
    repeated outwards.
    """
    blocks = np.kron(np.random.RandomState(3).randint(0, 2, (6, 6)), np.ones((3, 3))).astype(np.uint8) * 255
    for index in range(3):
        exact = bicubic(blocks.astype(np.float64), 5, index, 1)
        assert exact.min() < -1 and exact.max() > 256  # there is something to cut off
        made = small_affine(blocks[None], index, 1, 5)[0]
        assert made.dtype == np.uint8
        assert np.abs(made - exact.clip(0, 255)).max() <= 0.5 + 1e-6  # rounded to the nearest
    even = np.full((1, 18, 18), 200, dtype=np.uint8)
    assert (small_affine(even, 0, 1, 5) == 200).all()


def test_encoding_leaves_no_gradients_and_the_tokenizer_as_it_was(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer.weights_hash()
    seen: list[bool] = []
    tokenizer.encoder.register_forward_hook(lambda module, arguments, out: seen.append(out.requires_grad))
    prepare(
        ImageFolder(make_folder(tmp_path / "images", {"oak": 2})),
        tmp_path / "store",
        tokenizer,
        TEN_CROP,
        progress=False,
    )
    assert seen and not any(seen) and tokenizer.weights_hash() == before and not tokenizer.training
    assert not any(isinstance(value, torch.Tensor) and value.grad is not None for value in tokenizer.parameters())


def test_files_come_in_order_of_their_whole_names(tmp_path: Path) -> None:
    """So the order, and with it a store's rows, is the same however folders are walked: '-' sorts before '/'."""
    for name in ("b/1.png", "b-c.png", "b.png", "a/z/9.png"):
        file = tmp_path / "class" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(8, 8, 0).save(file)
    source = ImageFolder(tmp_path)
    assert source.files == ["class/a/z/9.png", "class/b-c.png", "class/b.png", "class/b/1.png"]

"""data.prepare: source to store, corrupt files, resuming after a kill, views in memory, LlamaGen's files."""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from star_fast.config import ConfigError, DataConfig
from star_fast.data.codes import CodeStore
from star_fast.data.llamagen_codes import import_llamagen_codes
from star_fast.data.prepare import collect_views, explain_out_of_memory, prepare, skipped_report
from star_fast.data.sources import DataError, ImageFolder, UnreadableImage, split_indices
from star_fast.data.views import RefusedImage, make_views
from star_fast.errors import UserError
from star_fast.locks import Busy, only_writer
from star_fast.model.tokenizer import VQTokenizer, from_uint8
from star_fast.storage import StorageError
from tests.data.pictures import TINY, make_folder, picture, tiny_tokenizer

TEN_CROP = DataConfig(views="ten-crop", crop_ranges=(1.3,), held_out_share=0.25)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, nine images, one of them a truncated JPEG and one not an image."""
    made = make_folder(tmp_path / "images", {"oak": 5, "elm": 4}, ".jpg")
    (made / "oak" / "02.jpg").write_bytes((made / "oak" / "02.jpg").read_bytes()[:300])
    (made / "elm" / "00.jpg").write_bytes(b"no image")
    return made


def run(folder: Path, out: Path, tokenizer: VQTokenizer, data: DataConfig = TEN_CROP, seed: int = 0) -> CodeStore:
    return prepare(ImageFolder(folder), out, tokenizer, data, seed=seed, chunk_images=2, batch_views=3, progress=False)


@pytest.mark.parametrize("data", [TEN_CROP, DataConfig(views="small-affine", affine_views=3, held_out_share=0.25)])
def test_store_holds_the_codes_of_every_view(tmp_path: Path, folder: Path, data: DataConfig) -> None:
    tokenizer, source = tiny_tokenizer(), ImageFolder(folder)
    store = run(folder, tmp_path / "store", tokenizer, data, seed=5)
    assert (
        store.class_names == ("elm", "oak")
        and store.positions == 64
        and store.grid == (8, 8)
        and store.image_size == 16
    )
    good = [1, 2, 3, 4, 5, 7, 8]  # elm/00 and oak/02 are damaged
    assert store.keys() == [source.files[i] for i in good] and store.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    for row, index in enumerate(good):
        views = make_views(source[index].image, index, data, 16, 3, seed=5)
        assert torch.equal(
            store.codes([row], range(len(views)))[0], tokenizer.encode(from_uint8(torch.from_numpy(views)))
        )
    # The rule: a store without it was made under another
    assert store.manifest["pixels"] == "upright by EXIF, 16 bits scaled by the white level"
    assert [entry["key"] for entry in store.manifest["skipped"]] == ["elm/00.jpg", "oak/02.jpg"]
    assert "truncated" in store.manifest["skipped"][1]["reason"].lower()
    assert skipped_report(store).splitlines()[0].startswith("skipped elm/00.jpg: UnidentifiedImageError")
    assert skipped_report(store, most=1).splitlines()[1].startswith("... and 1 more, listed in")
    held_out = split_indices(source.labels, 0.25)[1]
    assert [good[row] for row in store.held_out_indices] == [i for i in held_out if i in good]
    store.require_tokenizer(tokenizer.weights_hash())
    with pytest.raises(DataError, match="made by tokenizer"):
        store.require_tokenizer(tiny_tokenizer(1).weights_hash())


class Killed(Exception):
    pass


def test_resume_after_a_kill_gives_the_same_bytes(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(folder, tmp_path / "whole", tiny_tokenizer())
    encode = VQTokenizer.encode
    calls = 0

    def mortal(tokenizer: VQTokenizer, images: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls % 10 == 0:
            raise Killed
        return encode(tokenizer, images)

    monkeypatch.setattr(VQTokenizer, "encode", mortal)
    deaths = 0
    while True:
        try:
            run(folder, tmp_path / "broken", tiny_tokenizer())
            break
        except Killed:
            deaths += 1
    assert deaths >= 2
    assert {path.name for path in whole.path.iterdir()} == {path.name for path in (tmp_path / "broken").iterdir()}
    for path in whole.path.iterdir():
        assert path.read_bytes() == (tmp_path / "broken" / path.name).read_bytes()
    calls = 0
    run(folder, tmp_path / "broken", tiny_tokenizer())
    assert calls == 0  # the finished store is opened, nothing encoded again
    with pytest.raises(StorageError, match="already holds codes of another source, tokenizer, view setting or split"):
        run(folder, tmp_path / "broken", tiny_tokenizer(), replace(TEN_CROP, held_out_share=0.3))


def test_jobs_that_cannot_go_on(tmp_path: Path) -> None:
    images = make_folder(tmp_path / "images", {"a": 2})
    for path in (images / "a").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 2 images could be read; the first: a/00\.png"):
        run(images, tmp_path / "store", tiny_tokenizer())
    with pytest.raises(DataError, match="none of the 2 images could be read"):
        collect_views(ImageFolder(images), np.arange(2), TEN_CROP, TINY, progress=False)
    with pytest.raises(DataError, match=r"must be float32, got torch\.bfloat16"):
        run(images, tmp_path / "other", tiny_tokenizer().bfloat16())


def test_views_in_memory_are_of_the_images_asked_for(folder: Path) -> None:
    source = ImageFolder(folder)
    opened: list[int] = []
    load = source.__class__.__getitem__

    class Watched(ImageFolder):
        def __getitem__(self, index: int) -> object:
            opened.append(index)
            return load(self, index)

    watched, wanted = Watched(folder), np.array([1, 3, 6, 8])  # 6 is damaged
    views = collect_views(watched, wanted, TEN_CROP, TINY, progress=False)
    expected = np.concatenate([make_views(source[i].image, i, TEN_CROP, 16, 3) for i in (1, 3, 8)])
    assert torch.equal(views, torch.from_numpy(expected)) and sorted(set(opened)) == [1, 3, 6, 8]
    assert collect_views(source, wanted, TEN_CROP, TINY, plain_only=True, progress=False).shape == (3, 3, 16, 16)
    part = collect_views(source, wanted[[0, 1, 3]], TEN_CROP, TINY, limit_bytes=7 * 3 * 16 * 16, progress=False)
    assert len(part) == 7 and {view.numpy().tobytes() for view in part} < {view.tobytes() for view in expected}
    with pytest.raises(UnreadableImage):
        source[6]


def write_llamagen(root: Path, codes: np.ndarray, labels: list[int]) -> None:
    (root / "imagenet256_codes").mkdir(parents=True)
    (root / "imagenet256_labels").mkdir()
    for i, label in enumerate(labels):
        np.save(root / "imagenet256_codes" / f"{i}.npy", codes[i : i + 1])
        np.save(root / "imagenet256_labels" / f"{i}.npy", np.array([label]))


def test_llamagen_codes_become_a_store(tmp_path: Path) -> None:
    codes = np.random.RandomState(0).randint(0, 16384, (13, 10, 256))
    write_llamagen(tmp_path / "llamagen", codes, [2, 0, 1] * 4 + [0])
    store = import_llamagen_codes(tmp_path / "llamagen", tmp_path / "store", "ab" * 32, chunk_images=4, progress=False)
    assert torch.equal(store.codes(range(13), range(10)), torch.from_numpy(codes)) and store.grid == (16, 16)
    assert store.labels.tolist() == [2, 0, 1] * 4 + [0] and store.class_names == ("class 0", "class 1", "class 2")
    assert (
        store.views[5] == "mirrored top left" and len(store.train_indices) == 13 and store.tokenizer_hash == "ab" * 32
    )
    named = import_llamagen_codes(
        tmp_path / "llamagen",
        tmp_path / "named",
        "ab" * 32,
        class_names=("tench", "shark", "hen"),
        held_out_share=0.3,
        progress=False,
    )
    assert named.class_index("hen") == 2 and named.labels[named.held_out_indices].bincount().tolist() == [2, 1, 1]


def remove(root: Path) -> None:
    (root / "imagenet256_codes" / "1.npy").unlink()


def truncate(root: Path) -> None:
    path = root / "imagenet256_codes" / "2.npy"
    path.write_bytes(path.read_bytes()[:-9])


def reshape(root: Path) -> None:
    np.save(root / "imagenet256_codes" / "2.npy", np.zeros((1, 2, 225), dtype=np.int64))


def relabel(root: Path) -> None:
    np.save(root / "imagenet256_labels" / "2.npy", np.array([-1]))


def overflow(root: Path) -> None:
    np.save(root / "imagenet256_codes" / "2.npy", np.full((1, 2, 256), 16384))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, r"1\.npy is missing although 2\.npy exists"),
        (truncate, r"2\.npy: missing or not a NumPy file"),
        (reshape, r"2\.npy: expected shape \(1, 2, 256\) as in 0\.npy, got \(1, 2, 225\)"),
        (relabel, r"labels must lie in 0 \.\.\. 0"),
        (overflow, r"codes must lie in 0 \.\.\. 16383, got 0 \.\.\. 16384"),
    ],
)
def test_llamagen_damage_says_so(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write_llamagen(tmp_path / "llamagen", np.zeros((3, 2, 256), dtype=np.int64), [0, 0, 0])
    damage(tmp_path / "llamagen")
    with pytest.raises(DataError, match=message):
        import_llamagen_codes(tmp_path / "llamagen", tmp_path / "store", "ab" * 32, progress=False)
    with pytest.raises(DataError, match="no code files"):
        import_llamagen_codes(tmp_path / "absent", tmp_path / "store", "ab" * 32, progress=False)


def header(text: str) -> bytes:
    """A .npy file with this header and eight bytes after it."""
    data = text.encode("latin-1") + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(data)) + data + b"\1" * 8


def objects() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([print], dtype=object), allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        header("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000, 1000000000, 1)}"),
        header("{'descr': '<i8', 'fortran_order': False, 'shape': (-1, -1)}"),
        header("{'descr': '<f8', 'fortran_order': False, 'shape': (1,)}"),
        header("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}"),
        objects(),
        header("(" * 5000),
        header("{'descr': '<i8', 'fortran_order': False, 'shape': (" + "9" * 8000 + ",)}"),
        b"PK\3\4 a zip",
        b"",
        b"\x93NUMPY\7\7",
    ],
    ids=["absurd", "negative", "floats", "objects' header", "objects", "nested", "digits", "zip", "empty", "version"],
)
def test_llamagen_files_that_ask_for_more_than_they_hold(tmp_path: Path, content: bytes) -> None:
    for folder in ("imagenet256_codes", "imagenet256_labels"):
        root = tmp_path / folder
        write_llamagen(root, np.zeros((3, 2, 256), dtype=np.int64), [0, 0, 0])
        (root / folder / "0.npy").write_bytes(content)
        with pytest.raises(DataError, match=r"0\.npy: missing or not a NumPy file"):
            import_llamagen_codes(root, root / "store", "ab" * 32, progress=False)


def test_llamagen_files_that_are_none(tmp_path: Path) -> None:
    write_llamagen(tmp_path, np.zeros((3, 2, 256), dtype=np.int64), [0, 0, 10**15])
    with pytest.raises(DataError, match=r"2\.npy: expected one label below 2\^31"):
        import_llamagen_codes(tmp_path, tmp_path / "store", "ab" * 32, progress=False)
    np.save(tmp_path / "imagenet256_labels" / "2.npy", np.array([2**30]))  # would be a thousand million class names
    with pytest.raises(DataError, match=r"labels must lie in 0 \.\.\. 1048575"):
        import_llamagen_codes(tmp_path, tmp_path / "store", "ab" * 32, progress=False)
    (tmp_path / "imagenet256_labels" / "2.npy").unlink()
    os.mkfifo(tmp_path / "imagenet256_labels" / "2.npy")
    with pytest.raises(DataError, match="found a pipe"):
        import_llamagen_codes(tmp_path, tmp_path / "store", "ab" * 32, progress=False)


def test_one_odd_image_is_skipped_whatever_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_folder(tmp_path / "images", {"a": 5})
    Image.new("L", (100_000, 1)).save(images / "a" / "01.png")  # 177 bytes that took 5.9 GB in the centre crop
    Image.fromarray(np.zeros((9, 9), dtype=np.float32)).save(images / "a" / "02.png", "TIFF")
    picture(37, 40, 1, "P").save(images / "a" / "03.png")
    convert = Image.Image.convert

    def failing(image: Image.Image, mode: str) -> Image.Image:
        if image.size == (37, 40):
            raise RuntimeError("odd\npalette")
        return convert(image, mode)

    monkeypatch.setattr(Image.Image, "convert", failing)
    store = run(images, tmp_path / "store", tiny_tokenizer())
    assert store.keys() == ["a/00.png", "a/04.png"]
    reasons = {entry["key"]: entry["reason"] for entry in store.manifest["skipped"]}
    assert (
        "too long and thin" in reasons["a/01.png"]
        and "floating-point" in reasons["a/02.png"]
        and reasons["a/03.png"] == "RuntimeError: odd palette"
    )
    assert len(collect_views(ImageFolder(images), np.arange(5), TEN_CROP, TINY, progress=False)) == 20
    with pytest.raises(RefusedImage, match=r"100000 x 1 pixels: too long and thin to be cut into squares of 20 pixels"):
        make_views(Image.new("L", (100_000, 1)), 0, TEN_CROP, 16, 3)
    assert make_views(Image.new("L", (1000, 10)), 0, TEN_CROP, 16, 3).shape == (10, 3, 16, 16)  # merely long


def test_settings_at_fault_are_not_taken_for_bad_images(folder: Path, tmp_path: Path) -> None:
    for data, field in (
        (DataConfig(views="small-affine", affine_views=10**15), r"data\.affine_views"),
        (DataConfig(crop_ranges=(16000.0,)), r"data\.crop_ranges"),
    ):
        with pytest.raises(ConfigError, match=field):
            run(folder, tmp_path / "store", tiny_tokenizer(), data)
        with pytest.raises(ConfigError, match=field):
            collect_views(ImageFolder(folder), np.arange(3), data, TINY, progress=False)
    with pytest.raises(ConfigError, match=r"tokenizer\.image_channels: expected 1 \(gray\) or 3"):
        collect_views(ImageFolder(folder), np.arange(3), TEN_CROP, replace(TINY, image_channels=2), progress=False)


def test_memory_that_does_not_suffice_is_one_line() -> None:
    for error in (
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        torch.OutOfMemoryError("CUDA"),
    ):
        with (
            pytest.raises(UserError, match="not enough memory to think; choose smaller"),
            explain_out_of_memory("think"),
        ):
            raise error
    with pytest.raises(RuntimeError, match="other"), explain_out_of_memory("think"):
        raise RuntimeError("other")


def test_one_writer_a_store(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "store"
    (tmp_path / "llamagen").mkdir()
    write_llamagen(tmp_path / "llamagen", np.zeros((3, 2, 256), dtype=np.int64), [0, 0, 0])
    monkeypatch.setattr("star_fast.locks.job_identity", lambda: "process 1 on another")
    with only_writer(out, "preparing codes"):
        monkeypatch.undo()
        with pytest.raises(Busy, match=r"preparing codes is writing there \(process 1 on another"):
            run(folder, out, tiny_tokenizer())
        with pytest.raises(Busy):
            import_llamagen_codes(tmp_path / "llamagen", out, "ab" * 32, progress=False)
    for name in (".codes.bin.77.tmp", ".manifest.json.77.tmp", ".progress.json.77.tmp"):
        (out / name).write_bytes(b"a dead job's")
    (out / ".notes.77.tmp").write_bytes(b"not ours")
    store = run(folder, out, tiny_tokenizer())
    assert {path.name for path in out.iterdir()} == {
        "codes.bin",
        "labels.bin",
        "keys.jsonl",
        "skipped.csv",
        "manifest.json",
        ".notes.77.tmp",
    }
    monkeypatch.setattr("star_fast.locks.job_identity", lambda: "process 1 on another")
    with only_writer(out, "preparing codes"):
        monkeypatch.undo()
        assert len(run(folder, out, tiny_tokenizer())) == len(store)  # finished: only read


def test_names_of_files_reach_the_store_and_no_terminal(tmp_path: Path) -> None:
    images = make_folder(tmp_path / "images", {os.fsdecode(b"caf\xe9"): 2, "b\n\x1b[31m": 3})
    (images / "b\n\x1b[31m" / "bad\r.png").write_bytes(b"none")
    store = run(images, tmp_path / "store", tiny_tokenizer())
    assert store.class_names == ("b\n\x1b[31m", "caf\udce9") and store.keys() == [
        key for key in ImageFolder(images).files if "bad" not in key
    ]
    assert all(
        line.isprintable() for line in skipped_report(store).splitlines()
    ) and "b\\n\\x1b[31m/bad\\r.png" in skipped_report(store)
    assert json.loads((tmp_path / "store" / "manifest.json").read_bytes())["class_names"][1] == "caf\udce9"
    assert len(run(images, tmp_path / "store", tiny_tokenizer())) == len(store)

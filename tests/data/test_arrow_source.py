"""data.arrow_source: a data set that Hugging Face's package wrote, read back by rows; needs that package."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from star_fast.data.arrow_source import ArrowDataset
from star_fast.data.sources import DataError, UnreadableImage, open_source
from tests.data.pictures import picture

datasets = pytest.importorskip("datasets")


def encoded(seed: int, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture(20 + seed, 18, seed).save(file, form)
    return file.getvalue()


def save(folder: Path, features: dict[str, Any], **columns: list[Any]) -> Path:
    rows = {
        "image": [{"bytes": encoded(seed), "path": None} for seed in range(len(next(iter(columns.values()))))],
        **columns,
    }
    datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image(), **features})).save_to_disk(
        folder
    )
    return folder


def test_images_labels_and_names_as_they_were_saved(tmp_path: Path) -> None:
    folder = save(
        tmp_path / "set",
        {"id": datasets.Value("int64"), "kind": datasets.ClassLabel(names=["oak", "elm", "ash"])},
        id=[5, 6, 7, 8],
        kind=[2, 0, -1, 2],
    )
    source = open_source(folder)
    assert (
        isinstance(source, ArrowDataset)
        and source.class_names == ("oak", "elm", "ash")
        and source.labels.tolist() == [2, 0, 2]
    )
    assert source.files == ["row 0000000", "row 0000001", "row 0000003"] and source.skipped == [
        {"key": "row 0000002", "reason": "has no label"}
    ]
    for index, seed in enumerate((0, 1, 3)):
        assert source.encoded(index) == encoded(seed)
        sample = source[index]
        assert sample.image.tobytes() == picture(20 + seed, 18, seed).tobytes() and sample.label == source.labels[index]
    assert source.description() == open_source(folder).description()
    other = save(
        tmp_path / "other" / "set",
        {"id": datasets.Value("int64"), "kind": datasets.ClassLabel(names=["oak", "elm", "ash"])},
        id=[5, 6, 7, 8],
        kind=[2, 0, 0, 2],
    )
    assert open_source(other).description() != source.description()


def test_a_choice_of_rows_keeps_its_order(tmp_path: Path) -> None:
    folder = save(tmp_path / "set", {"label": datasets.ClassLabel(names=["a", "b"])}, label=[0, 1, 0, 1, 1])
    datasets.load_from_disk(str(folder)).select([4, 2, 0]).save_to_disk(tmp_path / "part")
    source = open_source(tmp_path / "part")
    assert source.labels.tolist() == [1, 0, 0] and [source.encoded(i) for i in range(3)] == [
        encoded(4),
        encoded(2),
        encoded(0),
    ]


@pytest.mark.parametrize(
    ("kind", "values", "names", "labels"),
    [("int64", [10, 9, 10], ("9", "10"), [1, 0, 1]), ("string", ["oak", "elm", "oak"], ("elm", "oak"), [1, 0, 1])],
)
def test_labels_without_names_of_their_own(
    tmp_path: Path, kind: str, values: list[Any], names: tuple[str, ...], labels: list[int]
) -> None:
    source = open_source(
        save(
            tmp_path / "set",
            {"label": datasets.Value(kind), "more": datasets.Value("string")},
            label=values,
            more=["x"] * 3,
        )
    )
    assert source.class_names == names and source.labels.tolist() == labels


def test_texts_may_be_missing(tmp_path: Path) -> None:
    source = open_source(save(tmp_path / "set", {"label": datasets.Value("string")}, label=["b", None, "a", " "]))
    assert source.class_names == ("a", "b") and source.labels.tolist() == [1, 0] and len(source.skipped) == 2


def test_splits_are_to_be_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "set", {"label": datasets.ClassLabel(names=["a", "b"])}, label=[0, 1])
    part = datasets.load_from_disk(str(folder))
    datasets.DatasetDict({"train": part, "validation": part.select([1])}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match=r"holds 2 splits; give one of them: .*both/train, .*both/validation"):
        open_source(tmp_path / "both")
    source = open_source(tmp_path / "both" / "train", held_out=tmp_path / "both" / "validation")
    assert source.labels.tolist() == [0, 1, 1] and source.files[2] == "held out/row 0000000"


def test_images_that_are_none(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    rows = {
        "image": [{"bytes": b"no image", "path": "x.png"}, None, {"bytes": encoded(2, "JPEG"), "path": None}],
        "label": [0, 0, 0],
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    source = open_source(tmp_path / "set")
    for index, reason in ((0, "UnidentifiedImageError: cannot identify image file$"), (1, "its row holds no image")):
        with pytest.raises(UnreadableImage, match=reason):
            source[index]
    assert source[2].image.size == (22, 18)


def test_columns_that_cannot_be_told(tmp_path: Path) -> None:
    two = {"one": datasets.ClassLabel(names=["a"]), "two": datasets.ClassLabel(names=["a"])}
    with pytest.raises(DataError, match=r"expected one column of class labels, .* found image, one, two"):
        open_source(save(tmp_path / "two", two, one=[0], two=[0]))
    assert open_source(
        save(tmp_path / "fine", {"fine_label": two["one"], "coarse": two["two"]}, fine_label=[0], coarse=[0])
    ).class_names == ("a",)
    datasets.Dataset.from_dict({"label": [0, 1]}).save_to_disk(tmp_path / "none")
    with pytest.raises(DataError, match="expected one column of images, found 0 among label"):
        open_source(tmp_path / "none")
    with pytest.raises(DataError, match="none of its 2 rows has a label in column 'label'"):
        open_source(save(tmp_path / "unlabelled", {"label": datasets.ClassLabel(names=["a"])}, label=[-1, -1]))


def test_damaged_folders_are_one_line(tmp_path: Path) -> None:
    folder = save(tmp_path / "set", {"label": datasets.ClassLabel(names=["a"])}, label=[0, 0])
    arrow = next(folder.glob("*.arrow"))
    content = arrow.read_bytes()
    for name, damage in (
        (arrow.name, content[: len(content) // 3]),
        (arrow.name, b""),
        ("state.json", b"{}"),
        ("dataset_info.json", b"[]"),
        ("state.json", b"x"),
    ):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(damage)
        with pytest.raises(DataError, match="cannot be read as a data set that save_to_disk wrote"):
            open_source(folder)
        (folder / name).write_bytes(kept)
    assert np.array_equal(open_source(folder).labels, [0, 0])

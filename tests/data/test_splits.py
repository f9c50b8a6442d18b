"""data.splits: held-out images from elsewhere, and the one function that says which images are held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from star_fast.data.sources import (
    DataError,
    ImageFolder,
    UnreadableImage,
    WithHeldOut,
    open_source,
    split_indices,
    split_of,
)
from tests.data.pictures import make_folder


def test_held_out_images_of_their_own(tmp_path: Path) -> None:
    train = make_folder(tmp_path / "train", {"ash": 2, "elm": 3, "oak": 2})
    val = make_folder(tmp_path / "val", {"oak": 2, "elm": 1})
    (train / "bare").mkdir()
    (val / "gone").mkdir()
    (val / "oak" / "01.png").write_bytes(b"no image")
    source = open_source(train, held_out=val)
    assert isinstance(source, WithHeldOut) and source.class_names == ("ash", "elm", "oak") and len(source) == 10
    assert source.labels.tolist() == [0, 0, 1, 1, 1, 2, 2, 1, 2, 2]
    assert (
        list(source.files)[6:]
        == source.files[6:]
        == ["oak/01.png", "held out/elm/00.png", "held out/oak/00.png", "held out/oak/01.png"]
    )
    assert source.files[-1] == "held out/oak/01.png" and len(set(source.files)) == 10
    assert [entry["key"] for entry in source.skipped] == ["bare/", "held out/gone/"]
    sample = source[7]
    assert (sample.label, sample.key) == (1, "held out/elm/00.png")
    assert (
        sample.image.tobytes() == ImageFolder(val)[0].image.tobytes()
        and source[3].image.tobytes() == ImageFolder(train)[3].image.tobytes()
    )
    assert (
        source.encoded(8) == (val / "oak" / "00.png").read_bytes()
        and source.encoded(0) == (train / "ash" / "00.png").read_bytes()
    )
    with pytest.raises(UnreadableImage, match=r"held out/oak/01\.png"):
        source[9]
    (val / "oak" / "00.png").unlink()
    with pytest.raises(UnreadableImage, match=r"held out/oak/00\.png"):
        source.encoded(8)
    assert source.description()["held_out"] == {
        **ImageFolder(val).description(),
        "images": 3,
        **{"sha256_of_paths_and_sizes": source.held_out.description()["sha256_of_paths_and_sizes"]},
    }
    assert (
        source.description()["images"] == 7
        and source.description() != WithHeldOut(ImageFolder(train), ImageFolder(val)).description()
    )


def test_the_split_is_the_sources_own(tmp_path: Path) -> None:
    source = open_source(
        make_folder(tmp_path / "train", {"ash": 4, "elm": 4}), held_out=make_folder(tmp_path / "val", {"elm": 3})
    )
    train, held_out = split_of(source, 0.0)
    assert (
        train.tolist() == list(range(8))
        and held_out.tolist() == [8, 9, 10]
        and train.dtype == held_out.dtype == np.int64
    )
    with pytest.raises(DataError, match=r"held_out_share: expected 0 with a held-out source, .* got 0\.1"):
        split_of(source, 0.1)
    plain = ImageFolder(tmp_path / "train")
    for share in (0.0, 0.25):
        assert all(
            np.array_equal(ours, theirs)
            for ours, theirs in zip(split_of(plain, share), split_indices(plain.labels, share), strict=True)
        )


def test_held_out_classes_must_be_known(tmp_path: Path) -> None:
    train = make_folder(tmp_path / "train", {"ash": 1, "elm": 1, "oak": 1})
    with pytest.raises(
        DataError, match=r"its class 'fir' and 1 more is none of the 3 classes of the training images \(ash, elm, oak\)"
    ):
        open_source(train, held_out=make_folder(tmp_path / "val", {"fir": 1, "elm": 1, "pine": 1}))
    numbered = make_folder(tmp_path / "numbered", {"2": 2, "0": 1})
    assert open_source(train, held_out=numbered).labels.tolist() == [0, 1, 2, 0, 2, 2]
    with pytest.raises(DataError, match="its class '3'"):
        open_source(train, held_out=make_folder(tmp_path / "beyond", {"1": 1, "3": 1}))
    with pytest.raises(DataError, match="no held-out source"):
        open_source(train, held_out_labels="x.csv")


def test_names_are_given_after_the_classes_were_matched(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("the ash\nthe elm\n")
    source = open_source(
        make_folder(tmp_path / "train", {"n1": 1, "n2": 1}),
        held_out=make_folder(tmp_path / "val", {"n2": 1}),
        class_names=str(tmp_path / "names.txt"),
    )
    assert source.class_names == ("the ash", "the elm") and source.labels.tolist() == [0, 1, 1]

"""data.class_names: folder names and numbers become words."""

from __future__ import annotations

from pathlib import Path

import pytest

from star_fast.data.class_names import renamed_classes
from star_fast.data.sources import DataError, open_source
from tests.data.pictures import make_folder

IDS = ("n01440764", "n02012849", "n03126707", "n03710721")


@pytest.mark.parametrize("line", ["{} {}", "{}\t{}", "{},{}", "{} , {}"])
def test_a_mapping_is_applied_by_first_fields(tmp_path: Path, line: str) -> None:
    words = {
        "n03126707": "crane",
        "n01440764": "tench, Tinca tinca",
        "n99999999": "of no class here",
        "n02012849": "crane",
        "n03710721": "maillot, tank suit",
    }
    file = tmp_path / "mapping.txt"
    file.write_text("".join(line.format(wnid, name) + "\n" for wnid, name in words.items()))
    assert renamed_classes(IDS, str(file)) == (
        "tench, Tinca tinca",
        "crane (n02012849)",
        "crane (n03126707)",
        "maillot, tank suit",
    )
    with pytest.raises(
        DataError, match="has no line for class 'n00000001' and 1 more; expected one for each of the 3 classes"
    ):
        renamed_classes(("n00000001", "n00000002", "n01440764"), str(file))


def test_a_plain_list_is_in_the_order_of_the_classes(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("one word\ntwo words\ntwo words\n")
    assert renamed_classes(("a", "b", "c"), str(file)) == ("one word", "two words (b)", "two words (c)")
    assert renamed_classes(("0", "1", "2"), str(file)) == ("one word", "two words (1)", "two words (2)")
    assert renamed_classes(("0", "2"), str(file)) == ("one word", "two words (2)")  # class 1 has no image
    assert renamed_classes(("1", "2", "3"), str(file)) == ("one word", "two words (2)", "two words (3)")
    for names in (("a", "b"), ("1", "3"), ("a", "b", "c", "d")):
        with pytest.raises(
            DataError,
            match=rf"expected {len(names)} names, one a line for each class, .* got 3 lines, the first 'one word'",
        ):
            renamed_classes(names, str(file))


def test_imagenets_names(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    names = renamed_classes(tuple(f"n{number:08d}" for number in range(1000)), "imagenet")
    assert names[0] == "tench" and names[517] == "crane" and len(set(names)) == 1000
    assert renamed_classes(("0", "207"), "imagenet") == ("tench", "golden retriever")
    for classes in (
        ("n01440764", "n01443537"),
        ("dog", "cat"),
        tuple(f"n{number:08d}" for number in range(999, -1, -1)),
    ):
        with pytest.raises(DataError, match="expected 1000"):
            renamed_classes(classes, "imagenet")


def test_a_source_opens_under_the_names(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", {"n02": 2, "n01": 1})
    (tmp_path / "names.txt").write_text("n02 a hen\nn01 a fish\n")
    source = open_source(folder, class_names=str(tmp_path / "names.txt"))
    assert source.class_names == ("a fish", "a hen") and source.labels.tolist() == [0, 1, 1] and source[1].label == 1
    assert source.files == ["n01/00.png", "n02/00.png", "n02/01.png"]

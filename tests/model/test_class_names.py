"""model.class_names: names from a file, and ImageNet's."""

from __future__ import annotations

from pathlib import Path

import pytest

from star_fast.errors import UserError
from star_fast.model.class_names import imagenet_names, names_for_model, read_class_names


def test_names_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes("\ufeffgoldfish, Carassius auratus\r\n größe \n\tthird one\n\n".encode())
    assert read_class_names(file) == ["goldfish, Carassius auratus", "größe", "third one"]
    for data, message in (
        (b"a\n\nb\n", r"names\.txt, line 2: no name; expected a text file with one class name a line"),
        (b"", "line 1: no name"),
        (b"\xff\xfe", r"names\.txt: not UTF-8 text"),
        (b"a" * (2**23 + 1), "expected at most"),
    ):
        file.write_bytes(data)
        with pytest.raises(UserError, match=message):
            read_class_names(file)
    with pytest.raises(UserError, match="not found"):
        read_class_names(tmp_path / "absent.txt")


def test_lines_with_wordnet_ids_are_put_in_their_order(tmp_path: Path) -> None:
    file = tmp_path / "LOC_synset_mapping.txt"
    file.write_text("n03126707 crane\nn01440764 tench, Tinca tinca\nn02012849 crane\n")
    assert read_class_names(file) == ["tench, Tinca tinca", "crane (n02012849)", "crane (n03126707)"]
    file.write_text("n03126707 crane\nn01440764 tench\nnot an id\n")
    # Then they are names like any others
    assert read_class_names(file) == ["n03126707 crane", "n01440764 tench", "not an id"]


def test_imagenets_names_are_all_there_and_all_different() -> None:
    pytest.importorskip("torchvision")
    names = imagenet_names()
    assert len(names) == len(set(names)) == 1000
    assert [names[number] for number in (0, 1, 207, 517, 999)] == [
        "tench",
        "goldfish",
        "golden retriever",
        "crane",
        "toilet tissue",
    ]
    assert read_class_names("imagenet") == names
    assert names_for_model([str(number) for number in range(1000)], "imagenet") == names


def test_names_for_a_model_that_has_none(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("ash\noak\nash\n")
    assert names_for_model(["0", "1", "2"], "") == ["0", "1", "2"]
    assert (
        names_for_model(["0", "1", "2"], str(file))
        == names_for_model(["class 0", "class 1", "class 2"], str(file))
        == ["ash (0)", "oak", "ash (2)"]
    )
    with pytest.raises(UserError, match=r"the model has names of its own \(elm, oak\); leave the option out"):
        names_for_model(["elm", "oak"], str(file))
    with pytest.raises(UserError, match=r"the model has 2 classes, .*names\.txt has 3 names"):
        names_for_model(["0", "1"], str(file))

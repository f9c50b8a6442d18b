"""data.llamagen_codes: both crop ranges in one store, and the way back to the same files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from star_fast.data import llamagen_codes
from star_fast.data.llamagen_codes import export_llamagen_codes, import_llamagen_codes, sibling_of
from star_fast.data.sources import DataError
from star_fast.locks import Busy, only_writer
from star_fast.storage import StorageError
from tests.data.test_prepare import write_llamagen

CROPS = ("top left", "top right", "bottom left", "bottom right", "centre")
TEN = CROPS + tuple(f"mirrored {crop}" for crop in CROPS)
LABELS = [2, 0, 1, 2, 0, 1, 2]


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, Path]:
    """Two roots as two extractions leave them; the codes say where they come from."""
    made = tmp_path / "imagenet_code_c2i_flip_ten_crop", tmp_path / "imagenet_code_c2i_flip_ten_crop_105"
    for number, root in enumerate(made):
        write_llamagen(root, codes_of(number), LABELS)
    return made


def codes_of(number: int) -> np.ndarray:
    return np.random.RandomState(number).randint(0, 16384, (len(LABELS), 10, 256))


def take(root: Path, out: Path, **more: object) -> object:
    return import_llamagen_codes(root, out, "ab" * 32, progress=False, **more)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_both_ranges_are_views_of_one_image(tmp_path: Path, roots: tuple[Path, Path]) -> None:
    store = take(roots[0], tmp_path / "store", sibling=roots[1], chunk_images=3)
    assert store.views == tuple(f"{name}, range 1.1" for name in TEN) + tuple(f"{name}, range 1.05" for name in TEN)
    assert torch.equal(store.codes(range(7), range(10)), torch.from_numpy(codes_of(0)))
    assert torch.equal(store.codes(range(7), range(10, 20)), torch.from_numpy(codes_of(1)))
    assert store.labels.tolist() == LABELS and store.manifest["source"]["sibling"] == roots[1].name
    assert take(roots[0], tmp_path / "one").views == TEN
    with pytest.raises(StorageError, match="already holds codes of another"):
        take(roots[0], tmp_path / "store")


def test_the_sibling_is_found_by_its_name(tmp_path: Path, roots: tuple[Path, Path]) -> None:
    assert sibling_of(roots[0]) == roots[1] and sibling_of(str(roots[0]) + "/") == roots[1]
    assert sibling_of(roots[1]) is None
    (tmp_path / "other").mkdir()
    (tmp_path / "other_105").mkdir()
    assert sibling_of(tmp_path / "other") is None  # LlamaGen's loader looks for the words ten_crop


def test_what_was_imported_is_exported_byte_for_byte(tmp_path: Path, roots: tuple[Path, Path]) -> None:
    both = take(roots[0], tmp_path / "both", sibling=roots[1])
    there = tmp_path / "there_ten_crop"
    assert export_llamagen_codes(both, there, progress=False) == [there, tmp_path / "there_ten_crop_105"]
    assert contents(there) == contents(roots[0]) and contents(tmp_path / "there_ten_crop_105") == contents(roots[1])
    assert len(contents(there)) == 14 and np.load(there / "imagenet256_codes" / "3.npy").dtype == np.int64
    one = take(roots[1], tmp_path / "one")
    assert export_llamagen_codes(one, tmp_path / "back", sibling=tmp_path / "unused", progress=False) == [
        tmp_path / "back"
    ]
    assert contents(tmp_path / "back") == contents(roots[1]) and not (tmp_path / "unused").exists()
    assert export_llamagen_codes(both, tmp_path / "x", sibling=tmp_path / "y", progress=False) == [
        tmp_path / "x",
        tmp_path / "y",
    ]
    assert contents(tmp_path / "y") == contents(roots[1])
    with pytest.raises(DataError, match="already holds codes, of another store or finished"):
        export_llamagen_codes(both, there, progress=False)
    with pytest.raises(DataError, match="already holds codes"):  # the sibling alone does
        export_llamagen_codes(both, tmp_path / "z", sibling=tmp_path / "y", progress=False)


class Killed(Exception):
    pass


def test_an_export_goes_on_where_it_was_killed(
    tmp_path: Path, roots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = take(roots[0], tmp_path / "store", sibling=roots[1])
    other = take(roots[1], tmp_path / "other")
    monkeypatch.setattr(llamagen_codes, "_EXPORT_CHUNK", 2)
    replace, renamed = os.replace, []

    def mortal(old: Path, new: Path) -> None:
        renamed.append(Path(new).name)
        if len(renamed) % 13 == 0:
            raise Killed
        replace(old, new)

    monkeypatch.setattr(os, "replace", mortal)
    root, deaths = tmp_path / "root", 0
    while True:
        try:
            export_llamagen_codes(store, root, progress=False)
            break
        except Killed:
            deaths += 1
            assert deaths < 20
            with monkeypatch.context() as alive:
                alive.setattr(os, "replace", replace)
                if deaths == 1:
                    with pytest.raises(DataError, match="of another store"):
                        export_llamagen_codes(other, root, progress=False)
    assert deaths >= 2 and len(renamed) < deaths * 28  # each went on from the last chunk
    assert contents(root) == contents(roots[0]) and contents(tmp_path / "root_105") == contents(roots[1])
    (root / "unfinished.json").write_text(json.dumps({"store": "x"}))
    with pytest.raises(DataError, match="of another store"):
        export_llamagen_codes(store, root, progress=False)


def test_one_export_at_a_time(tmp_path: Path, roots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    store = take(roots[0], tmp_path / "store")
    monkeypatch.setattr("star_fast.locks.job_identity", lambda: "process 1 on another")
    with only_writer(tmp_path / "root", "exporting codes"):
        monkeypatch.undo()
        with pytest.raises(Busy):
            export_llamagen_codes(store, tmp_path / "root", progress=False)


def test_siblings_of_other_images(tmp_path: Path, roots: tuple[Path, Path]) -> None:
    np.save(roots[1] / "imagenet256_labels" / "4.npy", np.array([1]))
    with pytest.raises(
        DataError,
        match=r"_105/imagenet256_labels/4\.npy: label 1, but 0 in .*ten_crop/imagenet256_labels; expected the codes of "
        r"the same",
    ):
        take(roots[0], tmp_path / "store", sibling=roots[1])
    np.save(roots[1] / "imagenet256_labels" / "4.npy", np.array([0]))
    np.save(roots[1] / "imagenet256_codes" / "4.npy", np.zeros((1, 2, 256), dtype=np.int64))
    with pytest.raises(
        DataError,
        match=r"_105/imagenet256_codes/4\.npy: expected shape \(1, 10, 256\) as in "
        r".*ten_crop/imagenet256_codes/0\.npy, "
        r"got",
    ):
        take(roots[0], tmp_path / "store", sibling=roots[1])
    with pytest.raises(DataError, match="no code files"):
        take(roots[0], tmp_path / "other", sibling=tmp_path / "absent")


def test_extractions_by_other_numbers_of_processes(
    tmp_path: Path, roots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight processes write eight files for seven images: the first image again."""
    np.save(roots[1] / "imagenet256_codes" / "7.npy", codes_of(1)[:1])
    np.save(roots[1] / "imagenet256_labels" / "7.npy", np.array([LABELS[0]]))
    store = take(roots[0], tmp_path / "store", sibling=roots[1])
    assert len(store) == 7 and [entry["key"] for entry in store.manifest["skipped"]] == ["7.npy"]
    assert "the end of an extraction by several processes" in store.manifest["skipped"][0]["reason"]
    monkeypatch.setattr(llamagen_codes, "_MOST_PADDING", 0)
    with pytest.raises(DataError, match=r"expected the codes of the same images as .*, 7, got 8"):
        take(roots[0], tmp_path / "other", sibling=roots[1])

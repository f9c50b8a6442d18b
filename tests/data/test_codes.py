"""data.codes: what is written comes back bit for bit, and every damage is one clear line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from star_fast.data.codes import CodeStore
from star_fast.data.sources import DataError, split_indices
from star_fast.data.store_writer import StoreWriter
from star_fast.storage import StorageError

LABELS = np.array([0, 1, 2] * 10)
ABOUT: dict[str, Any] = {
    "views": ("plain", "mirrored"),
    "positions": 9,
    "grid": (3, 3),
    "image_size": 12,
    "codebook": 65536,
    "class_names": ("ant", "bee", "cat"),
    "tokenizer_sha256": "ab" * 32,
    "source": {"kind": "test"},
}
CODES = np.random.RandomState(0).randint(0, 65536, (30, 2, 9))
CODES[0, 0, :2] = 0, 65535


def write(out: Path, about: dict[str, Any] = ABOUT, stop: int = 30) -> StoreWriter:
    writer = StoreWriter(out, about)
    for start in range(writer.next_index, stop, 7):
        rows = [i for i in range(start, min(start + 7, stop)) if i != 11]
        gone = [{"index": 11, "key": "image 11", "reason": "damaged"}] if start <= 11 < start + 7 else []
        writer.append(CODES[rows], LABELS[rows].tolist(), [f"image {i}\n" for i in rows], min(start + 7, stop), gone)
    return writer


@pytest.fixture
def store(tmp_path: Path) -> CodeStore:
    return write(tmp_path / "store").finish(LABELS, 0.2)


def test_round_trip_is_bitwise(store: CodeStore) -> None:
    rows = [i for i in range(30) if i != 11]
    assert len(store) == 29 and store.views == ("plain", "mirrored") and store.grid == (3, 3)
    everything = store.codes(range(29), [0, 1])
    assert everything.dtype == torch.int64 and torch.equal(everything, torch.from_numpy(CODES[rows]))
    assert torch.equal(
        store.codes(torch.tensor([5, 28, 5]), torch.tensor([[1, 0], [0, 0], [1, 1]])),
        torch.from_numpy(CODES[np.array(rows)[[5, 28, 5]][:, None], [[1, 0], [0, 0], [1, 1]]]),
    )
    assert store.labels.tolist() == LABELS[rows].tolist()
    assert store.keys() == [f"image {i}\n" for i in rows]
    assert (
        store.manifest["skipped"] == [{"index": 11, "key": "image 11", "reason": "damaged"}]
        and store.source_indices().tolist() == rows
    )
    assert (store.path / "skipped.csv").read_text() == "key,reason\nimage 11,damaged\n"
    store.verify()


def test_split_is_the_sources_without_what_was_skipped(store: CodeStore) -> None:
    rows = np.array([i for i in range(30) if i != 11])
    train, held_out = split_indices(LABELS, 0.2)
    assert rows[store.train_indices].tolist() == [i for i in train if i != 11]
    assert rows[store.held_out_indices].tolist() == [i for i in held_out if i != 11]
    assert len(store.train_indices) + len(store.held_out_indices) == 29


def test_class_names_and_tokenizer(store: CodeStore) -> None:
    assert store.class_index("bee") == 1
    with pytest.raises(DataError, match="no class is named 'dog'; there are: ant, bee, cat"):
        store.class_index("dog")
    store.require_tokenizer("ab" * 32)
    with pytest.raises(DataError, match="made by tokenizer abababababab, the tokenizer given is cdcdcdcdcdcd"):
        store.require_tokenizer("cd" * 32)


def test_asking_for_what_is_not_there(store: CodeStore) -> None:
    with pytest.raises(DataError, match=r"image_indices must lie in 0 \.\.\. 28, got -1 \.\.\. 3"):
        store.codes([3, -1], [0])
    with pytest.raises(DataError, match=r"views must lie in 0 \.\.\. 1, got 0 \.\.\. 2"):
        store.codes([3], [0, 2])
    with pytest.raises(DataError, match=r"got \(2,\) and \(3, 1\)"):
        store.codes([3, 4], [[0], [1], [0]])


@pytest.mark.parametrize("stop", [7, 14, 21])
def test_an_interrupted_store_goes_on_to_the_same_bytes(tmp_path: Path, store: CodeStore, stop: int) -> None:
    out = tmp_path / "again"
    write(out, stop=stop)
    with pytest.raises(StorageError, match="an unfinished code store"):
        CodeStore.open(out)
    for name in ("codes.bin", "labels.bin", "keys.jsonl"):  # killed in the middle of the next chunk
        with open(out / name, "ab") as file:
            file.write(b"half a chunk")
    (out / ".progress.json.123.tmp").write_bytes(b"half a record")
    writer = StoreWriter(out, ABOUT)
    assert writer.next_index == stop and not writer.complete
    write(out).finish(LABELS, 0.2)
    assert sorted(path.name for path in out.iterdir()) == [
        "codes.bin",
        "keys.jsonl",
        "labels.bin",
        "manifest.json",
        "skipped.csv",
    ]
    for path in store.path.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()
    assert StoreWriter(out, ABOUT).complete


def test_a_folder_of_another_job_is_refused(tmp_path: Path) -> None:
    write(tmp_path, stop=14)
    with pytest.raises(StorageError, match="already holds codes of another"):
        StoreWriter(tmp_path, {**ABOUT, "tokenizer_sha256": "cd" * 32})
    write(tmp_path).finish(LABELS, 0.2)
    with pytest.raises(StorageError, match="already holds codes of another"):
        StoreWriter(tmp_path, {**ABOUT, "source": {"kind": "other"}})


def test_wrong_codes_are_not_written(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, {**ABOUT, "codebook": 50})
    with pytest.raises(DataError, match=r"codes must lie in 0 \.\.\. 49, got 0 \.\.\. 50"):
        writer.append(np.array([[[50] + [0] * 8] * 2]), [0], ["a"], 1)
    with pytest.raises(DataError, match=r"expected codes \(1, 2, 9\)"):
        writer.append(np.zeros((1, 2, 8), dtype=np.int64), [0], ["a"], 1)


def test_damage_says_so(store: CodeStore) -> None:
    path = store.path
    codes, labels, manifest = ((path / name).read_bytes() for name in ("codes.bin", "labels.bin", "manifest.json"))
    (path / "codes.bin").write_bytes(codes[:-2])
    with pytest.raises(StorageError, match=r"codes\.bin: expected 1044 bytes by the manifest, got 1042: truncated"):
        CodeStore.open(path)
    (path / "codes.bin").write_bytes(codes[:-2] + bytes([codes[-2] ^ 1, codes[-1]]))
    with pytest.raises(StorageError, match=r"codes\.bin: damaged"):
        CodeStore.open(path).verify()
    (path / "codes.bin").unlink()
    with pytest.raises(StorageError, match=r"codes\.bin: not found"):
        CodeStore.open(path)
    (path / "codes.bin").write_bytes(codes)
    (path / "labels.bin").write_bytes(bytes([labels[0] ^ 1]) + labels[1:])
    with pytest.raises(StorageError, match=r"labels\.bin: its content is not"):
        CodeStore.open(path)
    (path / "labels.bin").write_bytes(labels)
    (path / "manifest.json").write_text(json.dumps({**json.loads(manifest), "format_version": 2}))
    with pytest.raises(StorageError, match="version 1, got 'star_fast code store' version 2"):
        CodeStore.open(path)
    (path / "manifest.json").write_text(
        json.dumps({name: value for name, value in json.loads(manifest).items() if name != "grid"})
    )
    with pytest.raises(StorageError, match="lacks grid"):
        CodeStore.open(path)
    (path / "manifest.json").write_bytes(manifest[:300])
    with pytest.raises(StorageError, match="truncated or not JSON"):
        CodeStore.open(path)
    (path / "manifest.json").unlink()
    with pytest.raises(StorageError, match=r"manifest\.json: not found; a code store is a folder written by"):
        CodeStore.open(path)


def rewrite(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file; a name may lead into its dicts, as in split__held_out; ... removes the entry."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        inner = content
        for step in outer:
            inner = inner[step]
        inner[last] = value
        if value is ...:
            del inner[last]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"images": 10**18}, "labels.bin: expected 4000000000000000000 bytes|images: expected"),
        ({"images": -1}, "images: expected at least 1"),
        ({"images": 0}, "images: expected at least 1"),
        ({"images": 10**400}, "images: expected a whole number"),
        ({"images": "29"}, "images: expected a value of type"),
        ({"images": True}, "images: expected a value"),
        ({"views": []}, "views: expected at least one"),
        ({"views": "ab"}, "views: expected a list"),
        ({"views": [1]}, r"views\[0\]: expected"),
        ({"positions": 10**15}, "grid: expected"),
        ({"positions": -9}, "grid: expected"),
        ({"grid": [9]}, "grid: expected"),
        ({"grid": [10**9, 10**9], "positions": 10**18}, "expected"),
        ({"grid": None}, "grid: expected a list"),
        ({"image_size": 10**9}, "image_size: expected"),
        ({"image_channels": 0}, "image_channels: expected"),
        ({"codebook": 65537}, "codebook: expected"),
        ({"class_names": []}, "class_names: expected at least one"),
        ({"class_names": {"a": 1}}, "class_names: expected a list"),
        ({"class_names": ["ant", "bee"]}, r"labels\.bin: labels must lie in 0 \.\.\. 1"),
        ({"tokenizer_sha256": 7}, "tokenizer_sha256: expected"),
        ({"source": []}, "source: expected a mapping"),
        ({"split": None}, "split: expected"),
        ({"split__held_out": [1, 1]}, "split.held_out: expected rising"),
        ({"split__held_out": [29]}, "split.held_out"),
        ({"split__held_out": [-1]}, "split.held_out"),
        ({"split__held_out": [1.5]}, "split.held_out"),
        ({"split__held_out": [10**30]}, "split.held_out"),
        ({"split__held_out": "abc"}, "split.held_out"),
        ({"split__held_out_share": "x"}, "held_out_share"),
        ({"skipped": [3]}, "skipped"),
        ({"files": {}}, "files: expected an entry codes.bin"),
        ({"files__labels.bin": 3}, "files.labels.bin: expected"),
        ({"view_settings": 3}, "view_settings"),
        ({"format": [[1]] * 9}, "expected 'star_fast code store'"),
    ],
)
def test_a_manifest_that_contradicts_itself(store: CodeStore, changes: dict[str, Any], field: str) -> None:
    rewrite(store.path / "manifest.json", **changes)
    with pytest.raises(StorageError, match=field) as caught:
        CodeStore.open(store.path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    with pytest.raises(StorageError):
        StoreWriter(store.path, ABOUT)


def test_irregular_files(store: CodeStore) -> None:
    for name in ("manifest.json", "labels.bin", "codes.bin", "keys.jsonl"):
        content = (store.path / name).read_bytes()
        (store.path / name).unlink()
        os.mkfifo(store.path / name)
        with pytest.raises(StorageError, match="expected an ordinary file, found a pipe"):
            CodeStore.open(store.path).keys()
        (store.path / name).unlink()
        (store.path / name).symlink_to("/dev/zero")
        with pytest.raises(StorageError, match="device"):
            CodeStore.open(store.path).keys()
        (store.path / name).unlink()
        (store.path / name).write_bytes(content)
    CodeStore.open(store.path).verify()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: lines[:-1], "expected 29 whole lines, got 28"),
        (lambda lines: [*lines, '"x"\n'], "expected 29 whole lines, got 30"),
        (lambda lines: ["3\n", *lines[1:]], "line 1: expected the name of an image"),
        (lambda lines: [*lines[:-1], lines[-1][:-1]], "whole lines"),
        (lambda lines: [lines[0], "[" * 100000 + "\n", *lines[2:]], "line 2: expected the name"),
        (lambda lines: ["\xff\n", *lines[1:]], "line 1"),
    ],
)
def test_keys_that_are_none(store: CodeStore, damage: Any, message: str) -> None:
    path = store.path / "keys.jsonl"
    path.write_text("".join(damage(path.read_text().splitlines(keepends=True))), encoding="latin-1")
    with pytest.raises(StorageError, match=message):
        CodeStore.open(store.path).keys()


def test_names_that_are_no_text_come_back(tmp_path: Path) -> None:
    key, name = "line\nbreak \udce9 \u2028 \x1b[31m", "caf\udce9\x1b"
    writer = StoreWriter(tmp_path, {**ABOUT, "class_names": (name,)})
    writer.append(CODES[:1], [0], [key], 2, [{"index": 1, "key": key, "reason": "damaged"}])
    store = StoreWriter(tmp_path, {**ABOUT, "class_names": (name,)}).finish(np.array([0, 0]), 0.0)
    assert store.keys() == [key] and store.class_names == (name,) and store.manifest["skipped"][0]["key"] == key
    with pytest.raises(DataError) as caught:
        store.class_index("dog")
    assert str(caught.value).isprintable()


def test_verify_looks_at_the_codes_themselves(store: CodeStore) -> None:
    rewrite(store.path / "manifest.json", codebook=65535)  # the store holds code 65535, and every sha256 is right
    with pytest.raises(StorageError, match=r"codes\.bin: codes must lie in 0 \.\.\. 65534, got 65535 in rows 0"):
        CodeStore.open(store.path).verify()


@pytest.mark.parametrize("name", ["codes.bin", "labels.bin", "keys.jsonl"])
def test_bytes_that_were_damaged_before_a_resume_are_not_built_upon(tmp_path: Path, name: str) -> None:
    write(tmp_path, stop=14)
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        StorageError, match=rf"{name}: damaged \(its bytes are not the ones that progress\.json recorded\)"
    ):
        StoreWriter(tmp_path, ABOUT)


def test_bytes_that_were_damaged_before_the_end_are_not_blessed(tmp_path: Path) -> None:
    writer = write(tmp_path)
    content = bytearray((tmp_path / "codes.bin").read_bytes())
    content[100] ^= 4
    (tmp_path / "codes.bin").write_bytes(content)
    with pytest.raises(StorageError, match="damaged"):
        writer.finish(LABELS, 0.2)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": -3}, "next_index: expected"),
        ({"next_index": 10**15}, "next_index: expected"),
        ({"bytes": {}}, "bytes: expected"),
        ({"bytes": 3}, "bytes"),
        ({"bytes__codes.bin": 10**15}, "shorter than"),
        ({"bytes__codes.bin": -1}, "bytes: expected"),
        ({"skipped": [{}]}, "skipped"),
        ({"rows": ...}, "rows: missing"),
        ({"skipped": [{"index": 10**9, "key": "", "reason": ""}]}, "skipped: expected"),
        ({"sha256": []}, "sha256"),
        ({"job_sha256": None}, "job_sha256"),
    ],
)
def test_damaged_progress_says_so(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path, stop=14)
    rewrite(tmp_path / "progress.json", **changes)
    with pytest.raises(StorageError, match=f"{message}.*delete .* to start afresh"):
        StoreWriter(tmp_path, ABOUT)


def test_a_store_of_other_images_is_not_finished(tmp_path: Path) -> None:
    writer = write(tmp_path)
    with pytest.raises(StorageError, match="holds 29 of 30 images, expected 31 to be through"):
        writer.finish(np.append(LABELS, 0), 0.2)


def test_another_jobs_folder_says_what_differs(tmp_path: Path) -> None:
    write(tmp_path, stop=14)
    about = {**ABOUT, "view_settings": {"kind": "small-affine", "seed": 0}}
    with pytest.raises(
        StorageError,
        match=r"\(tokenizer_sha256: abab\w+\.\.\. there, cdcd\w+\.\.\. here\); choose another folder or delete",
    ):
        StoreWriter(tmp_path, {**ABOUT, "tokenizer_sha256": "cd" * 32})
    with pytest.raises(StorageError, match="other classes"):
        StoreWriter(tmp_path, {**ABOUT, "class_names": ("x", "y", "z")})
    write(tmp_path / "b", about).finish(LABELS, 0.2)
    with pytest.raises(StorageError, match=r"view_settings\.seed: 0 there, 1 here"):
        StoreWriter(tmp_path / "b", {**about, "view_settings": {"kind": "small-affine", "seed": 1}})


def test_stores_of_earlier_versions_stay_whole(tmp_path: Path) -> None:
    """A finished store without the entry `pixels` is this job's; a begun one is not, since its images were read by
    another rule. Old progress has no sums.
    """
    write(tmp_path / "old").finish(LABELS, 0.2)
    assert StoreWriter(tmp_path / "old", {**ABOUT, "pixels": "upright"}).complete
    write(tmp_path / "begun", stop=14)
    with pytest.raises(StorageError, match="already holds codes of another"):
        StoreWriter(tmp_path / "begun", {**ABOUT, "pixels": "upright"})
    rewrite(tmp_path / "begun" / "progress.json", sha256=..., about=...)
    write(tmp_path / "begun").finish(LABELS, 0.2)
    assert (tmp_path / "begun" / "manifest.json").read_bytes() == (tmp_path / "old" / "manifest.json").read_bytes()

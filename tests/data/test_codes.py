"""data.codes: what is written comes back bit for bit, and every damage is one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from star_fast.data.codes import CodeStore, StoreWriter
from star_fast.data.sources import DataError, split_indices
from star_fast.storage import StorageError

LABELS = np.array([0, 1, 2] * 10)
ABOUT: dict[str, Any] = {"views": ("plain", "mirrored"), "positions": 9, "grid": (3, 3), "image_size": 12, "codebook": 65536,
                         "class_names": ("ant", "bee", "cat"), "tokenizer_sha256": "ab" * 32, "source": {"kind": "test"}}
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
    assert torch.equal(store.codes(torch.tensor([5, 28, 5]), torch.tensor([[1, 0], [0, 0], [1, 1]])),
                       torch.from_numpy(CODES[np.array(rows)[[5, 28, 5]][:, None], [[1, 0], [0, 0], [1, 1]]]))
    assert store.labels.tolist() == LABELS[rows].tolist()
    assert store.keys() == [f"image {i}\n" for i in rows]
    assert store.manifest["skipped"] == [{"key": "image 11", "reason": "damaged"}]
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
    assert sorted(path.name for path in out.iterdir()) == ["codes.bin", "keys.jsonl", "labels.bin", "manifest.json"]
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
    (path / "manifest.json").write_text(json.dumps({name: value for name, value in json.loads(manifest).items() if name != "grid"}))
    with pytest.raises(StorageError, match="lacks grid"):
        CodeStore.open(path)
    (path / "manifest.json").write_bytes(manifest[:300])
    with pytest.raises(StorageError, match="truncated or not JSON"):
        CodeStore.open(path)
    (path / "manifest.json").unlink()
    with pytest.raises(StorageError, match=r"manifest\.json: not found; a code store is a folder written by"):
        CodeStore.open(path)

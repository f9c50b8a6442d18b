"""data.prepare on several ranks, killed, and in bfloat16: the same bytes whatever happened, and a store that says how
it was made.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from star_fast.config import ConfigError, DataConfig
from star_fast.data import prepare as preparing
from star_fast.data.chunks import EncodedChunk, read_part, write_part
from star_fast.data.codes import CodeStore
from star_fast.data.encoding import Encoder
from star_fast.data.prepare import prepare
from star_fast.data.sources import ImageFolder
from star_fast.data.view_reading import processors_of_this_rank
from star_fast.errors import UserError
from star_fast.model.tokenizer import from_uint8
from star_fast.storage import StorageError
from tests.data.pictures import make_folder, tiny_tokenizer

TOKENIZER = tiny_tokenizer()  # made once: threads that seed torch's generator would get different ones
TEN_CROP = DataConfig(crop_ranges=(1.3,), held_out_share=0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 images of two classes, two of them damaged, and one beside the classes."""
    made = make_folder(tmp_path_factory.mktemp("ranks") / "images", {"oak": 13, "elm": 10}, ".jpg")
    (made / "oak" / "02.jpg").write_bytes((made / "oak" / "02.jpg").read_bytes()[:300])
    (made / "elm" / "07.jpg").write_bytes(b"no image")
    (made / "loose.jpg").write_bytes(b"no class")
    return made


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one rank makes when nothing happens."""
    return content(run(folder, tmp_path_factory.mktemp("ranks") / "whole").path)


def run(folder: Path, out: Path, rank: int = 0, ranks: int = 1, **more: object) -> CodeStore:
    return prepare(
        ImageFolder(folder),
        out,
        TOKENIZER,
        TEN_CROP,
        chunk_images=2,
        batch_views=20,
        rank=rank,
        ranks=ranks,
        progress=False,
        **more,
    )


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def run_ranks(folder: Path, out: Path, ranks: int) -> list[CodeStore]:
    """All ranks of a job at once, each in a thread of its own."""
    stores: list[CodeStore] = []
    threads = [
        threading.Thread(target=lambda rank=rank: stores.append(run(folder, out, rank, ranks)), daemon=True)
        for rank in range(ranks)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return stores


@pytest.mark.parametrize("ranks", [2, 4, 15])
def test_any_number_of_ranks_makes_the_same_store(
    folder: Path, tmp_path: Path, whole: dict[str, bytes], ranks: int
) -> None:
    stores = run_ranks(folder, tmp_path / "store", ranks)  # of 15 ranks three have no chunk
    assert len(stores) == ranks and all(len(store) == 21 for store in stores)
    assert content(tmp_path / "store") == whole
    assert sorted(whole) == ["codes.bin", "keys.jsonl", "labels.bin", "manifest.json", "skipped.csv"]
    stores[0].verify()


def test_everything_is_accounted_for(whole: dict[str, bytes], folder: Path) -> None:
    lines = whole["skipped.csv"].decode().splitlines()
    assert lines[0] == "key,reason" and [line.split(",")[0] for line in lines[1:]] == [
        "loose.jpg",
        "elm/07.jpg",
        "oak/02.jpg",
    ]
    assert whole["keys.jsonl"].count(b"\n") + len(lines) - 1 == sum(1 for _ in folder.rglob("*.jpg"))


def test_a_chunk_in_a_file_of_its_own(tmp_path: Path) -> None:
    chunk = EncodedChunk(
        np.arange(2 * 3 * 4).reshape(2, 3, 4) + 65000,
        [1, 0],
        ["a\n", "\udcff"],
        [{"index": 7, "key": "b", "reason": "damaged"}],
        6,
        9,
    )
    path = tmp_path / "parts" / "part"
    write_part(path, chunk, "job")
    back = read_part(path, "job", 3, 4)
    assert back is not None and np.array_equal(back.codes, chunk.codes) and back[1:] == chunk[1:]
    assert (
        read_part(path, "other job", 3, 4) is None
        and read_part(path, "job", 4, 3) is not None
        and read_part(path, "job", 3, 5) is None
    )
    assert read_part(tmp_path / "absent", "job", 3, 4) is None
    whole = path.read_bytes()
    for place in (0, 70, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert read_part(path, "job", 3, 4) is None
    path.write_bytes(whole[:-1])
    assert read_part(path, "job", 3, 4) is None


def test_what_another_number_of_ranks_left_is_used(
    folder: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 of 2 runs alone first, then one rank finishes: the chunks of rank 1, but a damaged one, are not encoded
    again.
    """
    monkeypatch.setattr(preparing, "_PATIENCE_S", 0.2)
    out = tmp_path / "store"
    with pytest.raises(
        UserError, match=r"rank 0 has not come on for .* hours; see what it said last, and run the same command again"
    ):
        run(folder, out, 1, 2)
    parts = sorted((out / "parts").iterdir())
    assert len(parts) == 6  # every second of twelve chunks
    parts[2].write_bytes(parts[2].read_bytes()[:-1])
    encoded: list[int] = []
    call = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, views: encoded.append(len(views)) or call(self, views))
    run(folder, out)
    assert len(encoded) == 7 and content(out) == whole


def test_a_folder_in_a_chunks_place_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "store/parts/until-00000004").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"until-00000004: cannot be written: Is a directory"):
        run(folder, tmp_path / "store")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_killed_ranks_go_on_to_the_same_bytes(folder: Path, tmp_path: Path, whole: dict[str, bytes], seed: int) -> None:
    """Two ranks, one of them killed at random; then one that finishes alone."""
    chance = random.Random(seed)

    def start(rank: int, ranks: int, pause_s: float) -> subprocess.Popen[str]:
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "localhost",
            "OMP_NUM_THREADS": "1",
            "PATH": "",
            "PYTHONPATH": ".",
        }
        return subprocess.Popen(
            [sys.executable, "-m", "tests.data.ranks_main", str(folder), str(tmp_path / "store"), str(pause_s)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )

    both = [start(rank, 2, 0.1) for rank in range(2)]
    for process in both:
        assert process.stdout is not None and process.stdout.readline() == "begins\n"
    time.sleep(chance.uniform(0.0, 0.5))
    both[chance.randrange(2)].kill()
    time.sleep(0.1)
    for process in both:
        process.kill()
        process.wait()
    assert not (tmp_path / "store" / "manifest.json").exists()
    last = start(0, 1, 0.0)
    assert last.communicate(timeout=120)[0] == "begins\ndone\n"
    assert content(tmp_path / "store") == whole


def test_bfloat16_is_asked_for_and_said(folder: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    store, exact = run(folder, tmp_path / "store", precision="bf16"), np.frombuffer(whole["codes.bin"], "<u2")
    assert store.manifest["precision"] == "bf16" and b'"precision": "fp32"' in whole["manifest.json"]
    said = store.manifest["bf16"]
    plain = store.codes(range(21), [4])[:, 0].numpy() != exact.reshape(21, 10, -1)[:, 4]
    assert said["images"] == 21 and abs(said["codes_that_differ"] - plain.mean()) < 0.02 and 0 < plain.mean() < 0.5
    with pytest.raises(UserError, match=r"precision: bf16 there, fp32 here"):
        run(folder, tmp_path / "store")
    with pytest.raises(ConfigError, match=r"precision: expected 'fp32' or 'bf16', got 'fp8'"):
        run(folder, tmp_path / "other", precision="fp8")


def test_the_encoder_is_the_tokenizer() -> None:
    """Channels last changes nothing but the order in which sums are taken; bfloat16 leaves the search for the nearest
    entry alone.
    """
    views = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codes = Encoder(TOKENIZER, "fp32", 2)(views)
    assert codes.dtype == np.int64 and np.array_equal(codes, TOKENIZER.encode(from_uint8(views)).numpy())
    rounded = Encoder(TOKENIZER, "bf16", 2)
    assert (
        rounded.tokenizer.quantize.embedding.weight.dtype == torch.float32 and rounded.tokenizer.dtype == torch.bfloat16
    )
    assert TOKENIZER.dtype == torch.float32


def test_no_tf32_while_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, str]] = []
    encode = type(TOKENIZER).encode

    def settings() -> tuple[bool, str]:
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

    def watched(tokenizer: object, images: torch.Tensor) -> torch.Tensor:
        seen.append(settings())
        return encode(tokenizer, images)

    torch.set_float32_matmul_precision("high")
    try:
        before = settings()
        monkeypatch.setattr(type(TOKENIZER), "encode", watched)
        Encoder(TOKENIZER, "fp32", 2)(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
        assert before[1] == "high" and seen == [(False, "highest")] and settings() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_ranks_share_of_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12), raising=False)
    for name, told, share in (
        ("LOCAL_WORLD_SIZE", "4", 3),
        ("LOCAL_WORLD_SIZE", "99", 1),
        ("LOCAL_WORLD_SIZE", "x", 12),
        ("WORLD_SIZE", "6", 2),
    ):
        with monkeypatch.context() as patched:
            patched.delenv("LOCAL_WORLD_SIZE", raising=False)
            patched.setenv(name, told)
            assert processors_of_this_rank() == share
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processors_of_this_rank() == 5

"""`star-fast prepare` under kills, second starts, changed settings, hostile images and damaged files: whole, one line,
or the same bytes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from star_fast import cli
from star_fast.data.codes import CodeStore
from star_fast.locks import only_writer
from tests.data.pictures import make_folder

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = [
    "--new-tokenizer.image-size",
    "16",
    "--new-tokenizer.base-channels",
    "4",
    "--new-tokenizer.multipliers",
    "1",
    "1",
    "--new-tokenizer.z-channels",
    "4",
    "--new-tokenizer.codebook",
    "16",
    "--new-tokenizer.steps",
    "60",
    "--new-tokenizer.images-per-step",
    "2",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("source") / "images", {"dark": 4, "light": 4})


def command(images: Path, out: Path, *more: str) -> list[str]:
    return ["prepare", str(images), "--out", str(out), *SETTINGS, *more]


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="module")
def prepared(images: Path) -> Path:
    out = images.parent / "unbroken"
    assert cli.main(command(images, out)) == 0
    return out


@pytest.fixture
def store(prepared: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    for name, data in content(prepared).items():
        (tmp_path / "store" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "store" / name).write_bytes(data)
    return tmp_path / "store"


def refusal(arguments: list[str], capfd: pytest.CaptureFixture, status: int = 2) -> str:
    """The one line that a command ends with."""
    capfd.readouterr()
    assert cli.main(arguments) == status
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_killed_while_it_trains_its_tokenizer_it_goes_on_to_the_same_bytes(
    images: Path, prepared: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes"
    with subprocess.Popen(
        [sys.executable, "-m", "star_fast.cli", *command(images, out)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    ) as process:
        end = time.monotonic() + 120
        while (
            not (out / "tokenizer" / "unfinished.json").exists() and process.poll() is None and time.monotonic() < end
        ):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert cli.main(command(images, out)) == 0  # the dead job's lock does not block
    assert content(out) == content(prepared)


def test_ctrl_c_says_that_the_same_command_goes_on(
    images: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    steps, step = 0, torch.optim.AdamW.step

    def counted(*arguments: object) -> object:
        nonlocal steps
        steps += 1
        if steps == 7:
            signal.raise_signal(signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    assert cli.main(command(images, tmp_path)) == 130
    assert (
        capfd.readouterr().err.splitlines()[-1]
        == "interrupted: 7 of 60 tokenizer steps are kept; the same command goes on where it stopped"
    )
    assert cli.main(command(images, tmp_path)) == 0
    assert steps == 60 and content(tmp_path) == content(prepared)


def test_a_second_job_is_told_who_is_at_work(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("star_fast.locks.job_identity", lambda: "process 1 on another")
    with only_writer(tmp_path, "preparing codes"):
        monkeypatch.undo()
        line = refusal(command(images, tmp_path), capfd)
    assert "preparing codes is writing there (process 1 on another" in line
    assert not content(tmp_path)  # not even a tokenizer was begun


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (
            ["--new-tokenizer.steps", "61"],
            "--new-tokenizer.steps: {out}/tokenizer holds a tokenizer with 60, asked for is 61",
        ),
        (["--new-tokenizer.lr", "0.1"], "--new-tokenizer.lr: "),
        (["--seed", "1"], "--seed: {out}/tokenizer holds a tokenizer trained with 0, asked for is 1"),
        (["--data.held-out-share", "0.4"], "(held_out_share: 0.1 there, 0.4 here)"),
        (["--data.crop-ranges", "1.5"], "(view_settings.crop_ranges: [1.1] there, [1.5] here)"),
    ],
)
def test_changed_settings_on_a_finished_store_are_named(
    images: Path, store: Path, more: list[str], line: str, capfd: pytest.CaptureFixture
) -> None:
    before = content(store)
    assert line.format(out=store) in refusal(command(images, store, *more), capfd)
    assert content(store) == before
    assert cli.main(command(images, store)) == 0  # the same settings open it
    assert content(store) == before


def test_another_tokenizer_does_not_replace_the_stores_own(
    images: Path, store: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    assert cli.main(["prepare", str(images), "--out", str(tmp_path / "other"), *SETTINGS, "--seed", "5"]) == 0
    before = content(store)
    given = ["prepare", str(images), "--out", str(store), "--tokenizer", str(tmp_path / "other" / "tokenizer")]
    assert refusal(given, capfd).startswith(f"error: --tokenizer: {tmp_path / 'other' / 'tokenizer'} is ")
    assert refusal([*given, "--new-tokenizer.steps", "3"], capfd).startswith(
        "error: --new-tokenizer: has no effect with --tokenizer"
    )
    assert content(store) == before


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--new-tokenizer.image-size", "15", "--new-tokenizer.multipliers", "1", "2"],
            "--new-tokenizer.image-size: expected a multiple of the downsampling 2, got 15",
        ),
        (
            ["--new-tokenizer.image-channels", "2"],
            "--new-tokenizer.image-channels: expected 1 (gray) or 3 (RGB), got 2",
        ),
        (["--new-tokenizer.base-channels", "4096"], "--new-tokenizer.base-channels: training "),
        (["--data.crop-ranges", "0.5"], "--data.crop-ranges: expected up to 16 different numbers of 1 ... 16384"),
        (
            ["--data.views", "small-affine", "--data.affine-views", "1000000000000000"],
            "--data.affine-views: expected at most 4096",
        ),
        (["--seed", "-1"], "--seed: expected a whole number from 0"),
        (["--seed", "1" + "0" * 30], "--seed: expected a whole number from 0"),
        (["--device", "foo"], "device: expected cpu"),
        (["--out", "a\0b"], "null byte"),
        (["--out", "x" * 300], "File name too long"),
        (["--out", "/dev/null/x"], "/dev/null"),
    ],
)
def test_settings_are_refused_under_the_name_that_was_typed(
    images: Path,
    tmp_path: Path,
    arguments: list[str],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert line in refusal(["prepare", str(images), "--out", "codes", *arguments], capfd)


def test_hostile_images_cost_nothing_and_names_are_printed_escaped(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    images = make_folder(tmp_path / "images", {"good\x1b[31m": 4, os.fsdecode(b"caf\xe9"): 4})
    Image.new("L", (100_000, 1)).save(images / "good\x1b[31m" / "strip.png")
    Image.new("RGB", (16000, 16000 // 8)).save(images / "good\x1b[31m" / "large.webp", lossless=True)
    Image.new("1", (11000, 11000)).save(images / "good\x1b[31m" / "bomb.png")
    (images / "good\x1b[31m" / "line\nbreak.png").write_bytes(b"none")
    os.mkfifo(images / "good\x1b[31m" / "pipe.png")
    Image.new("L", (9, 9)).save(images / "loose.png")
    assert (
        cli.main(
            ["prepare", str(images), "--out", str(tmp_path / "codes"), *SETTINGS[:-4], "--new-tokenizer.steps", "1"]
        )
        == 0
    )
    out, error = capfd.readouterr()
    assert out.splitlines()[-1].endswith(
        "codes: codes of 8 images x 10 views, 64 a view, 2 classes, 1 images held out, 6 skipped (skipped.csv)"
    )
    assert "Warning" not in error  # Pillow's, which says nothing that the list does not
    skipped = [line for line in error.splitlines() if line.startswith("skipped ")]
    assert len(skipped) == 6 and all(line.isprintable() for line in skipped)
    for name in (
        "strip.png",
        "large.webp",
        "bomb.png",
        "line\\nbreak.png",
        "pipe.png",
        "loose.png: lies beside the class folders",
    ):
        assert sum(name in line for line in skipped) == 1, name
    opened = CodeStore.open(tmp_path / "codes")
    opened.verify()
    assert opened.class_names == ("caf\udce9", "good\x1b[31m")


def flip(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("manifest.json", lambda data: data[:100]),
        ("manifest.json", lambda data: data.replace(b'"images": 8,\n "views"', b'"images": 800000000000000, "views"')),
        ("manifest.json", lambda data: b"[" * 100_000),
        ("manifest.json", lambda data: data.replace(b'"positions": 64', b'"positions": 1e400')),
        ("labels.bin", flip),
        ("labels.bin", lambda data: data[:-1]),
        ("codes.bin", lambda data: data + b"\0"),
        ("codes.bin", lambda data: b""),
        ("tokenizer/tokenizer.safetensors", flip),
        ("tokenizer/tokenizer.json", lambda data: data[:40]),
        ("tokenizer/training.json", lambda data: b"{}"),
    ],
)
def test_a_damaged_store_is_named_in_one_line(
    images: Path, store: Path, name: str, damage: Callable[[bytes], bytes], capfd: pytest.CaptureFixture
) -> None:
    (store / name).write_bytes(damage((store / name).read_bytes()))
    capfd.readouterr()
    assert cli.main(command(images, store)) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and (name in lines[0] or "by the manifest" in lines[0]) and "unexpected" not in lines[0]


def test_a_store_whose_tokenizer_is_gone_says_so(images: Path, store: Path, capfd: pytest.CaptureFixture) -> None:
    (store / "tokenizer" / "tokenizer.json").unlink()
    assert "tokenizer.json: not found, and the codes in" in refusal(command(images, store), capfd)


def test_bytes_damaged_between_a_kill_and_the_next_start(
    images: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("star_fast.data.store_writer.StoreWriter.finish", kill)
        with pytest.raises(Killed):
            cli.main(command(images, tmp_path))
    before = (tmp_path / "codes.bin").read_bytes()
    (tmp_path / "codes.bin").write_bytes(flip(before))
    capfd.readouterr()
    assert cli.main(command(images, tmp_path)) == 2
    assert "codes.bin: damaged" in capfd.readouterr().err
    # What a kill amid a chunk leaves is no damage
    (tmp_path / "codes.bin").write_bytes(before + np.zeros(99).tobytes())
    assert cli.main(command(images, tmp_path)) == 0
    assert content(tmp_path) == content(prepared)


def test_an_error_amid_a_progress_bar_has_a_line_of_its_own(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    def last_line() -> str:
        capfd.readouterr()
        assert cli.main(command(images, tmp_path)) == 2
        return capfd.readouterr().err.splitlines()[-1]

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    assert last_line().startswith("error: not enough memory to train this tokenizer on 2 images of 16 pixels a step")
    monkeypatch.undo()
    monkeypatch.setattr("star_fast.model.tokenizer.VQTokenizer.encode", fail)
    assert last_line().startswith("error: not enough memory to ")
    monkeypatch.undo()
    assert cli.main(command(images, tmp_path)) == 0

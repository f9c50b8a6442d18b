"""What sampling is asked for and cannot do: one line, before anything is written; and what it tells when it can."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from star_fast import cli
from star_fast.errors import UserError
from star_fast.generation import batch, limits
from star_fast.generation.decoder import Decoder
from star_fast.generation.sample import sample_images
from star_fast.storage import StorageError
from tests.generation.small_model import images_of
from tests.reliability.sampling_job import BATCH, IMAGES, names, settings
from tests.reliability.sampling_job import finished as finished  # fixtures
from tests.reliability.sampling_job import model as model
from tests.reliability.sampling_job import one_process as one_process
from tests.reliability.sampling_job import unbroken as unbroken


def refused(capfd: pytest.CaptureFixture, *arguments: str) -> str:
    """The one error line of `star-fast sample`."""
    assert cli.main(["sample", *arguments]) == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--images", str(10**15)), "images: 1000000000000000 of 16 x 16 pixels need 705,767.9 TiB at "),
        (("--images", str(10**30)), "images: expected at most 9007199254740992"),
        (("--pixels", str(10**6), "--images", "1"), "TiB"),
        (("--pixels", str(10**9)), "pixels: expected at most"),
        (("--batch-images", str(10**12)), "batch_images: expected at most"),
        (("--grid-rows", str(10**15)), "grid_rows: expected at most"),
        (
            ("--grid-columns", "30000", "--images", "90000"),
            "grid: 3 rows of 30000 images would be a picture of 2040000 x 208 pixels",
        ),
        (("--top-k", str(10**20)), "top_k must be 0 (all) or a number of tokens below 2^31"),
        (("--cfg-interval", str(10**20)), "cfg_interval must be"),
        (("--temperature", "nan"), "temperature must be"),
        (("--top-p", "inf"), "top_p must be"),
        (("--guidance", "nan"), "guidance must be"),
        (("--guidance", "inf"), "guidance must be"),
        (("--device", "foo"), "device: expected cpu, cuda or cuda:N, got 'foo'"),
        (("--device", "meta"), "expected cpu, cuda or cuda:N"),
        (("--device", "cuda:99999999999999"), "expected cpu, cuda or cuda:N"),
        (("--device", "cpu:7"), "expected cpu, cuda or cuda:N"),
        (("--products", "packed", "--precision", "fp32"), "products 'packed' cannot be had"),
        (("--classes", "9" * 5000), "classes: no class '99999"),
        (("--classes", "3"), "numbers 0 ... 2"),
        (("--classes", "a\x1b[31m\nb"), r"classes: no class 'a\x1b[31m\nb'"),
        (("--out", "x" * 240 + ".npz"), "out: expected a file name of at most 230 bytes, got one of 244"),
        (("--out", "y/" * 3000 + "x.npz"), "File name too long"),
        (("--out", "model/config.json/x.npz"), "config.json/x.npz.parts/.lock: cannot be written: Not a directory"),
        (("--out", "folder.npz"), "folder.npz: a folder; expected a name for the file of images"),
        (("--out", "taken.npz"), "taken.json: is no record of a sampling run, and would be replaced by one"),
        (("--out", "alone.npz"), "alone.npz: exists without its protocol record alone.json"),
        (("--out", "pipe.npz"), "pipe.npz: expected an ordinary file, found a pipe"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_before_anything_is_written(
    arguments: tuple[str, ...],
    line: str,
    model: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "taken.json").write_text('{"my": "settings"}')
    (tmp_path / "alone.npz").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.npz")
    before = names(tmp_path)
    assert line in refused(capfd, "--model", "model", *arguments)
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"RANK": "x"}, "RANK: expected a whole number in 0 ... 0"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: expected a whole number in 1 ... "),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: expected a whole number in 0 ... 1"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE: expected"),
    ],
)
def test_a_launchers_numbers_are_checked(
    environment: dict[str, str], line: str, model: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        sample_images(settings(model, Path("never")))
    assert line in str(caught.value)


def test_a_batch_beyond_the_machines_memory_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "physical_bytes", lambda: 10**6)
    with pytest.raises(
        UserError,
        match=r"batch_images: 64 images of 16 x 16 pixels drawn together need 1\.\d MiB of memory, this machine has "
        r"976\.6 KiB",
    ):
        sample_images(settings(model, tmp_path, images=64, batch_images=64))
    assert not names(tmp_path)


@pytest.mark.parametrize(
    "error",
    [ValueError("row 0 of the logits holds NaN"), MemoryError(), RuntimeError("can't allocate memory: you tried 1 TB")],
)
def test_a_model_that_cannot_be_drawn_from_is_one_line(
    error: Exception, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Decoder, "generate", fail)
    with pytest.raises(UserError, match=r"holds NaN|give a smaller --batch-images"):
        sample_images(settings(model, tmp_path))


BAD_RECORDS = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe",
    b'{"plan": {}, "run": {}}',
    b'{"plan": 1, "run": 2}',
    b'{"plan": {"images": 1e999}}',
    b"[" * 10000,
]


@pytest.mark.parametrize("content", BAD_RECORDS, ids=range(len(BAD_RECORDS)))
def test_damaged_records_and_plans_are_one_line(
    content: bytes, model: Path, finished: Path, capfd: pytest.CaptureFixture
) -> None:
    arguments = (
        "--model",
        str(model),
        "--out",
        str(finished / "images.npz"),
        "--images",
        str(IMAGES),
        "--batch-images",
        str(BATCH),
    )
    (finished / "images.json").write_bytes(content)
    assert "images.json" in refused(capfd, *arguments)
    (finished / "images.npz").unlink()
    (finished / "images.json").unlink()
    (finished / "images.npz.parts").mkdir()
    (finished / "images.npz.parts/plan.json").write_bytes(content)
    line = refused(capfd, *arguments)
    assert "plan.json" in line
    assert f"delete {finished / 'images.npz.parts'} to start again" in line


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("images", "11"),
        ("guidance", None),
        ("seed", -1),
        ("seed", 1.5),
        ("classes", "some"),
        ("image_shape", [16, "x"]),
        ("extra", 1),
    ],
)
def test_a_record_of_wrong_kinds_is_named(field: str, value: object, model: Path, finished: Path) -> None:
    record = json.loads((finished / "images.json").read_text())
    record["plan"][field] = value
    (finished / "images.json").write_text(json.dumps(record))
    with pytest.raises(StorageError, match=rf"images\.json: {field}.*delete it and the \.npz"):
        sample_images(settings(model, finished))


def test_seeds_beyond_the_whole_numbers_of_json_readers_go_on(model: Path, tmp_path: Path) -> None:
    config = settings(model, tmp_path, seed=2**63 - 1)
    sample_images(config)
    assert sample_images(config).drawn == 0


# What the user is told


def test_the_last_line_says_what_was_written(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sample_images(settings(model, tmp_path))
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / 'images.npz'}: 11 images of 16 x 16 pixels (11 drawn in ")
    assert f"images/s); record in {tmp_path / 'images.json'}, grid in {tmp_path / 'images.png'}\n" in out


def test_an_interrupted_job_says_that_it_goes_on(
    model: Path, unbroken: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        "sample",
        "--model",
        str(model),
        "--out",
        str(tmp_path / "images.npz"),
        "--images",
        str(IMAGES),
        "--batch-images",
        str(BATCH),
        "--precision",
        "fp32",
        "--top-k",
        "20",
    ]
    real = batch.Drawer.start

    def interrupt_the_last(drawer: batch.Drawer, first: int, *rest: object) -> object:
        if first == 2 * BATCH:
            raise KeyboardInterrupt
        return real(drawer, first, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(batch.Drawer, "start", interrupt_the_last)
        assert cli.main(arguments) == 130
    last = capfd.readouterr().err.splitlines()[-1]
    assert (
        last
        == f"interrupted: 8 of 11 images are safe in {tmp_path / 'images.npz.parts'}; the same command goes on from "
        "there"
    )
    assert cli.main(arguments) == 0
    assert "(3 drawn in " in capfd.readouterr().out
    assert (tmp_path / "images.npz").read_bytes() == (unbroken / "images.npz").read_bytes()


def test_without_a_model_the_quickstarts_is_taken(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "model: none was given, and there is no runs/digits/model here" in refused(capfd)
    (tmp_path / "runs/digits").mkdir(parents=True)
    (tmp_path / "runs/digits/model").symlink_to(model)
    assert cli.main(["sample", "--images", "2"]) == 0
    assert len(images_of(tmp_path / "samples.npz")) == 2

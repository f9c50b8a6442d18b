"""Sampling over damaged files: what is finished is checked whole, what is damaged is told or drawn again."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from star_fast.generation import job
from star_fast.generation.parts import write_part
from star_fast.generation.sample import sample_images
from star_fast.storage import StorageError
from tests.generation.processes import run_ranks
from tests.generation.small_model import images_of
from tests.reliability.sampling_job import BATCH, FINISHED, IMAGE_BYTES, IMAGES, first_pixel, flip, names, settings
from tests.reliability.sampling_job import finished as finished  # fixtures
from tests.reliability.sampling_job import interrupted as interrupted
from tests.reliability.sampling_job import model as model
from tests.reliability.sampling_job import one_process as one_process
from tests.reliability.sampling_job import unbroken as unbroken

LINE = 39  # bytes of the journal a batch


def test_a_finished_file_is_read_whole_before_it_counts(
    model: Path, finished: Path, capsys: pytest.CaptureFixture
) -> None:
    npz = finished / "images.npz"
    whole, pixels = npz.read_bytes(), first_pixel(npz)
    labels = whole.index(np.arange(3, dtype=np.int64).tobytes())
    for offset in (
        5,
        14,
        40,
        pixels - 20,
        pixels,
        pixels + 5 * IMAGE_BYTES,
        labels,
        labels - 30,
        len(whole) - 1,
        len(whole) - 60,
        len(whole) - 130,
    ):
        npz.write_bytes(whole)
        flip(npz, offset)
        with pytest.raises(
            StorageError, match=r"images\.npz: damaged: .*; delete it and run the same command again"
        ) as caught:
            sample_images(settings(model, finished))
        assert "\n" not in str(caught.value)
    for content in (b"", b"PK", whole[:100], whole[:pixels], whole[:-1], whole + b"x"):
        npz.write_bytes(content)
        with pytest.raises(StorageError, match="damaged"):
            sample_images(settings(model, finished))
    npz.unlink()
    capsys.readouterr()
    assert sample_images(settings(model, finished)).drawn == IMAGES
    assert npz.read_bytes() == whole
    assert sample_images(settings(model, finished)).drawn == 0
    assert f"all {IMAGES} images of 16 x 16 pixels were there already, checked" in capsys.readouterr().out


def test_labels_and_shape_must_be_the_plans(model: Path, finished: Path) -> None:
    """A file that is whole, but not of this job: only its record was kept."""
    npz, record = finished / "images.npz", json.loads((finished / "images.json").read_text())
    other = finished / "other"
    other.mkdir()
    sample_images(settings(model, other, labels="random", grid=False))
    npz.write_bytes((other / "images.npz").read_bytes())
    of_other = json.loads((other / "images.json").read_text())["run"]
    record["run"] |= {name: of_other[name] for name in ("images_crc32", "frame_crc32")}
    (finished / "images.json").write_text(json.dumps(record))
    with pytest.raises(StorageError, match="damaged: expected the labels of the plan"):
        sample_images(settings(model, finished))


def rewritten(npz: Path, old: bytes, new: bytes) -> None:
    """Replace bytes inside a member and make all checksums fit, the record's included: what only a look at the content
    can find.
    """
    with zipfile.ZipFile(npz) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    assert sum(data.count(old) for data in members.values()) == 1
    with zipfile.ZipFile(npz, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data.replace(old, new))
            if name == "arr_0.npy":
                images_crc = zlib.crc32(data.replace(old, new))
    record = json.loads(npz.with_suffix(".json").read_text())
    record["run"] |= {"images_crc32": f"{images_crc:08x}", "frame_crc32": ""}
    npz.with_suffix(".json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"'shape': (11,)", b"[" * 14),
        (b"(11, 16, 16, 3)", b"(16, 11, 16, 3)"),
        (b"'|u1'", b"'|i1'"),
        (b"'<i8'", b"'<f8'"),
        (b"'<i8'", b"'|O' "),
        (b"'shape': (11, 16, 16, 3), }" + b" " * 5, b"'shape': (11, 16, 16, 3), }" + b"[" * 5),
    ],
)
def test_headers_inside_the_file_are_compared_never_evaluated(
    old: bytes, new: bytes, model: Path, finished: Path
) -> None:
    rewritten(finished / "images.npz", old, new)
    with pytest.raises(StorageError, match=r"damaged: expected \{'descr'"):
        sample_images(settings(model, finished))


def test_a_file_of_an_earlier_version_is_checked_by_what_its_record_has(model: Path, finished: Path) -> None:
    record = json.loads((finished / "images.json").read_text())
    del record["run"]["frame_crc32"]
    (finished / "images.json").write_text(json.dumps(record))
    assert sample_images(settings(model, finished)).drawn == 0
    whole = (finished / "images.npz").read_bytes()
    flip(finished / "images.npz", first_pixel(finished / "images.npz") + 9)
    with pytest.raises(StorageError, match="damaged: expected checksum"):
        sample_images(settings(model, finished))
    (finished / "images.npz").write_bytes(whole)
    with zipfile.ZipFile(finished / "images.npz") as archive:
        pixels = archive.read("arr_0.npy")[-40:]
    rewritten(finished / "images.npz", pixels, bytes(40))
    (finished / "images.json").write_text(json.dumps(record))
    with pytest.raises(StorageError, match=r"damaged: expected checksum .* by its record"):
        sample_images(settings(model, finished))


def test_a_damaged_part_is_drawn_again(
    model: Path, unbroken: Path, interrupted: Path, capsys: pytest.CaptureFixture
) -> None:
    parts, images = interrupted / "images.npz.parts", images_of(unbroken / "images.npz")
    for file in ("unfinished.npz", "unfinished.journal"):
        (parts / file).unlink()
    plan = (parts / "plan.json").read_bytes()
    write_part(parts / "good.npy", images[4:8])
    good = (parts / "good.npy").read_bytes()
    (parts / "good.npy").unlink()
    assert np.array_equal(
        np.load(unbroken / "images.npz")["arr_0"][4:8],
        np.frombuffer(good, np.uint8, 4 * IMAGE_BYTES, 128).reshape(4, 16, 16, 3),
    )
    half = bytearray(good)
    half[1000] ^= 1
    for content, drawn in (
        (good, 7),
        (bytes(half), 11),
        (good[:-1], 11),
        (good[:-4], 11),
        (good + b"x", 11),
        (b"", 11),
        (good[:200], 11),
    ):
        parts.mkdir(exist_ok=True)
        (parts / "plan.json").write_bytes(plan)
        (parts / "batch-0000001.npy").write_bytes(content)
        assert sample_images(settings(model, interrupted)).drawn == drawn
        assert ("batch-0000001.npy" in capsys.readouterr().err) == (drawn == 11)
        assert (interrupted / "images.npz").read_bytes() == (unbroken / "images.npz").read_bytes()
        (interrupted / "images.npz").unlink()


def test_a_part_that_another_rank_left_damaged_is_drawn_by_rank_0(
    model: Path, unbroken: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage between delivery and collection: the other rank has gone."""
    parts, real = interrupted / "images.npz.parts", job.write_part
    for file in ("unfinished.npz", "unfinished.journal"):
        (parts / file).unlink()
    damaged = []

    def write_and_damage(path: Path, images: np.ndarray) -> None:
        real(path, images)
        if path.name == "batch-0000001.npy" and not damaged:
            flip(path, 700)
            damaged.append(path)

    monkeypatch.setattr(job, "write_part", write_and_damage)
    monkeypatch.setattr(job, "_PATIENCE_S", 0.5)
    assert sample_images(settings(model, interrupted)).drawn == IMAGES + BATCH
    assert damaged
    assert (interrupted / "images.npz").read_bytes() == (unbroken / "images.npz").read_bytes()


@pytest.mark.parametrize(
    ("name", "offset", "drawn"),
    [
        ("unfinished.npz", lambda start: start + 5 * IMAGE_BYTES, 7),  # a pixel of the second batch
        ("unfinished.npz", lambda start: start + 10 * IMAGE_BYTES, 3),  # of the last
        ("unfinished.npz", lambda start: start, 11),
        ("unfinished.npz", lambda start: 4, 11),
        ("unfinished.npz", lambda start: start - 30, 11),
        ("unfinished.npz", lambda start: 15, 0),  # the checksum, which is written last
        ("unfinished.journal", lambda start: LINE + 3, 7),
        ("unfinished.journal", lambda start: 2 * LINE + 25, 3),
        ("unfinished.journal", lambda start: 33, 11),
    ],
)
def test_a_damaged_unfinished_file_is_kept_up_to_its_last_good_batch(
    model: Path,
    unbroken: Path,
    interrupted: Path,
    name: str,
    offset: Callable[[int], int],
    drawn: int,
    capsys: pytest.CaptureFixture,
) -> None:
    flip(interrupted / "images.npz.parts" / name, offset(first_pixel(unbroken / "images.npz")))
    assert sample_images(settings(model, interrupted)).drawn == drawn
    assert ("not what the journal vouches for" in capsys.readouterr().err) == (drawn > 0)
    assert (interrupted / "images.npz").read_bytes() == (unbroken / "images.npz").read_bytes()
    assert names(interrupted) == FINISHED


def test_what_rank_0_cuts_off_is_drawn_whatever_other_ranks_took_for_safe(
    model: Path, unbroken: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 looked at the sizes before rank 0 checked the bytes: it draws nothing, so rank 0 must."""
    flip(interrupted / "images.npz.parts/unfinished.npz", first_pixel(unbroken / "images.npz"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(job, "_PATIENCE_S", 0.5)
    assert sample_images(settings(model, interrupted)).drawn == IMAGES
    assert (interrupted / "images.npz").read_bytes() == (unbroken / "images.npz").read_bytes()


def test_two_ranks_mend_a_damaged_file(model: Path, unbroken: Path, interrupted: Path) -> None:
    flip(interrupted / "images.npz.parts/unfinished.npz", first_pixel(unbroken / "images.npz") + 5 * IMAGE_BYTES)
    run_ranks(settings(model, interrupted), 2)
    assert (interrupted / "images.npz").read_bytes() == (unbroken / "images.npz").read_bytes()
    assert names(interrupted) == FINISHED

"""Sampling when files are damaged, when others write to the same place, and when it is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from star_fast.generation import job
from star_fast.generation.parts import write_part
from star_fast.generation.sample import sample_images
from star_fast.locks import Busy
from star_fast.storage import StorageError
from tests.generation.processes import run_ranks
from tests.generation.small_model import images_of, journal_of
from tests.reliability.sampling_job import BATCH, FINISHED, IMAGE_BYTES, IMAGES, first_pixel, flip, names, settings
from tests.reliability.sampling_job import finished as finished  # fixtures
from tests.reliability.sampling_job import model as model
from tests.reliability.sampling_job import one_process as one_process
from tests.reliability.sampling_job import unbroken as unbroken

LINE = 39  # bytes of the journal a batch


@pytest.fixture
def interrupted(model: Path, unbroken: Path, tmp_path: Path) -> Path:
    """A folder with all batches in the unfinished file, and its journal."""
    (tmp_path / "images.npz.parts").mkdir()
    plan = json.loads((unbroken / "images.json").read_text())["plan"]
    (tmp_path / "images.npz.parts/plan.json").write_text(json.dumps(plan))
    (tmp_path / "images.npz.parts/unfinished.npz").write_bytes((unbroken / "images.npz").read_bytes())
    (tmp_path / "images.npz.parts/unfinished.journal").write_bytes(journal_of(unbroken / "images.npz", BATCH))
    return tmp_path


# One writer

HOLDER = """
import sys
from star_fast.locks import only_writer
with only_writer(sys.argv[1], 'sampling'):
    print('held', flush=True)
    sys.stdin.read()
"""


def test_a_second_job_on_the_same_name_is_told_who_is_at_it(model: Path, tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "images.npz.parts")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Busy, match=f"images.npz.parts: sampling is writing there .process {holder.pid} on"):
            sample_images(settings(model, tmp_path))
        assert names(tmp_path) == {"images.npz.parts", "images.npz.parts/.lock"}
    finally:
        holder.kill()
        holder.communicate()
    assert sample_images(settings(model, tmp_path)).drawn == IMAGES  # a dead holder blocks nobody
    assert names(tmp_path) == FINISHED


@pytest.mark.parametrize(
    ("rank", "looks"), [("1", 1), ("1", 2), ("0", 1)], ids=["before the lock", "with the lock", "another process"]
)
def test_who_comes_late_leaves_no_folder_behind(
    model: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, rank: str, looks: int
) -> None:
    """Another process finished, and removed the folder of parts, between this one's look at the
    file and its next step.
    """
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(job, "_PATIENCE_S", 0.5)
    real, answers = job.Job.finished, [False] * looks
    monkeypatch.setattr(job.Job, "finished", lambda self: answers.pop() if answers else real(self))
    assert sample_images(settings(model, finished)).drawn == 0
    assert names(finished) == FINISHED


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_folder_may_vanish_under_a_process_that_asks_for_the_lock(
    rank: str, model: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process of this very job finished it in that moment."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")

    def finish_and_fail(folder: Path, _: str) -> None:
        for file in unbroken.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        raise StorageError(f"{folder}/.lock: cannot be written: No such file or directory")

    monkeypatch.setattr(job, "only_writer", finish_and_fail)
    assert sample_images(settings(model, tmp_path)).drawn == 0
    assert names(tmp_path) == FINISHED


# Finished means checked


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


# Leftovers


def test_leftovers_of_dead_jobs_are_removed_and_nothing_else(model: Path, unbroken: Path, interrupted: Path) -> None:
    others = {
        ".other.json.12.tmp",
        ".images.npz.12",
        "images.json.12.tmp",
        ".images.json.x.tmp",
        "images.npz.parts.old",
    }
    for name in (
        ".images.npz.12.tmp",
        ".images.json.12.tmp",
        ".images.png.999999.tmp",
        "images.npz.parts/.batch-0000001.npy.12.tmp",
        "images.npz.parts/.plan.json.12.tmp",
        *others,
    ):
        (interrupted / name).write_bytes(b"half")
    sample_images(settings(model, interrupted))
    assert names(interrupted) == FINISHED | others


def test_a_kill_amid_the_last_removals_is_tidied_by_the_next_run(model: Path, finished: Path, unbroken: Path) -> None:
    plan = json.dumps(json.loads((unbroken / "images.json").read_text())["plan"])
    parts, whole = finished / "images.npz.parts", (finished / "images.npz").read_bytes()
    for left in (
        (),
        (".lock",),
        ("plan.json", ".lock"),
        ("unfinished.journal",),
        ("batch-0000002.npy", "plan.json"),
        (".batch-0000002.npy.7.tmp",),
    ):
        parts.mkdir()
        for name in left:
            (parts / name).write_text(plan if name == "plan.json" else "")
        assert sample_images(settings(model, finished)).drawn == 0
        assert names(finished) == FINISHED
    parts.mkdir()
    (parts / "mine.txt").write_text("keep")
    sample_images(settings(model, finished))
    assert names(parts) == {"mine.txt"}
    (parts / "mine.txt").rename(parts / "batch-0000000.npy")
    # Of another job, interrupted under the same name
    (parts / "plan.json").write_text(plan.replace('"seed": 0', '"seed": 1'))
    sample_images(settings(model, finished))
    assert names(parts) >= {"batch-0000000.npy", "plan.json"}
    assert (finished / "images.npz").read_bytes() == whole


def test_pictures_asked_for_later_are_drawn_from_the_finished_file(model: Path, finished: Path, unbroken: Path) -> None:
    (finished / "images.png").unlink()
    (finished / "images").mkdir()
    (finished / "images/.000003.png.12.tmp").write_bytes(b"half")
    assert sample_images(settings(model, finished, png_folder=True)).drawn == 0
    assert (finished / "images.png").read_bytes() == (unbroken / "images.png").read_bytes()
    assert names(finished / "images") == {f"{index:06d}.png" for index in range(IMAGES)}


class _Killed(BaseException):
    pass


def test_every_fsync_rename_and_removal_may_be_the_last(
    model: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """scripts/kill_and_resume.py does this with processes; here the calls fail, from one of them on, and nothing that
    would tidy up gets through.
    """
    count = 0

    def until(call: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*arguments: object, **named: object) -> object:
            nonlocal count
            count += 1
            if count > last:
                raise _Killed
            return call(*arguments, **named)

        return wrapper

    last, ended = 0, False
    while not ended:
        where = tmp_path / str(last)
        with monkeypatch.context() as patch:
            for name in ("fsync", "replace", "rename", "unlink", "rmdir"):
                patch.setattr(os, name, until(getattr(os, name)))
            count = 0
            try:
                sample_images(settings(model, where))
                ended = True
            except _Killed:
                pass
        sample_images(settings(model, where))
        assert names(where) == FINISHED, last
        assert (where / "images.npz").read_bytes() == (unbroken / "images.npz").read_bytes(), last
        last += 1 if last < 8 or ended else 3  # the first ones begin the files; then every third, which meets each kind
    assert last > 30

"""Sampling when others write to the same place, when it is killed, and after jobs that died.
(Damaged files: test_sampling_damage.py.)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from star_fast.generation import job
from star_fast.generation.sample import sample_images
from star_fast.locks import Busy
from star_fast.storage import StorageError
from tests.reliability.sampling_job import FINISHED, IMAGES, names, settings
from tests.reliability.sampling_job import finished as finished  # fixtures
from tests.reliability.sampling_job import interrupted as interrupted
from tests.reliability.sampling_job import model as model
from tests.reliability.sampling_job import one_process as one_process
from tests.reliability.sampling_job import unbroken as unbroken

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

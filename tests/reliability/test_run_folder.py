"""A run's folder: leftovers are no checkpoints, a full disk costs none, and one job writes at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from star_fast.locks import only_writer
from star_fast.storage import sha256_of_file
from star_fast.training import checkpoint, shards
from tests.reliability.training_job import SMALL, Training

ROOT = Path(__file__).resolve().parents[2]


def test_a_leftover_folder_is_no_checkpoint_and_is_cleared(training: Training) -> None:
    """A full disk leaves step-N.tmp: it once counted as one of the kept, and the last good checkpoint went."""
    left = training.run / "checkpoints/step-9999999.tmp"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x")
    os.mkfifo(left.with_name("step-8888888.tmp"))  # removing it as a folder would wait for a writer
    (training.run / ".config.yaml.4242.tmp").write_bytes(b"x")
    status, _ = training("--train.max-steps", "4", "--train.save-every-steps", "2", "--train.keep-checkpoints", "1")
    assert status == 0
    assert training.checkpoints() == ["step-0000004"]
    assert not list(training.run.glob(".*.tmp"))


def test_pruning_counts_complete_checkpoints_only(tmp_path: Path) -> None:
    for name in ("step-0000002", "step-0000010", "step-0000008.tmp", "step-x", "step-10000000"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints/step-0000099").write_text("a file")
    assert [path.name for path in checkpoint.finished(tmp_path)] == ["step-0000002", "step-0000010", "step-10000000"]
    assert checkpoint.latest(tmp_path).name == "step-10000000"


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "a\0b"])
def test_a_name_that_no_file_system_knows_is_one_line(training: Training, name: str) -> None:
    training.run = training.run / name
    status, line = training()
    assert status == 2
    assert line


@pytest.mark.parametrize("stage", ["0", "1"])
def test_a_full_disk_in_a_save_is_one_line_and_the_last_checkpoint_stays(
    training: Training, tmp_path: Path, stage: str
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("needs the right to mount a small disk")
    try:
        training.run = disk / "run"
        settings = [
            "--train.zero-stage",
            stage,
            "--train.save-every-steps",
            "2",
            "--train.keep-checkpoints",
            "9",
            "--train.max-steps",
            "40",
        ]
        status, line = training(*settings)
        assert status == 2
        assert "the disk is full" in line
        assert training.checkpoints()
        assert not any(name.endswith(".tmp") for name in training.checkpoints())
        newest = checkpoint.latest(training.run)
        for name, file in json.loads((newest / "complete.json").read_text())["files"].items():
            assert sha256_of_file(newest / name) == file["sha256"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_some_checkpoints_stay_for_good(training: Training) -> None:
    assert (
        training(
            "--train.max-steps",
            "10",
            "--train.save-every-steps",
            "2",
            "--train.keep-checkpoints",
            "1",
            "--train.keep-every-steps",
            "4",
        )[0]
        == 0
    )
    assert [checkpoint.step_of(folder) for folder in checkpoint.finished(training.run)] == [4, 8, 10]


def test_the_error_of_safetensors_on_a_full_disk_is_understood(
    monkeypatch: pytest.MonkeyPatch, training: Training
) -> None:
    from safetensors import SafetensorError

    def full(tensors: dict, path: Path, metadata: dict) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(shards, "save_file", full)
    status, line = training("--train.max-steps", "2")
    assert status == 2
    assert "the disk is full" in line
    assert training.checkpoints() == []


def test_a_second_training_on_one_folder_is_told_who_is_there(training: Training) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from star_fast.locks import only_writer\n"
            f"with only_writer({str(training.run)!r}, 'training'): print('held', flush=True); sys.stdin.read()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert holder.stdout.readline() == "held\n"
    status, line = training("--train.max-steps", "2")
    assert status == 2
    assert f"{training.run}: training is writing there (process {holder.pid} on" in line
    assert sorted(path.name for path in training.run.iterdir()) == [".lock"]
    holder.kill()
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    status, _ = training("--train.max-steps", "2")  # a dead job does not block
    assert status == 0


def test_the_lock_is_shared_by_ranks_of_one_job_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"from star_fast.locks import only_writer\nwith only_writer({str(tmp_path)!r}, 'sampling'): print('held')"
    for name in ("MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)

    def second(**environment: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "node7")
    monkeypatch.setenv("MASTER_PORT", "4711")
    with only_writer(tmp_path, "sampling"):
        assert second(RANK="1") == (0, "held\n")
        status, said = second(MASTER_PORT="4712")
        assert status == 1
        assert "Busy" in said
        assert "job at node7:4711" in said
    assert second(MASTER_PORT="4712") == (0, "held\n")
    (tmp_path / ".lock").write_bytes(b"\xff\x00 garbage")
    assert second() == (0, "held\n")


def test_nothing_is_compiled_at_the_first_start(training: Training, tmp_path: Path) -> None:
    """DeepSpeed compiled an op that training never calls: a silent minute, and a lock for good if
    that was interrupted.
    """
    extensions = tmp_path / "extensions"
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "star_fast/train.py"),
            *SMALL,
            "--data.codes",
            str(training.codes),
            "--run",
            str(training.run),
            "--train.max-steps",
            "1",
        ],
        env={**os.environ, "TORCH_EXTENSIONS_DIR": str(extensions), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not extensions.exists() or not list(extensions.rglob("*.*"))

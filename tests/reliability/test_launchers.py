"""Training under the documented launchers: Ctrl-C keeps every step, two jobs at once do not meet on a port, a rank's
own error is heard.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from star_fast.training import checkpoint
from tests.reliability.training_job import SMALL
from tests.training.store import write_store

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "deepspeed": ["deepspeed", "--num_accelerators", "2", str(ROOT / "star_fast/train.py")],
    "torchrun": ["torchrun", "--standalone", "--nproc-per-node", "2", "--", str(ROOT / "star_fast/train.py")],
}
PATIENCE_S = 240


def start(launcher: str, folder: Path, run: str, *more: str) -> subprocess.Popen:
    """A two-rank job in a process group of its own, as a shell starts one."""
    if not (folder / "codes").exists():
        write_store(folder / "codes")
    command = LAUNCHERS[launcher]
    return subprocess.Popen(
        [
            BIN / command[0],
            *command[1:],
            *SMALL,
            "--data.codes",
            str(folder / "codes"),
            "--run",
            str(folder / run),
            *more,
        ],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition: object, process: subprocess.Popen) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"the job did not get so far: {process.communicate()[0][-3000:]}")
        time.sleep(0.02)


def steps_logged(run: Path) -> int:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ctrl_c_under_a_launcher_loses_no_step(launcher: str, tmp_path: Path) -> None:
    """A terminal's Ctrl-C reaches launcher and ranks alike, and the launcher passes on signals of its own on top."""
    job = start(launcher, tmp_path, "run", "--train.max-steps", "100000", "--train.save-every-steps", "100000")
    wait_for(lambda: steps_logged(tmp_path / "run") >= 3, job)
    os.killpg(job.pid, signal.SIGINT)
    output = job.communicate(timeout=PATIENCE_S)[0]
    # A launcher may show a traceback of its own, ours never
    assert f'File "{ROOT / "star_fast"}' not in output, output[-3000:]
    newest = checkpoint.latest(tmp_path / "run")
    assert newest is not None, output[-3000:]
    assert int(newest.name.removeprefix("step-")) == steps_logged(tmp_path / "run") >= 3
    assert (tmp_path / "run/model/model.safetensors").exists(), output[-3000:]


def two_ranks(folder: Path, *more: str) -> list[subprocess.Popen]:
    """Two ranks as srun starts them: by the environment alone."""
    write_store(folder / "codes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        subprocess.Popen(
            [
                sys.executable,
                ROOT / "star_fast/train.py",
                *SMALL,
                "--data.codes",
                "codes",
                "--run",
                "run",
                "--train.max-steps",
                "100000",
                "--train.save-every-steps",
                "100000",
                *more,
            ],
            cwd=folder,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "RANK": rank,
                "WORLD_SIZE": "2",
                "LOCAL_RANK": rank,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]


def test_sigterm_to_one_rank_lets_all_save_the_same_step_and_end_well(tmp_path: Path) -> None:
    ranks = two_ranks(tmp_path)
    wait_for(lambda: steps_logged(tmp_path / "run") >= 2, ranks[0])
    ranks[1].send_signal(signal.SIGTERM)
    outputs = [rank.communicate(timeout=PATIENCE_S)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs[0][-2000:] + outputs[1][-2000:]
    assert checkpoint.step_of(checkpoint.latest(tmp_path / "run")) == steps_logged(tmp_path / "run") >= 2
    assert "go on with --resume" in outputs[0]


def test_a_hang_is_said_by_every_rank_and_ends(tmp_path: Path) -> None:
    """A rank that is stopped, as one on a machine that is gone would be, keeps the other one
    waiting in a collective.
    """
    ranks = two_ranks(tmp_path, "--train.hang-minutes", "0.1")
    try:
        wait_for(lambda: steps_logged(tmp_path / "run") >= 2, ranks[0])
        ranks[1].send_signal(signal.SIGSTOP)
        output = ranks[0].communicate(timeout=PATIENCE_S)[0]
        ranks[1].send_signal(signal.SIGCONT)
        ranks[1].communicate(timeout=PATIENCE_S)
    finally:
        ranks[1].kill()
    assert ranks[0].returncode == 75, output[-3000:]
    said = next(line for line in output.splitlines() if "no progress for 0." in line)
    last = steps_logged(tmp_path / "run")
    assert said.startswith("rank 0:") and any(f"in step {step}: " in said for step in (last, last + 1)), said
    assert "engine.py" in output or "loop.py" in output or "telemetry.py" in output


def test_a_rank_whose_peer_dies_says_so_in_one_line(tmp_path: Path) -> None:
    ranks = two_ranks(tmp_path)
    wait_for(lambda: steps_logged(tmp_path / "run") >= 2, ranks[0])
    ranks[1].kill()
    output = ranks[0].communicate(timeout=PATIENCE_S)[0]
    ranks[1].communicate()
    assert ranks[0].returncode == 2, output[-3000:]
    assert "Traceback" not in output
    assert "error: the connection to another rank is lost" in output


def test_two_jobs_at_once_do_not_meet_on_a_port(tmp_path: Path) -> None:
    jobs = [start("deepspeed", tmp_path, run, "--train.max-steps", "2") for run in ("one", "two")]
    for job, run in zip(jobs, ("one", "two"), strict=True):
        output = job.communicate(timeout=PATIENCE_S)[0]
        assert job.returncode == 0, output[-3000:]
        assert (tmp_path / run / "model/model.safetensors").exists()


def test_an_error_is_said_once_whatever_the_number_of_ranks(tmp_path: Path) -> None:
    job = start("torchrun", tmp_path, "run", "--train.images-per-step", "7")
    output = job.communicate(timeout=PATIENCE_S)[0]
    assert job.returncode != 0
    assert output.count("error: train.images_per_step") == 1, output[-3000:]

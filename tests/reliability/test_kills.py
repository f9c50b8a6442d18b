"""A slice of scripts/kill_and_resume.py: a rank that is lost at a random moment costs nothing but time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_three_kills_of_a_random_rank_leave_the_bytes_of_an_unbroken_run() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "scripts/kill_and_resume.py",
            "--subject",
            "training",
            "--kills",
            "3",
            "--ranks",
            "2",
            "--one-rank",
            "--seed",
            "7",
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "training on 2 ranks: 3 kills of a random rank" in done.stdout and "all equal" in done.stdout

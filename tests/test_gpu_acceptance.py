"""scripts/gpu_acceptance.sh: the order of its stages, what it says of one that fails, its two reports. Python and the
GPU are played by a stand-in.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from star_fast import cli

ROOT = Path(__file__).resolve().parents[1]
STAND_IN = """#!/bin/sh
case "$2" in
  *get_device_properties*) [ -z "$NO_GPU" ] || exit 1; echo "NVIDIA H100 80GB HBM3|90|9.0"; exit ;;
  *find_spec*) for name in $ABSENT; do case "$2" in *"'$name'"*) exit 1 ;; esac; done; exit 0 ;;
  *SUBJECTS*) echo "ops sampling_op"; exit ;;
esac
echo "$*" >> "$CALLS"
echo "output of $*"
[ -n "$KILL" ] && case "$*" in *$KILL*) kill -9 "$(cut -d ' ' -f 4 "/proc/$PPID/stat")" ;; esac
[ -n "$FAIL" ] && case "$*" in *$FAIL*) exit 3 ;; esac
exit 0
"""


class Run:
    """One run of the script with the stand-in."""

    def __init__(self, folder: Path, *parts: str, **environment: str) -> None:
        stand_in = folder / "python"
        stand_in.write_text(STAND_IN)
        stand_in.chmod(0o755)
        (folder / "results").mkdir()
        given = {
            "PYTHON": str(stand_in),
            "RESULTS": str(folder / "results"),
            "CALLS": str(folder / "calls"),
            "PATH": "/usr/bin:/bin",
            **environment,
        }
        done = subprocess.run(
            ["bash", "scripts/gpu_acceptance.sh", *parts],
            cwd=ROOT,
            env={**os.environ, **given},
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr
        self.calls = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
        self.files = sorted(path.name for path in (folder / "results").iterdir())
        self.report, self.details = (
            ((folder / "results" / name).read_text() for name in self.files) if len(self.files) == 2 else ("", "")
        )


def test_from_a_smoke_test_upwards_on_one_screen(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert (
        run.code == 0
        and len(run.files) == 2
        and run.files[0].startswith("gpu_acceptance_")
        and "NVIDIA-H100-80GB-HBM3" in run.files[0]
    )
    order = [
        "doctor",
        "build_ext",
        "doctor --self-test --device cuda",
        "-m pytest -m gpu",
        "--ignore tests/ops",
        "kernel_resources.py --check",
        "prepare digits",
        "train --preset tiny",
        "--resume",
        "sample --model",
        "report --run",
        "throughput.py --device cuda --subject ops --json",
        "benchmarks/sampling.py",
        "benchmarks/training.py",
        "plan_check.py",
        "loading.py",
    ]
    places = [next(index for index, call in enumerate(run.calls) if part in call) for part in order]
    assert places == sorted(places), run.calls
    assert len(run.report.splitlines()) <= 40 and "FAILED" not in run.report and "_details.md" in run.report
    calls = [re.sub(r"/\S*/(?=journey|gpu_)", "", call) for call in run.calls]
    assert all(f"output of {call}" in run.details for call in calls), run.details
    assert not re.search(r"/\S*/(journey|gpu_)", run.details)  # no machine's paths


def test_a_stage_that_fails_says_where_to_look_and_the_rest_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path, FAIL="--self-test")
    assert run.code == 1
    [line] = [line for line in run.report.splitlines() if "FAILED" in line]
    assert "self-test of each kernel" in line and "exit code 3" in line and "star_fast/ops/triton/OP.py" in line
    assert any("plan_check.py" in call for call in run.calls)


def test_what_is_absent_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path, ABSENT="deepspeed nvidia.dali ninja")
    assert run.code == 0
    assert run.report.count("skipped:") >= 4 and "deepspeed or mlxtend is not installed" in run.report
    assert not any("train" in call or "build_ext" in call for call in run.calls)


def test_one_part_runs_alone_on_a_fresh_machine(tmp_path: Path) -> None:
    """Where a call may last ten minutes the parts are called one by one; the sampler is built for each."""
    run = Run(tmp_path, "speed")
    ran = [next((word for word in call.split() if word.endswith(".py")), "doctor") for call in run.calls]
    assert run.code == 0 and ran == [
        "doctor",
        "setup.py",
        *["benchmarks/throughput.py"] * 2,
        *(f"benchmarks/{name}.py" for name in ("sampling", "training", "plan_check", "loading")),
    ]
    assert "scripts/gpu_acceptance.sh speed`" in run.report


def test_a_part_that_there_is_not_is_one_line(tmp_path: Path) -> None:
    run = Run(tmp_path, "speed", "tests")
    assert run.code == 2 and run.err.splitlines() == [
        "error: no part tests: expected some of kernels journey speed checkers"
    ]
    assert not run.calls and not run.files


def test_what_ends_half_way_keeps_its_report(tmp_path: Path) -> None:
    """A stage that kills the script, as a limit from outside would."""
    run = Run(tmp_path, KILL="plan_check.py")
    assert run.code < 0 and "benchmark training | passed" in run.report and "planned" not in run.report
    assert "output of benchmarks/training.py" in run.details


def test_no_gpu_is_one_line(tmp_path: Path) -> None:
    run = Run(tmp_path, NO_GPU="1")
    assert (
        run.code == 2
        and len(run.err.splitlines()) == 1
        and "no CUDA GPU" in run.err
        and not run.files
        and not run.calls
    )


def test_its_commands_and_files_exist(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for call in Run(tmp_path).calls:
        words = call.split()
        for path in [word for word in words if re.match(r"(benchmarks|tests|scripts)/", word)]:
            assert (ROOT / path).exists(), path
        if words[:2] != ["-m", "star_fast.cli"]:
            continue
        with pytest.raises(SystemExit):
            cli.main([words[2], "--help"])
        listed = capsys.readouterr().out
        assert not [word for word in words if word.startswith("--") and word != "--preset" and word not in listed], call


def test_files_that_it_points_to_exist() -> None:
    text = (ROOT / "scripts/gpu_acceptance.sh").read_text()
    named = set(re.findall(r"(?:star_fast|tests|benchmarks)/[\w/]+\.(?:py|md)", text)) - {"star_fast/ops/triton/OP.py"}
    assert len(named) > 8 and not [path for path in named if not (ROOT / path).exists()]

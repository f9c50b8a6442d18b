"""scripts/setup.sh: what is installed when, in both orders; pip is played by a stub that writes down what it was asked
for.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STUB = f"""#!/bin/sh
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") shift 2; [ ! -e fail ] || exit 1; echo "$*" >> pip.log ;;
  "-c import star_fast") ;;
  *) exec {sys.executable} "$@" ;;
esac
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("scripts", "csrc"):
        (tmp_path / name).mkdir()
    scripts = ("scripts/setup.sh", "scripts/environment.sh", "scripts/constraints.txt")
    for name in (*scripts, "pyproject.toml", "setup.py", "csrc/schema.cpp"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def asked_for(project: Path, *arguments: str, code: int = 0) -> list[str]:
    """What one run of setup.sh asks pip for: 'torch', 'star_fast', 'dali'."""
    log = project / "pip.log"
    log.write_text("")
    environment = {**os.environ, "PYTHON": str(project / "python")}
    done = subprocess.run(
        ["bash", "scripts/setup.sh", *arguments], cwd=project, env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    lines = log.read_text().splitlines()
    assert all(line.endswith("-c scripts/constraints.txt") for line in lines)
    return [
        next(
            name for word, name in (("nvidia-dali", "dali"), (" -e ", "star_fast"), ("torch", "torch")) if word in line
        )
        for line in lines
    ]


def test_quickstart_first(project: Path) -> None:
    assert asked_for(project) == ["torch", "star_fast"]
    assert asked_for(project) == []
    assert asked_for(project, "--tests") == ["dali"]
    assert asked_for(project, "--tests") == asked_for(project) == []


def test_tests_first(project: Path) -> None:
    assert asked_for(project, "--tests") == ["torch", "star_fast", "dali"]
    assert asked_for(project) == asked_for(project, "--tests") == []


def test_other_versions_are_installed_again(project: Path) -> None:
    asked_for(project, "--tests")
    with (project / "scripts/constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert asked_for(project) == ["torch", "star_fast"]
    assert asked_for(project, "--tests") == ["dali"]


def test_what_failed_is_not_taken_for_done(project: Path) -> None:
    asked_for(project)
    (project / "fail").touch()
    assert asked_for(project, "--tests") == []  # the other tests are run without it
    (project / "fail").unlink()
    assert asked_for(project, "--tests") == ["dali"]


def test_an_unknown_argument(project: Path) -> None:
    assert asked_for(project, "--test", code=2) == [] and not (project / ".venv").exists()


def test_the_tests_get_dali_and_the_quickstart_does_not_wait_for_it() -> None:
    assert "\nscripts/setup.sh --tests\n" in (ROOT / "scripts/test.sh").read_text()
    assert "\nscripts/setup.sh\n" in (ROOT / "scripts/quickstart.sh").read_text()
    pinned = dict(
        line.split("==") for line in (ROOT / "scripts/constraints.txt").read_text().splitlines() if "==" in line
    )
    assert "nvidia-dali-cuda130" in pinned


def test_what_the_tests_run_as_a_program_is_installed_and_pinned() -> None:
    """Another version of a linter or a type checker finds other faults in the same code."""
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    pinned = [line.partition("==")[0] for line in (ROOT / "scripts/constraints.txt").read_text().splitlines()]
    for name in ("ruff", "mypy"):
        assert any(one.startswith(f"{name}>=") for one in extra) and name in pinned

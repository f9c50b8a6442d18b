"""The package's types as mypy reads them, with the settings of pyproject.toml; and that others' checkers find them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "star_fast").rglob("*.py"))
# What the settings have to refuse, each line one thing
WRONG = """\
from star_fast.ops.swiglu import swiglu

swiglu("no tensor")  # arg-type
count: int = None  # assignment
def unsaid(x): return x  # no-untyped-def
def loop() -> int: return "text" + 1  # operator
same = 1 == "1"  # comparison-overlap
fine = 1  # type: ignore[assignment] # unused-ignore
"""


def checked(*arguments: str) -> tuple[int, str]:
    """mypy's exit code and words. Its cache stays in the project: a second run takes seconds."""
    command = [sys.executable, "-m", "mypy", "--no-color-output", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_type_checker_is_content() -> None:
    code, told = checked()
    assert code == 0, told
    assert f"no issues found in {len(SOURCES)} source files" in told  # all of the package, nothing left out


def test_the_type_checker_would_tell(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text(WRONG)
    code, told = checked(str(wrong))
    expected = [(number, line.rpartition("# ")[2]) for number, line in enumerate(WRONG.splitlines(), 1) if "# " in line]
    found = re.findall(r"wrong\.py:(\d+): error: .*\[([a-z-]+)\]$", told, re.MULTILINE)
    assert code == 1 and [(int(number), kind) for number, kind in found] == expected, told


def test_only_kernels_may_lack_types() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    own = [part for part in settings["overrides"] if any(name.startswith("star_fast") for name in part["module"])]
    assert [part["module"] for part in own] == [["star_fast.ops.triton.*"]]
    assert settings["files"] == ["star_fast"] and "exclude" not in settings


def test_what_the_type_checker_overlooks_has_a_reason() -> None:
    lines = [(path, line) for path in SOURCES for line in path.read_text().splitlines() if "type: ignore" in line]
    for path, line in lines:
        assert re.search(r"# type: ignore\[[a-z-]+\]  # \w", line), f"{path}: {line.strip()}"


def test_other_packages_are_told_of_the_types(tmp_path: Path) -> None:
    """py.typed lies in what is installed (setuptools takes it along by itself): without it a type checker takes
    everything of star_fast for Any.
    """
    build = ["egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(tmp_path / "lib")]
    environment = {**os.environ, "STAR_FAST_NO_EXT": "1"}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *build], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lib/star_fast/py.typed").exists() and (tmp_path / "lib/star_fast/api.py").exists()

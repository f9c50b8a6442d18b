"""What travels in the sdist and in the wheel that is built from it: lists and metadata, nothing compiled.

scripts/wheel_check.sh compiles, installs into a fresh environment and runs what is installed.
"""

from __future__ import annotations

import configparser
import email
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import star_fast

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COPIED = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE")


def hook(folder: Path, name: str, out: Path) -> Path:
    """What pip calls to build: an archive in `out`, of the project in `folder`, without the extension."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.{name}(sys.argv[1]))"
    environment = {**os.environ, "STAR_FAST_NO_EXT": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of a copy of this tree, with all that may lie about in one."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("sdist")
    for name in COPIED:
        shutil.copy(ROOT / name, tree / name)
    for name in ("star_fast", "csrc", "tests/csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (tree / "tests" / "test_anything.py").touch()
    for name in ("_C.cpython-311-x86_64-linux-gnu.so", "ops/__pycache__/dispatch.cpython-311.pyc"):
        (tree / "star_fast" / name).parent.mkdir(exist_ok=True)
        (tree / "star_fast" / name).touch()
    return hook(tree, "build_sdist", out)


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder, out = tmp_path_factory.mktemp("from_sdist"), tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (project,) = folder.iterdir()
    return zipfile.ZipFile(hook(project, "build_wheel", out))


def files_of(folder: str) -> set[str]:
    """What belongs to the package of a folder of this tree."""
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }


def test_the_sdist_has_all_that_a_wheel_is_compiled_from_and_nothing_that_lay_about(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {member.name.split("/", 1)[1] for member in archive if member.isfile()}
    made = {name for name in held if name in ("PKG-INFO", "setup.cfg") or name.startswith("star_fast.egg-info/")}
    assert held - made == {*COPIED, *files_of("star_fast"), *files_of("csrc")}


def test_the_wheel_has_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    about = f"star_fast-{star_fast.__version__}.dist-info"
    assert Path(wheel.filename or "").name == f"star_fast-{star_fast.__version__}-py3-none-any.whl"
    records = {f"{about}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt")}
    assert set(wheel.namelist()) == files_of("star_fast") | records | {f"{about}/licenses/LICENSE"}
    assert wheel.read("star_fast/cli.py") == (ROOT / "star_fast" / "cli.py").read_bytes()


def test_the_wheel_says_what_it_is_and_what_it_needs(wheel: zipfile.ZipFile) -> None:
    about = f"star_fast-{star_fast.__version__}.dist-info"
    metadata = email.message_from_bytes(wheel.read(f"{about}/METADATA"))
    assert metadata["Name"] == "star_fast" and metadata["Version"] == star_fast.__version__
    assert metadata["License-Expression"] == PROJECT["license"]
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert [line.replace(" ", "") for line in needed] == [line.replace(" ", "") for line in PROJECT["dependencies"]]
    assert set(metadata.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    assert str(metadata.get_payload()).startswith((ROOT / "README.md").read_text().splitlines()[0])
    entries = configparser.ConfigParser()
    entries.read_string(wheel.read(f"{about}/entry_points.txt").decode())
    assert dict(entries["console_scripts"]) == {"star-fast": "star_fast.cli:main"}


def test_the_script_refuses_what_it_does_not_know() -> None:
    done = subprocess.run(
        ["bash", ROOT / "scripts/wheel_check.sh", "--gpu"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr == "usage: scripts/wheel_check.sh [--cuda]\n" and not done.stdout

"""Mutation spot-check: does a test fail where the code is wrong? Each fault of tests/faults.txt is put into a copy of
the tree, one at a time, and the tests that are named for it must fail.

    python tests/mutation_check.py [--list] [--only NAME ...] [--jobs 2] [--save]

faults.txt is written as a diff: "@@ FILE" and "tests: FILES" hold for the faults below them; "# NAME: what goes wrong"
begins a fault, "- " lines are the text that must be in the file exactly once, "+ " lines what takes its place. A fault
is caught when a test fails that passes without it. An error of import, syntax or collection catches nothing: the fault
is badly made. Faults in csrc/ are compiled, so they need a compiler and some minutes; they share a copy.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import multiprocessing
import os
import platform
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ROOT / "tests/faults.txt"
PAGE = ROOT / "benchmarks/results/mutations.md"
_PATIENCE_S = 900  # of one run of pytest
_FAILED = re.compile(r"^FAILED (?P<test>\S+?\.py::.*?)(?: - (?P<reason>.*))?$", re.MULTILINE)
_BADLY_MADE = ("SyntaxError", "IndentationError", "ImportError", "ModuleNotFoundError", "NameError")


class Fault(NamedTuple):
    """One wrong edit, and the tests that must notice it."""

    name: str
    harm: str
    file: str
    tests: tuple[str, ...]
    old: str
    new: str

    def wrong(self, text: str) -> str:
        """The file's text with the fault in it. Raises ValueError unless `old` is there exactly once."""
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: {self.file} holds its text {found} times, expected once: {self.old!r}")
        return text.replace(self.old, self.new)


class Outcome(NamedTuple):
    """What the tests said of a fault."""

    verdict: str  # "caught", "survived" or "badly made"
    by: str  # the test that failed, or what happened instead
    seconds: float


def read_faults(text: str) -> list[Fault]:
    """The faults of a text as tests/faults.txt is written. Raises ValueError at a line that has no place."""
    faults: list[Fault] = []
    file, tests = "", ()
    name, harm, old, new = "", "", [], []

    def close() -> None:
        if name:
            if not (old and file and tests):
                raise ValueError(f"faults: {name} needs a file, tests and a text to replace")
            faults.append(Fault(name, harm, file, tests, "\n".join(old), "\n".join(new)))

    for line in [*text.splitlines(), "@@ "]:
        mark, rest = line[:2], line[2:]
        if mark in ("@@", "# "):
            close()
            name, harm, old, new = "", "", [], []
        if mark == "@@":
            file, tests = rest.strip(), ()
        elif mark == "# ":
            name, _, harm = rest.partition(": ")
        elif line.startswith("tests: "):
            tests = tuple(line.split()[1:])
        elif mark in ("- ", "+ "):
            (old if mark == "- " else new).append(rest)
        elif line:
            raise ValueError(f"faults: expected @@, tests:, #, - or + at the start, got {line!r}")
    if len({fault.name for fault in faults}) != len(faults):
        raise ValueError("faults: a name stands there twice")
    return faults


def tracked() -> list[str]:
    """The files of the tree that git knows, and the built extension."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    built = (str(path.relative_to(ROOT)) for path in ROOT.glob("star_fast/_C*.so"))
    return [name for name in (*listed.split("\0"), *built) if (ROOT / name).is_file()]


class Copy:
    """A copy of the tree, to be broken and mended again.

    Args:
        files: their paths within the tree.
    """

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        self.folder = folder
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
        # Without byte code: two edits within a second may leave a file's time and size as they were
        paths = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
        self.environment = {
            **os.environ,
            "PYTHONPATH": paths,
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "300",
        }

    def test_with(self, fault: Fault) -> Outcome:
        """Run its tests with the fault in the copy, compiled where that is needed; then all is as before."""
        path, built = self.folder / fault.file, list(self.folder.glob("star_fast/_C*.so"))
        before = {kept: kept.read_bytes() for kept in (path, *built)}
        path.write_text(fault.wrong(path.read_text()))
        try:
            if fault.file.startswith("csrc/"):
                done = self._build()
                if done.returncode:
                    return Outcome("badly made", f"does not compile: {done.stdout[-200:]}", 0.0)
            return self.test(fault.tests)
        finally:
            for kept, content in before.items():
                kept.write_bytes(content)

    def test(self, files: Sequence[str]) -> Outcome:
        """Run tests until one fails, in a process that has loaded torch already."""
        began = time.monotonic()
        said = self.folder / "pytest.txt"
        process = _PROCESSES.Process(target=_pytest, args=(self.folder, self.environment, said, tuple(files)))
        process.start()
        process.join(_PATIENCE_S)
        seconds = time.monotonic() - began
        if process.exitcode is None:
            process.kill()
            process.join()
            return Outcome("badly made", f"no end within {_PATIENCE_S} s", seconds)
        if process.exitcode == 0:
            return Outcome("survived", "", seconds)
        text = said.read_text()
        failed = _FAILED.search(text)
        if process.exitcode != 1 or not failed or (failed["reason"] or "").startswith(_BADLY_MADE):
            last = " ".join(text.strip().splitlines()[-1:])
            return Outcome("badly made", f"exit {process.exitcode}: {last[:120]}", seconds)
        return Outcome("caught", failed["test"], seconds)

    def _build(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=self.folder,
            env=self.environment | {"STAR_FAST_NO_CUDA": "1"},
            capture_output=True,
            text=True,
            check=False,
        )


# Forked off one that has imported what takes seconds; star_fast and the tests each imports afresh, from its copy
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["torch", "torch.testing", "torch._dynamo", "triton", "deepspeed", "pytest"])


def _pytest(folder: Path, environment: dict[str, str], said: Path, files: Sequence[str]) -> None:
    """The body of such a process: pytest on a copy, its words into the file `said`, its status as the exit status."""
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ.update(environment)
    sys.dont_write_bytecode = True
    sys.path[:] = [str(folder), *(path for path in sys.path if not Path(path).resolve().is_relative_to(ROOT / "tests"))]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("star_fast", "tests")]:
        del sys.modules[name]
    import pytest

    status = pytest.main(["-x", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", *files])
    sys.stdout.flush()
    os._exit(int(status))


def check(faults: Sequence[Fault], jobs: int) -> dict[str, Outcome]:
    """An outcome for each fault, by name. Where the tests fail without it nothing can be judged: it is badly made."""
    groups: dict[tuple[str, ...], list[Fault]] = {}
    for fault in faults:
        groups.setdefault(fault.tests, []).append(fault)
    compiled = [tests for tests, those in groups.items() if any(fault.file.startswith("csrc/") for fault in those)]
    files = tracked()
    tasks = [compiled, *([tests] for tests in groups if tests not in compiled)]  # one copy compiles: later, only a part
    with (
        tempfile.TemporaryDirectory(prefix="mutations-") as folder,
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=len(groups) + len(faults), unit="run") as bar,
    ):
        copies: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        for number in range(jobs):
            copies.put(Copy(Path(folder, str(number)), files))

        def judged(task: list[tuple[str, ...]]) -> dict[str, Outcome]:
            copy = copies.get()
            try:
                return {name: outcome for tests in task for name, outcome in judged_by(tests, copy)}
            finally:
                copies.put(copy)

        def judged_by(tests: tuple[str, ...], copy: Copy) -> Iterator[tuple[str, Outcome]]:
            without = copy.test(tests)
            bar.update()
            for fault in groups[tests]:
                outcome = Outcome("badly made", f"the tests fail without it: {without.by}", 0.0)
                if without.verdict == "survived":
                    outcome = copy.test_with(fault)
                if outcome.verdict != "caught":
                    bar.write(f"{fault.name}: {_caught_by(outcome)}", file=sys.stderr)
                bar.update()
                yield fault.name, outcome

        outcomes = {name: outcome for found in pool.map(judged, tasks) for name, outcome in found.items()}
    return {fault.name: outcomes[fault.name] for fault in faults}


def total(outcomes: dict[str, Outcome]) -> str:
    """One sentence."""
    caught = sum(outcome.verdict == "caught" for outcome in outcomes.values())
    seconds = sum(outcome.seconds for outcome in outcomes.values())
    return f"{caught} of {len(outcomes)} faults were caught by a test, in {seconds / 60:.0f} minutes of tests."


def page(faults: Sequence[Fault], outcomes: dict[str, Outcome]) -> str:
    """The page in benchmarks/results."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "deepspeed", "pytest"))
    rows = [
        f"| {fault.name} | {fault.harm} | `{fault.file}` | {_caught_by(outcomes[fault.name])} "
        f"| {outcomes[fault.name].seconds:.0f} |"
        for fault in faults
    ]
    return "\n".join(
        [
            "# Faults put in by hand",
            "",
            f"`python tests/mutation_check.py --save`, {datetime.date.today()}, Python {platform.python_version()}, "
            f"{versions}.",
            "Each fault of [`tests/faults.txt`](../../tests/faults.txt) is put into a copy of the tree, alone, and the",
            f"tests named there are run until one fails. {total(outcomes)}",
            "",
            "| fault | what goes wrong | file | caught by | s |",
            "|---|---|---|---|--:|",
            *rows,
            "",
        ]
    )


def _caught_by(outcome: Outcome) -> str:
    return f"`{outcome.by.partition('[')[0]}`" if outcome.verdict == "caught" else f"{outcome.verdict} {outcome.by}"


def main() -> int:
    """The command line. 0: all faults were caught."""
    parser = argparse.ArgumentParser(description="Put faults in by hand; see whether a test fails.")
    parser.add_argument("--list", action="store_true", help="name the faults, run nothing")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults")
    parser.add_argument("--jobs", type=int, default=1, help="copies of the tree that are tested at once")
    parser.add_argument("--save", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    given = parser.parse_args()
    os.environ.setdefault("TRITON_INTERPRET", "1")  # as tests/conftest.py, but before Triton is imported
    faults = read_faults(FAULTS.read_text())
    if unknown := set(given.only or ()) - {fault.name for fault in faults}:
        parser.error(f"no fault is called {', '.join(sorted(unknown))}; see --list")
    faults = [fault for fault in faults if not given.only or fault.name in given.only]
    for fault in faults:
        fault.wrong((ROOT / fault.file).read_text())
    table = Table("fault", "what goes wrong", *(() if given.list else ("caught by", "s")))
    outcomes = {} if given.list else check(faults, given.jobs)
    for fault in faults:
        told = [] if given.list else [_caught_by(outcomes[fault.name]), f"{outcomes[fault.name].seconds:.0f}"]
        table.add_row(fault.name, fault.harm, *told)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    if given.list:
        return 0
    print(total(outcomes))
    if given.save:
        PAGE.write_text(page(faults, outcomes))
    return int(any(outcome.verdict != "caught" for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())

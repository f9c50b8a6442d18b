"""Throw damaged files and absurd command lines at everything that star_fast reads, and see that nothing runs, crashes, hangs, bloats or shows a traceback.

    python scripts/fuzz.py [--inputs 100000] [--seconds S] [--seed 0] [--subject NAME ...] [--out FOLDER] [--record FILE]
    python scripts/fuzz.py --replay FOLDER/example.json

Every input must end with success or with one line that says what is wrong, within 1 s + 10 ms a kilobyte and 300 MB over what the process held before.
The exit status is 1 if one did not; of each kind of failure one example is kept in --out. Seeded: input n of a subject is the same in every run.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch comes: workers are forked, and many readers are timed on one core
os.environ["TQDM_DISABLE"] = "1"  # the readers' bars

import argparse
import base64
import dataclasses
import gc
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch._dynamo  # noqa: E402 (an optimizer loads it at its first step: not within an input's second)
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from tqdm import tqdm  # noqa: E402

from scripts.fuzzing import trial  # noqa: E402
from scripts.fuzzing.trial import FAILURES, Case, Outcome, Subject  # noqa: E402

_COLUMNS = ("inputs", "accepted", "refused", *FAILURES)


class Tally:
    """Counts by subject, and one example of each kind of failure."""

    def __init__(self, subjects: Sequence[Subject]) -> None:
        self.counts: dict[str, Counter[str]] = {subject.name: Counter() for subject in subjects}
        self.seconds: Counter[str] = Counter()
        self.failures: dict[tuple[str, ...], list[Outcome]] = {}
        self.slowest = self.fattest = Outcome("", 0, "")

    def add(self, outcome: Outcome) -> None:
        """Count one outcome."""
        self.counts[outcome.subject].update(["inputs", *(outcome.failures or [outcome.verdict])])
        self.seconds[outcome.subject] += outcome.seconds
        if outcome.failures:
            same = (outcome.failures[0], outcome.kind, outcome.where or outcome.subject)
            self.failures.setdefault(same, []).append(outcome)
        self.slowest = max(self.slowest, outcome, key=lambda one: one.seconds)
        self.fattest = max(self.fattest, outcome, key=lambda one: one.extra_bytes)

    @property
    def rows(self) -> list[tuple[str, list[int]]]:
        """(subject, counts in the order of the columns), and the sum."""
        total = sum(self.counts.values(), Counter())
        return [(name, [counts[column] for column in _COLUMNS]) for name, counts in (*self.counts.items(), ("all", total))]

    def milliseconds(self, name: str) -> float:
        """Mean time of a subject's inputs."""
        counts, seconds = (self.counts, self.seconds) if name in self.counts else ({name: sum(self.counts.values(), Counter())}, {name: sum(self.seconds.values())})
        return 1000 * seconds[name] / max(1, counts[name]["inputs"])


def main() -> int:
    """0 if every input ended as it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="how many, dealt to the subjects by their shares")
    parser.add_argument("--seconds", type=float, default=3600, help="end after so long, with what was done")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--subject", action="append", help="only subjects whose name contains this; may be given again")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "star_fast-fuzz", help="folder for examples of failures")
    parser.add_argument("--record", type=Path, help="write the result as Markdown")
    parser.add_argument("--replay", type=Path, help="run one kept example again, and show what it does")
    parser.add_argument("--goods", type=Path, help="keep the good files here, or take them from here")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    try:
        goods = arguments.goods or scratch / "goods"
        make_goods(goods)
        from scripts.fuzzing.subjects import all_subjects
        subjects = all_subjects()
        if arguments.replay:
            return replay(arguments.replay, subjects, goods, scratch)
        chosen = [subject for subject in subjects if not arguments.subject or any(part in subject.name for part in arguments.subject)]
        if not chosen:
            parser.error(f"no such subject; there are: {', '.join(subject.name for subject in subjects)}")
        started = time.monotonic()
        tally = run(chosen, arguments.inputs, arguments.seconds, arguments.seed, goods, scratch)
        seconds = time.monotonic() - started
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    show(tally, seconds)
    keep(tally, arguments.out)
    if arguments.record:
        arguments.record.write_text(record(tally, chosen, arguments.seed, seconds))
    return 1 if tally.failures else 0


def make_goods(folder: Path) -> None:
    """The good files, made in a process of their own; the training in it compiles DeepSpeed's op where that was never done."""
    if (folder / "fuzz_canary_module.py").exists():  # the last one to be written
        return
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, "-m", "scripts.fuzzing.goods", str(folder)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"fuzz: the good files could not be made:\n{done.stdout[-5000:]}")


def jobs_of(subjects: Sequence[Subject], inputs: int) -> list[tuple[int, int]]:
    """(place of the subject, number of the input), every subject spread evenly over the run, at least one of each."""
    shares = sum(subject.share for subject in subjects)
    counts = [max(1, round(inputs * subject.share / shares)) for subject in subjects]
    return [job for _, job in sorted(((number + 0.5) / count, (place, number)) for place, count in enumerate(counts) for number in range(count))]


def run(subjects: Sequence[Subject], inputs: int, seconds: float, seed: int, goods: Path, scratch: Path) -> Tally:
    """Try the inputs until they or the seconds are used up."""
    tally, end, jobs = Tally(subjects), time.monotonic() + seconds, jobs_of(subjects, inputs)
    tqdm.monitor_interval = 0  # its thread would not survive the forks
    gc.collect()
    gc.freeze()
    with tqdm(total=len(jobs), desc="fuzzing", unit="input", disable=False, dynamic_ncols=True, mininterval=1) as bar:
        for outcome in trial.run(subjects, jobs, seed, goods, scratch):
            tally.add(outcome)
            bar.update()
            if outcome.failures:
                bar.set_postfix_str(f"{sum(map(len, tally.failures.values()))} failures of {len(tally.failures)} kinds", refresh=False)
            if time.monotonic() > end:
                break
    return tally


def show(tally: Tally, seconds: float) -> None:
    """The table, and what failed."""
    table = Table("subject", *_COLUMNS, "ms each", title="Damaged inputs")
    for name, numbers in tally.rows:
        table.add_row(name, *(f"[red]{number}[/]" if column in FAILURES and number else str(number) for column, number in zip(_COLUMNS, numbers, strict=True)),
                      f"{tally.milliseconds(name):.1f}")
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    total = tally.rows[-1][1][0]
    console.print(f"{total} inputs in {seconds:.0f} s, {total / seconds:.0f} a second; slowest {tally.slowest.seconds:.2f} s ({tally.slowest.subject} {tally.slowest.number}), "
                  f"fattest {tally.fattest.extra_bytes / 2**20:.0f} MiB ({tally.fattest.subject} {tally.fattest.number})", highlight=False)
    for (failure, kind, where), outcomes in sorted(tally.failures.items(), key=lambda item: -len(item[1])):
        first = outcomes[0]
        print(f"{len(outcomes)} x {failure} {kind} at {where}: {first.subject} {first.number}: {first.case.change[:150] if first.case else ''}")


def keep(tally: Tally, out: Path) -> None:
    """One example of each kind of failure, the smallest: its input and what it did."""
    for (failure, kind, where), outcomes in tally.failures.items():
        first = min((outcome for outcome in outcomes if outcome.case), key=lambda outcome: outcome.case.size)
        case = dataclasses.asdict(first.case)
        case["content"] = None if first.case.content is None else base64.b64encode(first.case.content).decode()
        name = re.sub(r"\W+", "-", f"{failure} {kind} {where or first.subject}").strip("-")[:120]
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(json.dumps({"subject": first.subject, "number": first.number, "failure": failure, "kind": kind, "where": where, "count": len(outcomes),
                                                      "seconds": round(first.seconds, 3), "extra_mib": first.extra_bytes >> 20, "told": first.told, "case": case}, indent=1))
    if tally.failures:
        print(f"examples in {out}; run one again with --replay FILE")


def replay(path: Path, subjects: Sequence[Subject], goods: Path, scratch: Path) -> int:
    """Run a kept example again, in a process of its own; 0 if it now ends as it should."""
    kept = json.loads(path.read_text())
    case = Case(**{**kept["case"], "arguments": tuple(kept["case"]["arguments"]), "content": None if kept["case"]["content"] is None else base64.b64decode(kept["case"]["content"])})
    subject = next(one for one in subjects if one.name == kept["subject"])
    again = dataclasses.replace(subject, make=lambda random, good: case)
    outcome = next(trial.run([again], [(0, kept["number"])], 0, goods, scratch))
    print(f"{outcome.subject}: {case.change}\n{outcome.verdict} {', '.join(outcome.failures)}: {outcome.seconds:.2f} s, {outcome.extra_bytes / 2**20:.0f} MiB more\n{outcome.told}")
    return 1 if outcome.failures else 0


def record(tally: Tally, subjects: Sequence[Subject], seed: int, seconds: float) -> str:
    """The result as Markdown."""
    import PIL
    import torch
    import yaml

    about = {subject.name: subject.about for subject in subjects}
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, Pillow {PIL.__version__}, PyYAML {yaml.__version__}"
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    rows = [f"| {name} | {about.get(name, '')} | {' | '.join(map(str, numbers))} |" for name, numbers in tally.rows]
    failures = [f"- {len(outcomes)} x {failure} {kind} at `{where}`" for (failure, kind, where), outcomes in tally.failures.items()]
    total = tally.rows[-1][1][0]
    return "\n".join([
        "# Damaged inputs", "", f"{time.strftime('%Y-%m-%d')}, commit {commit}, {versions}, {platform.machine()}, one core. Seed {seed}: `python scripts/fuzz.py --inputs {total} --seed {seed}`, {seconds:.0f} s "
        f"({total / seconds:.0f} inputs a second).", "", "An input is accepted, or refused with one line. Else it fails: it showed a traceback, took over 1 s + 10 ms a kilobyte (slow) or 300 MB over what the process held (fat), ran something "
        "(executed), did not end (hung), took the process down (crashed), or put control characters on the terminal (garbled).", "", f"| subject | read by | {' | '.join(_COLUMNS)} |", "|---" * (len(_COLUMNS) + 2) + "|", *rows, "",
        f"Slowest: {tally.slowest.seconds:.2f} s ({tally.slowest.subject}). Most memory over the base: {tally.fattest.extra_bytes / 2**20:.0f} MiB ({tally.fattest.subject}).", "", *(["Failures:", "", *failures, ""] if failures else [])])


if __name__ == "__main__":
    sys.exit(main())

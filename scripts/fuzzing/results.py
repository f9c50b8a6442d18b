"""What came of a fuzzing run: counted, shown, kept as examples, written as Markdown."""

from __future__ import annotations

import base64
import dataclasses
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from scripts.fuzzing.trial import FAILURES, Case, Outcome, Subject

COLUMNS = ("inputs", "accepted", "refused", *FAILURES)
_MEANING = (
    "An input is accepted, or refused with one line. Else it fails: it showed a traceback, took over 1 s + 10 ms "
    "a kilobyte (slow) or 300 MB over what "
    "the process held (fat), ran something (executed), did not end (hung), took the process down (crashed), or "
    "put control characters on the terminal "
    "(garbled)."
)


class Tally:
    """Counts by subject, and the failures by kind, exception and place."""

    def __init__(self, subjects: Sequence[Subject]) -> None:
        self.about = {subject.name: subject.about for subject in subjects}
        self.counts: dict[str, Counter[str]] = {subject.name: Counter() for subject in subjects}
        self.seconds: Counter[str] = Counter()
        self.failures: dict[tuple[str, str, str], list[Outcome]] = {}
        self.slowest = self.fattest = Outcome("", 0, "")

    def add(self, outcome: Outcome) -> None:
        """Count one outcome."""
        self.counts[outcome.subject].update(["inputs", *(outcome.failures or [outcome.verdict])])
        self.seconds[outcome.subject] += outcome.seconds
        if outcome.failures:
            self.failures.setdefault((outcome.failures[0], outcome.kind, outcome.where or outcome.subject), []).append(
                outcome
            )
        self.slowest = max(self.slowest, outcome, key=lambda one: one.seconds)
        self.fattest = max(self.fattest, outcome, key=lambda one: one.extra_bytes)

    @property
    def inputs(self) -> int:
        """How many were tried."""
        return sum(counts["inputs"] for counts in self.counts.values())

    def rows(self) -> list[tuple[str, list[int], float]]:
        """(subject, counts in the order of the columns, mean milliseconds), and the sum."""
        every = [*self.counts.items(), ("all", sum(self.counts.values(), Counter()))]
        seconds = {**self.seconds, "all": sum(self.seconds.values())}
        return [
            (name, [counts[column] for column in COLUMNS], 1000 * seconds.get(name, 0) / max(1, counts["inputs"]))
            for name, counts in every
        ]

    def extremes(self) -> str:
        """The slowest input and the one that took most memory."""
        return (
            f"Slowest: {self.slowest.seconds:.2f} s ({self.slowest.subject}, input {self.slowest.number}). Most "
            "memory over the base: "
            f"{self.fattest.extra_bytes / 2**20:.0f} MiB ({self.fattest.subject}, input {self.fattest.number})."
        )


def show(tally: Tally, seconds: float) -> None:
    """Print the table, and what failed."""
    table = Table("subject", *COLUMNS, "ms each")
    for name, numbers, milliseconds in tally.rows():
        marked = [
            f"[red]{number}[/]" if column in FAILURES and number else str(number)
            for column, number in zip(COLUMNS, numbers, strict=True)
        ]
        table.add_row(name, *marked, f"{milliseconds:.1f}")
    Console(width=None if sys.stdout.isatty() else 180).print(table)
    print(f"{tally.inputs} inputs in {seconds:.0f} s, {tally.inputs / seconds:.0f} a second. {tally.extremes()}")
    for (failure, kind, where), outcomes in sorted(tally.failures.items(), key=lambda item: -len(item[1])):
        first = outcomes[0]
        print(
            f"{len(outcomes)} x {failure} {kind} at {where}: {first.subject} {first.number}: "
            f"{ascii(first.case.change)[:150] if first.case else ''}"
        )


def keep(tally: Tally, out: Path) -> None:
    """Write one example of each kind of failure, the smallest: its input and what it did."""
    for (failure, kind, where), outcomes in tally.failures.items():
        first = min(outcomes, key=lambda outcome: outcome.case.size if outcome.case else 2**62)
        content = first.case.content if first.case else None
        told = {
            "failure": failure,
            "kind": kind,
            "where": where,
            "count": len(outcomes),
            "subject": first.subject,
            "number": first.number,
            "seconds": round(first.seconds, 3),
            "extra_mib": first.extra_bytes >> 20,
            "told": first.told,
            "case": first.case
            and {
                **dataclasses.asdict(first.case),
                "content": None if content is None else base64.b64encode(content).decode(),
            },
        }
        name = re.sub(r"\W+", "-", f"{failure} {kind} {where}").strip("-")[:120]
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(json.dumps(told, indent=1))
    if tally.failures:
        print(f"examples in {out}; --replay FILE runs one again")


def kept(path: Path) -> tuple[str, int, Case]:
    """The subject, number and input of an example that `keep` wrote."""
    told = json.loads(path.read_text())
    case = told["case"]
    content = None if case["content"] is None else base64.b64decode(case["content"])
    return (
        told["subject"],
        told["number"],
        Case(
            **{
                **case,
                "content": content,
                **{name: tuple(case[name]) for name in ("arguments", "environment", "repairs")},
            }
        ),
    )


def record(tally: Tally, seed: int, seconds: float, root: Path) -> str:
    """The result as Markdown."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("torch", "safetensors", "numpy", "pillow", "pyyaml", "deepspeed", "tyro")
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    ).stdout.strip()
    rows = [
        f"| {name} | {tally.about.get(name, '')} | {' | '.join(map(str, numbers))} | {milliseconds:.1f} |"
        for name, numbers, milliseconds in tally.rows()
    ]
    failures = [
        f"- {len(outcomes)} x {failure} {kind} at `{where}`"
        for (failure, kind, where), outcomes in tally.failures.items()
    ]
    return "\n".join(
        [
            "# Damaged inputs",
            "",
            f"`python scripts/fuzz.py --inputs {tally.inputs} --seed {seed}`: {seconds:.0f} s on one core of "
            f"{platform.machine()}, "
            f"{tally.inputs / seconds:.0f} inputs a second. {time.strftime('%Y-%m-%d')}, commit {commit}, Python "
            f"{platform.python_version()}, {versions}.",
            "",
            _MEANING,
            "",
            f"| subject | read by | {' | '.join(COLUMNS)} | ms each |",
            "|---" * (len(COLUMNS) + 3) + "|",
            *rows,
            "",
            tally.extremes(),
            "",
            *(["Failures:", "", *failures, ""] if failures else []),
        ]
    )

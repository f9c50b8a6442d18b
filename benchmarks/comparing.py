"""Two runs of throughput.py beside each other: what became slower, beyond what either run is sure of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

UNKNOWN_SPREAD = 0.1  # of a figure that was taken once
_MUST_AGREE = ("device", "threads", "torch")


class Unreadable(Exception):
    """A file that is no report of throughput.py, in one line."""


class Comparison(NamedTuple):
    """Lines of Markdown, and the names of the rows that became slower."""

    lines: list[str]
    regressions: list[str]


def read(path: Path) -> dict[str, Any]:
    """A report as `throughput.py --json` wrote it. Raises Unreadable."""
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise Unreadable(
            f"{path}: cannot be read as JSON ({why}); give a file that throughput.py --json wrote"
        ) from error
    rows = report.get("rows") if isinstance(report, dict) else None
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {"name", "backend", "median_ms", "spread"} <= set(row) for row in rows
    ):
        raise Unreadable(
            f"{path}: expected a list of rows with name, backend, median_ms and spread; give a file that "
            "throughput.py --json wrote"
        )
    return report


def compare(old: dict[str, Any], new: dict[str, Any]) -> Comparison:
    """Rows by name and backend.

    A row is a regression where its time grew by more than both spreads together, (1 + old spread) (1 + new spread), and
    where it had a time and now fails. A row whose time fell as far is marked faster. Rows without a time on either side
    are left out.
    """
    before, now = _timed(old), _timed(new)
    failed = {(row["name"], row["backend"]): row["error"] for row in new["rows"] if row.get("error")}
    body, regressions = [], []
    for key, row in now.items():
        name, median_ms = " | ".join(key), row["median_ms"]
        if key not in before:
            body.append(f"| {name} | | {median_ms:.3f} | | new |")
            continue
        was = before[key]
        ratio, noise = median_ms / was["median_ms"], (1 + _spread(was)) * (1 + _spread(row))
        verdict = "**slower**" if ratio > noise else "faster" if ratio < 1 / noise else ""
        if ratio > noise:
            regressions.append(", ".join(key))
        body.append(f"| {name} | {was['median_ms']:.3f} | {median_ms:.3f} | {ratio:.2f} | {verdict} |")
    for key, was in before.items():
        if key not in now:
            error = failed.get(key)
            if error:
                regressions.append(", ".join(key))
            body.append(
                f"| {' | '.join(key)} | {was['median_ms']:.3f} | | | {f'**fails**: {error}' if error else 'missing'} |"
            )
    differing = [
        f"{what}: {old.get('environment', {}).get(what)} before, {new.get('environment', {}).get(what)} now"
        for what in _MUST_AGREE
        if old.get("environment", {}).get(what) != new.get("environment", {}).get(what)
    ]
    if bool(old.get("quick")) != bool(new.get("quick")):
        differing.append("one of them was --quick")
    lines = [
        *([f"Not the same setting: {'; '.join(differing)}.", ""] if differing else []),
        "| what | backend | before, ms | now, ms | now / before | |",
        "|---|---|--:|--:|--:|---|",
        *body,
        "",
        f"{len(regressions)} of {len(now)} became slower beyond both runs' spread"
        + (": " + "; ".join(regressions) if regressions else "")
        + ".",
    ]
    return Comparison(lines, regressions)


def _timed(report: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["name"], row["backend"]): row for row in report["rows"] if row["median_ms"]}


def _spread(row: dict[str, Any]) -> float:
    return UNKNOWN_SPREAD if row["spread"] is None else row["spread"]

"""Why a row is under half of its ceiling, or slower than its baseline: one line each, by the row's name. What no line covers is listed as not explained."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

HALF = 0.5
NOT_EXPLAINED = "not explained"


class Reason(NamedTuple):
    """Patterns of a row (whole name, whole backend, device; searched, not matched whole), and why."""

    name: str
    backend: str
    device: str
    why: str


REASONS: list[Reason] = []


def shortfall(row: dict[str, Any]) -> str:
    """What a row falls short of, in words; empty: nothing."""
    found = []
    if row["share"] is not None and row["share"] < HALF:
        found.append(f"{row['share']:.1%} of the ceiling")
    if row["ratio"] is not None and round(row["ratio"], 2) < 1:
        found.append(f"{row['ratio']:.2f} x the baseline")
    return ", ".join(found)


def reason_for(row: dict[str, Any], device: str, reasons: list[Reason] | None = None) -> str:
    """The first reason whose patterns are found in the row."""
    for reason in REASONS if reasons is None else reasons:
        if re.search(reason.name, row["name"]) and re.search(reason.backend, row["backend"]) and re.search(reason.device, device):
            return reason.why
    return NOT_EXPLAINED


def explain(rows: list[dict[str, Any]], device: str) -> None:
    """Give each row that falls short `short` and `reason`."""
    for row in rows:
        short = shortfall(row)
        if short:
            row |= {"short": short, "reason": reason_for(row, device)}


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: each reason once, the rows that it is about below it; those not explained last."""
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        if "reason" in row:
            by_reason.setdefault(row["reason"], []).append(f"  - {row['name']}, {row['backend']}: {row['short']}")
    order = sorted(by_reason, key=lambda reason: reason == NOT_EXPLAINED)
    return ["Under half of the ceiling, or slower than the baseline:", "", *(line for reason in order for line in (f"- {reason}", *by_reason[reason]))] \
        if by_reason else []

"""The small study's page: tables of means and spreads, the probe's curves, and sentences that the tables back, whichever way they come out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

Rows = Mapping[tuple[str, int], Mapping[str, Any]]
# Okabe and Ito's colours, told apart by every kind of colour vision.
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#999999", "#CC79A7", "#0072B2")
_MEASURES: dict[str, tuple[str, Callable[[Mapping[str, Any]], float]]] = {
    "probe, last position": ("%", lambda found: 100 * found["probe"][-1]),
    "probe, best position": ("%", lambda found: 100 * max(found["probe"])),
    "fall from best to last": ("points", lambda found: 100 * (max(found["probe"]) - found["probe"][-1])),
    "right class, no guidance": ("%", lambda found: 100 * found["guidance 1"]["agreement"]),
    "right class, guidance 2": ("%", lambda found: 100 * found["guidance 2"]["agreement"]),
    "Fréchet, no guidance": ("", lambda found: found["guidance 1"]["frechet"]),
    "Fréchet, guidance 2": ("", lambda found: found["guidance 2"]["frechet"]),
    "attention distance": ("cells", lambda found: statistics.fmean(block["distance"] for block in found["attention"])),
}


def values(rows: Rows, name: str, weights: str, measure: str) -> list[float]:
    """Of all seeds of a variant."""
    return [_MEASURES[measure][1](row[weights]) for (of, _), row in sorted(rows.items()) if of == name and weights in row]


def shown(numbers: Sequence[float], digits: int = 1) -> str:
    """Mean and, of several, standard deviation."""
    if not numbers:
        return ""
    spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.{digits}f}{spread}"


def write_page(rows: Rows, about: Mapping[str, str], folder: Path) -> None:
    """results/small_study.md and .png from the rows that are there."""
    _draw(rows, about, folder / "small_study.png")
    (folder / "small_study.md").write_text("\n".join(_page(rows, about)) + "\n")


def _page(rows: Rows, about: Mapping[str, str]) -> Iterator[str]:
    names = [name for name in about if any(of == name for of, _ in rows)]
    steps = sorted({row["steps"] for row in rows.values()})
    yield "# The small study"
    yield ""
    yield (f"`scripts/small_study.sh`: the built-in digits (7 x 7 codes), preset `tiny`, {' or '.join(map(str, steps))} steps of 32 images, {len(rows)} runs; "
           "mean ± standard deviation over seeds where there are several. Equal steps: all rows; equal views: the baseline with two views against the others. "
           "The classifier that judges samples (500 of each run, 50 a class) and the codes are the same for all runs. Fréchet: on that classifier's features; "
           "compares these runs only.")
    for weights in ("student", "teacher"):
        measures = list(_MEASURES)
        yield ""
        yield f"## {weights.capitalize()}'s weights"
        yield ""
        yield "| variant | what is trained | seeds | " + " | ".join(f"{name}{f', {_MEASURES[name][0]}' if _MEASURES[name][0] else ''}" for name in measures) \
            + (" | held-out loss, nats |" if weights == "student" else " |")
        yield "|---|---|--:|" + "--:|" * (len(measures) + (weights == "student"))
        for name in names:
            if not values(rows, name, weights, measures[0]):
                continue
            cells = [shown(values(rows, name, weights, measure), 2 if _MEASURES[measure][0] in ("", "cells") else 1) for measure in measures]
            losses = [row["val_ar"] for (of, _), row in rows.items() if of == name]
            seeds = len(values(rows, name, weights, measures[0]))
            yield f"| {name} | {about[name]} | {seeds} | {' | '.join(cells)} |" + (f" {shown(losses, 3)} |" if weights == "student" else "")
    yield ""
    yield "## Probe by position, student"
    yield ""
    yield "![Probe accuracy by position](small_study.png)"
    yield ""
    yield "## What the paper says, and what is seen here"
    yield ""
    yield from _claims(rows)


def _claims(rows: Rows) -> Iterator[str]:
    """Each claim with the numbers of the tables; a difference counts where it exceeds the two standard deviations together."""
    def compare(claim: str, measure: str, first: str, second: str, *, higher: bool) -> str:
        ours, theirs = values(rows, first, "student", measure), values(rows, second, "student", measure)
        if len(ours) < 2 or len(theirs) < 2:
            return f"- {claim}: not enough runs yet."
        difference = statistics.fmean(ours) - statistics.fmean(theirs)
        spread = statistics.stdev(ours) + statistics.stdev(theirs)
        holds = "holds" if (difference > spread if higher else -difference > spread) else "does not hold" if (
            -difference > spread if higher else difference > spread) else "cannot be told: the difference is within the spread"
        return f"- {claim}: **{holds}** ({first} {shown(ours)}, {second} {shown(theirs)}; {measure})."

    for baseline in ("baseline", "baseline, 2 views"):
        yield compare("the baseline's probe falls more at late positions than ST-AR's", "fall from best to last", baseline, "all", higher=True)
        yield compare("ST-AR's features know more of the class at the last position", "probe, last position", "all", baseline, higher=True)
        yield compare("ST-AR's samples are more often of the class asked for, without guidance", "right class, no guidance", "all", baseline, higher=True)
        yield compare("ST-AR's samples are closer to real images, without guidance", "Fréchet, no guidance", "all", baseline, higher=False)
        yield compare("ST-AR attends farther", "attention distance", "all", baseline, higher=True)
    yield compare("contrast between steps adds to masked features", "probe, last position", "MIM+step", "MIM", higher=True)
    yield compare("contrast between views adds to masked features", "probe, last position", "MIM+view", "MIM", higher=True)
    yield compare("all three together are best", "probe, last position", "all", "MIM+view", higher=True)


def _draw(rows: Rows, about: Mapping[str, str], path: Path) -> None:
    with matplotlib.rc_context({"font.size": 9, "font.family": "sans-serif"}):
        figure = Figure(figsize=(7.2, 4.0), dpi=170, layout="constrained")
        axes = figure.add_subplot()
        several = [name for name in about if sum(of == name for of, _ in rows) > 1] or list({of for of, _ in rows})
        for index, name in enumerate(several):
            found = [row["student"] for (of, _), row in sorted(rows.items()) if of == name]
            positions = found[0]["positions"]
            columns = list(zip(*(each["probe"] for each in found), strict=True))
            middle = [100 * statistics.fmean(column) for column in columns]
            colour, line = _COLOURS[index % 8], "-" if index < 5 else "--"
            axes.plot(positions, middle, line, color=colour, label=f"{name} ({len(found)})", linewidth=1.6, marker="os^Dvx*P"[index % 8], markersize=4)
            if len(found) > 1:
                spread = [100 * statistics.stdev(column) for column in columns]
                axes.fill_between(positions, [m - s for m, s in zip(middle, spread, strict=True)], [m + s for m, s in zip(middle, spread, strict=True)],
                                  color=colour, alpha=0.12, linewidth=0)
        axes.set_xlabel("position in the sequence (of 49)")
        axes.set_ylabel("linear probe, top-1 of held-out digits, %")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e2e6ec", linewidth=0.8)
        axes.legend(frameon=False, fontsize=8, title="variant (seeds); band: one standard deviation", title_fontsize=8)
        figure.savefig(path)

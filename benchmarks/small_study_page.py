"""The small study's page: tables of means and spreads, figures, and sentences that the tables back, whichever way they
come out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Rows = Mapping[tuple[str, int], Mapping[str, Any]]
Variants = Mapping[str, str]  # {name: what is trained}
# Okabe and Ito's colours, told apart by every kind of colour vision; markers and lines differ too.
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#999999", "#CC79A7", "#0072B2")
_MARKERS = "os^Dvx*P"


class Measure(NamedTuple):
    """A column of the tables."""

    of: Callable[[Mapping[str, Any]], float]  # of what is found with one kind of weights
    unit: str
    digits: int
    higher: bool  # is better


MEASURES = {
    "probe, last position": Measure(lambda found: 100 * found["probe"][-1], "%", 1, True),
    "probe, best position": Measure(lambda found: 100 * max(found["probe"]), "%", 1, True),
    "fall from best to last": Measure(
        lambda found: 100 * (max(found["probe"]) - found["probe"][-1]), "points", 1, False
    ),
    "right class, no guidance": Measure(lambda found: 100 * found["guidance 1"]["agreement"], "%", 1, True),
    "right class, guidance 2": Measure(lambda found: 100 * found["guidance 2"]["agreement"], "%", 1, True),
    "Fréchet, no guidance": Measure(lambda found: found["guidance 1"]["frechet"], "", 2, False),
    "Fréchet, guidance 2": Measure(lambda found: found["guidance 2"]["frechet"], "", 2, False),
    "held-out loss": Measure(lambda found: found["loss"], "nats", 3, False),
    "attention distance": Measure(
        lambda found: statistics.fmean(block["distance"] for block in found["attention"]), "cells", 2, True
    ),
}


def values(rows: Rows, name: str, weights: str, measure: str) -> list[float]:
    """Of all seeds of a variant."""
    return [
        MEASURES[measure].of(row[weights]) for (of, _), row in sorted(rows.items()) if of == name and weights in row
    ]


def shown(numbers: Sequence[float], measure: str) -> str:
    """Mean and, of several, standard deviation."""
    digits = MEASURES[measure].digits
    spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.{digits}f}{spread}" if numbers else ""


def write_page(rows: Rows, groups: Mapping[str, Variants], folder: Path) -> None:
    """results/small_study.md and .png from the rows that are there. `groups`: core, alone, open."""
    _draw(rows, list(groups["core"]), folder / "small_study.png")
    (folder / "small_study.md").write_text("\n".join(_page(rows, groups)) + "\n")


def _page(rows: Rows, groups: Mapping[str, Variants]) -> Iterator[str]:
    steps = sorted({row["steps"] for row in rows.values()})
    minutes = sum(row["training_s"] for row in rows.values()) / 60
    yield "# The small study"
    yield ""
    yield (
        "`scripts/small_study.sh`: the built-in digits (4500 training images, 7 x 7 codes, 8 views), preset `tiny`, "
        f"{' or '.join(map(str, steps))} steps of 32 images, {len(rows)} runs of one thread each, {minutes:.0f} "
        "minutes of training together. "
        "Mean ± standard deviation over seeds where there are several. Equal steps: all rows; equal views a step: "
        "all but `baseline`, which sees one. The "
        "classifier that judges samples (500 of each run, 50 a class) and the codes are the same for all runs. "
        "Fréchet: on that classifier's features; it "
        "compares these runs only. Probe: block 3 of 6, 500 held-out digits (one standard error at 85 %: 1.6 "
        "points). Attention distance: mean over blocks."
    )
    for title, names, kinds in (
        ("Table 3 in small", groups["core"], ("student", "teacher")),
        ("Each loss alone", groups["alone"], ("student",)),
        ("What the paper leaves open", groups["open"], ("student",)),
    ):
        names = [name for name in names if any(of == name for of, _ in rows)]
        if names:
            compared = [] if title.startswith("Table") else ["baseline, 2 views", "all"]
            for kind in kinds:
                yield from ("", f"## {title}: {kind}'s weights", "")
                yield from _table(
                    rows,
                    [*compared, *names],
                    {name: about for group in groups.values() for name, about in group.items()},
                    kind,
                )
    yield from (
        "",
        "![Probe, attention, samples and loss of each variant](small_study.png)",
        "",
        "## What the paper says, and what is seen here",
        "",
    )
    yield (
        "A difference of means counts where it exceeds both standard deviations together. Student's weights; the "
        "teacher's verdict beside it where it "
        "is another one."
    )
    yield ""
    yield from _claims(rows)
    yield from _open(rows, groups)


def _table(rows: Rows, names: Sequence[str], about: Variants, kind: str) -> Iterator[str]:
    heads = [f"{name}{f', {measure.unit}' if measure.unit else ''}" for name, measure in MEASURES.items()]
    yield "| variant | what is trained | seeds | " + " | ".join(heads) + " |"
    yield "|---|---|--:|" + "--:|" * len(heads)
    for name in names:
        if seeds := len(values(rows, name, kind, "held-out loss")):
            yield (
                f"| {name} | {about[name]} | {seeds} | "
                + " | ".join(shown(values(rows, name, kind, measure), measure) for measure in MEASURES)
                + " |"
            )


def _claims(rows: Rows) -> Iterator[str]:
    """Each claim with the numbers of the tables."""
    for baseline in ("baseline", "baseline, 2 views"):
        yield _claim(
            rows,
            "the baseline's probe falls more from its best position to the last than ST-AR's",
            "fall from best to last",
            "all",
            baseline,
        )
        yield _claim(
            rows,
            "ST-AR's features know more of the class at the last position",
            "probe, last position",
            "all",
            baseline,
        )
        yield _claim(
            rows,
            "ST-AR's samples are more often of the class asked for, without guidance",
            "right class, no guidance",
            "all",
            baseline,
        )
        yield _claim(
            rows,
            "ST-AR's samples are closer to real images, without guidance",
            "Fréchet, no guidance",
            "all",
            baseline,
        )
        yield _claim(rows, "the same with guidance 2", "Fréchet, guidance 2", "all", baseline)
        yield _claim(rows, "ST-AR attends farther", "attention distance", "all", baseline)
    yield _claim(rows, "masked features alone help", "probe, last position", "MIM", "baseline, 2 views")
    yield _claim(rows, "contrast between steps adds to masked features", "probe, last position", "MIM+step", "MIM")
    yield _claim(rows, "contrast between views adds to masked features", "probe, last position", "MIM+view", "MIM")
    yield _claim(
        rows,
        "all three together are better than without contrast between steps",
        "probe, last position",
        "all",
        "MIM+view",
    )


def _claim(rows: Rows, claim: str, measure: str, ours: str, theirs: str) -> str:
    """`ours` is better than `theirs`: whether that holds."""
    found = {
        kind: (
            values(rows, ours, kind, measure),
            values(rows, theirs, kind, measure) or values(rows, theirs, "student", measure),
        )
        for kind in ("student", "teacher")
    }
    verdicts = {
        kind: _verdict(*pair, higher=MEASURES[measure].higher)
        for kind, pair in found.items()
        if min(map(len, pair)) > 1
    }
    if "student" not in verdicts:
        return f"- {claim}: not enough runs yet."
    told = (
        f"- {claim}: **{verdicts['student']}** ({measure}: {ours} {shown(found['student'][0], measure)}, {theirs} "
        f"{shown(found['student'][1], measure)})"
    )
    if verdicts.get("teacher", verdicts["student"]) != verdicts["student"]:
        told += f"; teacher's weights: {verdicts['teacher']} ({shown(found['teacher'][0], measure)})"
    return told + "."


def _verdict(ours: Sequence[float], theirs: Sequence[float], *, higher: bool) -> str:
    gain = (statistics.fmean(ours) - statistics.fmean(theirs)) * (1 if higher else -1)
    spread = statistics.stdev(ours) + statistics.stdev(theirs)
    return (
        "holds"
        if gain > spread
        else "does not hold, the contrary is seen"
        if -gain > spread
        else "cannot be told, the difference is within the spread"
    )


def _open(rows: Rows, groups: Mapping[str, Variants]) -> Iterator[str]:
    """Of single runs: what lies farther from the mean of `all` than two of its standard deviations."""
    names = [name for name in (*groups["alone"], *groups["open"]) if any(of == name for of, _ in rows)]
    if not names or len(values(rows, "all", "student", "held-out loss")) < 2:
        return
    yield from ("", "## One change from ST-AR, one seed", "")
    yield from (
        "What lies farther from the mean of `all` than two of its standard deviations (one run each: a hint, no more).",
        "",
    )
    for name in names:
        told = []
        for measure, (_, unit, digits, _) in MEASURES.items():
            own, usual = (
                statistics.fmean(values(rows, name, "student", measure)),
                values(rows, "all", "student", measure),
            )
            away = own - statistics.fmean(usual)
            if abs(away) > 2 * statistics.stdev(usual):
                told.append(f"{measure} {away:+.{digits}f}{f' {unit}' if unit else ''}")
        yield f"- `{name}`: {'; '.join(told) or 'nothing'}."


def _draw(rows: Rows, core: Sequence[str], path: Path) -> None:
    names = [name for name in core if any(of == name for of, _ in rows)]
    with matplotlib.rc_context({"font.size": 9, "font.family": "sans-serif", "axes.titlesize": 9}):
        figure = Figure(figsize=(10.4, 7.2), dpi=150, layout="constrained")
        (probe, attention), (samples, loss) = figure.subplots(2, 2)
        for index, name in enumerate(names):
            found = [row for (of, _), row in sorted(rows.items()) if of == name]
            style = {
                "color": _COLOURS[index],
                "linestyle": "-" if index < 5 else "--",
                "marker": _MARKERS[index],
                "markersize": 4,
                "linewidth": 1.5,
            }
            student = [row["student"] for row in found]
            _band(
                probe,
                student[0]["positions"],
                [[100 * share for share in each["probe"]] for each in student],
                f"{name} ({len(found)})",
                style,
            )
            _band(
                attention,
                range(1, len(student[0]["attention"]) + 1),
                [[block["distance"] for block in each["attention"]] for each in student],
                "",
                style,
            )
            _band(
                loss,
                [250 * (n + 1) for n in range(len(found[0]["val_ar"]))][:-1] + [found[0]["steps"]],
                [row["val_ar"] for row in found],
                "",
                style,
            )
            for marker, scale in (("o", "1"), ("^", "2")):
                samples.scatter(
                    [each[f"guidance {scale}"]["frechet"] for each in student],
                    [100 * each[f"guidance {scale}"]["agreement"] for each in student],
                    color=_COLOURS[index],
                    marker=marker,
                    s=28,
                    facecolors=None if index < 5 else "none",
                )
        probe.set(
            title="Linear probe by position",
            xlabel="position in the sequence (of 49)",
            ylabel="top-1 of held-out digits, %",
        )
        attention.set(title="Where blocks look", xlabel="block", ylabel="mean distance of attention, cells")
        samples.set(
            title="Samples: no guidance (circles), guidance 2 (triangles)",
            xlabel="classifier Fréchet distance to real digits",
            ylabel="of the class asked for, %",
        )
        loss.set(title="Held-out next-token loss, nothing hidden", xlabel="step", ylabel="nats")
        for axes in (probe, attention, samples, loss):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#e2e6ec", linewidth=0.8)
            axes.set_axisbelow(True)
        figure.legend(
            loc="outside lower center",
            ncols=len(names),
            frameon=False,
            fontsize=8,
            title="variant (seeds); bands: one standard deviation",
            title_fontsize=8,
        )
        figure.savefig(path)


def _band(
    axes: Axes, x: Sequence[float], lines: Sequence[Sequence[float]], label: str, style: Mapping[str, Any]
) -> None:
    """The mean of some lines, and one standard deviation about it."""
    columns = list(zip(*lines, strict=True))
    middle = [statistics.fmean(column) for column in columns]
    axes.plot(x, middle, label=label or None, **style)
    if len(lines) > 1:
        spread = [statistics.stdev(column) for column in columns]
        axes.fill_between(
            x,
            [m - s for m, s in zip(middle, spread, strict=True)],
            [m + s for m, s in zip(middle, spread, strict=True)],
            color=style["color"],
            alpha=0.12,
            linewidth=0,
        )

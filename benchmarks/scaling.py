"""How cost grows: with batch, positions, codebook, contrast positions, ranks and samples, beside what theory says.

    python benchmarks/scaling.py [--quick] [--save [FOLDER]] [--only WORD ...]

On the CPU. Each curve's exponent is the slope of a straight line through (log size, log cost); theory's is the slope
through the counted work (products, pairs, weights) at the same sizes. A curve that is more than 0.15 steeper than its
theory is marked, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from benchmarks import timing
from benchmarks.scaling_curves import IMAGES_OF_A_RANK, Curve, all_curves

RESULTS = Path(__file__).resolve().parent / "results"
ALLOWED = 0.15
PANELS = {
    "B": "images of a batch, B",
    "T": "positions, T",
    "V": "codebook entries, V",
    "K": "contrast positions, K",
    "D": "width, D",
    "ranks": "ranks (gloo)",
    "N": "images sampled, N",
}

COLUMNS = 2
MARKERS = "osD^v<>Ph"
SHORT = {  # of a curve's name, in the legend
    ", forward + backward": "",
    ", forward": "",
    f", {IMAGES_OF_A_RANK} images a rank": "",
    "ST-AR step, preset tiny": "ST-AR step",
    "star-fast ": "",
}
READING = (
    "Across: how many times as large the size is\nas at the curve's first point; up: how many\n"
    "times the cost is (time or memory)."
    "\n\nSolid: measured. Dashed, in the same colour:\nwhat the counted work alone would give.\n\n"
    "Exponents are the slopes: $B^{1.00}$ doubles\nwith B, $B^{2.00}$ takes four times as long.\n"
    "Below theory: a cost that stays (calls, weights\nthat all rows share) is spread over more."
)


def exponent(sizes: list[int], values: list[float]) -> float:
    """Slope of the least-squares line through (log size, log value)."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def too_steep(curve: Curve) -> bool:
    """Whether the cost grows faster than the counted work does."""
    return exponent(curve.sizes, curve.costs) > exponent(curve.sizes, curve.work) + ALLOWED


def text(curves: list[Curve], environment: dict[str, str | int], quick: bool) -> str:
    """The page."""
    lines = [
        "# Scaling",
        "",
        ", ".join(f"{key} {value}" for key, value in environment.items())
        + (" (quick: not to publish)" if quick else ""),
        "",
        "By `python benchmarks/scaling.py`; float32, one thread a process. Exponent: slope of log cost over log "
        "size; theory: of the counted work at the "
        "same sizes. Fixed costs (calls, Python, weights that all rows share) make a curve flatter than its "
        "theory, never steeper.",
        "",
        "![log-log curves](scaling.png)",
        "",
        "| what | over | sizes | cost | exponent | theory | law | |",
        "|---|---|---|---|--:|--:|---|---|",
    ]
    for curve in curves:
        costs = " ".join(f"{cost:.4g}" for cost in curve.costs)
        lines.append(
            f"| {curve.what} | {curve.over} | {' '.join(map(str, curve.sizes))} | {costs} {curve.unit} | "
            f"{exponent(curve.sizes, curve.costs):.2f} | "
            f"{exponent(curve.sizes, curve.work):.2f} | {curve.law} | "
            f"{'**steeper than theory**' if too_steep(curve) else ''} |"
        )
    cores = environment.get("cores")
    steep = [curve for curve in curves if too_steep(curve)]
    shared = (
        f"Ranks share {cores} cores: more ranks than that take turns on them, so the wall clock grows where a rank's "
        "own CPU time does not."
    )
    return (
        "\n".join(
            [
                *lines,
                "",
                shared,
                "",
                f"{len(steep)} of {len(curves)} grow faster than their theory by more than {ALLOWED}.",
            ]
        )
        + "\n"
    )


def draw(curves: list[Curve], file: Path) -> None:
    """A panel a size: cost over the first point's, the theory's line dashed in the same colour, slopes in the legend
    below it; how to read it in the last place.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    overs = [over for over in PANELS if any(curve.over == over for curve in curves)]
    rows = -(-(len(overs) + 1) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(6 * COLUMNS, 5.4 * rows), squeeze=False, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
    for axis in axes.flat[len(overs) :]:
        axis.axis("off")
    axes.flat[len(overs)].text(0.03, 0.97, READING, fontsize=13, va="top", linespacing=1.6)
    for axis, over in zip(axes.flat, overs, strict=False):
        sizes: set[float] = set()
        for number, curve in enumerate(curve for curve in curves if curve.over == over):
            scale = [size / curve.sizes[0] for size in curve.sizes]
            (line,) = axis.plot(
                scale,
                [cost / curve.costs[0] for cost in curve.costs],
                marker=MARKERS[number % len(MARKERS)],
                markersize=6,
                label=_label(curve),
            )
            work = [work / curve.work[0] for work in curve.work]
            axis.plot(scale, work, linestyle="--", linewidth=1, color=line.get_color())
            sizes |= set(scale)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(sorted(sizes) if over != "T" else [1, 2, 4, 8])
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, 0.8), max(high, 2.2))  # a doubling is always in sight, and what stays looks flat
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter(lambda value, _: f"{value:.3g}x")
        axis.minorticks_off()
        axis.tick_params(labelsize=11)
        axis.set_xlabel(PANELS[over], fontsize=13)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=11, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _label(curve: Curve) -> str:
    name = curve.what
    for words, short in SHORT.items():
        name = name.replace(words, short)
    letter = curve.over if len(curve.over) == 1 else rf"\mathrm{{{curve.over}}}"
    slope, theory = exponent(curve.sizes, curve.costs), exponent(curve.sizes, curve.work)
    mark = ", too steep" if too_steep(curve) else ""
    return f"{name}: ${letter}^{{{slope:.2f}}}$, theory ${letter}^{{{theory:.2f}}}${mark}"


def main() -> int:
    """Measure, print, and with --save keep page and picture."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument(
        "--quick", action="store_true", help="three sizes and few repeats: a check that all runs, not to publish"
    )
    parser.add_argument(
        "--save",
        type=Path,
        nargs="?",
        const=RESULTS,
        metavar="FOLDER",
        help="write scaling.{md,png} there (benchmarks/results)",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="curves with one of these words in their name, as the bar shows them"
    )
    arguments = parser.parse_args()
    chosen = [
        (name, run)
        for name, run in all_curves(arguments.quick)
        if not arguments.only or any(word in name for word in arguments.only)
    ]
    if not chosen:
        parser.error(
            f"--only: no curve has {' or '.join(arguments.only)} in its name; they are: "
            f"{', '.join(name for name, _ in all_curves(True))}"
        )
    curves: list[Curve] = []
    with tqdm(chosen, file=sys.stderr, disable=None, leave=False) as bar:
        for name, run in bar:
            bar.set_description(name)
            curves += run()
    page = text(curves, timing.environment("cpu") | {"cores": os.cpu_count() or 1}, arguments.quick)
    print(page)
    if arguments.save:
        arguments.save.mkdir(parents=True, exist_ok=True)
        (arguments.save / "scaling.md").write_text(page)
        draw(curves, arguments.save / "scaling.png")
    return int(any(map(too_steep, curves)))


if __name__ == "__main__":
    sys.exit(main())

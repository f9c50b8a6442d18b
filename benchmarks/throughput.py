"""The one entry to all speed measurements.

    python benchmarks/throughput.py [--quick] [--subject ops ...] [--device cpu|cuda] [--json FILE] [--save]
                                    [--compare OLD.json [NEW.json]]
    python benchmarks/throughput.py --profile FOLDER [--subject ops ...]

This machine's ceilings first; then every subject's rows in one table, each beside its ceiling and its baseline, and why
those that fall short do. A subject that fails costs no other its figures. Backend "triton" is measured on CUDA only:
Triton's interpreter proves results, its time means nothing. Exit code 1: a row failed, or --compare found one slower
beyond both runs' spread; 2: wrong arguments.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells each profile's start and end

import torch
from tqdm import tqdm

from benchmarks import comparing, profiling, reasons, timing
from benchmarks.rows import Given, Piece, measured

# Each module has pieces(given), parts that run and may fail alone, and main_call(given), what --profile looks into.
SUBJECTS = {
    "ops": "benchmarks.ops",
    "sample_op": "benchmarks.sample_op",
    "training": "benchmarks.training_rows",
    "sampling": "benchmarks.sampling_rows",
    "loading": "benchmarks.loading",
    "checkpoint": "benchmarks.checkpoint",
    "python-cost": "benchmarks.python_cost",
}
KEEP_MEMORY = ("ops", "python-cost")  # in this process, for good: measured last
RESULTS = Path(__file__).resolve().parent / "results"
HEADINGS = ("what", "backend", "median ms", "spread", "of ceiling", "x baseline", "peak MiB", "")
LEFT = (0, 1, 7)  # columns of words
CAPTION = (
    "Spread: the middle half of the times over their median. Of ceiling: of the speed that this run's ceilings "
    "allow, named at the end of the row; "
    "caches can lift it above 100 %. x baseline: the baseline's time (memory, where no time is given) over this "
    "one's, above 1 is better. Peak MiB: "
    "most memory beyond what was there before; of torch's allocator for ops, of a process (p) for steps and "
    "checkpoints."
)


def parse() -> argparse.Namespace:
    """The command line. What contradicts itself ends with a line."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument(
        "--subject", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS), help="what to measure; all by default"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small shapes and few repeats, under three minutes: a check that all runs, not to publish",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write ceilings, environment and all rows here")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/throughput.{json,md}")
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="an earlier --json file, beside this run; two: beside each other, nothing is measured",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FOLDER",
        help="measure nothing; write a torch profiler trace and a table of each subject's main call",
    )
    arguments = parser.parse_args()
    if arguments.compare and len(arguments.compare) > 2:
        parser.error(f"--compare: expected one or two files, got {len(arguments.compare)}")
    if arguments.profile and (arguments.json or arguments.save or arguments.compare):
        parser.error("--profile measures nothing that --json, --save or --compare could take: give it alone")
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        parser.error(f"--json {arguments.json}: its folder does not exist; make it first")
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the processes that candidates start too
    elif arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here; see star-fast doctor")
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return arguments


def all_rows(pieces: dict[str, list[Piece]]) -> list[dict[str, Any]]:
    """Every piece's rows, with their subject; a bar on stderr says what is being measured."""
    rows = []
    with tqdm(total=sum(map(len, pieces.values())), file=sys.stderr, disable=None, leave=False, unit="piece") as bar:
        for subject, parts in sorted(pieces.items(), key=lambda item: item[0] in KEEP_MEMORY):
            for piece in parts:
                bar.set_description(f"{subject}: {piece.name}"[:70])
                rows += [{"subject": subject, **row._asdict()} for row in measured(piece)]
                bar.update()
    return sorted(rows, key=lambda row: list(pieces).index(row["subject"]))


def pieces_of(subjects: list[str], given: Given) -> dict[str, list[Piece]]:
    """The parts of each subject. A subject that cannot even say them is one part, which fails."""
    found: dict[str, list[Piece]] = {}
    for subject in subjects:
        try:
            found[subject] = importlib.import_module(SUBJECTS[subject]).pieces(given)
        except Exception as error:

            def fail(error: Exception = error) -> list:
                raise error

            found[subject] = [Piece(subject, fail)]
    return found


def cells(row: dict[str, Any]) -> list[str]:
    """A row as the table shows it."""

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    memory = shown(row["peak_mib"], ".1f") + (
        " p" if row["peak_mib"] is not None and row["memory_of"] == "the process" else ""
    )
    note = f"FAILED: {row['error']}" if row["error"] else row["ceiling"]
    if row["how"] not in ("", timing.REPLAYED):
        note = "; ".join(filter(None, (note, row["how"])))
    return [
        row["name"],
        row["backend"],
        shown(row["median_ms"], ".3f"),
        shown(row["spread"], ".0%"),
        shown(row["share"], ".1%"),
        shown(row["ratio"], ".2f"),
        memory,
        note,
    ]


def head(report: dict[str, Any]) -> list[str]:
    """Machine and ceilings, in two lines."""
    found, ceilings = report["environment"], report["ceilings"]
    int8 = ceilings["int8_gop_per_s"]
    return [
        ", ".join(f"{key} {value}" for key, value in found.items())
        + (" (quick: not to publish)" if report["quick"] else ""),
        f"Ceilings: read {ceilings['read_gb_per_s']:.1f} GB/s, copy {ceilings['copy_gb_per_s']:.1f} GB/s (read "
        "and written), products "
        f"{ceilings['fp32_gflop_per_s']:.0f} GFLOP/s float32, {ceilings['bf16_gflop_per_s']:.0f} bfloat16, "
        f"{f'{int8:.0f} GOP/s' if int8 else 'no'} int8.",
    ]


def show(report: dict[str, Any]) -> None:
    """The table for people; a subject a section, a name once."""
    from rich.console import Console
    from rich.table import Table

    table, subject, name = Table(caption=CAPTION, caption_justify="left"), None, None
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if number in LEFT else "right", overflow="fold")
    for row in report["rows"]:
        if row["subject"] != subject:
            table.add_section()
            subject = row["subject"]
        shown = cells(row)
        table.add_row("" if shown[0] == name else shown[0], *shown[1:])
        name = shown[0]
    console = Console(markup=False, highlight=False)
    Console(markup=False, highlight=False, width=max(150, console.width)).print(table)


def text(report: dict[str, Any]) -> str:
    """The same as Markdown."""
    lines = [
        "# Throughput",
        "",
        "By `python benchmarks/throughput.py`.",
        "",
        *(part for line in head(report) for part in (line, "")),
        CAPTION,
    ]
    for subject in dict.fromkeys(row["subject"] for row in report["rows"]):
        lines += [
            "",
            f"## {subject}",
            "",
            f"| {' | '.join(HEADINGS)} |",
            "|" + "|".join("---" if i in LEFT else "--:" for i in range(len(HEADINGS))) + "|",
        ]
        lines += [f"| {' | '.join(cells(row))} |" for row in report["rows"] if row["subject"] == subject]
    return "\n".join([*lines, "", *reasons.lines(report["rows"])]).rstrip() + "\n"


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report: environment, ceilings, rows."""
    environment, ceilings = timing.environment(arguments.device), timing.ceilings(arguments.device, arguments.quick)
    rows = all_rows(pieces_of(arguments.subject, Given(arguments.device, arguments.quick, ceilings)))
    reasons.explain(rows, arguments.device)
    return {"environment": environment, "quick": arguments.quick, "ceilings": ceilings._asdict(), "rows": rows}


def main() -> int:
    """Measure, show, keep and compare what was asked for."""
    arguments = parse()
    if arguments.profile:
        arguments.profile.mkdir(parents=True, exist_ok=True)
        # Nothing is held against them
        given = Given(arguments.device, arguments.quick, timing.Ceilings(1.0, 1.0, 1.0, 1.0))
        for subject in arguments.subject:
            print(profiling.write(subject, SUBJECTS[subject], arguments.profile, given), flush=True)
        return 0
    try:
        earlier = [comparing.read(path) for path in arguments.compare or ()]
    except comparing.Unreadable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = False
    if len(earlier) < 2:
        report = measure(arguments)
        failed = any(row["error"] for row in report["rows"])
        print("\n".join(head(report)))
        show(report)
        print("\n".join(reasons.lines(report["rows"])))
        kept = json.dumps(report, indent=1) + "\n"
        if arguments.json:
            arguments.json.write_text(kept)
        if arguments.save:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / "throughput.json").write_text(kept)
            (RESULTS / "throughput.md").write_text(text(report))
        earlier.append(report)
    if arguments.compare:
        comparison = comparing.compare(*earlier)
        print("\n".join(comparison.lines))
        failed |= bool(comparison.regressions)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

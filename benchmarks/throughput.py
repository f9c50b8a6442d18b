"""The one entry to all speed measurements.

    python benchmarks/throughput.py [--subject ops ...] [--quick]

Prints this machine's measured ceilings and a table for people, then one JSON line, last: `ceilings`, `rows` (name, backend, median_ms, spread, ratio,
share and more) and the environment. Without --quick the same JSON is kept in benchmarks/results/. Backend "triton" is measured on CUDA only:
Triton's interpreter proves results, its time means nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.pop("TRITON_INTERPRET", None)

import torch

from benchmarks import timing

# Each module has measure(device, quick, ceilings) -> rows with at least name, backend, median_ms, spread, ratio, share.
SUBJECTS = {"ops": "benchmarks.ops", "sample_op": "benchmarks.sample_op", "python-cost": "benchmarks.python_cost"}
RESULTS = Path(__file__).resolve().parent / "results"
CAPTION = "ratio: naive time over this one's (above 1 is faster); share: of what the measured ceilings allow (caches can lift it above 100 %)"


def show(subject: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows of one subject as a table for people; plain lines where rich is not installed."""
    cells = [[row["name"], row["backend"], "" if row["median_ms"] is None else f"{row['median_ms']:.3f}",
              "" if row["spread"] is None else f"{row['spread']:.0%}",
              row.get("error") or ("" if row["ratio"] is None else f"{row['ratio']:.2f}"),
              "" if row["share"] is None else f"{row['share']:.1%}", "" if row["how"] == timing.REPLAYED else row["how"]] for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("\n".join([subject, *("  ".join(row) for row in cells), CAPTION]))
        return
    table = Table(title=subject, caption=CAPTION)
    for heading in ("what", "backend", "median ms", "spread", "ratio", "share", "unless a graph's replay"):
        table.add_column(heading, justify="right" if heading in ("median ms", "spread", "ratio", "share") else "left", overflow="fold")
    for row in cells:
        table.add_row(*row)
    console = Console()
    Console(width=max(130, console.width)).print(table)


def main() -> int:
    """Measure the chosen subjects."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subject", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS), help="what to measure")
    parser.add_argument("--quick", action="store_true", help="small shapes and few repeats: a check that all runs, not a measurement to publish")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    environment, ceilings = timing.environment(device), timing.ceilings(device, arguments.quick)
    print(f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}, commit {environment['commit']}")
    print(f"ceilings: read {ceilings.read_gb_per_s:.1f} GB/s, copy {ceilings.copy_gb_per_s:.1f} GB/s, "
          f"products {ceilings.fp32_gflop_per_s:.0f} GFLOP/s float32, {ceilings.bf16_gflop_per_s:.0f} bfloat16")
    rows: list[dict[str, Any]] = []
    for subject in arguments.subject:
        found = [row._asdict() for row in importlib.import_module(SUBJECTS[subject]).measure(device, arguments.quick, ceilings)]
        show(subject, found)
        rows += found
    report = {"environment": environment, "quick": arguments.quick, "ceilings": ceilings._asdict(), "rows": rows}
    if not arguments.quick:
        name = re.sub(r"[^a-z0-9]+", "-", f"{'-'.join(arguments.subject)} {environment['device']}".lower()).strip("-")
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"throughput-{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return 1 if any(row.get("error") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

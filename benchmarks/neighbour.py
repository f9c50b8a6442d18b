"""A busy neighbour: how fast `--preset tiny` trains alone, and while another process keeps one core.

    python benchmarks/neighbour.py CODES [--save]      CODES: a store of the digits (star-fast prepare digits)

Three ways of waiting take turns: OpenMP's default, the bound that star_fast sets (star_fast/threads.py), and no spinning at all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import timing  # noqa: E402 (needs the path above)
from star_fast.threads import SPINS  # noqa: E402

WAYS = {"OpenMP's default": {"GOMP_SPINCOUNT": "300000"}, f"bounded ({SPINS} spins, ours)": {}, "no spinning": {"GOMP_SPINCOUNT": "0"}}


def images_per_s(codes: str, environment: dict[str, str], steps: int, busy: bool) -> float:
    """Of the later log lines of one training."""
    neighbour = subprocess.Popen([sys.executable, "-c", "import os\nos.sched_setaffinity(0, {0})\nwhile True: pass"]) if busy else None
    try:
        with tempfile.TemporaryDirectory() as run:
            subprocess.run([sys.executable, ROOT / "star_fast/train.py", "--preset", "tiny", "--data.codes", codes, "--run", run, "--train.max-steps",
                            str(steps), "--train.log-every-steps", str(steps // 4), "--train.validate-every-steps", "0", "--train.tensorboard", "False"],
                           check=True, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
            return statistics.median(line["images_per_s"] for line in lines[1:])
    finally:
        if neighbour is not None:
            neighbour.kill()
            neighbour.wait()


def main() -> None:
    """Measure, print, and with --save keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("codes", help="a code store of the digits")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/neighbour.md")
    arguments = parser.parse_args()
    found: dict[tuple[str, bool], list[float]] = {}
    for _ in range(arguments.turns):
        for way, environment in WAYS.items():
            for busy in (False, True):
                steps = 40 if busy and way == "OpenMP's default" else 120  # a tenth of the speed: patience has an end
                found.setdefault((way, busy), []).append(images_per_s(arguments.codes, environment, steps, busy))
    where = ", ".join(f"{key} {value}" for key, value in timing.environment("cpu").items())
    default = statistics.median(found["OpenMP's default", False])
    lines = ["# A busy neighbour", "", where, "",
             f"`--preset tiny`, two cores, one of them kept by another process; images/s, medians of {arguments.turns} turns.", "",
             "| threads wait | alone | share of the default's | with a neighbour | share of alone |", "|---|---|---|---|---|"]
    for way in WAYS:
        alone, busy = (statistics.median(found[way, is_busy]) for is_busy in (False, True))
        lines.append(f"| {way} | {alone:.0f} | {alone / default:.0%} | {busy:.0f} | {busy / alone:.0%} |")
    print("\n".join(lines))
    if arguments.save:
        (ROOT / "benchmarks/results/neighbour.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

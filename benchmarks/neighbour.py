"""A busy neighbour: how fast `--preset tiny` trains and its model samples, alone and while another process keeps one
core.

    python benchmarks/neighbour.py CODES RUN [--save]      of the digits, as scripts/quickstart.sh makes both

Three ways of waiting take turns: OpenMP's default, the bound that star_fast sets (star_fast/threads.py), and no
spinning at all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import timing  # noqa: E402 (needs the path above)
from star_fast.threads import SPINS  # noqa: E402

DEFAULT = "OpenMP's default"
WAYS = {
    DEFAULT: {"GOMP_SPINCOUNT": "300000"},
    f"bounded ({SPINS} spins, ours)": {},
    "no spinning": {"GOMP_SPINCOUNT": "0"},
}


def train(codes: str, run: str, slow: bool, environment: dict[str, str]) -> float:
    """Images/s of the later log lines of one training."""
    steps = 40 if slow else 120  # a tenth of the speed: patience has an end
    with tempfile.TemporaryDirectory() as folder:
        _quietly(
            [
                ROOT / "star_fast/train.py",
                "--preset",
                "tiny",
                "--data.codes",
                codes,
                "--run",
                folder,
                "--train.max-steps",
                str(steps),
                "--train.log-every-steps",
                str(steps // 4),
                "--train.validate-every-steps",
                "0",
                "--train.tensorboard",
                "False",
            ],
            environment,
        )
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        return statistics.median(line["images_per_s"] for line in lines[1:])


def sample(codes: str, run: str, slow: bool, environment: dict[str, str]) -> float:
    """Images/s of `star-fast sample`, pixels included."""
    images = 200 if slow else 2000
    with tempfile.TemporaryDirectory() as folder:
        _quietly(
            [
                "-m",
                "star_fast.cli",
                "sample",
                "--model",
                f"{run}/model",
                "--out",
                f"{folder}/out.npz",
                "--images",
                str(images),
                "--no-grid",
            ],
            environment,
        )
        return images / json.loads(Path(folder, "out.json").read_text())["run"]["here_s"]


def _quietly(command: list[Any], environment: dict[str, str]) -> None:
    subprocess.run(
        [sys.executable, *command],
        check=True,
        env={**os.environ, "PYTHONPATH": timing.on_path(ROOT), **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@contextmanager
def neighbour(busy: bool) -> Iterator[None]:
    """Another process that keeps the first core, if `busy`."""
    process = (
        subprocess.Popen([sys.executable, "-c", "import os\nos.sched_setaffinity(0, {0})\nwhile True: pass"])
        if busy
        else None
    )
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def main() -> None:
    """Measure, print, and with --save keep."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("codes", help="a code store of the digits")
    parser.add_argument("run", help="a run trained on them")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/neighbour.md")
    arguments = parser.parse_args()
    found: dict[tuple[str, str, bool], list[float]] = {}
    for _ in range(arguments.turns):
        for what, work in WORK.items():
            for way, environment in WAYS.items():
                for busy in (False, True):
                    with neighbour(busy):
                        rate = work(arguments.codes, arguments.run, busy and way == DEFAULT, environment)
                    found.setdefault((what, way, busy), []).append(rate)
    where = ", ".join(f"{key} {value}" for key, value in timing.environment("cpu").items())
    lines = [
        "# A busy neighbour",
        "",
        where,
        "",
        f"`--preset tiny`, two cores, one of them kept by another process; images/s, medians of {arguments.turns} "
        "turns.",
    ]
    for what in WORK:
        default = statistics.median(found[what, DEFAULT, False])
        lines += [
            "",
            f"{what}:",
            "",
            "| threads wait | alone | share of the default's | with a neighbour | share of alone |",
            "|---|---|---|---|---|",
        ]
        for way in WAYS:
            alone, busy = (statistics.median(found[what, way, is_busy]) for is_busy in (False, True))
            lines.append(f"| {way} | {alone:.0f} | {alone / default:.0%} | {busy:.0f} | {busy / alone:.0%} |")
    print("\n".join(lines))
    if arguments.save:
        (ROOT / "benchmarks/results/neighbour.md").write_text("\n".join(lines) + "\n")


WORK = {"training": train, "sampling": sample}

if __name__ == "__main__":
    main()

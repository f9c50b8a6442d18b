"""What `star-fast evaluate` costs: Inception on the CPU, and the metrics of 50 000 samples against 10 000 real images
once the features are there.

    python benchmarks/evaluation.py [--parts NAME ...] [--samples N] [--real N] [--save]

Features are random, of Inception's widths; drawing them is not timed. Each part runs in a process of its own, so that
its peak of memory is its own. Results of earlier calls are kept beside the table, so that a long run need not be
repeated.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from star_fast.threads import settle_threads  # noqa: E402 (needs the path above)

settle_threads()  # as the command line does, before torch starts its threads

import torch  # noqa: E402

from benchmarks import timing  # noqa: E402
from star_fast.evaluation.adm import POOL_WIDTH, SPATIAL_WIDTH, FeatureStatistics, adm_metrics  # noqa: E402
from star_fast.evaluation.inception import CLASSES, Features, Inception  # noqa: E402
from star_fast.evaluation.manifolds import precision_recall  # noqa: E402

BATCH_IMAGES = 250
INCEPTION_IMAGES = 64
PARTS = {
    "inception": f"Inception, {INCEPTION_IMAGES} images of 256 pixels in batches of 32, one thread",
    "fid": "moments of both kinds, FID, sFID, Inception Score",
    "float32": "precision and recall, exact",
    "float16": "precision and recall, ADM's float16",
}
TARGETS = {"inception": "", "fid": "5 min, 2 GiB", "float32": "10 min", "float16": ""}
RESULTS = ROOT / "benchmarks/results/evaluation.json"


class Clock:
    """Wall and CPU time of the blocks that it times."""

    def __init__(self) -> None:
        self.wall_s = self.cpu_s = 0.0

    def __call__(self, call: Callable[[], object]) -> object:
        wall, cpu = time.perf_counter(), time.process_time()
        made = call()
        self.wall_s, self.cpu_s = self.wall_s + time.perf_counter() - wall, self.cpu_s + time.process_time() - cpu
        return made


def features(images: int, width: int, seed: int) -> Iterator[torch.Tensor]:
    """Batches (n, D) float32 like Inception's: not negative, most of them small, a few directions much wider than the
    rest.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(16, width, generator=torch.Generator().manual_seed(0)) * 0.15
    for start in range(0, images, BATCH_IMAGES):
        count = min(BATCH_IMAGES, images - start)
        yield (
            0.3 * torch.randn(count, width, generator=generator)
            + torch.randn(count, 16, generator=generator) @ wide
            + 0.1 * seed
        ).relu_()


def measure_fid(samples: int, real: int, clock: Clock) -> dict[str, float]:
    """All sums of both sets, then the distances and the score."""
    gathered = []
    for seed, images in ((1, samples), (2, real)):
        statistics = FeatureStatistics()
        for parts in zip(
            *(features(images, width, seed) for width in (POOL_WIDTH, SPATIAL_WIDTH, CLASSES)), strict=True
        ):
            clock(functools.partial(statistics.add, Features(*parts)))
        gathered.append(statistics)
    metrics = clock(lambda: adm_metrics(gathered[0], gathered[1].gaussians(), None))
    return {"fid": metrics.fid, "sfid": metrics.sfid, "inception_score": metrics.inception_score}


def measure_manifolds(samples: int, real: int, distances: str, clock: Clock) -> dict[str, float]:
    """Precision and recall."""
    sets = [torch.cat(list(features(images, POOL_WIDTH, 1))) for images in (samples, real)]
    sets[1] *= 1.02
    return clock(lambda: precision_recall(*sets, distances=distances))._asdict()


def measure_inception(clock: Clock) -> dict[str, float]:
    """Images a second of CPU time."""
    torch.set_num_threads(1)
    network = Inception(None)
    images = torch.randint(0, 256, (INCEPTION_IMAGES, 3, 256, 256), dtype=torch.uint8)
    network(images[:32])  # warm
    for batch in images.split(32):
        clock(functools.partial(network, batch))
    return {"cpu_ms_per_image": 1e3 * clock.cpu_s / INCEPTION_IMAGES}


def run_part(name: str, samples: int, real: int) -> dict[str, object]:
    """One part in this process."""
    clock = Clock()
    if name == "inception":
        figures = measure_inception(clock)
    else:
        figures = measure_fid(samples, real, clock) if name == "fid" else measure_manifolds(samples, real, name, clock)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"figures": figures, "wall_s": clock.wall_s, "cpu_s": clock.cpu_s, "peak_gib": peak_gib}


def table(found: dict[str, dict[str, Any]]) -> str:
    """The page that is kept."""
    lines = [
        "# What `star-fast evaluate` costs",
        "",
        "Random weights and features: what they are does not change the work. CPU time is that of all threads: "
        "where others used the machine too, the",
        "wall time is theirs as much as ours. Memory is the peak of the whole process, PyTorch and the features "
        "included.",
        "",
        "| | samples | real images | wall | CPU time | peak memory | asked for | result |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, title in PARTS.items():
        if row := found.get(name):
            figures = ", ".join(f"{key} {value:.4f}" for key, value in row["figures"].items())
            sizes = "| | " if name == "inception" else f"| {row['samples']:,} | {row['real']:,} "
            lines.append(
                f"| {title} {sizes}| {row['wall_s']:.0f} s | {row['cpu_s']:.0f} s | {row['peak_gib']:.2f} GiB | "
                f"{TARGETS[name]} | {figures} |"
            )
    lines += [
        "",
        *(
            f"{name}: {row['device']}, load before the run {row['load_before']:.1f}, torch {row['torch']}, "
            f"{row['commit']}."
            for name, row in found.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and with --save keep."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--real", type=int, default=10_000)
    parser.add_argument("--here", choices=list(PARTS), help="only this part, in this process; prints JSON")
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/results/evaluation.md, beside rows kept before"
    )
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(run_part(arguments.here, arguments.samples, arguments.real)))
        return
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in arguments.parts:
        load = os.getloadavg()[0]
        command = [
            sys.executable,
            __file__,
            "--here",
            name,
            "--samples",
            str(arguments.samples),
            "--real",
            str(arguments.real),
        ]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        found[name] = {
            "samples": arguments.samples,
            "real": arguments.real,
            **row,
            "load_before": load,
            **timing.environment("cpu"),
        }
    print(table(found))
    if arguments.save:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(table(found))


if __name__ == "__main__":
    main()

"""The linear probe at ImageNet's size: training from features on disk, its time an epoch and its memory.

    python -m benchmarks.probe [--images N] [--epochs N] [--folder FOLDER] [--quick] [--save]

Synthetic features of N images at 8 positions, width 768 (LlamaGen-B), bfloat16, in which 1000 classes are planted: 16
chunks are drawn and written again and again until the folder is full, so every image of an epoch is read from a file of
its own, and what is learnt can be judged. Held-out images are drawn anew.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import timing
from star_fast.evaluation.probe_features import BLOCK_IMAGES, OnDisk, remove_features
from star_fast.evaluation.probe_training import Schedule, accuracies, neighbour_accuracies, train_probes

RESULTS = Path(__file__).parent / "results"
HEADS, WIDTH, CLASSES, DISTINCT = 8, 768, 1000, 16
SIGNAL = 0.25  # length of a planted direction's coordinate beside noise of 1


class Synthetic:
    """Draws chunks of features in which classes are planted."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.directions = torch.randn(CLASSES, HEADS, WIDTH, generator=self.generator)

    def chunk(self, count: int) -> tuple[Tensor, Tensor]:
        """(count, HEADS, WIDTH) bfloat16 and labels (count,)."""
        labels = torch.randint(CLASSES, (count,), generator=self.generator)
        features = torch.randn(count, HEADS, WIDTH, generator=self.generator)
        return features.add_(self.directions[labels], alpha=SIGNAL).bfloat16(), labels


def write(features: OnDisk, drawn: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Fill the folder from the drawn chunks; the labels (N,) of its images."""
    labels = []
    for chunk in range(features.chunks):
        x, label = drawn[chunk % len(drawn)]
        count = features.rows(chunk).stop - features.rows(chunk).start
        features.path(0, chunk).write_bytes(memoryview(x[:count].view(torch.int16).numpy()).cast("B"))
        labels.append(label[:count])
    return torch.cat(labels)


def peak_gib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(folder: Path, images: int, epochs: int, judged: int, neighbours_of: int) -> list[str]:
    """The table's lines."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = Synthetic(0)
    train, held = (
        OnDisk(folder, name, 1, count, HEADS, WIDTH) for name, count in (("train", images), ("held-out", judged))
    )
    few = OnDisk(folder, "few", 1, neighbours_of, HEADS, WIDTH)
    start = time.perf_counter()
    labels = write(train, [source.chunk(BLOCK_IMAGES) for _ in range(DISTINCT)])
    held_labels, few_labels = (
        write(each, [source.chunk(BLOCK_IMAGES) for _ in range(min(DISTINCT, each.chunks))]) for each in (held, few)
    )
    written_s, before = time.perf_counter() - start, peak_gib()
    size_gib = sum(train.size_bytes(chunk) for chunk in range(train.chunks)) / 2**30
    start = time.perf_counter()
    count = sum(len(x) for x, _ in train.epoch(16384, torch.Generator().manual_seed(0)))
    read_s = time.perf_counter() - start
    schedule = Schedule((6.4,), epochs, min(1, epochs - 1), 16384, 0)
    start = time.perf_counter()
    probes = train_probes(train, labels, CLASSES, schedule, device)
    trained_s = time.perf_counter() - start
    after = peak_gib()
    start = time.perf_counter()
    accuracy = accuracies(probes, held, held_labels)[0]
    judged_s = time.perf_counter() - start
    start = time.perf_counter()
    near = neighbour_accuracies(train, labels, few, few_labels, CLASSES, device=device)
    near_s = time.perf_counter() - start
    remove_features([train])
    remove_features([held])
    remove_features([few])
    flops = 4 * images * HEADS * WIDTH * CLASSES
    return [
        "| | |",
        "|---|--:|",
        f"| training images x positions x width | {images:,} x {HEADS} x {WIDTH} |",
        f"| features on disk | {size_gib:.1f} GiB |",
        f"| writing them, s | {written_s:.0f} |",
        f"| reading and mixing an epoch alone ({count:,} images), s | {read_s:.0f} |",
        f"| **an epoch of training, s** (mean of {epochs}) | **{trained_s / epochs:.0f}** |",
        f"| its products alone (forward and gradient), GFLOP/s | {flops * epochs / trained_s / 1e9:.0f} |",
        f"| judging {judged:,} images, s | {judged_s:.1f} |",
        f"| nearest neighbours of {neighbours_of:,} images, s | {near_s:.0f} |",
        f"| peak memory before training, GiB | {before:.2f} |",
        f"| **peak memory of training, GiB** | **{after:.2f}** |",
        f"| peak memory at the end, GiB | {peak_gib():.2f} |",
        f"| top-1 of unseen images after {epochs} epochs, by position, % | "
        f"{', '.join(f'{100 * share:.1f}' for share in accuracy.tolist())} (chance 0.1) |",
        f"| … by their 20 nearest neighbours, % | {', '.join(f'{100 * share:.1f}' for share in near.tolist())} |",
    ]


def main() -> None:
    """Measure, print, and with --save keep."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--epochs", type=int, default=1, help="few: what an epoch takes does not change")
    parser.add_argument(
        "--folder", default="", help="where the features are written; empty: the place for temporary files"
    )
    parser.add_argument(
        "--quick", action="store_true", help="few images: a check that all runs, not a measurement to publish"
    )
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/probe.md")
    arguments = parser.parse_args()
    images, judged, neighbours_of = (20_000, 2000, 100) if arguments.quick else (arguments.images, 50_000, 256)
    where = timing.environment("cuda" if torch.cuda.is_available() else "cpu") | {"cores": os.cpu_count() or 1}
    with tempfile.TemporaryDirectory(dir=arguments.folder or None) as folder:
        lines = measure(Path(folder), images, arguments.epochs, judged, neighbours_of)
    load = f", load average {os.getloadavg()[2]:.1f}: the machine was shared, so times are longer than alone"
    lines = [
        "# The linear probe from features on disk",
        "",
        ", ".join(f"{key} {value}" for key, value in where.items()) + load,
        "",
        *(line.strip() for line in __doc__.split("\n\n")[2].strip().splitlines()),
        "",
        *lines,
    ]
    print("\n".join(lines))
    if arguments.save:
        (RESULTS / "probe.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""From files to views, and from the code store to batches: images/s, beside a DataLoader that does what LlamaGen does.

    python benchmarks/loading.py [--quick] [--save]

All candidates get the same files, held in memory, and two threads or processes. Turn by turn, medians; CPU seconds are
of the process and its workers.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import loading_store, timing
from benchmarks.loading_ways import SIDE, THREADS, Candidate, by_dali, by_decoder, by_loader, by_pillow
from benchmarks.photographs import encoded, photographs, sources
from benchmarks.rows import Given, Piece, Row
from star_fast.config import DataConfig
from star_fast.data.augment import Augmentation
from star_fast.data.dali import DaliAugment, DaliSquares
from star_fast.data.dali_pipelines import ENCODED, decode_pipeline, square_shape, squares_pipeline
from star_fast.data.decoding import decode_image
from star_fast.data.views import cut_views, make_squares, square_sizes

RESULTS = Path(__file__).resolve().parent / "results"
DECODING = "decoding alone, Pillow in threads"
RANGES = {"1.1": (1.1,), "1.1 and 1.05": (1.1, 1.05)}


class Prepared(NamedTuple):
    """One way to make the views of files, measured."""

    way: str
    ms: float  # an image, median
    spread: float
    cpu_ms: float  # an image, of the process and its workers
    by_loader: float  # times as fast as the faster DataLoader


def prepare(name: str, quick: bool) -> tuple[int, list[Prepared], list[str]]:
    """(views of an image, every way of making them for a crop range, what DALI left to Pillow); the last way only
    decodes.
    """
    files, a_turn = photographs(32 if quick else 512), 16 if quick else 64
    with ThreadPoolExecutor(THREADS) as pool:
        data = DataConfig(crop_ranges=RANGES[name])
        sizes = square_sizes(data, SIDE)
        dali = {
            device: DaliSquares(sizes, 3, device=device, threads=THREADS)
            for device in ("cpu", *(["mixed"] if torch.cuda.is_available() else []))
        }
        ways = {
            "DataLoader, one image a step (as published)": by_loader(files, sizes, 1),
            "DataLoader, batches of 32": by_loader(files, sizes, 32),
            "Pillow in threads (ours)": by_pillow(files, data, pool),
            **{f"DALI, {device} (ours)": by_dali(files, data, pool, squares) for device, squares in dali.items()},
            DECODING: by_decoder(files, pool),
        }
        candidates = {way: Candidate(make, len(files), a_turn) for way, make in ways.items()}
        timings = timing.compare(candidates, "cpu", seconds=1 if quick else 20, repeats=(3 if quick else 8, 24))
    fastest = min(found.median_ms for way, found in timings.items() if "DataLoader" in way)
    left = [
        f"Of the files DALI ({device}) took {squares.counts['dali'] / whole:.1%}, Pillow "
        f"{squares.counts['pillow'] / whole:.1%}."
        for device, squares in dali.items()
        if (whole := sum(squares.counts.values()))
    ]
    return (
        len(sizes) * 10,
        [
            Prepared(
                way,
                found.median_ms / a_turn,
                found.spread,
                1e3 * statistics.median(candidates[way].cpu[1:]),
                fastest / found.median_ms,
            )
            for way, found in timings.items()
        ],
        left,
    )


def preparation(quick: bool) -> Iterator[str]:
    """Ten crops of each file, by every way."""
    for name in RANGES:
        views, found, left = prepare(name, quick)
        yield from (
            f"## Crop range {name}: {views} views an image",
            "",
            "| | images/s | spread | CPU ms an image | times the faster DataLoader |",
            "|---|--:|--:|--:|--:|",
        )
        for row in found:
            yield f"| {row.way} | {1e3 / row.ms:.0f} | {row.spread:.0%} | {row.cpu_ms:.1f} | {row.by_loader:.2f} |"
        for line in left:
            yield from ("", line)
        yield ""


def pieces(given: Given) -> list[Piece]:
    """Rows of throughput.py: the first crop range (both, unless quick), then the store."""
    ranges = list(RANGES)[: 1 if given.quick else None]
    return [
        *(Piece(f"views of an image, crop range {name}", functools.partial(_rows, name, given)) for name in ranges),
        *loading_store.pieces(given),
    ]


def _rows(name: str, given: Given) -> list[Row]:
    views, found, _ = prepare(name, given.quick)
    least_ms = next(row.ms for row in found if row.way == DECODING)
    return [
        Row(
            f"{views} views of an image, crop range {name}",
            row.way,
            row.ms,
            row.spread,
            None if row.way == DECODING else row.by_loader,
            least_ms / row.ms,
            how="" if given.device == "cpu" else "on the host",
            ceiling="decoding alone",
        )
        for row in found
    ]


def main_call(given: Given) -> Callable[[], object]:
    """For --profile: ten crops of 16 files, step by step, and a batch of a store."""
    files, data = photographs(16), DataConfig()
    batch = loading_store.a_batch()

    def call() -> None:
        with torch.profiler.record_function("decode, Pillow"):
            images = [decode_image(file).convert("RGB") for file in files]
        with torch.profiler.record_function("centre crops"):
            squares = [make_squares(image, square_sizes(data, SIDE), 3) for image in images]
        with torch.profiler.record_function("ten crops"):
            for number, square in enumerate(squares):
                cut_views(square, number, data, SIDE)
        with torch.profiler.record_function("Batches.step"):
            batch()

    return call


def decode_by(
    pipeline: Any, files: list[bytes], inputs: dict[str, list[np.ndarray]] | None = None
) -> list[list[np.ndarray]]:
    """Each output of a DALI graph, file by file."""
    pipeline.feed_input(ENCODED, [np.frombuffer(data, dtype=np.uint8) for data in files])
    for name, rows in (inputs or {}).items():
        pipeline.feed_input(name, rows)
    return [[np.asarray(output.at(place)) for place in range(len(files))] for output in pipeline.run()]


def profile(quick: bool) -> Iterator[str]:
    """Where the time goes, on one core."""
    from torchvision import transforms

    files = photographs(16)
    images, data = [decode_image(file) for file in files], DataConfig()
    squares = [make_squares(image, (281,), 3) for image in images]
    shown = [Image.fromarray(square[0].transpose(1, 2, 0)) for square in squares]
    decode, resize = decode_pipeline(16, 1), squares_pipeline((281,), 3, "cpu", 16, 1)
    augmented = DaliAugment(Augmentation(), 2, SIDE, 3, 0, threads=1)
    shapes = {"shape 0": [square_shape(*image.size, 281) for image in images]}
    to_float = transforms.Compose(
        [
            transforms.TenCrop(SIDE),
            lambda crops: torch.stack([transforms.ToTensor()(crop) for crop in crops]),
            transforms.Normalize([0.5] * 3, [0.5] * 3, inplace=True),
        ]
    )
    steps = {
        "decode, Pillow": lambda: [decode_image(file).convert("RGB") for file in files],
        "decode, DALI": lambda: decode_by(decode, files),
        "centre crop to 281, Pillow": lambda: [make_squares(image, (281,), 3) for image in images],
        "decode and centre crop, DALI's own resize (rounded twice, no halving)": lambda: decode_by(
            resize, files, shapes
        ),
        "ten crops of the square, uint8": lambda: [cut_views(square, 0, data, SIDE) for square in squares],
        "ten crops of the square, float32 normalised (DataLoader)": lambda: [to_float(image) for image in shown],
        "two random crops, DALI's decoder and Pillow": lambda: augmented(files, range(16), 0),
    }
    calls = {name: timing.Metered(call) for name, call in steps.items()}
    timings = timing.compare(calls, "cpu", seconds=0.5 if quick else 4, repeats=(3, 60))
    yield from ("## On one core", "", "| step | ms an image | spread | CPU ms an image |", "|---|--:|--:|--:|")
    for name, found in timings.items():
        yield f"| {name} | {found.median_ms / 16:.2f} | {found.spread:.0%} | {calls[name].cpu_ms / 16:.2f} |"
    yield ""


def differences() -> Iterator[str]:
    """How far DALI is from Pillow, step by step."""
    yield from (
        "## Levels between DALI and Pillow",
        "",
        "The graph is the one for a GPU, run on the CPU; on the CPU `DaliSquares` cuts with Pillow instead.",
        "",
        "| file | decoded: largest | values that differ | `DaliSquares` on the CPU | graph, 281: largest | values "
        "that differ | by more than 1 |",
        "|---|--:|--:|--:|--:|--:|--:|",
    )
    images = [image.resize((500, 375), Image.Resampling.BICUBIC) for image in sources()]
    kinds: dict[str, tuple[str, dict[str, Any], str]] = {
        "JPEG 4:4:4": ("JPEG", {"quality": 92, "subsampling": 0}, "RGB"),
        "JPEG 4:2:2": ("JPEG", {"quality": 92, "subsampling": 1}, "RGB"),
        "JPEG 4:2:0": ("JPEG", {"quality": 92, "subsampling": 2}, "RGB"),
        "JPEG gray": ("JPEG", {"quality": 92}, "L"),
        "JPEG progressive": ("JPEG", {"quality": 92, "progressive": True}, "RGB"),
        "PNG (goes to Pillow)": ("PNG", {}, "RGB"),
        "WebP (goes to Pillow)": ("WEBP", {"quality": 92}, "RGB"),
    }
    decode, resize, squares = decode_pipeline(8, 1), squares_pipeline((281,), 3, "cpu", 8, 1), DaliSquares((281,), 3)
    shapes = {"shape 0": [square_shape(*image.size, 281) for image in images]}
    for name, (kind, options, mode) in kinds.items():
        files = [encoded(image.convert(mode), kind, **options) for image in images]
        right = [decode_image(file).convert("RGB") for file in files]
        wanted = np.stack([make_squares(image, (281,), 3)[0] for image in right]).astype(int)
        decoded = np.abs(
            np.stack(decode_by(decode, files)[0]).astype(int) - np.stack([np.asarray(image) for image in right])
        )
        cut = np.abs(np.stack(decode_by(resize, files, shapes)[0]).transpose(0, 3, 1, 2) - wanted)
        path = np.abs(np.stack([found[0] for found in squares(files)]) - wanted)
        yield (
            f"| {name} | {decoded.max()} | {np.mean(decoded > 0):.2%} | "
            f"{'bit-equal' if not path.any() else f'up to {path.max()}'} | {cut.max()} | "
            f"{np.mean(cut > 0):.2%} | {np.mean(cut > 1):.4%} |"
        )
    yield ""


def main() -> None:
    """Measure, print, and with --save keep."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few files, a small store: a check that all runs, not a measurement to publish",
    )
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/loading.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    where = timing.environment("cuda" if torch.cuda.is_available() else "cpu") | {"cores": os.cpu_count() or 1}
    lines = ["# Loading", "", ", ".join(f"{key} {value}" for key, value in where.items()), ""]
    print("\n".join(lines))
    for part in (
        preparation(arguments.quick),
        profile(arguments.quick),
        differences(),
        loading_store.report(arguments.quick),
    ):
        for line in part:
            print(line, flush=True)
            lines.append(line)
    lines[2] += (
        f", load average {os.getloadavg()[2]:.1f}: the machine was shared, so times by the wall are longer than "
        "alone, by about this number over 2; "
        "CPU times are not"
    )
    if arguments.save:
        (RESULTS / "loading.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

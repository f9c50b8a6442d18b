"""Reading codes: a store of ImageNet's size, opened, and random batches of it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import timing
from benchmarks.rows import Given, Piece, Row
from star_fast.config import RunConfig
from star_fast.data.codes import CodeStore
from star_fast.data.manifest import CODES_FILE, FILES, FORMAT, FORMAT_VERSION, KEYS_FILE, LABELS_FILE, MANIFEST_FILE
from star_fast.data.views import TEN_CROP_VIEWS
from star_fast.method import masking
from star_fast.presets import preset
from star_fast.storage import sha256_of_bytes
from star_fast.training.batches import Batches, resolve

RESULTS = Path(__file__).resolve().parent / "results"
IMAGES, POSITIONS, CLASSES = 1_281_167, 256, 1000


def write_store(folder: Path, images: int) -> None:
    """A store of `images` x 10 x 256 codes, all zero: codes.bin is as long as a real one and takes no room. (Its sha256
    is that of nothing.)
    """
    labels = np.random.RandomState(0).randint(0, CLASSES, images).astype("<i4").tobytes()
    keys = "".join(
        f'"n{number % CLASSES:08d}/n{number % CLASSES:08d}_{number}.JPEG"\n' for number in range(images)
    ).encode()
    with open(folder / CODES_FILE, "wb") as file:
        file.truncate(2 * images * len(TEN_CROP_VIEWS) * POSITIONS)
    (folder / LABELS_FILE).write_bytes(labels)
    (folder / KEYS_FILE).write_bytes(keys)
    hashes = {CODES_FILE: sha256_of_bytes(b""), LABELS_FILE: sha256_of_bytes(labels), KEYS_FILE: sha256_of_bytes(keys)}
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "images": images,
        "views": list(TEN_CROP_VIEWS),
        "positions": POSITIONS,
        "grid": [16, 16],
        "image_size": 256,
        "codebook": 16384,
        "class_names": [f"n{number:08d}" for number in range(CLASSES)],
        "tokenizer_sha256": "0" * 64,
        "source": {"kind": "made by benchmarks/loading.py"},
        "split": {"held_out_share": 0.0, "held_out": []},
        "skipped": [],
        "files": {name: {"bytes": (folder / name).stat().st_size, "sha256": hashes[name]} for name in FILES},
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


def config_for(store: CodeStore) -> RunConfig:
    """Preset B on this store, on one rank."""
    return resolve(dataclasses.replace(preset("B")), store)


def step_ms_an_image() -> float | None:
    """What a step of preset B takes, by benchmarks/results/training.md: 4 images a step."""
    row = re.search(r"^\| star_fast, ST-AR \| ([\d.]+) \|", (RESULTS / "training.md").read_text(), re.MULTILINE)
    return float(row.group(1)) / 4 if row else None


class Read(NamedTuple):
    """One thing done with a store, measured."""

    what: str
    images: int  # it is about; 0: not about images
    median_ms: float
    spread: float
    cpu_ms: float
    moved_bytes: int  # at least: codes read and their 64-bit copies written; 0: not counted


def measure(images: int, seconds: float) -> tuple[dict[str, Read], float]:
    """({name: what opening a store of so many images, a new epoch and a batch take}, GB that it seems to have)."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_store(folder, images)
        store = CodeStore.open(folder)
        batches = Batches(store, config_for(store))
        size = batches.config.train.images_per_step
        random, turn = np.random.RandomState(1), itertools.count()
        asked = random.permutation(images)[: images // size * size].reshape(-1, size)[:500]
        views = np.argsort(random.rand(*asked.shape, len(store.views)), axis=2)[..., :2]

        def gather() -> None:
            number = next(turn) % len(asked)
            store.codes(asked[number], views[number])

        def new_epoch() -> None:
            batches._order = None  # as at the first step of an epoch
            batches.images_of(0)

        method, moved = batches.config.method, size * 2 * POSITIONS * (2 + 8)
        told = {
            "open": ("`CodeStore.open`", 0, 0),
            "epoch": ("the order of a new epoch, once an epoch", 0, 0),
            "gather": (f"`CodeStore.codes`, {size} random images x 2 views", size, moved),
            "mask": ("the key masks of those views", size, 0),
            "step": (f"`Batches.step`, preset B: {size} images x 2 views, masks, labels", size, moved),
        }
        calls = {
            name: timing.Metered(call)
            for name, call in {
                "open": lambda: CodeStore.open(folder),
                "epoch": new_epoch,
                "gather": gather,
                "mask": lambda: masking.key_mask(0, 0, asked[0], method.views, POSITIONS, method.mask_ratio),
                "step": lambda: batches.step(next(turn) % batches.steps_per_epoch),
            }.items()
        }
        timings = timing.compare({name: calls[name] for name in ("open", "epoch")}, "cpu", seconds, repeats=(5, 50))
        timings |= timing.compare(
            {name: calls[name] for name in ("gather", "mask", "step")}, "cpu", seconds, repeats=(5, 400)
        )
        shown = (folder / CODES_FILE).stat().st_size / 1e9
    return {
        name: Read(what, count, timings[name].median_ms, timings[name].spread, calls[name].cpu_ms, moved)
        for name, (what, count, moved) in told.items()
    }, shown


def report(quick: bool) -> Iterator[str]:
    """Lines of the result."""
    images = 20_000 if quick else IMAGES
    found, shown = measure(images, 1 if quick else 5)
    yield from (
        f"## The store: {images:,} images x 10 views x 256 codes, {shown:.1f} GB (sparse: in memory, the disk is "
        "not measured)",
        "",
        "| what | median ms | spread | CPU ms | images/s | images a CPU second |",
        "|---|--:|--:|--:|--:|--:|",
    )
    for row in found.values():
        rates = f"{1e3 * row.images / row.median_ms:,.0f} | {1e3 * row.images / row.cpu_ms:,.0f}" if row.images else "|"
        yield f"| {row.what} | {row.median_ms:.2f} | {row.spread:.0%} | {row.cpu_ms:.2f} | {rates} |"
    made = found["step"].cpu_ms / found["step"].images
    yield ""
    step = step_ms_an_image()
    if step is not None:
        yield (
            f"Making a batch takes {made:.4f} CPU ms an image, the step itself {step:.0f} ms an image on two "
            f"cores (results/training.md): {made / step:.4%} "
            "of it, and it is made in the background."
        )
    yield (
        f"On a GPU the data time stays under 1 % of the step at up to {0.01 * 1e3 / made:,.0f} images/s a rank even "
        "if nothing ran in the background."
    )


def pieces(given: Given) -> list[Piece]:
    """Rows of throughput.py."""
    images = 20_000 if given.quick else IMAGES

    def rows() -> list[Row]:
        found, _ = measure(images, 0.5 if given.quick else 5)
        return [
            Row(
                f"store of {images:,} images: {row.what.replace('`', '')}",
                "star_fast",
                row.median_ms,
                row.spread,
                None,
                row.moved_bytes / (1e6 * given.ceilings.copy_gb_per_s) / row.median_ms if row.moved_bytes else None,
                row.moved_bytes / 1e6,
                how="" if given.device == "cpu" else "on the host",
                ceiling="copying its codes" if row.moved_bytes else "",
            )
            for row in found.values()
        ]

    return [Piece(f"store of {images:,} images", rows)]


def a_batch() -> Callable[[], object]:
    """Makes the first batch of a small store."""
    place = tempfile.TemporaryDirectory()
    write_store(Path(place.name), 1000)
    store = CodeStore.open(Path(place.name))
    batches = Batches(store, config_for(store))

    def call(place: tempfile.TemporaryDirectory = place) -> object:  # which lives as long as the call
        return batches.step(0)

    return call

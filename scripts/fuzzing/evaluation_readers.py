"""How the commands of evaluation read each kind of file. As in readers.py the first line of a docstring goes into the
record.
"""

from __future__ import annotations

import functools
import zlib
from pathlib import Path

import torch

from scripts.fuzzing import small_network
from scripts.fuzzing.trial import Case
from star_fast.demo import DemoCommand, Painter
from star_fast.errors import printable
from star_fast.evaluation import plots
from star_fast.evaluation.evaluate import EvaluateConfig, run_evaluate
from star_fast.evaluation.probe import ProbeConfig, probe
from star_fast.evaluation.probe_result import read_probe, table
from star_fast.evaluation.runs import Run, open_run

# As in the goods' folder
PROBE = ProbeConfig(
    Path("run"), points=2, epochs=1, warmup_epochs=0, features="kept", keep_features=True, knn=2, device="cpu"
)


def reference_file(place: Path, case: Case) -> None:
    """run_evaluate --reference"""
    _measure(samples="samples/done.npz", reference=case.file)


def npz_images(place: Path, case: Case) -> None:
    """run_evaluate --samples FILE.npz"""
    _measure(samples="samples/done.npz", reference=small_network.REFERENCE, protocol="adm-imagenet-256")


def image_folder(place: Path, case: Case) -> None:
    """run_evaluate --samples FOLDER"""
    _measure(
        samples="gallery",
        reference=small_network.REFERENCE,
        image_size=8 * (zlib.crc32(case.content or b"") % 2),
        batch_images=4,
    )


def inception_weights(place: Path, case: Case) -> None:
    """open_inception"""
    with small_network.small_network():
        small_network.open_small()(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def other_probe(place: Path, case: Case) -> None:
    """read_probe (--against)"""
    other = read_probe(Path("run"))
    if zlib.crc32(case.content or b"") % 40 == 0:
        plots.probe_curves({"run": vars(other)}, dark=False)


def kept_features(place: Path, case: Case) -> None:
    """store_features and OnDisk (probe --features)"""
    run = _run()
    print(printable(table(probe(run.model.transformer, run.store, run.contrast_depth, PROBE))))


def demo(place: Path, case: Case) -> None:
    """Painter (star-fast demo)"""
    painter = Painter(DemoCommand("run/model", device="cpu"))
    print(printable(painter.labels()[:20]))
    if zlib.crc32(case.content or b"") % 4 == 0:
        next(painter.draw(0, 1, 1.5, 1.0, 0, 1.0, 0))


def _measure(**settings: object) -> None:
    with small_network.small_network():
        weights = {"inception": small_network.WEIGHTS, "inception_sha256": small_network.weights_sha256()}
        config = EvaluateConfig(**weights, out="out/metrics.json", device="cpu", **settings)
        print("\n".join(map(printable, run_evaluate(config, progress=False).splitlines())))


@functools.cache
def _run() -> Run:
    return open_run("run")

"""The jobs of evaluation that kill_and_resume.py kills: reports, metrics, probes, attention, stability, Figure 6."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from scripts import kill_making


def prepare_reporting(given: Path) -> None:
    """A finished run with its code store and images."""
    from star_fast.train import run_command
    from tests.reliability.training_job import SMALL

    kill_making.prepare_preparing(given)
    (given / "made").mkdir()
    kill_making.run_preparing(given, given / "made", True)
    run_command(
        [*SMALL, "--data.codes", str(given / "made/codes"), "--run", str(given / "run"), "--train.max-steps", "3"],
        "train.py",
    )


def run_reporting(given: Path, work: Path, small: bool) -> None:
    """A report with its classifier, then a probe."""
    from star_fast import cli

    run = _run_folder(given, work)
    cli.report(
        [
            "--run",
            str(run),
            "--codes",
            str(given / "made/codes"),
            "--source",
            str(given / "images"),
            "--samples-per-class",
            "2",
            "--device",
            "cpu",
            "--attention-images",
            "1",
            "--attention-queries",
            "1",
            "--classifier.epochs",
            "1" if small else "6",
        ]
    )
    cli.probe(["--run", str(run), "--codes", str(given / "made/codes"), "--device", "cpu", "--epochs", "11"])


def prepare_evaluating(given: Path) -> None:
    """Pictures of two classes, and weights of Inception that nothing was learnt with: of its own size and of a few
    numbers.
    """
    from scripts.fuzzing.small_network import save_weights
    from tests.data.pictures import make_folder
    from tests.evaluation.small_inception import write_random_weights

    make_folder(given / "images", {"elm": 12, "oak": 12}, ".png")
    write_random_weights(given / "whole.pth")
    save_weights(given / "small.pth")


def run_evaluating(given: Path, work: Path, small: bool) -> None:
    """A reference of own images, then some of them measured against it: matrices of Inception's 2048 features take half
    a minute, the small job has six.
    """
    from scripts.fuzzing.small_network import small_network
    from star_fast import cli
    from star_fast.storage import sha256_of_file

    file = given / ("small.pth" if small else "whole.pth")
    weights = [
        "--inception",
        str(file),
        "--inception-sha256",
        sha256_of_file(file),
        "--device",
        "cpu",
        "--image-size",
        "16",
    ]
    with small_network() if small else contextlib.nullcontext():
        cli.evaluate(
            [
                "--make-reference",
                str(given / "images"),
                "--out",
                str(work / "reference.npz"),
                "--batch-images",
                "8",
                *weights,
            ]
        )
        cli.evaluate(
            [
                "--samples",
                str(given / "images/elm"),
                "--reference",
                str(work / "reference.npz"),
                "--out",
                str(work / "metrics.json"),
                *weights,
            ]
        )


def prepare_understanding(given: Path) -> None:
    """A finished run with its code store and images."""
    from tests.evaluation.conftest import make_finished_run

    make_finished_run(given)


def run_probing(given: Path, work: Path, small: bool) -> None:
    """A probe whose features go through a folder that it leaves as it found it; several ranks share the extraction."""
    from star_fast import cli

    cli.probe(
        [
            "--run",
            str(_run_folder(given, work)),
            "--features",
            str(work / "features"),
            "--train-views",
            "2",
            "--depths",
            "1",
            "2",
            "--device",
            "cpu",
            "--epochs",
            "11" if small else "200",
        ]
    )


def run_attention(given: Path, work: Path, small: bool) -> None:
    """Where both kinds of blocks look."""
    from star_fast import cli

    cli.attention(["--run", str(_run_folder(given, work)), "--device", "cpu", "--images", "4"])


def run_stability(given: Path, work: Path, small: bool) -> None:
    """Codes of shifted crops."""
    from star_fast import cli

    cli.stability(
        [
            "--codes",
            str(given / "codes"),
            "--source",
            str(given / "images"),
            "--out",
            str(work / "stability"),
            "--device",
            "cpu",
            "--tokenizer",
            str(given / "run/model/tokenizer"),
            "--images",
            "4" if small else "12",
        ]
    )


def run_figure6(given: Path, work: Path, small: bool) -> None:
    """Samples of a run above its own."""
    from star_fast import cli

    cli.figure6(
        [
            "--run",
            str(given / "run"),
            "--against",
            str(given / "run/model"),
            "--out",
            str(work / "figure6"),
            "--device",
            "cpu",
            "--per-class",
            "2" if small else "16",
        ]
    )


def _run_folder(given: Path, work: Path) -> Path:
    """The run's folder as each rank finds it, whole: made by the first one that comes."""
    run, copy = work / "run", work / f".copy-{os.environ.get('RANK', '0')}"
    if not run.exists():
        shutil.copytree(given / "run", copy, dirs_exist_ok=True)
        with contextlib.suppress(OSError):  # another rank was first
            copy.rename(run)
    shutil.rmtree(copy, ignore_errors=True)
    return run

"""The jobs that kill_and_resume.py kills: how each is prepared, run to its end from wherever it was killed, and
compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Of reports, records and metrics: what tells when and how fast a run was.
_TIMES = re.compile(
    rb'"(images_per_s|time_s|data_s|views_s|tokenizer_s|images_per_s_median|training_time_s|seconds|date|'
    rb'here_s|drawn_here_images)": '
    rb"[^,}\n]+"
)
_PARTS = re.compile(rb'"parts_s": {[^}]*}')
_TOLD = re.compile(rb"Made on [^<]+? on |<th scope=row>(A sample, pixels included|This report)</th><td>[^<]*</td>")


@dataclass(frozen=True)
class Subject:
    """A job that claims to survive kills.

    Everything it writes into its work folder is compared, so a forgotten temporary file counts as a fault.
    """

    prepare: Callable[[Path], None]  # writes into an empty folder what every run of the job reads; called once
    # (that folder, work folder, small): the job from its start or from where it was killed, as one rank (RANK and
    # WORLD_SIZE are set); small: for kills at every sync, with few of them; else for random kills, working rather than
    # starting most of its time
    run: Callable[[Path, Path, bool], None]
    # Of a file in the work folder: its bytes without what may differ between runs (dates, times)
    canonical: Callable[[Path], bytes] = Path.read_bytes
    preload: tuple[str, ...] = ()  # modules that every process of it needs
    ignored: tuple[str, ...] = (".lock", ".report.lock")  # names that may be there or not (locks that stay)
    single: bool = False  # has one rank only
    peers_notice: bool = False  # ranks end with an error of their own when another one dies


def without_times(file: Path) -> bytes:
    """The bytes of a text file, times and dates apart."""
    return _TOLD.sub(b"", _TIMES.sub(rb'"\1"', _PARTS.sub(b"", file.read_bytes())))


def prepare_sampling(given: Path) -> None:
    """A model so small that start-up takes most of a run."""
    from tests.generation.small_model import save_small_model

    save_small_model(given / "model")


def run_sampling(given: Path, work: Path, small: bool) -> None:
    """Images in batches, the last one short, with a grid; the small job writes single pictures too."""
    from star_fast.generation.sample import SampleConfig, sample_images

    images, batch = (5, 2) if small else (300, 16)
    sample_images(
        SampleConfig(
            model=str(given / "model"),
            out=str(work / "images.npz"),
            images=images,
            batch_images=batch,
            precision="fp32",
            top_k=20,
            png_folder=small,
        )
    )


def canonical_sampling(file: Path) -> bytes:
    """The record tells times and dates of its run; the plan and the checksums in it must be equal."""
    if file.suffix != ".json":
        return file.read_bytes()
    record = json.loads(file.read_text())
    return json.dumps(
        [record["plan"], {name: value for name, value in record["run"].items() if name.endswith("crc32")}]
    ).encode()


def prepare_training(given: Path) -> None:
    """A small code store."""
    from tests.training.store import write_store

    write_store(given / "codes")


def run_training(given: Path, work: Path, small: bool) -> None:
    """A few steps in bf16 under ZeRO-1, with dropout, checkpoints, validation and export."""
    from star_fast.train import run_command
    from star_fast.training import checkpoint
    from tests.reliability.training_job import SMALL

    steps, every = (4, "2") if small else (90, "3")
    resume = ["--resume"] if checkpoint.latest(work / "run") is not None else []
    run_command(
        [
            *SMALL,
            "--data.codes",
            str(given / "codes"),
            "--run",
            str(work / "run"),
            "--train.max-steps",
            str(steps),
            "--train.save-every-steps",
            every,
            "--train.validate-every-steps",
            every,
            "--train.zero-stage",
            "1",
            "--train.precision",
            "bf16",
            "--model.dropout",
            "0.1",
            *resume,
        ],
        "train.py",
    )


def prepare_preparing(given: Path) -> None:
    """A folder of small pictures, one of them damaged."""
    from tests.data.pictures import make_folder

    folder = make_folder(given / "images", {"elm": 30, "oak": 31}, ".jpg")
    (folder / "oak" / "02.jpg").write_bytes(b"no picture")


def run_preparing(given: Path, work: Path, small: bool) -> None:
    """A tokenizer trained on them, then their codes."""
    from star_fast import cli

    cli.prepare(
        [
            str(given / "images"),
            "--out",
            str(work / "codes"),
            "--new-tokenizer.image-size",
            "16",
            "--new-tokenizer.base-channels",
            "8",
            "--new-tokenizer.multipliers",
            "1",
            "1",
            "--new-tokenizer.z-channels",
            "8",
            "--new-tokenizer.codebook",
            "16",
            "--new-tokenizer.images-per-step",
            "8",
            "--new-tokenizer.steps",
            "6" if small else "300",
        ]
    )


def prepare_encoding(given: Path) -> None:
    """A folder of small pictures, one of them damaged, and a tokenizer."""
    from tests.data.pictures import tiny_tokenizer

    prepare_preparing(given)
    tiny_tokenizer().save(given / "tokenizer")


def run_encoding(given: Path, work: Path, small: bool) -> None:
    """The codes of pictures under a tokenizer that is there, on any number of ranks: at two crop ranges, or (small) few
    of them.
    """
    from star_fast.config import DataConfig
    from star_fast.data import prepare as module
    from star_fast.data.sources import ImageFolder
    from star_fast.generation.device import rank_and_ranks
    from star_fast.model.tokenizer import VQTokenizer

    rank, ranks = rank_and_ranks()
    data = DataConfig(crop_ranges=(1.3,) if small else (1.3, 1.1))
    module.prepare(
        ImageFolder(given / "images"),
        work / "codes",
        VQTokenizer.load(given / "tokenizer"),
        data,
        chunk_images=16 if small else 1,
        batch_views=10,
        rank=rank,
        ranks=ranks,
    )


def prepare_reporting(given: Path) -> None:
    """A finished run with its code store and images."""
    from star_fast.train import run_command
    from tests.reliability.training_job import SMALL

    prepare_preparing(given)
    (given / "made").mkdir()
    run_preparing(given, given / "made", True)
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


SUBJECTS = {
    "sampling": Subject(
        prepare_sampling, run_sampling, canonical_sampling, ("star_fast.generation.sample", "torch._dynamo")
    ),
    "training": Subject(
        prepare_training,
        run_training,
        without_times,
        (
            "star_fast.train",
            "star_fast.training.loop",
            "star_fast.training.export",
            "deepspeed",
            "tests.reliability.training_job",
            "torch._dynamo",
        ),
        peers_notice=True,
    ),
    "prepare": Subject(
        prepare_preparing,
        run_preparing,
        preload=("star_fast.cli", "star_fast.data.prepare", "star_fast.training.tokenizer", "torch._dynamo"),
        single=True,
    ),
    "encode": Subject(prepare_encoding, run_encoding, preload=("star_fast.data.prepare", "torch._dynamo")),
    "report": Subject(
        prepare_reporting,
        run_reporting,
        without_times,
        (
            "star_fast.cli",
            "star_fast.evaluation.report",
            "star_fast.evaluation.probe",
            "matplotlib.pyplot",
            "torch._dynamo",
        ),
        single=True,
    ),
    "evaluate": Subject(
        prepare_evaluating,
        run_evaluating,
        without_times,
        (
            "star_fast.cli",
            "star_fast.evaluation.evaluate",
            "star_fast.data.sources",
            "torch_fidelity.feature_extractor_inceptionv3",
        ),
        single=True,
    ),
    "probe": Subject(
        prepare_understanding,
        run_probing,
        preload=("star_fast.cli", "star_fast.evaluation.probe", "matplotlib.pyplot", "torch._dynamo"),
    ),
    "attention": Subject(
        prepare_understanding,
        run_attention,
        preload=("star_fast.cli", "star_fast.evaluation.attention", "matplotlib.pyplot"),
        single=True,
    ),
    "stability": Subject(
        prepare_understanding,
        run_stability,
        preload=("star_fast.cli", "star_fast.evaluation.stability", "matplotlib.pyplot"),
        single=True,
    ),
    "figure6": Subject(
        prepare_understanding,
        run_figure6,
        preload=("star_fast.cli", "star_fast.evaluation.figure6", "torch._dynamo"),
        single=True,
    ),
}

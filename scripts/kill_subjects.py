"""The jobs that kill_and_resume.py kills: how each is prepared, run to its end from wherever it was killed, and
compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scripts import kill_evaluation, kill_making

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


def canonical_sampling(file: Path) -> bytes:
    """The record tells times and dates of its run; the plan and the checksums in it must be equal."""
    if file.suffix != ".json":
        return file.read_bytes()
    record = json.loads(file.read_text())
    return json.dumps(
        [record["plan"], {name: value for name, value in record["run"].items() if name.endswith("crc32")}]
    ).encode()


SUBJECTS = {
    "sampling": Subject(
        kill_making.prepare_sampling,
        kill_making.run_sampling,
        canonical_sampling,
        ("star_fast.generation.sample", "torch._dynamo"),
    ),
    "training": Subject(
        kill_making.prepare_training,
        kill_making.run_training,
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
        kill_making.prepare_preparing,
        kill_making.run_preparing,
        preload=("star_fast.cli", "star_fast.data.prepare", "star_fast.training.tokenizer", "torch._dynamo"),
        single=True,
    ),
    "encode": Subject(
        kill_making.prepare_encoding, kill_making.run_encoding, preload=("star_fast.data.prepare", "torch._dynamo")
    ),
    "report": Subject(
        kill_evaluation.prepare_reporting,
        kill_evaluation.run_reporting,
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
        kill_evaluation.prepare_evaluating,
        kill_evaluation.run_evaluating,
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
        kill_evaluation.prepare_understanding,
        kill_evaluation.run_probing,
        preload=("star_fast.cli", "star_fast.evaluation.probe", "matplotlib.pyplot", "torch._dynamo"),
    ),
    "attention": Subject(
        kill_evaluation.prepare_understanding,
        kill_evaluation.run_attention,
        preload=("star_fast.cli", "star_fast.evaluation.attention", "matplotlib.pyplot"),
        single=True,
    ),
    "stability": Subject(
        kill_evaluation.prepare_understanding,
        kill_evaluation.run_stability,
        preload=("star_fast.cli", "star_fast.evaluation.stability", "matplotlib.pyplot"),
        single=True,
    ),
    "figure6": Subject(
        kill_evaluation.prepare_understanding,
        kill_evaluation.run_figure6,
        preload=("star_fast.cli", "star_fast.evaluation.figure6", "torch._dynamo"),
        single=True,
    ),
}

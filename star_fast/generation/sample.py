"""Many images: a model folder in; one .npz, a grid picture and a protocol record out. Any number of ranks, any number
of kills.

What is asked for is sample_config.py's; here it becomes a model, a plan and what the user is told; job.py keeps the
files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from star_fast.errors import UserError, printable
from star_fast.generation.batch import Drawer
from star_fast.generation.device import rank_and_ranks, take_device
from star_fast.generation.job import Job, Outcome
from star_fast.generation.label_plan import find_classes
from star_fast.generation.record import JobPlan
from star_fast.generation.sample_config import SampleConfig
from star_fast.model.class_names import names_for_model
from star_fast.model.llamagen import load_tokenizer
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.weights import LoadedModel, load_model
from star_fast.storage import explain_write_errors

_USUAL_MODEL = Path("runs/digits/model")  # where scripts/quickstart.sh leaves it
_DECIDING = (
    "weights",
    "images",
    "labels",
    "guidance",
    "cfg_interval",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "batch_images",
    "exact",
    "pixels",
)


class SampleResult(NamedTuple):
    """Where things are."""

    npz: Path
    record: Path
    grid: Path | None
    # Images that this call drew on this rank; fewer than asked for when it went on from an interrupted one, or with
    # several ranks
    drawn: int


def sample_images(config: SampleConfig) -> SampleResult:
    """Draw the images that `config` describes and that are not drawn yet. Every rank calls it (RANK, WORLD_SIZE,
    LOCAL_RANK as torchrun sets them).

    Returns when all images are in the file (rank 0) or this rank's batches are delivered (others). Rank 0 says in one
    line what is where.

    Raises:
        UserError, StorageError: the job cannot start or go on; one line that says why and what to do.
        KeyboardInterrupt: with a line that says what is safe.
    """
    rank, ranks = rank_and_ranks()
    device = take_device(config.device)
    with explain_write_errors(config.out):  # an over-long path
        if Path(config.out).is_dir():
            raise UserError(f"{config.out}: a folder; expected a name for the file of images")
    drawer, plan, classes, class_names = prepare_drawing(config, device)
    job = Job(config, drawer, plan, classes, class_names, rank, ranks)
    outcome = job.do()
    if rank == 0:
        print(printable(_summary(job, outcome)), flush=True)
    return SampleResult(job.files.out, job.files.record, job.files.grid, outcome.drawn)


class Drawing(NamedTuple):
    """A model ready to draw, and what it is to draw."""

    drawer: Drawer
    plan: JobPlan  # all that decides the images' bytes
    classes: list[int]  # labels in the order asked for
    class_names: Sequence[str]  # of all the model's classes


def prepare_drawing(config: SampleConfig, device: torch.device) -> Drawing:
    """Load the model and the tokenizer that `config` names. Nothing is drawn yet, no file written.

    Raises:
        UserError, StorageError: no such model, tokenizer or class.
    """
    loaded = load_model(_model(config), weights=config.weights)
    tokenizer = _tokenizer_for(config, loaded)
    class_names = names_for_model(loaded.class_names, config.class_names)
    classes = find_classes(config.classes, class_names)
    drawer = Drawer(config, loaded.transformer, tokenizer, device)
    return Drawing(drawer, _plan(config, loaded, tokenizer, drawer, classes), classes, class_names)


def _model(config: SampleConfig) -> str | Path:
    """The model asked for, or else the quickstart's."""
    if config.model:
        return config.model
    if _USUAL_MODEL.exists():
        return _USUAL_MODEL
    raise UserError(
        f"model: none was given, and there is no {_USUAL_MODEL} here (scripts/quickstart.sh makes it); give "
        "--model FOLDER or FILE"
    )


def _summary(job: Job, outcome: Outcome) -> str:
    """What is where, and what this run did for it."""
    height, width, _ = job.drawer.image_shape
    images = f"{job.config.images} images of {width} x {height} pixels"
    files = job.files
    where = (
        f"record in {files.record}"
        + (f", grid in {files.grid}" if files.grid else "")
        + (f", single images in {files.pngs}" if files.pngs else "")
    )
    if not outcome.added:
        return f"{files.out}: all {images} were there already, checked; {where}"
    drawn = outcome.drawn if job.ranks == 1 else outcome.added  # the other ranks' own count is not known here
    did = (
        f"{drawn} drawn in {outcome.seconds:.1f} s, {drawn / max(outcome.seconds, 1e-9):.3g} images/s"
        if drawn
        else "their last ones were drawn before"
    )
    return f"{files.out}: {images} ({did}{f', on {job.ranks} ranks' if job.ranks > 1 else ''}); {where}"


def _plan(
    config: SampleConfig, loaded: LoadedModel, tokenizer: VQTokenizer, drawer: Drawer, classes: list[int]
) -> JobPlan:
    told = asdict(config)
    return JobPlan(
        **{name: told[name] for name in _DECIDING},
        classes=classes if len(classes) < len(loaded.class_names) else "all",
        num_classes=len(loaded.class_names),
        weights_sha256=loaded.weights_sha256,
        tokenizer_sha256=tokenizer.weights_hash(),
        image_shape=drawer.image_shape,
        precision=drawer.precision,
        products=drawer.products,
        cache=config.cache,
        device=drawer.device.type,
        torch=torch.__version__,
        pixels_precision=drawer.pixels_precision,
    )


def _tokenizer_for(config: SampleConfig, loaded: LoadedModel) -> VQTokenizer:
    """The tokenizer asked for, or the model's own; it must speak the model's codes."""
    where = config.tokenizer or loaded.tokenizer_folder
    if not where:
        raise UserError(f"{config.model or _USUAL_MODEL}: comes without a tokenizer; give --tokenizer FOLDER or FILE")
    tokenizer = load_tokenizer(where)
    if tokenizer.config.codebook != loaded.transformer.config.vocab:
        raise UserError(
            f"{where}: this tokenizer has {tokenizer.config.codebook} codes, the model "
            f"{loaded.transformer.config.vocab}; "
            "give the one the model was trained with"
        )
    return tokenizer

"""Many images: a model folder in; one .npz, a grid picture and a protocol record out. Any number of ranks, any number
of kills.

Settings and what the user is told; generation/job.py keeps the files.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from star_fast.errors import UserError, printable
from star_fast.generation.batch import Drawer
from star_fast.generation.device import rank_and_ranks, take_device
from star_fast.generation.job import Job, Outcome
from star_fast.generation.label_plan import Plan, find_classes
from star_fast.generation.products import Products
from star_fast.generation.record import JobPlan
from star_fast.generation.sampling import Sampling
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
# What fits a file or a counter
_MOST = {"images": 2**53, "batch_images": 2**31, "grid_rows": 2**31, "grid_columns": 2**31, "pixels": 2**20}
_MOST_NAME_BYTES = 230  # of 255, for names that are longer by .json, .parts, or .PID.tmp


@dataclass(frozen=True)
class SampleConfig:
    """Draw images from a trained model into one .npz with a protocol record, and a labelled grid picture. A killed job
    goes on when started again.
    """

    # A model folder, a run folder, or a LlamaGen file; empty: runs/digits/model, which the quickstart makes
    model: str = ""
    # The images: arr_0 uint8 (N, H, W, 3), arr_1 labels; beside it NAME.json (protocol) and NAME.png (grid)
    out: str = "samples.npz"
    tokenizer: str = ""  # tokenizer folder or LlamaGen tokenizer file; empty: the model's own
    weights: Literal["student", "teacher"] = "student"  # which weights of the model folder
    images: int = 100  # how many
    classes: tuple[str, ...] = ()  # names or numbers; empty: all
    # Of a model whose classes are only numbers, as in released files: a file with one name a line, or imagenet
    class_names: str = ""
    labels: Plan = "balanced"  # balanced: the classes in turn; random: each image's class drawn uniformly (LlamaGen)
    guidance: float = 2.0  # scale of classifier-free guidance; 1 switches it off
    cfg_interval: int = -1  # n >= 0: only image tokens 0 ... n+1 are guided; -1: all
    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # tokens kept; 0: all
    top_p: float = 1.0  # share of the probability kept; 1: all
    seed: int = 0  # of the images' random streams and of random labels
    batch_images: int = 64  # images drawn together; another number may change a few codes, see exact
    # The same bytes for any batch_images, at a cost that is printed: float32, fixed blocks of 8 images
    exact: bool = False
    # Of the transformer; auto: bf16 where the device multiplies it, else fp32. fp32: pixels too (CPU)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    # CPU: how matrix products run; int8 takes half the time of bf16, and rounds weights and inputs to 8 bits
    products: Products = "auto"
    # Of keys and values: the model's precision, or 8 bits and a scale a row
    cache: Literal["model", "int8", "fp8"] = "model"
    # Side of the images written; 0: as the tokenizer makes them; else bicubic (LlamaGen scores 384 px models at 256)
    pixels: int = 0
    grid: bool = True  # also draw NAME.png
    grid_rows: int = 20  # classes in the grid
    grid_columns: int = 10  # images of each class in the grid
    png_folder: bool = False  # also write every image as NAME/000000.png
    device: str = ""  # cpu, cuda, cuda:1 ...; empty: this rank's GPU if there is one

    def __post_init__(self) -> None:
        for name in ("images", "batch_images", "grid_rows", "grid_columns"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.pixels < 0:
            raise UserError(
                f"pixels: expected 0 (as the tokenizer makes them) or a number of pixels, got {self.pixels}"
            )
        for name, most in _MOST.items():
            if getattr(self, name) > most:
                raise UserError(f"{name}: expected at most {most}, got {getattr(self, name)!r:.80}")
        if Path(self.out).suffix != ".npz" or "\0" in self.out:
            raise UserError(f"out: expected a name that ends in .npz, got {self.out[-80:]!r}")
        if (size := len(os.fsencode(Path(self.out).name))) > _MOST_NAME_BYTES:
            raise UserError(f"out: expected a file name of at most {_MOST_NAME_BYTES} bytes, got one of {size}")
        if self.exact and (self.precision == "bf16" or self.products not in ("auto", "plain") or self.cache != "model"):
            raise UserError(
                "exact: needs precision fp32 (or auto), products plain (or auto) and cache model, since rounding "
                "must not depend on the batch; "
                f"got {self.precision}, {self.products}, {self.cache}"
            )
        try:
            self.sampling()
        except ValueError as error:
            raise UserError(str(error).removeprefix("generate: ")) from error

    def sampling(self) -> Sampling:
        """The numbers that turn logits into tokens."""
        return Sampling(self.guidance, self.cfg_interval, self.temperature, self.top_k, self.top_p, self.seed)


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
    return SampleResult(job.out, job.record, job.grid, outcome.drawn)


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
    files = (
        f"record in {job.record}"
        + (f", grid in {job.grid}" if job.grid else "")
        + (f", single images in {job.pngs}" if job.pngs else "")
    )
    if not outcome.added:
        return f"{job.out}: all {images} were there already, checked; {files}"
    drawn = outcome.drawn if job.ranks == 1 else outcome.added  # the other ranks' own count is not known here
    did = (
        f"{drawn} drawn in {outcome.seconds:.1f} s, {drawn / max(outcome.seconds, 1e-9):.3g} images/s"
        if drawn
        else "their last ones were drawn before"
    )
    return f"{job.out}: {images} ({did}{f', on {job.ranks} ranks' if job.ranks > 1 else ''}); {files}"


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

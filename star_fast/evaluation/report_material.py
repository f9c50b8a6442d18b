"""What a report is written from: its settings, the run with all that belongs to it, and room for what is measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from star_fast.errors import UserError
from star_fast.evaluation.classifier import Classifier, ClassifierConfig
from star_fast.evaluation.limits import MOST_COUNT, MOST_SEED, option, require_ranges
from star_fast.evaluation.real_images import RealImages, open_real_images
from star_fast.evaluation.report_comparison import Figures
from star_fast.evaluation.runs import Run, read_metrics, spread
from star_fast.evaluation.samples import Reconstruction, SampleSet
from star_fast.generation.label_plan import find_classes
from star_fast.generation.sampling import Sampling
from star_fast.model.tokenizer import VQTokenizer
from star_fast.records import require

MOST_CLASSES = 20  # shown if none are named; of more classes ten, evenly spaced
MOST_HELD_OUT = 2000  # held-out images that classifier and tokenizer are judged on
MOST_SAMPLE_BYTES = 2**33  # of the samples' pixels, which are held in memory


@dataclass(frozen=True)
class AttentionExample:
    """One image with the last block's attention."""

    class_name: str
    image: Tensor  # (C, H, W) uint8, decoded from the codes that the model saw
    probs: Tensor  # (H, T, T) float32
    queries: list[int]  # query positions to show


@dataclass(frozen=True)
class ReportConfig:
    """Write report.html and report.json into a run's folder; a small classifier is trained there once."""

    run: Path  # the run folder
    weights: Literal["student", "teacher"] = "student"  # which weights of the model
    codes: str = ""  # the code store; empty: the one that the run was trained on
    source: str = ""  # the real images, as given to `star-fast prepare`; empty: from where they were then
    against: str = ""  # another run folder with a report of its own, to compare with
    classes: tuple[str, ...] = ()  # names of the classes sampled; empty: all up to 20, else ten
    samples_per_class: int = 20  # images drawn of each class
    guidance: float = 2.0  # classifier-free guidance of the samples; 1: off
    temperature: float = 1.0  # of the samples; 0: the likeliest token
    top_k: int = 0  # tokens kept; 0: all
    top_p: float = 1.0  # share of the probability kept; 1: all
    seed: int = 0  # of samples and probe
    batch_images: int = 64  # images drawn or decoded at once
    attention_images: int = 3  # held-out images with attention maps
    attention_queries: int = 4  # query positions of each
    # Views of each training image that the probe learns from; with more, every epoch draws one of them per image
    probe_train_views: int = 1
    probe_max_train_images: int = 0  # training images that the probe learns from, evenly spaced; 0: all
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    device: str = ""  # "cpu", "cuda"; empty: a GPU where there is one

    def __post_init__(self) -> None:
        require_ranges(
            self,
            {
                "samples_per_class": (1, 10_000),
                "batch_images": (1, 2**16),
                "attention_images": (1, 100),
                "attention_queries": (1, 256),
                "probe_train_views": (1, 2**16),
                "probe_max_train_images": (0, MOST_COUNT),
                "seed": (0, MOST_SEED),
            },
        )
        try:
            Sampling(**self.sampling)
        except ValueError as error:
            name, _, rest = str(error).removeprefix("generate: ").partition(" ")
            raise UserError(f"{option(name)} {rest}") from error

    @property
    def sampling(self) -> dict[str, Any]:
        """The numbers that turn logits into tokens, by name."""
        return {name: getattr(self, name) for name in ("guidance", "temperature", "top_k", "top_p", "seed")}


@dataclass
class Material:
    """What a report is written from: figures for page and JSON, and the images that only the page shows."""

    run: Run
    config: ReportConfig
    training: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    device: torch.device
    classes: list[int]
    rows: Tensor  # held-out rows of the store that real images and reconstructions come from
    tokenizer: VQTokenizer
    source: RealImages | None  # None where it is not known
    real: Tensor | None = None  # (N, C, H, W) uint8 of `rows`; None where the source of the images is not known
    samples: SampleSet = field(init=False, repr=False)  # these two are measured first
    reconstruction: Reconstruction = field(init=False, repr=False)
    attention: list[AttentionExample] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    against: Figures | None = None  # of the other run's report
    classifier: Classifier | None = None
    real_features: Tensor | None = None  # (n, F) the classifier's, of the held-out real images of the sampled classes
    # Of each class: its first sample and the nearest training images, (1 + n, C, H, W) uint8
    neighbours: list[Tensor] = field(default_factory=list)

    @property
    def row_labels(self) -> Tensor:
        """(N,) int64 classes of `rows`."""
        return self.run.store.labels[self.rows]


def gather(config: ReportConfig, run: Run, device: torch.device, other: Figures | None) -> Material:
    """Everything that can be missing, before anything is computed.

    Returns:
        The material of `report_measures.measure`: nothing in it is measured yet.

    Raises:
        UserError: no tokenizer or one that does not fit the codes, too few codes, no such class, images or source, or a
            number of samples that cannot be.
    """
    training, validation = read_metrics(run.folder)
    store = run.store
    if run.model.tokenizer_folder is None:
        raise UserError(
            f"{run.folder}/model: holds no tokenizer, samples cannot become images; train again from a code store "
            "with its tokenizer"
        )
    judging = store.judging()
    if store.positions < 4:
        raise UserError(
            f"{store.path}: expected images of at least 4 codes, got {store.positions}; there is no attention to "
            "show between fewer"
        )
    classes = (
        find_classes(config.classes, store.class_names) if config.classes else _default_classes(len(store.class_names))
    )
    tokenizer = VQTokenizer.load(run.model.tokenizer_folder)
    store.require_tokenizer(tokenizer.weights_hash())
    made = tokenizer.config
    ours, theirs = (made.image_size, made.positions, made.codebook), (store.image_size, store.positions, store.codebook)
    if ours != theirs:
        raise UserError(
            f"{run.model.tokenizer_folder}: makes images of (pixels a side, codes, codebook) {ours}, {store.path} "
            f"has {theirs}; "
            "files of two runs are mixed"
        )
    images = len(classes) * config.samples_per_class
    source = open_real_images(store, config.source)
    require(
        images >= 2 or source is None,
        option("samples_per_class"),
        config.samples_per_class,
        "at least 2 images of a single class: a Fréchet distance needs two",
    )
    most = MOST_SAMPLE_BYTES // (made.image_channels * made.image_size**2)
    require(
        images <= most,
        option("samples_per_class"),
        config.samples_per_class,
        f"at most {max(most // len(classes), 1):,} images of {made.image_size} x {made.image_size} pixels of each "
        f"of {len(classes)} classes",
    )
    return Material(
        run,
        config,
        training,
        validation,
        device,
        classes,
        spread(judging.judge, MOST_HELD_OUT),
        tokenizer,
        source,
        against=other,
    )


def _default_classes(count: int) -> list[int]:
    return spread(torch.arange(count), 10).tolist() if count > MOST_CLASSES else list(range(count))

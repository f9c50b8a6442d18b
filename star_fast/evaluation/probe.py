"""The linear probe of the paper's Figure 4: how much of the class a frozen model has understood by the time it reaches
each position.

The model sees the codes of an image with the *null* class, so that no label leaks in; the output of block
`contrast_depth` at eight evenly spaced positions is normalised, and one linear layer per position is trained to name
the class, by MAE's protocol (probe_training.py). Beside it stands what the nearest training images say, which needs no
training. The features are taken once (probe_features.py) for all depths and learning rates asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from star_fast.data.codes import CodeStore
from star_fast.data.sources import split_indices
from star_fast.errors import UserError
from star_fast.evaluation import plots
from star_fast.evaluation.limits import (
    MOST_COUNT,
    MOST_SEED,
    explain_out_of_memory,
    option,
    require_ranges,
)
from star_fast.evaluation.probe_features import (
    Features,
    InMemory,
    OnDisk,
    Wanted,
    await_all,
    extract_features,
    remove_features,
    store_features,
)
from star_fast.evaluation.probe_result import DepthResult, ProbeResult, read_probe
from star_fast.evaluation.probe_training import Schedule, accuracies, neighbour_accuracies, train_probes
from star_fast.evaluation.runs import only_report, open_run, spread
from star_fast.generation.device import pick_device, rank_and_ranks, take_device
from star_fast.host_memory import physical_bytes
from star_fast.model.transformer import Transformer
from star_fast.records import require
from star_fast.storage import atomic_write_bytes, atomic_write_json

ASIDE_SHARE = 0.1  # of each class's training images, on which a learning rate is chosen
FEATURES_FOLDER = "probe-features"  # in the run's folder


@dataclass(frozen=True)
class ProbeConfig:
    """Write probe.json and probe.png into a run's folder: how much of the class the model knows at each of eight
    positions.

    Under torchrun the ranks share the extraction of features; rank 0 does the rest.
    """

    run: Path  # the run folder
    weights: Literal["student", "teacher"] = "student"  # which weights of the model
    codes: str = ""  # the code store; empty: the one that the run was trained on
    against: str = ""  # another run folder with a probe of its own, whose curve is drawn beside
    points: int = 8  # positions probed, evenly spaced, the last one included (paper)
    # blocks whose outputs are probed, counted from 1; empty: the one whose output the run contrasts (paper)
    depths: tuple[int, ...] = ()
    # views of each training image; with more, every epoch draws one of them per image (of features on disk: per 4096
    # images)
    train_views: int = 1
    max_train_images: int = 0  # training images used, evenly spaced; 0: all
    epochs: int = 90  # passes over the training images (MAE)
    warmup_epochs: int = 10  # in which the learning rate rises (MAE)
    images_per_step: int = 16384  # (MAE); small sets are cut to a sixteenth, so that an epoch has at least 16 steps
    # peaks of LARS, whose steps are relative to the weights' norm (MAE: 0.1 per 256 images at 16384). Of several the
    # best is taken by a tenth of the training images, which is kept aside for that; all are reported.
    lr: tuple[float, ...] = (6.4,)
    knn: int = 20  # neighbours that vote, beside the linear layers (DINO); 0: none
    features: str = ""  # folder for the features; empty: memory if they fit it, else probe-features in the run folder
    keep_features: bool = False  # leave that folder there: the next probe of the same model and images starts from it
    batch_images: int = 128  # images of one forward pass
    device: str = ""  # "cpu", "cuda"; empty: a GPU where there is one
    seed: int = 0  # of the probes' initial weights and the order of the images

    def __post_init__(self) -> None:
        require_ranges(
            self,
            {
                "points": (1, 2**12),
                "train_views": (1, 2**16),
                "max_train_images": (0, MOST_COUNT),
                "epochs": (1, MOST_COUNT),
                "images_per_step": (1, MOST_COUNT),
                "knn": (0, 1000),
                "batch_images": (1, 2**16),
                "seed": (0, MOST_SEED),
            },
        )
        require(
            0 <= self.warmup_epochs < self.epochs,
            option("warmup_epochs"),
            self.warmup_epochs,
            f"0 ... epochs - 1 = {self.epochs - 1}",
        )
        require(
            0 < len(self.lr) <= 64 and len(set(self.lr)) == len(self.lr),
            option("lr"),
            " ".join(map(str, self.lr)),
            "1 ... 64 different numbers",
        )
        for rate in self.lr:
            require(1e-12 <= rate <= 1e6, option("lr"), rate, "1e-12 ... 1e+06")
        for depth in self.depths:
            require(1 <= depth <= 2**10, option("depths"), depth, "block numbers 1 ... 1,024")
        require(
            len(set(self.depths)) == len(self.depths),
            option("depths"),
            " ".join(map(str, self.depths)),
            "different block numbers",
        )
        require("\0" not in self.features + self.against, option("features"), self.features, "names of folders")

    @property
    def schedule(self) -> Schedule:
        """How the layers are trained."""
        return Schedule(self.lr, self.epochs, self.warmup_epochs, self.images_per_step, self.seed)


@dataclass(frozen=True)
class Subject:
    """What is probed: features of three sets of images, and what is known of them."""

    sets: Sequence[Features]  # to learn from, to be judged on, and (of several learning rates) kept aside
    rows: list[Tensor]  # of the store, (N,) int64 each
    labels: list[Tensor]  # (N,) int64 each
    judged_on: str
    depths: list[int]
    positions: list[int]
    classes: int
    sequence: int
    device: torch.device


def probe_positions(positions: int, points: int = 8) -> list[int]:
    """floor(T j / points) - 1 for j = 1 ... points; short sequences give each position once."""
    return sorted({max(positions * j // points - 1, 0) for j in range(1, points + 1)})


def probe(model: Transformer, store: CodeStore, depth: int, config: ProbeConfig) -> ProbeResult:
    """Extract features once, train the probes on one split, judge them on the other (see CodeStore.judging).

    Args:
        depth: the block to probe where the config names none.

    Raises:
        UserError: too few images to judge it, or the model's sizes are not the store's.
    """
    return _judge(_extract(model, store, depth, config), config)


def run_probe(config: ProbeConfig) -> ProbeResult | None:
    """Probe a run and write probe.json and probe.png into its folder; None on ranks other than 0, which only extract
    features.
    """
    pick_device(config.device)  # before anything is read
    other = read_probe(Path(config.against)) if config.against else None
    rank, _ = rank_and_ranks()
    run = open_run(config.run, codes=config.codes, weights=config.weights)
    with (
        only_report(run.folder, "writing a probe", ("probe.json", "probe.png")),
        explain_out_of_memory("give a smaller --batch-images or --max-train-images"),
    ):
        subject = _extract(run.model.transformer, run.store, run.contrast_depth, config)
        if rank:
            return None
        result = _judge(subject, config)
        settings = {
            key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(config).items()
        }
        record = {
            "weights": config.weights,
            "weights_sha256": run.model.weights_sha256,
            "step": run.record.step,
            "images_seen": run.record.images_seen,
            "settings": settings,
        }
        atomic_write_json(run.folder / "probe.json", {**result.to_dict(), **record})
        curves = {run.name: result.to_dict()}
        if other is not None:
            name = Path(config.against).absolute().name
            curves[name if name != run.name else f"{name} (other)"] = dataclasses.asdict(other)
        atomic_write_bytes(run.folder / "probe.png", plots.probe_curves(curves, dark=False))
    return result


def _extract(model: Transformer, store: CodeStore, depth: int, config: ProbeConfig) -> Subject:
    learn, held, judged_on = store.judging()
    train = spread(learn, config.max_train_images)
    depths = list(config.depths or (depth,))
    for number in depths:
        if not 1 <= number <= model.config.blocks:
            raise UserError(f"{option('depths')}: expected a block number 1 ... {model.config.blocks}, got {number}")
    plain = store.plain_view
    views = [plain, *(view for view in range(len(store.views)) if view != plain)][: config.train_views]
    wanted = [Wanted("train", train, views), Wanted("held-out", held, [plain])]
    if len(config.lr) > 1:
        kept, aside = (
            torch.from_numpy(part) for part in split_indices(store.labels[train].numpy(), ASIDE_SHARE, config.seed)
        )
        if not len(aside):
            raise UserError(
                f"{option('lr')}: expected one, got {len(config.lr)}: with one training image a class none can be "
                "kept aside to choose on"
            )
        wanted = [Wanted("train", train[kept], views), wanted[1], Wanted("aside", train[aside], [plain])]
    positions, device = probe_positions(model.config.positions, config.points), take_device(config.device)
    images = sum(len(each.rows) * len(each.views) for each in wanted)
    rank, ranks = rank_and_ranks()
    sets: Sequence[Features]
    settings: dict[str, Any] = {"batch_images": config.batch_images, "device": device}
    if (
        not config.features
        and ranks == 1
        and 2 * 4 * images * len(depths) * len(positions) * model.config.width <= physical_bytes()
    ):
        sets = [
            InMemory(
                [
                    extract_features(
                        model,
                        store,
                        each.rows,
                        view,
                        depths,
                        positions,
                        title=f"{each.name} features, view {view}",
                        **settings,
                    )
                    for view in each.views
                ]
            )
            for each in wanted
        ]
    else:
        folder = Path(config.features) if config.features else config.run / FEATURES_FOLDER
        sets = store_features(folder, model, store, wanted, depths, positions, rank=rank, ranks=ranks, **settings)
    return Subject(
        sets,
        [each.rows for each in wanted],
        [store.labels[each.rows] for each in wanted],
        judged_on,
        depths,
        positions,
        model.config.num_classes,
        model.config.positions,
        device,
    )


def _judge(subject: Subject, config: ProbeConfig) -> ProbeResult:
    """Train and judge; features on disk are removed unless they are to be kept."""
    on_disk = [each for each in subject.sets if isinstance(each, OnDisk)]
    if on_disk:
        await_all(on_disk)
    (train, held, *rest), (labels, held_labels, *rest_labels) = subject.sets, subject.labels
    probes = train_probes(train, labels, subject.classes, config.schedule, subject.device)
    on_train, on_held = accuracies(probes, train, labels), accuracies(probes, held, held_labels)
    on_aside = accuracies(probes, rest[0], rest_labels[0]) if rest else None
    near = (
        neighbour_accuracies(train, labels, held, held_labels, subject.classes, config.knn, subject.device)
        if config.knn
        else None
    )
    results, points, finite = [], len(subject.positions), probes.finite()
    for place, depth in enumerate(subject.depths):
        heads = slice(place * points, (place + 1) * points)
        score = [
            (on_aside if on_aside is not None else on_train)[number, heads].mean().item() if ok else -1.0
            for number, ok in enumerate(finite)
        ]
        best = score.index(max(score))
        by_lr = [
            {
                "lr": lr,
                "held_out": on_held[number, heads].tolist() if finite[number] else None,
                "kept_aside": on_aside[number, heads].tolist() if finite[number] and on_aside is not None else None,
            }
            for number, lr in enumerate(config.lr)
        ]
        results.append(
            DepthResult(
                depth,
                on_held[best, heads].tolist(),
                on_train[best, heads].tolist(),
                config.lr[best],
                near[heads].tolist() if near is not None else None,
                by_lr,
            )
        )
    if on_disk and not config.keep_features:
        remove_features(on_disk)
    first, chance = results[0], torch.bincount(held_labels).max().item() / held.count
    return ProbeResult(
        subject.positions,
        first.held_out,
        first.train,
        first.depth,
        held.count,
        train.count,
        chance,
        subject.judged_on,
        first.lr,
        first.knn,
        rest[0].count if rest else 0,
        subject.classes,
        subject.sequence,
        results,
    )

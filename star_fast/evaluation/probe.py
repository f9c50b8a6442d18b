"""The linear probe of the paper's Figure 4: how much of the class a frozen model has understood by the time it reaches each position.

The model sees the codes of an image with the *null* class, so that no label leaks in; the output of block `contrast_depth` at eight evenly spaced
positions is normalised, and one linear layer per position is trained to name the class. MAE's protocol (arXiv 2111.06377, section A.1): batch norm
without affine, LARS, 90 epochs, no weight decay. Two departures, since MAE's batch of 16384 is more than a small set has: the peak learning rate
stays 6.4 at any batch (LARS steps are relative to the weights), and the bias takes part in LARS as one more row of the matrix.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from star_fast.data.codes import CodeStore
from star_fast.errors import UserError
from star_fast.evaluation import plots
from star_fast.evaluation.limits import MOST_COUNT, MOST_SEED, explain_out_of_memory, option, require_memory, require_ranges
from star_fast.evaluation.runs import codes_of, only_report, open_run, spread
from star_fast.generation.device import pick_device
from star_fast.model.transformer import Transformer
from star_fast.records import require
from star_fast.storage import atomic_write_bytes, atomic_write_json

TRUST = 0.001  # LARS: a step moves a weight matrix by at most this share of its norm times the learning rate
MOMENTUM = 0.9
NORM_EPS = 1e-6
INIT_STD = 0.01


@dataclass(frozen=True)
class ProbeConfig:
    """Write probe.json and probe.png into a run's folder: how much of the class the model knows at each of eight positions."""

    run: Path  # the run folder
    weights: Literal["student", "teacher"] = "student"  # which weights of the model
    codes: str = ""  # the code store; empty: the one that the run was trained on
    points: int = 8  # positions probed, evenly spaced, the last one included (paper)
    depth: int = 0  # block whose output is probed, counted from 1; 0: the one whose output the run contrasts (paper)
    train_views: int = 1  # views of each training image; with more, every epoch draws one of them per image
    max_train_images: int = 0  # training images used, evenly spaced; 0: all
    epochs: int = 90  # passes over the training images (MAE)
    warmup_epochs: int = 10  # in which the learning rate rises (MAE)
    images_per_step: int = 16384  # (MAE); small sets are cut to a sixteenth, so that an epoch has at least 16 steps
    lr: float = 6.4  # peak of LARS, whose steps are relative to the weights' norm (MAE: 0.1 per 256 images at 16384)
    batch_images: int = 128  # images of one forward pass
    device: str = ""  # "cpu", "cuda"; empty: a GPU where there is one
    seed: int = 0  # of the probes' initial weights and the order of the images

    def __post_init__(self) -> None:
        require_ranges(self, {"points": (1, 2**12), "depth": (0, 2**10), "train_views": (1, 2**16), "max_train_images": (0, MOST_COUNT),
                              "epochs": (1, MOST_COUNT), "images_per_step": (1, MOST_COUNT), "lr": (1e-12, 1e6), "batch_images": (1, 2**16),
                              "seed": (0, MOST_SEED)})
        require(0 <= self.warmup_epochs < self.epochs, option("warmup_epochs"), self.warmup_epochs, f"0 ... epochs - 1 = {self.epochs - 1}")


@dataclass(frozen=True)
class ProbeResult:
    """Top-1 accuracies, one a position."""

    positions: list[int]
    held_out: list[float]  # share of held-out images whose class is named
    train: list[float]  # the same of the training images (of view 0 of those used)
    depth: int
    held_out_images: int
    train_images: int
    chance: float  # share of the commonest class among the held-out images
    judged_on: str = "held-out images"  # what `held_out` are; where none are held out, others

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, the standard error of each accuracy included."""
        errors = [math.sqrt(p * (1 - p) / self.held_out_images) for p in self.held_out]
        return {**dataclasses.asdict(self), "held_out_standard_error": errors}


def probe_positions(positions: int, points: int = 8) -> list[int]:
    """floor(T j / points) - 1 for j = 1 ... points; short sequences give each position once."""
    return sorted({max(positions * j // points - 1, 0) for j in range(1, points + 1)})


def first_blocks(model: Transformer, count: int) -> Transformer:
    """A model of the first `count` blocks that shares `model`'s weights: its last features are `model`'s features after that block."""
    short = copy.copy(model)
    short._modules = dict(model._modules)
    short.layers = nn.ModuleList(list(model.layers)[:count])
    short.config = dataclasses.replace(model.config, blocks=count)
    return short


@torch.inference_mode()
def extract_features(model: Transformer, store: CodeStore, rows: Tensor, view: int, depth: int, positions: Sequence[int], *, batch_images: int = 128,
                     device: torch.device | str = "cpu", title: str = "features") -> Tensor:
    """Output of block `depth` at `positions` under the null class: (N, P, D) float32 on the CPU, for the store's rows (N,) and one view of each."""
    short = first_blocks(model.to(device).eval(), depth)
    chosen = torch.as_tensor(list(positions), device=device)
    parts = []
    for part in tqdm(rows.split(batch_images), desc=title, unit="batch", leave=False):
        codes_BT = codes_of(store, part, view).to(device)
        label = torch.full((len(part),), model.null_class, device=device)
        parts.append(short(codes_BT[:, : max(positions)], label, logits=False).last[:, chosen].float().cpu())
    return torch.cat(parts)


def train_probes(train: Sequence[Tensor], labels: Tensor, held_out: Tensor, num_classes: int, config: ProbeConfig,
                 device: torch.device | str = "cpu") -> Tensor:
    """Train P linear layers side by side, each on its own position's features.

    Args:
        train: one (N, P, D) float32 tensor per view of the same N images; every epoch draws one view for each image.
        labels: (N,) int64. held_out: (N', P, D).

    Returns:
        (P, N' + N) int64: the predicted classes of the held-out images, then of the training images' first view. Deterministic from `config.seed` on the CPU.
    """
    count, points, width = train[0].shape
    generator = torch.Generator().manual_seed(config.seed)
    # The last row is the bias. With plain gradient steps at this learning rate, as in MAE, it swings wildly in small batches.
    weight = torch.zeros(points, width + 1, num_classes)
    nn.init.trunc_normal_(weight[:, :width], std=INIT_STD, generator=generator)
    weight = weight.to(device).requires_grad_()
    velocity = torch.zeros_like(weight)
    normalise = nn.BatchNorm1d(points * width, affine=False, eps=NORM_EPS).to(device).train()

    def score(features: Tensor) -> Tensor:
        """(n, P, D) -> logits (P, n, classes)."""
        x = normalise(features.flatten(1).to(device)).view(-1, points, width).transpose(0, 1)
        return torch.baddbmm(weight[:, width:], x, weight[:, :width])

    batch = min(config.images_per_step, max(count // 16, min(count, 32)))
    steps = count // batch
    for epoch in tqdm(range(config.epochs), desc="linear probes", unit="epoch", leave=False):
        order = torch.randperm(count, generator=generator)
        drawn = torch.randint(len(train), (count,), generator=generator)
        for step in range(steps):
            chosen = order[step * batch : (step + 1) * batch]
            x = train[0][chosen]
            for view in range(1, len(train)):
                here = drawn[chosen] == view
                x[here] = train[view][chosen[here]]
            logits = score(x)
            # Summed over the positions: each layer gets the gradient of its own mean loss.
            loss = F.cross_entropy(logits.flatten(0, 1), labels[chosen].to(device).repeat(points)) * points
            (gradient,) = torch.autograd.grad(loss, weight)
            lr = config.lr * _schedule(epoch + step / steps, config.warmup_epochs, config.epochs)
            with torch.no_grad():
                norm, gradient_norm = weight.norm(dim=(1, 2), keepdim=True), gradient.norm(dim=(1, 2), keepdim=True)
                velocity.mul_(MOMENTUM).add_(gradient * (TRUST * norm / gradient_norm.clamp_min(1e-30)))
                weight.sub_(lr * velocity)
    if not weight.isfinite().all():
        raise UserError(f"probe: its training ended in numbers that are not finite; give a smaller --lr than {config.lr:g}")
    normalise.eval()
    with torch.inference_mode():
        return torch.cat([score(part).argmax(dim=-1).cpu() for features in (held_out, train[0]) for part in features.split(4096)], dim=1)


def probe(model: Transformer, store: CodeStore, depth: int, config: ProbeConfig) -> ProbeResult:
    """Extract features of both splits once, train the probes on one, judge them on the other (see CodeStore.judging).

    Raises:
        UserError: too few images to judge it, or the model's sizes are not the store's.
    """
    learn, held, judged_on = store.judging()
    train = spread(learn, config.max_train_images)
    if not 1 <= depth <= model.config.blocks:
        raise UserError(f"{option('depth')}: expected a block number 1 ... {model.config.blocks}, got {depth}")
    plain = store.plain_view
    views = [plain, *(view for view in range(len(store.views)) if view != plain)][: config.train_views]
    positions, device = probe_positions(model.config.positions, config.points), pick_device(config.device)
    images = len(train) * len(views) + len(held)
    require_memory(2 * 4 * images * len(positions) * model.config.width, f"probe: the features of {images:,} images at {len(positions)} positions",
                   "use fewer training images: --max-train-images (of a report --probe-max-train-images)")
    settings = {"batch_images": config.batch_images, "device": device}
    features = [extract_features(model, store, train, view, depth, positions, title=f"train features, view {view}", **settings) for view in views]
    held_features = extract_features(model, store, held, plain, depth, positions, title="held-out features", **settings)
    labels = store.labels
    predicted = train_probes(features, labels[train], held_features, model.config.num_classes, config, device)
    correct_held = (predicted[:, : len(held)] == labels[held]).double().mean(1)
    correct_train = (predicted[:, len(held) :] == labels[train]).double().mean(1)
    chance = torch.bincount(labels[held]).max().item() / len(held)
    return ProbeResult(positions, correct_held.tolist(), correct_train.tolist(), depth, len(held), len(train), chance, judged_on)


def run_probe(config: ProbeConfig) -> ProbeResult:
    """Probe a run and write probe.json and probe.png into its folder."""
    pick_device(config.device)  # before anything is read
    run = open_run(config.run, codes=config.codes, weights=config.weights)
    with only_report(run.folder, "writing a probe", ("probe.json", "probe.png")), explain_out_of_memory("give a smaller --batch-images or --max-train-images"):
        result = probe(run.model.transformer, run.store, config.depth or run.contrast_depth, config)
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(config).items()}
        record = {"weights": config.weights, "weights_sha256": run.model.weights_sha256, "step": run.record.step, "images_seen": run.record.images_seen,
                  "settings": settings}
        atomic_write_json(run.folder / "probe.json", {**result.to_dict(), **record})
        atomic_write_bytes(run.folder / "probe.png", plots.probe_curves({run.name: result.to_dict()}, dark=False))
    return result


def _schedule(epoch: float, warmup: int, epochs: int) -> float:
    """MAE's learning-rate factor: linear warm-up, then half a cosine to 0."""
    return epoch / warmup if epoch < warmup else 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))

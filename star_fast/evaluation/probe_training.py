"""Linear layers and nearest neighbours on frozen features: what the probe learns, and how it is judged.

MAE's protocol (arXiv 2111.06377, section A.1): batch norm without affine, LARS, no weight decay. Two departures, since
MAE's batch of 16384 is more than a small set has: the peak learning rate stays 6.4 at any batch (LARS steps are
relative to the weights), and the bias takes part in LARS as one more row of the matrix. Every head (one block's output
at one position) and every learning rate has a layer of its own; all learn from one reading of the features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from star_fast.errors import UserError
from star_fast.evaluation.probe_features import BLOCK_IMAGES, Features, InMemory

TRUST = 0.001  # LARS: a step moves a weight matrix by at most this share of its norm times the learning rate
MOMENTUM = 0.9
NORM_EPS = 1e-6
NORM_MOMENTUM = 0.1  # of the running mean and variance that judging uses
INIT_STD = 0.01
KNN_TEMPERATURE = 0.07  # DINO (arXiv 2104.14294)
_GROUP_BYTES = 2**28  # of what a step holds of the heads that it computes together
_QUERY_BYTES = 2**30  # of the features whose neighbours are looked for in one reading of the others


@dataclass(frozen=True)
class Schedule:
    """How the layers are trained."""

    lr: tuple[float, ...]  # peaks of LARS, a set of layers for each
    epochs: int
    warmup_epochs: int
    images_per_step: int  # at most; small sets are cut to a sixteenth
    seed: int

    def factor(self, epoch: float) -> float:
        """MAE's learning-rate factor: linear warm-up, then half a cosine to 0."""
        if epoch < self.warmup_epochs:
            return epoch / self.warmup_epochs
        return 0.5 * (1 + math.cos(math.pi * (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)))


class Probes:
    """Linear layers behind one batch norm: of `rates` learning rates and P heads, D features, C classes."""

    def __init__(
        self, heads: int, width: int, classes: int, rates: int, generator: torch.Generator, device: torch.device | str
    ) -> None:
        # The last row is the bias. With plain gradient steps at this learning rate, as in MAE, it swings wildly in
        # small batches.
        start = torch.zeros(heads, width + 1, classes)
        nn.init.trunc_normal_(start[:, :width], std=INIT_STD, generator=generator)
        self.weight = start.to(device).repeat(rates, 1, 1, 1)  # (rates, P, D+1, C)
        self.mean, self.variance = torch.zeros(heads, width, device=device), torch.ones(heads, width, device=device)
        self.width, self.device = width, device

    def normalise(self, x: Tensor, heads: slice, training: bool) -> Tensor:
        """(n, P, D) -> (heads, n, D) on the device, by the batch's own mean and variance (which then move the running
        ones) or by the running ones.
        """
        part = x[:, heads].to(self.device).float()
        mean, variance = self.mean[heads].view(-1), self.variance[heads].view(-1)
        normed = F.batch_norm(part.flatten(1), mean, variance, training=training, momentum=NORM_MOMENTUM, eps=NORM_EPS)
        return normed.view(len(x), -1, self.width).transpose(0, 1)

    def scores(self, weight: Tensor, normed: Tensor) -> Tensor:
        """Logits (heads, n, C)."""
        return torch.baddbmm(weight[:, self.width :], normed, weight[:, : self.width])

    @torch.inference_mode()
    def predict(self, x: Tensor) -> Tensor:
        """(n, P, D) -> the classes that the layers name, (rates, P, n) int64 on the CPU."""
        parts = []
        for heads in _groups(x.shape[1], len(x), self.width, self.weight.shape[-1]):
            normed = self.normalise(x, heads, training=False)
            parts.append(torch.stack([self.scores(weight[heads], normed).argmax(-1) for weight in self.weight]).cpu())
        return torch.cat(parts, dim=1)

    def finite(self) -> list[bool]:
        """Of each learning rate whether its layers are numbers."""
        return self.weight.isfinite().flatten(1).all(1).tolist()


def train_probes(
    train: Features, labels: Tensor, num_classes: int, schedule: Schedule, device: torch.device | str = "cpu"
) -> Probes:
    """Train a linear layer for each head and learning rate, each as if it were alone.

    Args:
        labels: (N,) int64, of the images of `train`.

    Returns:
        The layers. Deterministic from `schedule.seed` on the CPU.

    Raises:
        UserError: with no learning rate did it end in finite numbers.
    """
    generator = torch.Generator().manual_seed(schedule.seed)
    probes = Probes(train.heads, train.width, num_classes, len(schedule.lr), generator, device)
    velocity = torch.zeros_like(probes.weight)
    batch = step_images(train.count, schedule.images_per_step)
    steps = train.count // batch
    groups = _groups(train.heads, batch, train.width, num_classes)
    with tqdm(total=schedule.epochs * steps, desc="linear probes", unit="step", leave=False) as bar:
        for epoch in range(schedule.epochs):
            for step, (x, chosen) in enumerate(train.epoch(batch, generator)):
                target, factor = labels[chosen].to(device), schedule.factor(epoch + step / steps)
                for heads in groups:
                    normed = probes.normalise(x, heads, training=True)
                    for number, lr in enumerate(schedule.lr):
                        _step(
                            probes, probes.weight[number, heads], velocity[number, heads], normed, target, lr * factor
                        )
                bar.update()
    if not any(probes.finite()):
        raise UserError(
            f"probe: its training ended in numbers that are not finite; give a smaller --lr than {min(schedule.lr):g}"
        )
    return probes


@torch.enable_grad()
def linear_probe(
    train: Tensor,
    labels: Tensor,
    held_out: Tensor,
    held_out_labels: Tensor,
    *,
    epochs: int = 90,
    lr: float = 6.4,
    seed: int = 0,
) -> list[float]:
    """The probe on any model's features: a linear layer for each position learns the class from `train`, and is judged
    on `held_out`.

    Args:
        train: (N, P, D) float, P positions. labels: (N,) int64, classes from 0 on.
        held_out: (N', P, D). held_out_labels: (N',) int64.
        epochs: passes over the training images, a ninth of them with a rising learning rate (MAE: 10 of 90). lr: its
            peak.

    Returns:
        The share of held-out images whose class is named, one a position.

    Raises:
        ValueError: shapes that do not fit. UserError: training ended in numbers that are not finite.
    """
    for name, features, classes in (("train", train, labels), ("held_out", held_out, held_out_labels)):
        if features.ndim != 3 or 0 in features.shape or features.shape[1:] != train.shape[1:]:
            raise ValueError(
                f"linear_probe: {name} must be (N, P, D), with the other's P and D, got shape {tuple(features.shape)}"
            )
        if classes.dtype != torch.int64 or classes.shape != features.shape[:1] or int(classes.min()) < 0:
            raise ValueError(
                f"linear_probe: labels of {name} must be ({len(features)},) int64, 0 or more, got {classes.dtype} "
                f"of shape {tuple(classes.shape)}"
            )
    schedule = Schedule((lr,), epochs, epochs // 9, 16384, seed)
    probes = train_probes(
        InMemory([train.float()]), labels, int(max(labels.max(), held_out_labels.max())) + 1, schedule, train.device
    )
    return accuracies(probes, InMemory([held_out.float()]), held_out_labels)[0].tolist()


def step_images(count: int, most: int) -> int:
    """Images of a step: `most`, but an epoch of `count` images has at least 16 steps, where steps of 32 images allow
    it.
    """
    return min(most, max(count // 16, min(count, 32)))


def accuracies(probes: Probes, features: Features, labels: Tensor) -> Tensor:
    """(rates, P) float64: the share of images whose class each layer names."""
    right, place = torch.zeros(probes.weight.shape[:2], dtype=torch.float64), 0
    for block in features.blocks():
        right += (probes.predict(block) == labels[place : place + len(block)]).sum(-1)
        place += len(block)
    return right / place


@torch.inference_mode()
def neighbour_accuracies(
    train: Features,
    labels: Tensor,
    judged: Features,
    judged_labels: Tensor,
    num_classes: int,
    neighbours: int = 20,
    device: torch.device | str = "cpu",
) -> Tensor:
    """(P,) float64: the share of judged images whose class their nearest training images name.

    As in DINO: of the k nearest by cosine (fewer where there are fewer) each votes for its class with weight exp(cosine
    / 0.07); no training, no scaling. Memory: the judged features of one reading and their neighbours (at most 1 GiB,
    twice while they are gathered), a block of training images, and one head's 4096 x 4096 cosines.
    """
    right, k, first = torch.zeros(train.heads, dtype=torch.float64), min(neighbours, train.count), 0
    for queries in _gathered(judged, 12 * k * judged.heads):  # a float32 and an int64 for each neighbour
        cosine = torch.full((train.heads, len(queries), k), -math.inf, device=device)
        voter = torch.zeros(train.heads, len(queries), k, dtype=torch.int64, device=device)
        place = 0
        for block in tqdm(
            train.blocks(), desc="nearest neighbours", unit="block", total=-(-train.count // BLOCK_IMAGES), leave=False
        ):
            label = labels[place : place + len(block)].to(device)
            for head in range(train.heads):
                keys = F.normalize(block[:, head].to(device).float(), dim=-1)
                for start in range(0, len(queries), BLOCK_IMAGES):
                    part = slice(start, start + BLOCK_IMAGES)
                    here = F.normalize(queries[part, head].to(device).float(), dim=-1) @ keys.t()
                    near, index = here.topk(min(k, len(block)), dim=1)
                    both = torch.cat([cosine[head, part], near], 1), torch.cat([voter[head, part], label[index]], 1)
                    cosine[head, part], best = both[0].topk(k, dim=1)
                    voter[head, part] = both[1].gather(1, best)
            place += len(block)
        truth = judged_labels[first : first + len(queries)].to(device)
        for head in range(train.heads):
            votes = torch.zeros(len(queries), num_classes, device=device)
            # exp(cosine / t) up to a factor that all votes for one image share
            votes.scatter_add_(1, voter[head], ((cosine[head] - cosine[head, :, :1]) / KNN_TEMPERATURE).exp())
            right[head] += (votes.argmax(1) == truth).sum().item()
        first += len(queries)
    return right / judged.count


def _step(probes: Probes, weight: Tensor, velocity: Tensor, normed: Tensor, target: Tensor, lr: float) -> None:
    """One step of LARS for the heads of `weight` (g, D+1, C), in place."""
    weight = weight.detach().requires_grad_()
    # Summed over the heads: each layer gets the gradient of its own mean loss.
    loss = F.cross_entropy(probes.scores(weight, normed).flatten(0, 1), target.repeat(len(weight))) * len(weight)
    (gradient,) = torch.autograd.grad(loss, weight)
    with torch.no_grad():
        norm, gradient_norm = weight.norm(dim=(1, 2), keepdim=True), gradient.norm(dim=(1, 2), keepdim=True)
        velocity.mul_(MOMENTUM).add_(gradient * (TRUST * norm / gradient_norm.clamp_min(1e-30)))
        weight.sub_(lr * velocity)


def _groups(heads: int, images: int, width: int, classes: int) -> list[slice]:
    """Heads that are computed together: all, if what that takes is little."""
    together = max(1, _GROUP_BYTES // (4 * images * (2 * width + 3 * classes)))
    return [slice(start, min(start + together, heads)) for start in range(0, heads, together)]


def _gathered(features: Features, more_bytes: int) -> Iterator[Tensor]:
    """The features in pieces of whole blocks that, with `more_bytes` an image, take at most _QUERY_BYTES (or are one
    block), copied out of them.
    """
    piece: list[Tensor] = []
    room = _QUERY_BYTES
    for block in features.blocks():
        needed = block.nbytes + more_bytes * len(block)
        if piece and needed > room:
            yield torch.cat(piece)
            piece, room = [], _QUERY_BYTES
        piece.append(block.clone())
        room -= needed
    yield torch.cat(piece)

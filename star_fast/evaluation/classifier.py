"""A small classifier of the data's own classes, trained on real images of the training split: it says whether a sample
shows the class that was asked for, and its penultimate features carry the classifier Fréchet distance. A measuring tool
for small data, no substitute for Inception.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from tqdm import tqdm

from star_fast.errors import UserError
from star_fast.evaluation.limits import MOST_COUNT, require_memory, require_ranges
from star_fast.records import require, to_dict
from star_fast.storage import (
    StorageError,
    atomic_write_bytes,
    atomic_write_json,
    read_bytes,
    read_record,
    sha256_of_bytes,
)

FEATURES = 64
RETRAIN = "remove the folder to train the classifier again"
RECORD_FILE, WEIGHTS_FILE = "classifier.json", "classifier.safetensors"
_MOST_HEADER_BYTES = 2**16  # of the weights' file
_REDUCED_AT_ONCE = 256  # images


@dataclass(frozen=True)
class ClassifierConfig:
    """How the small classifier is trained."""

    epochs: int = 8  # passes over the training images, each time shifted, turned and scaled a little
    images_per_step: int = 64  # images of an optimizer step
    lr: float = 4e-3  # AdamW, peak of a one-cycle schedule
    weight_decay: float = 0.02  # of AdamW
    channels: int = 16  # at half the resolution; doubles at each further halving, up to four times
    largest_side: int = 64  # pixels; images with a longer side than 32 are reduced to this one
    max_images: int = 50_000  # training images used, evenly spaced over the split; 0: all
    seed: int = 0  # of its initial weights and of the order and shifts of its images

    def __post_init__(self) -> None:
        require_ranges(
            self,
            {
                "epochs": (1, MOST_COUNT),
                "images_per_step": (2, 2**20),
                "lr": (1e-12, 1e3),
                "weight_decay": (0, 1e3),
                "channels": (1, 2**8),
                "largest_side": (1, 2**10),
                "max_images": (0, MOST_COUNT),
                "seed": (0, 2**53),
            },
            "classifier",
        )


@dataclass(frozen=True)
class ClassifierRecord:
    """What classifier.json holds: the network's sizes, how it was trained, on what, and which weights belong to it."""

    image_channels: int
    side: int  # pixels of the square that it sees
    num_classes: int
    channels: int
    train_images: int
    mirror: bool
    config: ClassifierConfig
    data: dict[str, Any] = field(default_factory=dict)  # of the caller: what identifies the training images
    weights_sha256: str = ""  # of classifier.safetensors

    def __post_init__(self) -> None:
        for name, most in (
            ("image_channels", 16),
            ("side", 2**10),
            ("num_classes", 2**24),
            ("channels", 2**8),
            ("train_images", MOST_COUNT),
        ):
            require(1 <= getattr(self, name) <= most, name, getattr(self, name), f"1 ... {most}")


class SmallCNN(nn.Module):
    """Convolution pairs, each halving the resolution until about 7 pixels are left, mean over what is left, 64
    features, one output per class.
    """

    def __init__(self, image_channels: int, side: int, num_classes: int, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = image_channels
        for level in range(max(1, round(math.log2(side / 7)))):
            width = channels * min(2**level, 4)
            kernel = 5 if level == 0 else 3
            layers += [
                nn.Conv2d(before, width, kernel, stride=2, padding=kernel // 2, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            before = width
        self.trunk = nn.Sequential(*layers)
        self.to_features = nn.Sequential(
            nn.Linear(2 * before, FEATURES, bias=False), nn.BatchNorm1d(FEATURES), nn.ReLU()
        )
        self.to_classes = nn.Linear(FEATURES, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """(N, C, S, S) in [-1, 1] -> (N, 64): mean and maximum over the last map, mixed by one layer."""
        maps = self.trunk(x).flatten(2)
        return self.to_features(torch.cat([maps.mean(-1), maps.amax(-1)], dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, S, S) in [-1, 1] -> (N, num_classes) logits."""
        return self.to_classes(self.features(x))


@dataclass(frozen=True)
class Verdict:
    """What the classifier says of N images."""

    features: Tensor  # (N, 64) float32, penultimate
    probs: Tensor  # (N, num_classes) float32

    @property
    def classes(self) -> Tensor:
        """(N,) int64, the likeliest class."""
        return self.probs.argmax(dim=1)

    def accuracy(self, labels: Tensor) -> float:
        """Share of images whose likeliest class is `labels` (N,)."""
        return (self.classes == labels).double().mean().item()


class Classifier:
    """A trained SmallCNN with the way images enter it: uint8 (N, C, H, W), as sources give them and as the generator
    writes them.
    """

    def __init__(self, network: SmallCNN, record: ClassifierRecord) -> None:
        self.network = network.eval().to(memory_format=torch.contiguous_format)  # as a loaded one is: the same bits
        self.record = record

    @torch.inference_mode()
    def judge(self, images: Tensor, images_per_step: int = 256) -> Verdict:
        """Features and class probabilities of uint8 images (N, C, H, W), any H and W."""
        if images.shape[1] != self.record.image_channels:
            raise UserError(
                f"classifier: expected images of {self.record.image_channels} channels, as it was trained on, got "
                f"{images.shape[1]}"
            )
        device = next(self.network.parameters()).device
        features, probs = [], []
        for start in range(0, len(images), images_per_step):
            part = self.network.features(to_input(images[start : start + images_per_step], self.record.side).to(device))
            features.append(part.float().cpu())
            probs.append(self.network.to_classes(part).float().softmax(dim=1).cpu())
        return Verdict(torch.cat(features), torch.cat(probs))

    def save(self, folder: Path) -> None:
        """Write the two files. The record comes last and holds the sha256 of the weights: killed in between, no old
        record fits the new weights.
        """
        weights = to_safetensors(self.network.state_dict())
        self.record = replace(self.record, weights_sha256=sha256_of_bytes(weights))
        atomic_write_bytes(folder / WEIGHTS_FILE, weights)
        atomic_write_json(folder / RECORD_FILE, to_dict(self.record))

    @classmethod
    def load(cls, folder: Path) -> Classifier:
        """The classifier that `save` wrote. Raises StorageError when a file is missing or damaged, or the two do not
        belong together.
        """
        record = read_record(folder / RECORD_FILE, ClassifierRecord, RETRAIN)
        # Shapes alone: nothing is allocated for what the record asks for before the weights have it
        with torch.device("meta"):
            network = SmallCNN(record.image_channels, record.side, record.num_classes, record.channels)
        expected = network.state_dict()
        file = folder / WEIGHTS_FILE
        data = read_bytes(file, RETRAIN, sum(tensor.nbytes for tensor in expected.values()) + _MOST_HEADER_BYTES)
        if sha256_of_bytes(data) != record.weights_sha256:
            raise StorageError(
                f"{file}: its sha256 is not the one in {RECORD_FILE}: damaged, or files of two classifiers mixed; "
                f"{RETRAIN}"
            )
        try:
            weights = parse_safetensors(data)
        except (ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise StorageError(
                f"{file}: the classifier cannot be read ({str(error).splitlines()[0]}); {RETRAIN}"
            ) from error
        shapes, found = (
            {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
            for state in (expected, weights)
        )
        differing = next((name for name in sorted({*shapes, *found}) if shapes.get(name) != found.get(name)), None)
        if differing is not None:
            raise StorageError(
                f"{file}: expected {differing} as {shapes.get(differing)}, got {found.get(differing)}; {RETRAIN}"
            )
        if (bad := _not_finite(weights)) is not None:
            raise StorageError(f"{file}: {bad} holds numbers that are not finite; {RETRAIN}")
        network.load_state_dict(weights, assign=True)
        return cls(network, record)


def _not_finite(weights: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with an infinity or NaN."""
    return next(
        (name for name, tensor in weights.items() if tensor.is_floating_point() and not tensor.isfinite().all()), None
    )


def input_side(height: int, width: int, largest_side: int) -> int:
    """Side in pixels of the square that the classifier sees: the images' own up to 32, else reduced
    to `largest_side`.
    """
    side = max(height, width)
    return side if side <= 32 else min(side, largest_side)


def to_input(images: Tensor, side: int) -> Tensor:
    """uint8 (N, C, H, W) -> float32 (N, C, side, side) in [-1, 1], reduced with antialiasing where the size differs."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"classifier: images must be uint8 (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
    if len(images) > _REDUCED_AT_ONCE:  # in parts: as floats in full size all of them could take many times the memory
        result = torch.empty(len(images), images.shape[1], side, side)
        for start in range(0, len(images), _REDUCED_AT_ONCE):
            result[start : start + _REDUCED_AT_ONCE] = to_input(images[start : start + _REDUCED_AT_ONCE], side)
        return result
    x = images.float() / 127.5 - 1
    return (
        x
        if x.shape[-2:] == (side, side)
        else F.interpolate(x, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    )


def nudge(x: Tensor, generator: torch.Generator, mirror: bool) -> Tensor:
    """Each image turned by up to 12 degrees, scaled by up to 12 %, sheared a little, shifted by up to 8 % of its side;
    mirrored half the time if `mirror`.
    """
    count = len(x)

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(count, generator=generator) - 1) * limit

    angle, scale, shear = uniform(math.radians(12)), 1 + uniform(0.12), uniform(0.15)
    flip = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0) if mirror else torch.ones(count)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = torch.stack(
        [torch.stack([flip * cos, shear - sin, uniform(0.16)], 1), torch.stack([flip * sin, cos, uniform(0.16)], 1)], 1
    )
    grid = F.affine_grid(rows.to(x.device), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def train_classifier(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    config: ClassifierConfig,
    *,
    mirror: bool = False,
    device: torch.device | str = "cpu",
) -> Classifier:
    """Train on real images; deterministic from `config.seed` on one machine.

    Args:
        images: (N, C, H, W) uint8, all of the training split.
        labels: (N,) int64 in 0 ... num_classes - 1.
        mirror: whether a mirrored image is of the same class (true of photographs, not of digits).

    Raises:
        UserError: fewer than two images, labels that do not fit, or a training that ended in numbers that are not
            finite.
    """
    if len(images) < 2 or labels.shape != (len(images),):
        raise UserError(
            f"classifier: expected at least 2 training images with one label each, got {len(images)} images and "
            f"labels {tuple(labels.shape)}"
        )
    side = input_side(images.shape[2], images.shape[3], config.largest_side)
    require_memory(
        4 * len(images) * images.shape[1] * side**2,
        f"classifier: {len(images):,} training images of {side} x {side} pixels",
        "use fewer or smaller ones: --classifier.max-images, --classifier.largest-side",
    )
    x_all = to_input(images, side)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = SmallCNN(images.shape[1], side, num_classes, config.channels)
    network.to(device).train().to(memory_format=torch.channels_last)
    batch = min(config.images_per_step, len(images))
    steps_per_epoch = len(images) // batch
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=config.epochs * steps_per_epoch, pct_start=0.2
    )
    for _ in tqdm(range(config.epochs), desc="classifier", unit="epoch", leave=False):
        order = torch.randperm(len(images), generator=generator)
        for step in range(steps_per_epoch):
            chosen = order[step * batch : (step + 1) * batch]
            x = nudge(x_all[chosen].to(device), generator, mirror).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(network(x), labels[chosen].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    if (bad := _not_finite(network.state_dict())) is not None:
        raise UserError(
            f"classifier: its training ended in numbers that are not finite ({bad}); give a smaller "
            f"--classifier.lr than {config.lr:g}"
        )
    record = ClassifierRecord(
        images.shape[1], side, num_classes, config.channels, train_images=len(images), mirror=mirror, config=config
    )
    return Classifier(network, record)

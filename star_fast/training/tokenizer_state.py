"""The state of an unfinished tokenizer training on disk: resumed from it, a training ends with the bytes that an
unbroken one would have ended with.

unfinished.json               how many steps are done, of which job, and the sha256 of the file below; replaced whole
unfinished-STEP.safetensors   weights, their average and Adam's moments, those of the discriminator, the random
                              generator, the images still to come, the codes in use
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from star_fast.config import ConfigError, TokenizerConfig
from star_fast.errors import UserError
from star_fast.model.tokenizer import VQTokenizer
from star_fast.records import require, to_dict
from star_fast.storage import (
    StorageError,
    atomic_write_bytes,
    atomic_write_json,
    read_bytes,
    read_record,
    remove_leftovers,
    sha256_of_bytes,
)
from star_fast.training.discriminator import PatchDiscriminator

RECORD_FILE = "unfinished.json"
FORMAT_VERSION = 1
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of each weight


@dataclass(frozen=True)
class TrainingJob:
    """What a training is, apart from how far it has come: another one never goes on from its state."""

    seed: int
    images_sha256: str
    config: TokenizerConfig  # as recorded()
    started_from: str = ""  # hash of the weights that are fine-tuned; "": random ones
    perceptual_sha256: str = ""  # of the perceptual loss's weights; "": there is none


@dataclass(frozen=True)
class StateRecord:
    """unfinished.json: the schema."""

    format_version: int
    step: int
    sha256: str
    job: TrainingJob

    def __post_init__(self) -> None:
        require(
            self.format_version == FORMAT_VERSION,
            "format_version",
            self.format_version,
            f"{FORMAT_VERSION}, which this version reads",
        )
        require(1 <= self.step <= self.job.config.steps, "step", self.step, f"1 ... {self.job.config.steps}")


def recorded(config: TokenizerConfig) -> TokenizerConfig:
    """The settings without the place of a file on this machine, which says nothing elsewhere: what the file holds is
    recorded by its hash.
    """
    return replace(config, perceptual_weights="")


@dataclass
class Training:
    """Everything that changes while a tokenizer is trained."""

    tokenizer: VQTokenizer
    optimizer: torch.optim.AdamW
    generator: torch.Generator  # of batches and of moved codes
    order: Tensor  # (n,) int64: the images of the next steps
    used: Tensor  # (V,) bool: codes that occurred since unused ones were last moved
    averaged: VQTokenizer | None = None  # the weights' running average, where one is kept
    discriminator: PatchDiscriminator | None = None
    discriminator_optimizer: torch.optim.AdamW | None = None

    @property
    def result(self) -> VQTokenizer:
        """The tokenizer that is measured and kept."""
        return self.averaged or self.tokenizer

    def learners(self, step: int) -> Iterator[tuple[str, nn.Module, torch.optim.AdamW, bool]]:
        """What learns: a prefix of its tensors' names, the module, its optimizer, and whether that has moments when
        `step` steps are done.
        """
        yield "", self.tokenizer, self.optimizer, True
        if self.discriminator is not None and self.discriminator_optimizer is not None:
            yield (
                "discriminator ",
                self.discriminator,
                self.discriminator_optimizer,
                step > self.tokenizer.config.discriminator_start_step,
            )


def save_state(folder: Path, training: Training, step: int, job: TrainingJob) -> None:
    """Record that `step` steps are done; killed within, the state before remains."""
    data = safetensors.torch.save(_tensors(training, step))
    atomic_write_bytes(_state_file(folder, step), data)
    atomic_write_json(
        folder / RECORD_FILE,
        {"format_version": FORMAT_VERSION, "step": step, "sha256": sha256_of_bytes(data), "job": to_dict(job)},
    )
    _remove_states(folder, but=step)


def load_state(folder: Path, training: Training, job: TrainingJob, images: int) -> int:
    """Put back what `save_state` recorded, if anything; returns the number of steps that are done.

    Raises:
        ConfigError: the training there has another setting, which is named. UserError: it is of other images.
            StorageError: its files are damaged.
    """
    if not os.path.lexists(folder / RECORD_FILE):
        return 0
    hint = f"delete {folder} to train from the start"
    record = read_record(folder / RECORD_FILE, StateRecord, hint)
    where = f"{folder} holds a training begun"
    require_same_settings(record.job.config, job.config, where, hint)
    require_same_seed(record.job.seed, job.seed, where, hint)
    require_same_start(record.job.started_from, job.started_from, where, hint)
    if record.job.perceptual_sha256 != job.perceptual_sha256:
        raise ConfigError(
            f"tokenizer.perceptual_weights: {where} with other weights of the perceptual loss "
            f"({record.job.perceptual_sha256[:12]}, given are "
            f"{job.perceptual_sha256[:12]}); give the same, or {hint}"
        )
    if record.job.images_sha256 != job.images_sha256:
        raise UserError(
            f"{where} on other images, or other views of them; give the same source and --data settings, or {hint}"
        )
    path = _state_file(folder, record.step)
    most = (
        sum(tensor.nbytes for tensor in _tensors(training, 0).values())
        + 8 * 2 * (images + job.config.images_per_step)
        + 2**20
    )
    data = read_bytes(path, hint, 3 * most)
    if sha256_of_bytes(data) != record.sha256:
        raise StorageError(f"{path}: damaged (its sha256 is not the one in {RECORD_FILE}); {hint}")
    try:
        found = safetensors.torch.load(data)
        _put_back(training, found, images, record.step)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise StorageError(
            f"{path}: not the state of this training ({' '.join(str(error).split())[:200]}); {hint}"
        ) from error
    return record.step


def remove_state(folder: Path) -> None:
    """Remove the state and what a kill left of it: the training is done. The record goes first, so that it never names
    a file that is gone.
    """
    with suppress(OSError):
        (folder / RECORD_FILE).unlink()
    _remove_states(folder)
    remove_leftovers(folder)


def require_same_settings(there: TokenizerConfig, asked: TokenizerConfig, where: str, hint: str) -> None:
    """Raise ConfigError naming the first setting in which the tokenizer `where` and the one asked for differ."""
    for f in fields(TokenizerConfig):
        if getattr(there, f.name) != getattr(asked, f.name):
            raise ConfigError(
                f"tokenizer.{f.name}: {where} with {getattr(there, f.name)}, asked for is "
                f"{getattr(asked, f.name)}; give the same, or {hint}"
            )


def require_same_seed(there: int, asked: int, where: str, hint: str) -> None:
    """Raise ConfigError where the seeds differ."""
    if there != asked:
        raise ConfigError(f"seed: {where} with {there}, asked for is {asked}; give the same, or {hint}")


def require_same_start(there: str, asked: str, where: str, hint: str) -> None:
    """Raise ConfigError where the weights (their hashes) that two trainings start from differ."""
    if there != asked:
        first, second = (f"weights {start[:12]}" if start else "random weights" for start in (there, asked))
        raise ConfigError(f"fine_tune: {where} from {first}, asked for is one from {second}; give the same, or {hint}")


def _state_file(folder: Path, step: int) -> Path:
    return folder / f"unfinished-{step:07d}.safetensors"


def _remove_states(folder: Path, but: int | None = None) -> None:
    for path in folder.glob("unfinished-*.safetensors"):
        if but is None or path != _state_file(folder, but):
            with suppress(OSError):
                path.unlink()


def _weights(training: Training) -> dict[str, Tensor]:
    """All weights by name, the average's and the discriminator's included: the tensors that are trained, not copies."""
    modules = {
        "weight ": training.tokenizer,
        "average ": training.averaged,
        "discriminator weight ": training.discriminator,
    }
    return {
        f"{prefix}{name}": value
        for prefix, module in modules.items()
        if module is not None
        for name, value in module.state_dict().items()
    }


def _tensors(training: Training, step: int) -> dict[str, Tensor]:
    tensors = _weights(training)
    for prefix, module, optimizer, _ in training.learners(step):
        for name, parameter in module.named_parameters():
            tensors |= {
                f"{prefix}{moment} {name}": value for moment, value in optimizer.state.get(parameter, {}).items()
            }
    tensors |= {"generator": training.generator.get_state(), "order": training.order, "used": training.used}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _put_back(training: Training, found: dict[str, Tensor], images: int, step: int) -> None:
    """Raises KeyError or ValueError for what does not fit, before anything is changed."""
    weights = _weights(training)
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]]
    expected = {name: (value.shape, value.dtype) for name, value in weights.items()}
    for prefix, module, _, begun in training.learners(step):
        expected |= {
            f"{prefix}{moment} {name}": (
                () if moment == "step" else value.shape,
                torch.float32 if moment == "step" else value.dtype,
            )
            for name, value in module.named_parameters()
            if begun
            for moment in _MOMENTS
        }
    expected |= {
        "generator": (training.generator.get_state().shape, torch.uint8),
        "used": (training.used.shape, torch.bool),
    }
    for name, (shape, dtype) in expected.items():
        if tuple(found[name].shape) != tuple(shape) or found[name].dtype != dtype:
            raise ValueError(
                f"{name}: expected {dtype} {tuple(shape)}, got {found[name].dtype} {tuple(found[name].shape)}"
            )
    order = found["order"]
    if (
        order.ndim != 1
        or order.dtype != torch.int64
        or (len(order) and not 0 <= int(order.min()) <= int(order.max()) < images)
    ):
        raise ValueError(f"order: expected numbers of {images} images")
    with torch.no_grad():
        for name, value in weights.items():
            value.copy_(found[name])
    for prefix, module, optimizer, begun in training.learners(step):
        for name, parameter in module.named_parameters() if begun else ():
            optimizer.state[parameter] = {
                moment: found[f"{prefix}{moment} {name}"].clone().to("cpu" if moment == "step" else parameter.device)
                for moment in _MOMENTS
            }
    training.generator.set_state(found["generator"])
    training.order = order.clone()
    training.used.copy_(found["used"])

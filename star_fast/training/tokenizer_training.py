"""Training a VQ tokenizer: the loop, its state on disk, and what can be seen on the way. What it minimises:
tokenizer_objective.py.
"""

from __future__ import annotations

import copy
import functools
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from star_fast.config import TokenizerConfig
from star_fast.data.prepare import explain_out_of_memory
from star_fast.errors import UserError, printable
from star_fast.model.tokenizer import VQTokenizer, from_uint8
from star_fast.ops.ema_update import ema_update
from star_fast.storage import atomic_write_json, sha256_of_bytes
from star_fast.training.codebook import move_codes
from star_fast.training.discriminator import PatchDiscriminator
from star_fast.training.perceptual import Perceptual, load_perceptual
from star_fast.training.tokenizer_limits import require_images, require_possible, require_same_shape
from star_fast.training.tokenizer_objective import backward, step_discriminator
from star_fast.training.tokenizer_report import EVALUATION_IMAGES, measure_tokenizer, write_reconstructions
from star_fast.training.tokenizer_state import Training, TrainingJob, load_state, recorded, remove_state, save_state

REPORT_FILE = "training.json"
PICTURE_FILE = "reconstructions.png"
_PICTURE_SHARES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75)  # of the steps, when a picture is written
_SHOWN = 16  # images in it
_SETTLE_SHARE = 0.15  # of the steps, at the end: no code is moved any more, so that all of them settle
_COUNT_EVERY_STEPS = 50  # codes in use are counted so often where none is moved
_SAVE_EVERY_STEPS = 50  # a kill loses at most so many
# The whole time is foretold after so many steps and so long, or after the longer time anyway
_TIMED_STEPS, _TIMED_S = 4, (2.0, 15.0)


def train_tokenizer(
    images: Tensor,
    config: TokenizerConfig,
    *,
    seed: int = 0,
    out: str | Path | None = None,
    held_out: Tensor | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
    save_every_steps: int = _SAVE_EVERY_STEPS,
    trained_on: dict[str, Any] | None = None,
    start: VQTokenizer | None = None,
) -> VQTokenizer:
    """Train a tokenizer on `images` and return it in eval mode. With `out`, the same call goes on where an interrupted
    or killed one stopped.

    Args:
        images: (N, C, H, W) uint8 of the train split only; several views of an image may be among them.
        config: shape of the tokenizer, steps, batch, learning rate (AdamW, linear warm-up, cosine to 0), losses.
        seed: of initial weights, batches and re-seeding. Equal seeds give equal weights on the same processor and
            number of threads (on a GPU: nearly, since its sums come in any order).
        out: folder that gets the tokenizer, training.json (PSNR, SSIM, use of the codebook) and reconstructions.png (on
            the way too); None writes nothing.
        held_out: (N', C, H, W) uint8 to measure on; None measures on (up to 1024 of) `images`, and training.json says
            so.
        save_every_steps: how often the state is saved in `out`; a kill loses the steps since. Ctrl-C loses none.
        trained_on: what `images` are, for training.json.
        start: the tokenizer to fine-tune, left as it is; its shape must be the one in `config`. None: random weights.

    Raises:
        ConfigError: images of another size or number of channels than `config` says, not uint8, or none; a training
            with other settings, or from other weights, was begun in `out`; weights of the perceptual loss that are not
            there. UserError: the loss stopped being finite (then `out` gets no tokenizer, and the last state saved
            there is kept), or memory does not suffice.
    """
    require_images(images, config, "images")
    require_possible(config, torch.device(device))
    if held_out is not None and len(held_out):
        require_images(held_out, config, "held_out")
    shown, measured_on = (
        (held_out, "held-out images") if held_out is not None and len(held_out) else (images[:1024], "training images")
    )
    # From all over: sources come class by class
    pictured = shown[torch.arange(min(_SHOWN, len(shown))) * len(shown) // min(_SHOWN, len(shown))]
    perceptual = load_perceptual(config.perceptual_weights).to(device) if config.perceptual_weight else None
    training = _begin(config, seed, device, start)
    folder = None if out is None else Path(out)
    job = TrainingJob(
        seed,
        sha256_of_bytes(images.contiguous().numpy().data.cast("B")),
        recorded(config),
        "" if start is None else start.weights_hash(),
        "" if perceptual is None else perceptual.weights_hash(),
    )
    with explain_out_of_memory(
        f"train this tokenizer on {config.images_per_step} images of {config.image_size} pixels a step"
    ):
        _train(training, images, job, perceptual, folder, pictured, save_every_steps, progress)
    tokenizer = training.result.eval()
    if folder is not None:
        with explain_out_of_memory(
            f"measure this tokenizer on {EVALUATION_IMAGES} images of {config.image_size} pixels at once"
        ):
            report = measure_tokenizer(tokenizer, shown)
            write_reconstructions(tokenizer, pictured, folder / PICTURE_FILE)
        atomic_write_json(
            folder / REPORT_FILE,
            {
                **asdict(report),
                "measured_on": measured_on,
                "training_images": len(images),
                "steps": config.steps,
                "seed": seed,
                "trained_on": trained_on or {},
                "started_from": job.started_from,
                "perceptual_sha256": job.perceptual_sha256,
            },
        )
        tokenizer.save(folder)  # last: a folder with a tokenizer in it is complete
        remove_state(folder)
        if progress:
            ssim = "" if report.ssim is None else f", SSIM {report.ssim:.3f}"
            tqdm.write(
                f"tokenizer: PSNR {report.psnr_db:.1f} dB{ssim} on {measured_on}, {report.codes_used} of "
                f"{report.codebook} codes in use there; "
                f"see {printable(folder / PICTURE_FILE)}"
            )
    return tokenizer


def _begin(config: TokenizerConfig, seed: int, device: str | torch.device, start: VQTokenizer | None) -> Training:
    """Everything as it is before the first step."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = VQTokenizer(recorded(config)).to(device)
        discriminator = PatchDiscriminator(config.image_channels).to(device) if config.discriminator_weight else None
    if start is not None:
        require_same_shape(start.config, config)
        tokenizer.load_state_dict(start.state_dict())
    tokenizer.train()
    training = Training(
        tokenizer,
        _adamw(tokenizer, config),
        torch.Generator().manual_seed(seed),
        torch.empty(0, dtype=torch.int64),
        torch.zeros(config.codebook, dtype=torch.bool, device=device),
    )
    if config.ema_decay:
        training.averaged = copy.deepcopy(tokenizer).requires_grad_(False)
    if discriminator is not None:
        training.discriminator, training.discriminator_optimizer = discriminator, _adamw(discriminator, config)
    return training


def _adamw(module: torch.nn.Module, config: TokenizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)


def _train(
    training: Training,
    images: Tensor,
    job: TrainingJob,
    perceptual: Perceptual | None,
    folder: Path | None,
    shown: Tensor,
    save_every_steps: int,
    progress: bool,
) -> None:
    """All steps that are still to do; with a folder the state is kept there, and pictures of `shown` are written."""
    tokenizer, generator, config = training.tokenizer, training.generator, job.config
    device, announced = training.used.device, not progress
    first = load_state(folder, training, job, len(images)) if folder is not None else 0
    pictures = (
        {math.ceil(config.steps * share) for share in _PICTURE_SHARES} - {config.steps} if folder is not None else set()
    )
    forecast = _Forecast(config, first) if progress else None
    bar = tqdm(
        range(first, config.steps),
        initial=first,
        total=config.steps,
        desc="tokenizer",
        unit="step",
        disable=not progress,
        dynamic_ncols=True,
    )
    with bar, _ctrl_c_waits() if folder is not None else _ctrl_c_acts() as interrupted:
        for step in bar:
            adversary = training.discriminator if step >= config.discriminator_start_step else None
            for optimizer in filter(None, (training.optimizer, training.discriminator_optimizer)):
                optimizer.param_groups[0]["lr"] = _lr(config, step)
            while len(training.order) < config.images_per_step:
                training.order = torch.cat([training.order, torch.randperm(len(images), generator=generator)])
            batch, training.order = training.order[: config.images_per_step], training.order[config.images_per_step :]
            target = from_uint8(images[batch].to(device))
            # Entries start where the latents are: a codebook far from them would be mostly dead
            if step == 0 and not job.started_from:
                with torch.no_grad():
                    _move_unused(training, tokenizer(target).latents)
            output, pixels, measured = backward(training, target, perceptual, adversary)
            _require_finite(measured, step, config, folder)  # before the step: nothing that is kept has seen it
            training.optimizer.step()
            if adversary is not None:
                step_discriminator(
                    training,
                    target,
                    output.reconstruction,
                    functools.partial(_require_finite, step=step, config=config, folder=folder),
                )
            # A short history is averaged over its own length: the first weights must not weigh long
            if training.averaged is not None:
                decay = min(config.ema_decay, (1 + step) / (10 + step))
                ema_update(
                    list(training.averaged.parameters()),
                    [parameter.detach() for parameter in tokenizer.parameters()],
                    decay,
                )
            training.used[output.codes.flatten()] = True
            if (step + 1) % (config.reseed_every_steps or _COUNT_EVERY_STEPS) == 0:
                count = int(training.used.sum())
                if (
                    config.reseed_every_steps
                    and step + 1 <= config.steps * (1 - _SETTLE_SHARE)
                    and count < config.codebook
                ):
                    _move_unused(training, output.latents)
                bar.set_postfix(pixels=f"{pixels.item():.4f}", codes=f"{count}/{config.codebook}")
                training.used.zero_()
            if interrupted or (step + 1) % save_every_steps == 0 or step + 1 == config.steps:
                weights = [
                    parameter for _, module, _, _ in training.learners(step + 1) for parameter in module.parameters()
                ]
                _require_finite(torch.stack([parameter.abs().amax() for parameter in weights]), step, config, folder)
                if folder is not None:
                    save_state(folder, training, step + 1, job)
            if interrupted:
                raise KeyboardInterrupt(f"{step + 1} of {config.steps} tokenizer steps are kept")
            if forecast is not None:
                forecast.tick()
            if step + 1 in pictures:
                assert folder is not None, "without one there are no pictures"
                write_reconstructions(training.result, shown, folder / PICTURE_FILE)
                if not announced:
                    tqdm.write(
                        "tokenizer: images above their reconstructions, renewed on the way: "
                        f"{printable(folder / PICTURE_FILE)}"
                    )
                announced = True


def _lr(config: TokenizerConfig, step: int) -> float:
    """Of one step: linear warm-up, times a cosine to 0."""
    return (
        config.lr
        * min(1.0, (step + 1) / max(1, config.warmup_steps))
        * 0.5
        * (1 + math.cos(math.pi * step / config.steps))
    )


@torch.no_grad()
def _move_unused(training: Training, latents: Tensor) -> None:
    """Move the codes that did not occur; in the average at once, where half a way would lead through nowhere."""
    codebook, unused = training.tokenizer.quantize.embedding.weight, ~training.used
    move_codes(codebook, unused, latents, training.generator, training.optimizer)
    if training.averaged is not None:
        training.averaged.quantize.embedding.weight[unused] = codebook[unused]


class _Forecast:
    """Tells once, from the first steps, how long all of them take. The very first is not counted: it plans convolutions
    and places codes.
    """

    def __init__(self, config: TokenizerConfig, first: int) -> None:
        self.config, self.first, self.done, self.since = config, first, 0, 0.0

    def tick(self) -> None:
        """A step is done."""
        self.done += 1
        if self.done == 1:
            self.since = time.perf_counter()
        elapsed, left = time.perf_counter() - self.since, self.config.steps - self.first
        if (
            self.since
            and self.done > 1
            and ((self.done > _TIMED_STEPS and elapsed >= _TIMED_S[0]) or elapsed >= _TIMED_S[1])
        ):
            per_step = elapsed / (self.done - 1)
            steps = f"{left} steps" if not self.first else f"the {left} steps of {self.config.steps} that are left,"
            later = self.config.discriminator_start_step if self.config.discriminator_weight else 0
            more = (
                f"; more from step {later} on, where the discriminator sets in"
                if later >= self.first + self.done
                else ""
            )
            tqdm.write(
                f"tokenizer: {steps} of {self.config.images_per_step} images, about {_duration(left * per_step)} "
                f"({per_step:.2g} s a step{more})"
            )
            self.since = 0.0


def _duration(seconds: float) -> str:
    """For people: '45 s', '3 min 20 s', '2 h 5 min'."""
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def _require_finite(values: Tensor, step: int, config: TokenizerConfig, folder: Path | None) -> None:
    """Raise UserError where the loss and the gradient's norm, or the largest weights, are not finite after so many
    steps.
    """
    if not torch.isfinite(values).all():
        what = (
            f"the loss is {values[0].item():.4g} and the gradient's norm {values[1].item():.4g}"
            if len(values) == 2
            else "weights are not finite"
        )
        again = f", delete {folder}, and run the same command" if folder is not None else ""
        raise UserError(
            f"tokenizer training: {what} at step {step + 1} of {config.steps}; no tokenizer is written; "
            f"lower the learning rate (--new-tokenizer.lr, now {config.lr:g}){again}"
        )


@contextmanager
def _ctrl_c_waits() -> Iterator[list[int]]:
    """Within the block the first Ctrl-C only fills the yielded list, so that a step is never cut in two; the second
    acts at once.
    """
    caught: list[int] = []
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield caught  # signals are somebody else's here
        return

    def note(number: int, frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    signal.signal(signal.SIGINT, note)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _ctrl_c_acts() -> Iterator[list[int]]:
    """Nothing is kept, so that nothing is worth waiting for."""
    yield []

"""The training loop: a screen long."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from star_fast.config import RunConfig
from star_fast.ops import error_flag
from star_fast.training import checkpoint
from star_fast.training.batches import Batches
from star_fast.training.engine import Engine
from star_fast.training.telemetry import Telemetry
from star_fast.training.validation import held_out_batches


def learning_rate(config: RunConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then constant, or cosine to final_lr_share of the peak."""
    optim = config.optim
    if step < optim.warmup_steps:
        return config.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return config.lr
    progress = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    return config.lr * (optim.final_lr_share + (1 - optim.final_lr_share) * (1 + math.cos(math.pi * progress)) / 2)


def train(engine: Engine, batches: Batches, run: Path, first_step: int) -> int:
    """Train from `first_step` to the end or to the first SIGINT or SIGTERM; returns the number of finished steps.

    Saves every `save_every_steps` and when it stops, so an interrupt loses nothing and a kill at most the steps since the last save.
    """
    config, total = engine.config, batches.total_steps
    telemetry = Telemetry(run, first_step, total, config.train.images_per_step, log_every=config.train.log_every_steps,
                          main=engine.rank == 0, tensorboard=config.train.tensorboard)
    # Whether to validate must not depend on the rank: with few held-out images a rank may have none and still joins the sum.
    validates = bool(config.train.validate_every_steps and len(batches.store.held_out_indices))
    validation = held_out_batches(batches.store, config, engine.rank, engine.ranks) if validates else []
    done = first_step
    with interrupts() as stop:
        for step, micro_batches in batches.steps(first_step, total):
            lr = learning_rate(config, step, total)
            losses, grad_norm = engine.step(micro_batches, step, lr)
            telemetry.step(step, losses, grad_norm, lr)
            done = step + 1
            at_log = done % config.train.log_every_steps == 0  # where numbers are read back from the device anyway
            if at_log and engine.device.type == "cuda":
                error_flag.raise_if_set(engine.device)
            if validates and (done % config.train.validate_every_steps == 0 or done == total):
                telemetry.validation(done, engine.evaluate(validation))
            if _any_rank(stop, engine, at_log):
                break
            if done % config.train.save_every_steps == 0:
                checkpoint.save(engine, batches.store, run, done, config.train.keep_checkpoints)
        if done > first_step:
            checkpoint.save(engine, batches.store, run, done, config.train.keep_checkpoints)
    telemetry.close()
    return done


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Within the block SIGINT and SIGTERM only fill the yielded list; a second one ends the program at once."""
    caught: list[int] = []

    def note(number: int, frame: object) -> None:
        if caught:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        caught.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _any_rank(stop: list[int], engine: Engine, at_log: bool) -> bool:
    """Whether any rank was told to stop; on GPUs asked only where the loop reads numbers back anyway."""
    if engine.ranks == 1:
        return bool(stop)
    if engine.device.type == "cuda" and not at_log:
        return False
    flag = torch.tensor([len(stop)], device=engine.device)
    dist.all_reduce(flag)
    return bool(flag.item())

"""The training loop: a screen long."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from star_fast.config import RunConfig
from star_fast.host_memory import give_back
from star_fast.storage import atomic_write_json
from star_fast.training import checkpoint
from star_fast.training.batches import Batches
from star_fast.training.checkpoint import TelemetryRecord
from star_fast.training.engine import Engine
from star_fast.training.telemetry import Telemetry
from star_fast.training.validation import held_out_batches
from star_fast.training.watch import Diverged, LossWatch
from star_fast.training.watchdog import Watchdog

# Launchers pass a Ctrl-C on, some twice and as another signal: within this time it all is one request to stop
_ONE_REQUEST_S = 5.0


def learning_rate(config: RunConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then constant, or cosine to final_lr_share of
    the peak.
    """
    optim = config.optim
    if step < optim.warmup_steps:
        return config.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return config.lr
    progress = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    return config.lr * (optim.final_lr_share + (1 - optim.final_lr_share) * (1 + math.cos(math.pi * progress)) / 2)


def train(
    engine: Engine,
    batches: Batches,
    run: Path,
    first_step: int,
    *,
    stop: Sequence[int] = (),
    earlier: TelemetryRecord | None = None,
) -> int:
    """Train from `first_step` to the end or until `stop` is no longer empty (see `interrupts`); returns the number of
    finished steps.

    Saves every `save_every_steps` and when it stops, so an interrupt loses nothing and a kill at most the steps since
    the last save.

    Args:
        earlier: what a checkpoint remembers of the losses before `first_step`.

    Raises:
        Diverged: the loss or the weights are not finite: nothing more is saved, and the batch's images are listed in
            the run folder.
    """
    config, total = engine.config, batches.total_steps
    earlier = earlier or TelemetryRecord()
    watch = LossWatch(config.train.spike_deviations, list(earlier.window), earlier.episode)
    telemetry = Telemetry(
        run,
        first_step,
        total,
        config.train.images_per_step,
        log_every=config.train.log_every_steps,
        main=engine.rank == 0,
        tensorboard=config.train.tensorboard,
        watch=watch,
        rows=earlier.rows,
        stop_on_spike=config.train.stop_on_spike,
        background=batches.seconds,
    )
    # Whether to validate must not depend on the rank: with few held-out images a rank may have none and still joins the
    # sum.
    validates = bool(config.train.validate_every_steps and len(batches.store.held_out_indices))
    validation = held_out_batches(batches.store, config, engine.rank, engine.ranks) if validates else []
    done = first_step

    def save() -> None:
        dog.at(done, "saving, with the gathering of the weights")
        telemetry.read()
        # While the loss is up on a spike the last checkpoint from before it outlives the count of those kept.
        spare = max(
            (
                folder
                for folder in checkpoint.finished(run)
                if watch.episode and folder < checkpoint.step_folder(run, watch.episode)
            ),
            default=None,
        )
        checkpoint.save(
            engine,
            batches.store,
            run,
            done,
            config.train.keep_checkpoints,
            TelemetryRecord(telemetry.rows, watch.window, watch.episode),
            spare,
        )
        give_back()

    dog = Watchdog(engine.rank, config.train.hang_minutes)
    engine.doing = lambda what: dog.at(done + 1, what)
    try:
        with dog:
            for step, micro_batches in telemetry.waiting_for(batches.steps(first_step, total)):
                lr = learning_rate(config, step, total)
                losses, grad_norm = engine.step(micro_batches, step, lr)
                dog.at(step + 1, "noting the losses, with their mean over all ranks")
                telemetry.step(step, losses, grad_norm, lr)
                done = step + 1
                # Where numbers are read back from the device anyway
                if done % config.train.log_every_steps == 0 and engine.device.type == "cuda":
                    engine.raise_if_noted()
                if validates and (done % config.train.validate_every_steps == 0 or done == total):
                    dog.at(done, "validation")
                    telemetry.validation(done, engine.evaluate(validation))
                dog.at(done, "asking all ranks whether to stop")
                if engine.any_rank(bool(stop)):
                    break
                if done % config.train.save_every_steps == 0:
                    save()
                dog.at(done + 1, "reading its codes")
            if done > first_step:
                save()
    except Diverged as error:
        raise _explained(error, engine, batches, run) from error
    finally:
        telemetry.close()
    return done


def _explained(error: Diverged, engine: Engine, batches: Batches, run: Path) -> Diverged:
    """The same error with what was kept and what to do; rank 0 lists the images of the step in the run folder."""
    listed = run / f"diverged-step-{error.step:07d}.json"
    if engine.rank == 0:
        images = batches.images_of(error.step - 1).ravel().tolist()
        keys = batches.store.keys()
        atomic_write_json(
            listed,
            {"step": error.step, "problem": str(error), "images": images, "keys": [keys[image] for image in images]},
        )
    good = checkpoint.latest(run)
    kept = (
        f"the last good checkpoint is {good}: go on from it with --resume and, say, a lower --optim.lr-per-256-images"
        if good
        else "there is no checkpoint yet: start again with a lower --optim.lr-per-256-images or more "
        "--optim.warmup-steps"
    )
    return Diverged(
        f"{error}; nothing was saved or exported since; {kept}; the step's images are listed in {listed}", error.step
    )


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Within the block SIGINT and SIGTERM only fill the yielded list. A second Ctrl-C, some seconds after the first
    signal, ends the program at once.

    SIGTERM never does: launchers send it after a Ctrl-C, and whoever means it will send SIGKILL.
    """
    caught: list[int] = []
    first = 0.0

    def note(number: int, frame: object) -> None:
        nonlocal first
        if caught and number == signal.SIGINT and time.monotonic() - first > _ONE_REQUEST_S:
            signal.signal(number, signal.default_int_handler)
            signal.raise_signal(number)
        if not caught:
            first = time.monotonic()
            print(
                "\nStopping after this step, then saving; Ctrl-C again after a few seconds ends without saving",
                file=sys.stderr,
                flush=True,
            )
        caught.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

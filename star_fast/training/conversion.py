"""A checkpoint made fit for any number of ranks and any ZeRO stage: `star-fast convert RUN --out NEW_RUN`."""

from __future__ import annotations

import dataclasses
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import tyro

from star_fast.errors import UserError, printable
from star_fast.locks import only_writer
from star_fast.storage import explain_write_errors, read_record, sync_folder
from star_fast.training import checkpoint, shards
from star_fast.training.checkpoint import ANY_RANKS, RECORD_FILE, CheckpointRecord

_CARRIED = ("config.yaml", "metrics.jsonl")  # of the run: what it was told, and its curves so far


@dataclass(frozen=True)
class ConvertCommand:
    """Put a run's checkpoint together, so that it goes on with another number of ranks or another ZeRO stage: as a new
    run, the old one stays as it is.
    """

    run: tyro.conf.Positional[str]  # the run's folder
    out: str = ""  # the new run's folder
    step: int = 0  # which checkpoint; 0: the newest


def convert(command: ConvertCommand) -> Path:
    """Write the new run; returns its checkpoint's folder.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or `out` is taken. StorageError: the disk is full.
    """
    run, out = Path(command.run), Path(command.out)
    source = checkpoint.step_folder(run, command.step) if command.step else checkpoint.latest(run)
    if source is None or not source.is_dir():
        there = ", ".join(str(checkpoint.step_of(folder)) for folder in checkpoint.finished(run)) or "none"
        raise UserError(
            f"{run}: no checkpoint {f'of step {command.step}' if command.step else 'is'} there; complete ones: {there}"
        )
    if not command.out:
        raise UserError("--out: expected the folder of a new run, got nothing")
    record = read_record(source / RECORD_FILE, CheckpointRecord, shards.DAMAGED)
    checkpoint.check_files(source, record)
    if record.ranks == ANY_RANKS:
        raise UserError(f"{source}: fits any number of ranks already; go on from it with --resume --run {run}")
    if out.resolve() == run.resolve():
        raise UserError(f"--out: expected another folder than the run's own, got {out}")
    final = checkpoint.step_folder(out, record.step)
    with only_writer(out, "a conversion"):
        if checkpoint.latest(out) is not None:
            raise UserError(f"{out}: holds checkpoints already; choose another --out")
        checkpoint.clear_leftovers(out)
        temporary = final.with_suffix(".tmp")
        try:
            checkpoint.empty(temporary)
            shards.put_together(source, temporary)
            with explain_write_errors(out):
                _copy(source / checkpoint.MODEL_FOLDER, temporary / checkpoint.MODEL_FOLDER)
                for name in _CARRIED:
                    if (run / name).is_file():
                        _copy(run / name, out / name)
            files = checkpoint.describe(temporary)
            checkpoint.complete(temporary, final, dataclasses.replace(record, ranks=ANY_RANKS, files=files))
        except UserError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return final


def _copy(source: Path, target: Path) -> None:
    """A file or folder, flushed to the disk."""
    for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
        to = target / path.relative_to(source) if source.is_dir() else target
        if path.is_dir():
            to.mkdir(parents=True, exist_ok=True)
            continue
        to.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as reading, to.open("wb") as writing:
            shutil.copyfileobj(reading, writing)
            writing.flush()
            os.fsync(writing.fileno())
    sync_folder(target if source.is_dir() else target.parent)


def run_convert(command: ConvertCommand) -> None:
    """Convert, and say what a resume on other ranks changes."""
    folder = convert(command)
    record = read_record(folder / RECORD_FILE, CheckpointRecord, shards.DAMAGED)
    before = read_record(
        checkpoint.step_folder(Path(command.run), record.step) / RECORD_FILE, CheckpointRecord, shards.DAMAGED
    )
    micro = before.config["train"]["micro_batch_images"]
    negatives = (
        f"{micro} images of each rank: {micro * before.ranks} until now, with R ranks {micro} x R"
        if micro
        else "images_per_step, whatever the number of ranks, while train.micro_batch_images is 0"
    )
    for line in (
        f"{folder}: step {record.step}, saved by {before.ranks} ranks with ZeRO-{before.zero_stage}, now for any "
        "number and stage.",
        "Unchanged: weights, teacher, AdamW's moments, order of the images, views, masks, positions and learning rate.",
        "Changes with the number of ranks: which activations dropout drops; the rounding of sums over ranks; a "
        f"contrast sees {negatives}.",
        f"Go on: deepspeed star_fast/train.py --config {Path(command.out) / 'config.yaml'} --resume --run "
        f"{command.out}   [--train.zero-stage N]",
    ):
        print(printable(line))

"""Saving and resuming a run exactly.

A checkpoint is a folder checkpoints/step-XXXXXXX, complete or absent: it is written under a temporary name, flushed to
disk, listed with the size and sha256 of each file in complete.json, and renamed last. Before anything of it is loaded
all that is checked, and nothing in it is ever executed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed as dist

from star_fast.config import RunConfig
from star_fast.data.codes import CodeStore
from star_fast.errors import ConfigError, UserError
from star_fast.records import require, to_dict
from star_fast.storage import (
    atomic_write_json,
    explain_write_errors,
    read_record,
    require_regular,
    sha256_of_file,
    sync_folder,
)
from star_fast.training import shards
from star_fast.training.engine import Engine
from star_fast.training.export import export
from star_fast.training.ranks import together

FORMAT = 3
ANY_RANKS = 0  # as number of ranks: put together for any number and ZeRO stage (star-fast convert)
RECORD_FILE = "complete.json"
MODEL_FOLDER = "model"  # student and teacher as plain safetensors, for every command that takes a model
_NAME = re.compile(r"step-(\d{7,15})")


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class CodesRecord:
    """Which codes a run trains on: a resume must find the same."""

    tokenizer: str  # sha256 of its weights
    images: int
    codes: str  # sha256 of codes.bin


@dataclass(frozen=True)
class TelemetryRecord:
    """What the losses were, so that a resumed run judges and logs the next ones as an unbroken run does."""

    # Of the steps since the last log line, in the order of telemetry.TERMS
    rows: list[list[float]] = field(default_factory=list)
    window: list[float] = field(default_factory=list)  # see watch.LossWatch
    episode: int | None = None


@dataclass(frozen=True)
class CheckpointRecord:
    """complete.json."""

    format: int
    step: int  # finished optimizer steps
    ranks: int
    zero_stage: int
    torch: str
    config: dict[str, dict[str, Any]]
    codes: CodesRecord
    files: dict[str, FileRecord]  # by path within the folder
    telemetry: TelemetryRecord = field(default_factory=TelemetryRecord)

    def __post_init__(self) -> None:
        require(self.step >= 0, "step", self.step, "0 or more")
        for name in self.files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\0" in name or not name:
                raise ConfigError(f"files: expected paths within the folder, got {name!r}")


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lives."""
    return run / "checkpoints" / f"step-{step:07d}"


def finished(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. What has another name (a `.tmp` that a full disk or a kill left)
    is none.
    """
    try:
        found = [
            (int(match[1]), folder)
            for folder in (run / "checkpoints").glob("step-*")
            if (match := _NAME.fullmatch(folder.name)) and folder.is_dir()
        ]
    except (OSError, ValueError) as error:  # an over-long name, a null byte
        raise UserError(
            f"{run}: cannot be a run's folder: {getattr(error, 'strerror', None) or error}; choose another --run"
        ) from error
    return [folder for _, folder in sorted(found)]


def step_of(folder: Path) -> int:
    """Of a checkpoint's folder: how many steps were finished."""
    return int(folder.name.removeprefix("step-"))


def latest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return max(finished(run), key=step_of, default=None)


def clear_leftovers(run: Path) -> None:
    """Remove what killed saves left behind. Only for the holder of the run's lock."""
    for entry in (run / "checkpoints").glob("step-*.tmp"):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:  # of a pipe rmtree would wait for a writer
            with contextlib.suppress(OSError):
                entry.unlink()


def codes_identity(store: CodeStore) -> CodesRecord:
    """Which codes a run trains on."""
    return CodesRecord(store.tokenizer_hash, len(store), store.manifest["files"]["codes.bin"]["sha256"])


def save(
    engine: Engine,
    store: CodeStore,
    run: Path,
    step: int,
    keep: int,
    telemetry: TelemetryRecord | None = None,
    spare: Path | None = None,
) -> Path:
    """Save everything a resume needs, as of `step` finished steps. A collective.

    Older complete checkpoints beyond the newest `keep` are removed once this one is safe; `spare`, the last one known
    to be good, is not.

    Raises:
        Diverged: the weights are not finite: nothing is written. AgreedError: the disk is full or cannot be written;
            earlier checkpoints are as they were.
    """
    final = step_folder(run, step)
    if final.exists():
        return final
    engine.require_finite(step)
    temporary = final.with_suffix(".tmp")
    main = engine.rank == 0
    try:
        together(lambda: empty(temporary) if main else None)
        together(lambda: shards.save(engine, temporary))
        export(engine, store, temporary / MODEL_FOLDER, step)
        files = _gather(together(lambda: _describe(temporary, _listing(temporary)[engine.rank :: engine.ranks])))
        record = CheckpointRecord(
            FORMAT,
            step,
            engine.ranks,
            engine.config.train.zero_stage,
            torch.__version__,
            to_dict(engine.config),
            codes_identity(store),
            files,
            telemetry or TelemetryRecord(),
        )
        together(lambda: complete(temporary, final, record) if main else None)
    except UserError:
        if main:  # a full disk gets its room back
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if main:
        every = engine.config.train.keep_every_steps
        for old in finished(run)[:-keep]:
            if old != spare and not (every and step_of(old) % every == 0):
                shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return final


def check(folder: Path, engine: Engine, store: CodeStore) -> CheckpointRecord:
    """The record of a complete, fitting checkpoint. Every rank calls it; each reads only its share of the files whole.

    Raises:
        UserError: a file is missing, foreign or not the one that was saved, or the checkpoint belongs to another model,
            code store, ZeRO stage or number of ranks.
    """
    record = read_record(
        folder / RECORD_FILE,
        CheckpointRecord,
        "not a complete checkpoint: remove this folder to resume from the one before",
    )
    if record.format != FORMAT:
        raise UserError(
            f"{folder}: checkpoint format {record.format}, this version reads {FORMAT}; go on with the version "
            "that saved it, or start "
            f"another run from its weights with --init {folder.parent.parent / 'model'}"
        )
    check_files(folder, record, engine.rank, engine.ranks)
    if record.ranks != ANY_RANKS and (record.ranks, record.zero_stage) != (
        engine.ranks,
        engine.config.train.zero_stage,
    ):
        run = folder.parent.parent
        raise UserError(
            f"{folder}: saved by {record.ranks} ranks with ZeRO stage {record.zero_stage}, this run has "
            f"{engine.ranks} ranks with stage "
            f"{engine.config.train.zero_stage}; resume with the same, or make it fit any number with: star-fast "
            f"convert {run} --out {run}-any"
        )
    _same_run(record.config, to_dict(engine.config), folder, any_ranks=record.ranks == ANY_RANKS)
    found = codes_identity(store)
    if record.codes != found:
        what = "tokenizer" if record.codes.tokenizer != found.tokenizer else "codes"
        raise UserError(
            f"{folder}: trained on a code store of {what} {getattr(record.codes, what)[:12]}, {store.path} has "
            f"{getattr(found, what)[:12]}; "
            "give the code store that the run began with"
        )
    return record


def load(engine: Engine, store: CodeStore, folder: Path) -> CheckpointRecord:
    """Put a checkpoint back; returns its record. Weights, optimizer state and teacher are bit-identical after. A
    collective.

    Raises:
        AgreedError: see check; or its weights are not finite.
    """

    def read() -> tuple[CheckpointRecord, Callable[[], None]]:
        record = check(folder, engine, store)
        return record, shards.read(engine, folder, whole=record.ranks == ANY_RANKS)

    record, put = together(read)
    put()
    engine.publish()
    engine.require_finite(record.step, f"{folder}: as saved")
    return record


def empty(folder: Path) -> None:
    """Make an empty folder. Raises StorageError."""
    with explain_write_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)


def _listing(folder: Path) -> list[str]:
    """The files below `folder`, by path within it, sorted."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()
    )


def _describe(folder: Path, names: list[str]) -> dict[str, FileRecord]:
    hashes = _hashes(folder, names)
    return {name: FileRecord((folder / name).stat().st_size, next(hashes)) for name in names}


def _hashes(folder: Path, names: list[str]) -> Iterator[str]:
    """The sha256 of each file, in order; several at a time, since training waits for them and its cores are free."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        yield from pool.map(lambda name: sha256_of_file(folder / name), names)


def describe(folder: Path) -> dict[str, FileRecord]:
    """Every file below `folder` with its size and hash."""
    return _describe(folder, _listing(folder))


def _gather(mine: dict[str, FileRecord]) -> dict[str, FileRecord]:
    """The shares of all ranks, by name."""
    shares = [mine] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    return dict(sorted((name, file) for share in shares for name, file in share.items()))


def complete(temporary: Path, final: Path, record: CheckpointRecord) -> None:
    """List what is there, flush the names to disk, and give the folder its final name."""
    with explain_write_errors(final):
        atomic_write_json(temporary / RECORD_FILE, to_dict(record))
        for folder in (temporary, *(path for path in temporary.rglob("*") if path.is_dir())):
            sync_folder(folder)
        os.replace(temporary, final)
        sync_folder(final.parent)


def check_files(folder: Path, record: CheckpointRecord, rank: int = 0, ranks: int = 1) -> None:
    """Names and sizes of all files, and the content of every ranks-th: together the ranks read all of it."""
    there = set(_listing(folder)) - {RECORD_FILE}
    for name in sorted(there - set(record.files)):
        raise UserError(
            f"{folder}: {name} is not part of the checkpoint; remove that file, or this folder to resume from the "
            "one before"
        )
    for name, file in record.files.items():
        size = require_regular(folder / name, shards.DAMAGED)
        if size != file.bytes:
            raise UserError(f"{folder}: {name} should have {file.bytes} bytes, it has {size}; {shards.DAMAGED}")
    mine = list(record.files)[rank::ranks]
    for name, sha256 in zip(mine, _hashes(folder, mine), strict=True):
        if sha256 != record.files[name].sha256:
            raise UserError(f"{folder}: {name} is not the file that was saved (its sha256 differs); {shards.DAMAGED}")


def _same_run(found: dict[str, Any], wanted: dict[str, Any], where: Path, any_ranks: bool = False) -> None:
    """Settings that would make a resume something else than the same run must agree. How long it lasts, what is logged
    and the optimizer's settings may change: the latter is how a run goes on that has diverged, and it is said."""
    free: dict[str, set[str]] = {
        "train": {
            "epochs",
            "max_steps",
            "save_every_steps",
            "keep_checkpoints",
            "keep_every_steps",
            "log_every_steps",
            "validate_every_steps",
            "tensorboard",
            "spike_deviations",
            "stop_on_spike",
            "hang_minutes",
            "block_checkpointing",
            "keep_attention",
        },
        "data": {"codes"},
    }
    unsaid = to_dict(RunConfig())  # a setting that did not exist yet had the value that is its default now
    if any_ranks:  # how the work is dealt out may change too
        free["train"] |= {"zero_stage", "gradient_precision", "offload_optimizer", "micro_batch_images"}
    for section, values in wanted.items():
        if section in ("tokenizer", "optim"):
            continue
        ignored = free.get(section, set())
        for name, value in values.items():
            before = found.get(section, {}).get(name, unsaid[section][name])
            if name not in ignored and before != value:
                raise UserError(
                    f"{where}: it was saved with {section}.{name} = {before!r}, this run has {value!r}; "
                    "resume with the same settings, or start another run with --init"
                )


def changed_settings(record: CheckpointRecord, config: RunConfig) -> list[str]:
    """The optimizer's settings that this resume changes, in words."""
    before, now = record.config.get("optim", {}), to_dict(config.optim)
    return [
        f"optim.{name} {before.get(name)!r} -> {value!r}" for name, value in now.items() if before.get(name) != value
    ]

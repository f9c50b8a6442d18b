"""A finished run, opened for looking at: its config, its metrics, its weights and the codes it was trained on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from star_fast.config import RunConfig
from star_fast.config_file import read_config
from star_fast.data.codes import CodeStore
from star_fast.errors import UserError
from star_fast.locks import only_writer
from star_fast.model.weights import LoadedModel, load_model
from star_fast.records import require
from star_fast.storage import StorageError, read_bytes, remove_leftovers, to_record

_METRICS_HINT = "expected the metrics that training writes beside its model"
_MOST_LINE_BYTES = 2**16  # training's take some hundred
_MOST_METRICS_BYTES = 2**28


@dataclass(frozen=True)
class TrainingRecord:
    """What training noted beside the weights; each field is absent in a model that came from elsewhere."""

    step: int | None = None  # optimizer steps
    images_seen: int | None = None  # an image counts once, however many views of it a step sees
    tokenizer_hash: str | None = None
    environment: dict[str, str] | None = None  # device and versions

    def __post_init__(self) -> None:
        for name in ("step", "images_seen"):
            require((getattr(self, name) or 0) >= 0, f"record.{name}", getattr(self, name), "0 or more")


@dataclass(frozen=True)
class MetricsLine:
    """A line of metrics.jsonl. Losses that were not finite are null; a line of validation has `val_ar` and no other
    loss.
    """

    step: int
    images: int | None = None
    loss: float | None = None
    ar: float | None = None
    mim: float | None = None
    step_contrast: float | None = None
    view_contrast: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    spike_deviations: float | None = None  # where the loss has jumped
    images_per_s: float | None = None
    time_s: float | None = None
    val_ar: float | None = None

    def __post_init__(self) -> None:
        for name in ("step", "images", "images_per_s", "time_s"):
            require(0 <= (getattr(self, name) or 0) <= 2**53, name, getattr(self, name), "0 ... 2^53")


@dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    folder: Path
    config: RunConfig
    model: LoadedModel
    store: CodeStore
    record: TrainingRecord

    @property
    def name(self) -> str:
        """The folder's own name, however it was given."""
        return (
            self.folder.absolute().name
            if self.folder.name not in ("", "..")
            else self.folder.resolve().name or str(self.folder.resolve())
        )

    @property
    def contrast_depth(self) -> int:
        """The block whose output the method contrasts (and the probe reads), counted from 1."""
        return self.config.contrast_depth


def open_run(folder: str | Path, *, codes: str = "", weights: Literal["student", "teacher"] = "student") -> Run:
    """Open a run folder that `star-fast train` (or train.py) wrote.

    Args:
        codes: the code store, where it is no longer where the run's config says.

    Raises:
        UserError: something is missing or does not fit together; one line that says what. Errors of config, weights and
            code store pass through.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):  # of os.path: unlike Path.is_dir it raises for no name
        raise UserError(
            f"{folder}: not a folder; expected a run folder as training writes it (config.yaml, metrics.jsonl, model/)"
        )
    for name, meaning in (
        ("config.yaml", "the run's settings"),
        ("model", "the exported weights, written when training ends"),
    ):
        # Of one that a killed save moved away load_model knows more
        if not os.path.exists(folder / name) and not any(folder.glob(f".{name}.*.old")):
            raise UserError(f"{folder}: holds no {name} ({meaning}); give the folder of a finished training run")
    config = read_config(folder / "config.yaml")
    model = load_model(folder / "model", weights=weights)
    record = to_record(
        model.record,
        folder / "model/config.json",
        TrainingRecord,
        "resume the run to write the model again",
        ignore_unknown=True,
    )
    size = model.transformer.config
    for name in ("blocks", "heads", "width"):
        if getattr(size, name) != getattr(config.model, name):
            raise UserError(
                f"{folder}: model.{name} is {getattr(config.model, name)} in config.yaml and "
                f"{getattr(size, name)} in model/: "
                "files of two runs are mixed"
            )
    store = CodeStore.open(_find_codes(folder, codes or config.data.codes, given=bool(codes)))
    ours, theirs = (
        (size.vocab, size.positions, size.num_classes),
        (store.codebook, store.positions, len(store.class_names)),
    )
    if ours != theirs:
        raise UserError(
            f"{store.path}: expected codes of (codebook, positions, classes) {ours}, which the run's model has, "
            f"got {theirs}; give --codes"
        )
    if record.tokenizer_hash and record.tokenizer_hash != store.tokenizer_hash:
        raise UserError(
            f"{store.path}: made by tokenizer {store.tokenizer_hash[:12]}, but the run was trained with "
            f"{record.tokenizer_hash[:12]}; give --codes"
        )
    return Run(folder, config, model, store, record)


def read_metrics(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training lines and validation lines of metrics.jsonl: the fields of MetricsLine that a line has; None where a
    loss was not finite.

    Raises:
        UserError: the file is missing, empty, or a line is not what training writes.
    """
    file = folder / "metrics.jsonl"
    training: list[dict[str, Any]] = []
    validation: list[dict[str, Any]] = []
    for row in _metrics_lines(file):
        (validation if "val_ar" in row else training).append(row)
    if not training:
        raise UserError(
            f"{file}: holds no training step; the run ended before its first log line (train.log_every_steps)"
        )
    return training, validation


def _metrics_lines(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(read_bytes(file, _METRICS_HINT, _MOST_METRICS_BYTES).splitlines(), 1):
        try:
            if len(line) > _MOST_LINE_BYTES:
                raise ValueError("too long")
            # Earlier versions wrote NaN and Infinity, which are no JSON; they count as the null that is written now.
            values = json.loads(line, parse_constant=lambda _: None)
        except (ValueError, RecursionError) as error:
            raise StorageError(
                f"{file}, line {number}: expected a JSON object with a step, got "
                f"{line[:60].decode(errors='replace')!r}; "
                "resume the run, or remove this line"
            ) from error
        record = to_record(
            values, f"{file}, line {number}", MetricsLine, "resume the run, or remove this line", ignore_unknown=True
        )
        yield {name: value for name, value in vars(record).items() if name in values}


@contextmanager
def only_report(folder: Path, job: str, files: Sequence[str]) -> Iterator[None]:
    """One report or probe of a run at a time; what dead ones left half-written of `files` is removed. Raises Busy when
    another is at it.
    """
    with only_writer(folder, job, name=".report.lock"):
        remove_leftovers(folder, files)
        yield


@contextmanager
def only_result(file: Path, job: str, files: Sequence[str]) -> Iterator[None]:
    """One job at a time that writes `file`, in a folder that others may write to as well; what dead ones left
    half-written of `files`, beside it, is removed.

    Raises Busy when another is at it.
    """
    lock = f".{file.name}.lock"
    with only_writer(file.parent, job, name=lock):
        remove_leftovers(file.parent, files)
        try:
            yield
        finally:
            # Still held: whoever waits for it sees that it is gone, and takes a new one
            (file.parent / lock).unlink(missing_ok=True)


def codes_of(store: CodeStore, rows: Tensor, view: int) -> Tensor:
    """(N, T) int64 codes of one view of the store's rows (N,)."""
    return store.codes(rows, [view])[:, 0]


def spread(rows: Tensor, most: int) -> Tensor:
    """At most `most` of the rows (N,), evenly spaced; 0: all."""
    if not 0 < most < len(rows):
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most, dtype=torch.float64).round().long()]


def _find_codes(folder: Path, name: str, given: bool) -> Path:
    """The code store of that name: as given, or beside the run if paths moved together."""
    if not name:
        raise UserError(f"{folder}/config.yaml: names no code store (data.codes); give --codes FOLDER")
    candidates = [Path(name)] if given or Path(name).is_absolute() else [Path(name), folder / name]
    for candidate in candidates:
        if os.path.exists(candidate):
            return candidate
    raise UserError(f"{name}: the code store that the run was trained on is not there; give --codes FOLDER")

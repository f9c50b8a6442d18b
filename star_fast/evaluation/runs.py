"""A finished run, opened for looking at: its config, its metrics, its weights and the codes it was trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from star_fast.config import RunConfig
from star_fast.config_file import read_config
from star_fast.data.codes import CodeStore
from star_fast.errors import UserError
from star_fast.model.weights import LoadedModel, load_model


@dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    folder: Path
    config: RunConfig
    model: LoadedModel
    store: CodeStore

    @property
    def contrast_depth(self) -> int:
        """The block whose output the method contrasts (and the probe reads), counted from 1."""
        return self.config.contrast_depth

    @property
    def step(self) -> int | None:
        """Optimizer steps behind the weights, where the model's record tells."""
        return self.model.record.get("step")

    @property
    def images_seen(self) -> int | None:
        """Training images behind the weights (an image counts once, however many views of it a step sees)."""
        return self.model.record.get("images_seen")


def open_run(folder: str | Path, *, codes: str = "", weights: Literal["student", "teacher"] = "student") -> Run:
    """Open a run folder that `star-fast train` (or train.py) wrote.

    Args:
        codes: the code store, where it is no longer where the run's config says.

    Raises:
        UserError: something is missing or does not fit together; one line that says what. Errors of config, weights and code store pass through.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; expected a run folder as training writes it (config.yaml, metrics.jsonl, model/)")
    for name, meaning in (("config.yaml", "the run's settings"), ("model", "the exported weights, written when training ends")):
        if not (folder / name).exists():
            raise UserError(f"{folder}: holds no {name} ({meaning}); give the folder of a finished training run")
    config = read_config(folder / "config.yaml")
    model = load_model(folder / "model", weights=weights)
    store = CodeStore.open(_find_codes(folder, codes or config.data.codes, given=bool(codes)))
    size = model.transformer.config
    ours, theirs = (size.vocab, size.positions, size.num_classes), (store.codebook, store.positions, len(store.class_names))
    if ours != theirs:
        raise UserError(f"{store.path}: expected codes of (codebook, positions, classes) {ours}, which the run's model has, got {theirs}; give --codes")
    trained_on = model.record.get("tokenizer_hash")
    if trained_on and trained_on != store.tokenizer_hash:
        raise UserError(f"{store.path}: made by tokenizer {store.tokenizer_hash[:12]}, but the run was trained with {trained_on[:12]}; give --codes")
    return Run(folder, config, model, store)


def read_metrics(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training lines and validation lines of metrics.jsonl.

    Raises:
        UserError: the file is missing, empty, or a line is not what training writes.
    """
    file = folder / "metrics.jsonl"
    if not file.exists():
        raise UserError(f"{file}: not found; expected the metrics that training writes beside its model")
    training, validation = [], []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            (validation if "val_ar" in row else training).append({"step": int(row["step"]), **row})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}, line {number}: expected a JSON object with a step, got {line[:60]!r}") from error
    if not training:
        raise UserError(f"{file}: holds no training step; the run ended before its first log line (train.log_every_steps)")
    return training, validation


def plain_view(store: CodeStore) -> int:
    """The view that alters an image least: the centre crop of ten-crop codes, else view 0."""
    return store.views.index("centre") if "centre" in store.views else 0


def pick_device(name: str) -> torch.device:
    """The device of that name; for an empty one a GPU where there is one, else the CPU."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device: {name} was asked for, but torch sees no CUDA device; use cpu")
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"device: expected cpu, cuda or cuda:N, got {name!r}") from error


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
        if candidate.exists():
            return candidate
    raise UserError(f"{name}: the code store that the run was trained on is not there; give --codes FOLDER")

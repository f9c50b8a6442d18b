"""Our own model folders: weights in safetensors under LlamaGen's names, and a config.json that says what they are.

    model.safetensors     the student
    teacher.safetensors   the EMA teacher, where there is one
    config.json           ModelConfig, class names, sha256 of the weights, the record of the run (method, step ...)
    tokenizer/            the VQ tokenizer that made the codes, where it is known
    README.md             a card for people, where the folder is to be shown

A folder is whole or absent (folder_swap.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from star_fast.config import ModelConfig
from star_fast.errors import UserError
from star_fast.model.bounded_file import read_small_json, shown
from star_fast.model.class_table import match_classes
from star_fast.model.folder_swap import replaced_folder, require_in_place
from star_fast.model.llamagen import (
    CLASS_TABLE,
    Checkpoint,
    checkpoint_config,
    open_checkpoint,
    read_transformer,
    safetensors_bytes,
)
from star_fast.model.tensor_files import require_finite, require_fit
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.transformer import Transformer
from star_fast.records import require, to_dict
from star_fast.storage import atomic_write_bytes, atomic_write_json, sha256_of_bytes, to_record

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
TOKENIZER_FOLDER = "tokenizer"
WEIGHTS_FILES = {"student": "model.safetensors", "teacher": "teacher.safetensors"}
_HINT = "expected a model folder as a training run writes it"
_MOST_CONFIG_BYTES = 2**23  # the names of 200 000 classes
CARD_FILE = "README.md"
_MEMBERS = {CONFIG_FILE, CARD_FILE, TOKENIZER_FOLDER, *WEIGHTS_FILES.values()}

Weights = Literal["student", "teacher"]


@dataclass(frozen=True)
class LoadedModel:
    """A model and what is known about it."""

    transformer: Transformer  # eval mode, CPU
    class_names: list[str]  # one a class; of a LlamaGen file, which has none, the class numbers
    tokenizer_folder: Path | None  # for VQTokenizer.load; None where the model came without one
    record: dict[str, Any]  # what save_model was given; empty for a LlamaGen file
    weights_sha256: str  # of the file that the weights were read from


@dataclass(frozen=True)
class _Record:
    """What training notes about a run, as far as other code relies on it; the record may hold more."""

    step: int | None = None  # optimizer steps
    images_seen: int | None = None
    contrast_depth: int | None = None
    tokenizer_hash: str | None = None
    precision: str | None = None
    method: dict[str, Any] | None = None
    environment: dict[str, str] | None = None

    def __post_init__(self) -> None:
        for name in ("step", "images_seen", "contrast_depth"):
            require((getattr(self, name) or 0) >= 0, f"record.{name}", getattr(self, name), "0 or more")


@dataclass(frozen=True)
class _Recorded:
    """For messages that name the fields record.step ..."""

    record: _Record


@dataclass(frozen=True)
class _About:
    """config.json."""

    format_version: int
    model: ModelConfig
    class_names: list[str]
    weights_sha256: dict[str, str]  # by student and teacher
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("vocab", "positions", "num_classes"):
            require(getattr(self.model, name) >= 1, f"model.{name}", getattr(self.model, name), "at least 1")
        expected = self.model.num_classes
        require(
            len(self.class_names) == expected,
            "class_names",
            len(self.class_names),
            f"{expected} class names (model.num_classes)",
        )


def save_model(
    folder: str | Path,
    transformer: Transformer,
    *,
    class_names: Sequence[str],
    teacher: Transformer | Mapping[str, Tensor] | None = None,
    tokenizer: VQTokenizer | str | Path | None = None,
    record: Mapping[str, Any] | None = None,
    card: str = "",
) -> None:
    """Write a model folder, whole or not at all; an older model folder in its place is replaced.

    Args:
        folder: where to. What is there already must be a model folder, or empty.
        transformer: the student, any device; weights are stored in their dtype.
        class_names: one a class, in order of label.
        teacher: the EMA copy, or its weights under LlamaGen's names.
        tokenizer: the tokenizer or its folder.
        record: anything JSON can hold: method settings, step, images_seen, tokenizer hash ...
        card: README.md, in Markdown (hub.model_card); "": none.

    There must be one writer of a folder at a time, as a run's lock provides: leftovers of killed saves are cleared (see
    replaced_folder).

    Raises:
        ValueError: number of class names, or teacher's weights, do not fit. UserError: other files are in `folder`;
            weights that are not finite.
        StorageError: the disk is full, or the place cannot be written. After all of them the older model, if any, is in
            its place.
    """
    folder, config = Path(folder), transformer.config
    if len(class_names) != config.num_classes:
        raise ValueError(f"save_model: class_names must name {config.num_classes} classes, got {len(class_names)}")
    states = {"student": transformer.state_dict()}
    if teacher is not None:
        states["teacher"] = teacher.state_dict() if isinstance(teacher, Transformer) else dict(teacher)
        shapes, teacher_shapes = (
            {name: tuple(tensor.shape) for name, tensor in state.items()}
            for state in (states["student"], states["teacher"])
        )
        if shapes != teacher_shapes:
            differing = sorted(
                name for name in {*shapes, *teacher_shapes} if shapes.get(name) != teacher_shapes.get(name)
            )
            raise ValueError(
                "save_model: teacher must have the student's weights, names and shapes; differing: "
                f"{', '.join(differing[:6])}"
            )
    for name, state in states.items():
        require_finite(state, f"{folder}: not saved: of the {name}")
    if tokenizer is not None and not isinstance(tokenizer, VQTokenizer):
        tokenizer = VQTokenizer.load(tokenizer)
    with replaced_folder(folder, _MEMBERS, CONFIG_FILE) as staging:
        hashes = {}
        for name, state in states.items():
            data = safetensors_bytes(state, config)
            hashes[name] = sha256_of_bytes(data)
            atomic_write_bytes(staging / WEIGHTS_FILES[name], data)
        if tokenizer is not None:
            tokenizer.save(staging / TOKENIZER_FOLDER)
        if card:
            atomic_write_bytes(staging / CARD_FILE, card.encode())
        atomic_write_json(
            staging / CONFIG_FILE,
            {
                "format_version": FORMAT_VERSION,
                "model": to_dict(config),
                "class_names": list(class_names),
                "weights_sha256": hashes,
                "record": dict(record or {}),
            },
        )


def load_model(path: str | Path, *, weights: Weights = "student", dtype: torch.dtype | None = None) -> LoadedModel:
    """The model in a model folder, in a run folder (its model/), or in a LlamaGen file; eval mode, CPU.

    Args:
        path: folder or file.
        weights: "student" or "teacher".
        dtype: of the transformer's weights; None keeps the file's.

    Raises:
        UserError: something is missing, truncated, mixed up, not finite or of another size, or there is no teacher. One
            line.
    """
    folder = _model_folder(path, weights)
    if folder is None:
        path = Path(path)
        with open_checkpoint(path) as checkpoint:
            transformer = read_transformer(path, checkpoint, checkpoint_config(path, checkpoint), dtype)
            return LoadedModel(
                transformer,
                [str(label) for label in range(transformer.config.num_classes)],
                None,
                {},
                checkpoint.file.sha256(),
            )
    about = _read_config(folder)
    with _open_weights(folder, weights, about) as (checkpoint, sha256):
        transformer = read_transformer(checkpoint.file.path, checkpoint, about.model, dtype)
    tokenizer_folder = folder / TOKENIZER_FOLDER
    return LoadedModel(
        transformer,
        about.class_names,
        tokenizer_folder if os.path.isdir(tokenizer_folder) else None,
        about.record,
        sha256,
    )


def load_into(
    transformer: Transformer,
    path: str | Path,
    *,
    weights: str = "",
    tokenizer_hash: str = "",
    class_names: Sequence[str] | None = None,
    class_names_there: Sequence[str] | None = None,
) -> list[str]:
    """Copy the weights at `path` (as for load_model) into `transformer`, casting to its dtype: how a run starts from
    given weights.

    Class embeddings are matched by name (class_table.match_classes); rows that find no match stay as they are in
    `transformer`. The number of positions may differ: the rotary table is computed, not stored.

    Args:
        weights: of a model folder "student" or "teacher"; of a LlamaGen file what its weights sit under, say "model" or
            "ema"; "": the student, or the file's first of llamagen.WRAPPERS.
        tokenizer_hash: names the tokenizer whose codes will be trained on; a model folder that names another one is
            refused.
        class_names: of the classes that `transformer` will learn; None where not known.
        class_names_there: of the classes that the weights have learnt, where the file cannot say or says otherwise.

    Returns:
        What was done to make the weights fit, a line each.

    Raises:
        UserError: as load_model; or the weights know the codes of another tokenizer, are of another size (which tensor,
            expected and found shapes) or another number of heads, or the classes cannot be matched. Then `transformer`
            is as it was.
    """
    path, here = Path(path), transformer.config
    folder = _model_folder(path, "student")
    with contextlib.ExitStack() as stack:
        if folder is None:
            checkpoint = stack.enter_context(open_checkpoint(path, weights))
            _require_fit_but_classes(transformer, checkpoint, path)
            # Raises where the file contradicts ours
            config = checkpoint_config(path, checkpoint, here.heads, default_positions=here.positions)
        else:
            about = _read_config(folder)
            _require_same_codes(folder, about, tokenizer_hash)
            kinds = [kind for kind, name in WEIGHTS_FILES.items() if os.path.lexists(folder / name)]
            if weights and weights not in kinds:
                raise UserError(f"{folder}: holds no weights {shown(weights)}; it has {', '.join(kinds)}")
            checkpoint, _ = stack.enter_context(_open_weights(folder, weights or "student", about))
            _require_fit_but_classes(transformer, checkpoint, checkpoint.file.path)
            config, class_names_there = about.model, class_names_there or about.class_names
        file = checkpoint.file.path
        if config.heads != here.heads:
            raise UserError(
                f"{file}: model.heads is {config.heads} there and {here.heads} here; the weights cannot be used"
            )
        if class_names_there is not None and len(class_names_there) != config.num_classes:
            raise UserError(
                f"{file}: has {config.num_classes} classes, got {len(class_names_there)} names of them; give one "
                "name for each"
            )
        match = match_classes(file, config.num_classes, class_names_there, here.num_classes, class_names)
        stored = read_transformer(file, checkpoint, config)
    state = stored.state_dict()
    state[CLASS_TABLE] = match.table(transformer.state_dict()[CLASS_TABLE], state[CLASS_TABLE])
    transformer.load_state_dict(state)
    told = [match.told] if match.told else []
    if config.positions != here.positions:
        told.append(
            f"positions: trained with {config.positions}, here {here.positions}; the rotary table is computed anew"
        )
    return told


def _require_fit_but_classes(transformer: Transformer, checkpoint: Checkpoint, file: Path) -> None:
    """The weights' names and shapes are those of `transformer`, except perhaps for the number of classes."""
    weights, table = dict(checkpoint.weights), checkpoint.weights.get(CLASS_TABLE)
    if table is not None and table.ndim == 2:
        weights[CLASS_TABLE] = table._replace(shape=(transformer.config.num_classes + 1, table.shape[1]))
    require_fit(transformer, weights, file)


def _require_same_codes(folder: Path, about: _About, tokenizer_hash: str) -> None:
    trained_on = about.record.get("tokenizer_hash") or ""
    if tokenizer_hash and trained_on and trained_on != tokenizer_hash:
        raise UserError(
            f"{folder}: trained on codes of tokenizer {trained_on[:12]}, the code store here is of tokenizer "
            f"{tokenizer_hash[:12]}: the same "
            "code means another image patch; prepare the codes with star-fast prepare --tokenizer "
            f"{folder / TOKENIZER_FOLDER}"
        )


def _model_folder(path: str | Path, weights: str) -> Path | None:
    """The model folder that `path` means, or None for a LlamaGen file."""
    if weights not in WEIGHTS_FILES:
        raise UserError(f"weights: expected {' or '.join(WEIGHTS_FILES)}, got {weights!r}")
    path = Path(path)
    require_in_place(path, CONFIG_FILE)
    if not os.path.exists(path):  # of os.path: unlike Path.exists it raises for no name
        raise UserError(
            f"{path}: not found; expected a model folder (with {CONFIG_FILE}), a run folder or a LlamaGen file"
        )
    if os.path.isdir(path):
        if os.path.exists(path / CONFIG_FILE):
            return path
        require_in_place(path / "model", CONFIG_FILE)
        return path / "model" if os.path.exists(path / "model" / CONFIG_FILE) else path
    if path.name in WEIGHTS_FILES.values() and os.path.exists(path.parent / CONFIG_FILE):
        raise UserError(
            f"{path}: part of a model folder; give the folder {path.parent} (and weights student or teacher)"
        )
    if weights == "teacher":
        raise UserError(f"{path}: a LlamaGen file holds no teacher; use weights student")
    return None


def _read_config(folder: Path) -> _About:
    file = folder / CONFIG_FILE
    values = read_small_json(file, _HINT, _MOST_CONFIG_BYTES)
    if values.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{file}: expected format_version {FORMAT_VERSION}, got {shown(values.get('format_version'))}; not a "
            "model folder of this version"
        )
    about = to_record(values, file, _About, _HINT)
    to_record({"record": about.record}, file, _Recorded, _HINT, ignore_unknown=True)
    return about


@contextlib.contextmanager
def _open_weights(folder: Path, weights: str, about: _About) -> Iterator[tuple[Checkpoint, str]]:
    """A weights file, which must be the one that config.json names, and its sha256."""
    file = folder / WEIGHTS_FILES[weights]
    if not os.path.lexists(file):
        if weights == "teacher":
            raise UserError(
                f"{folder}: holds no teacher (no {file.name}): trained without one, or not saved; use weights student"
            )
        raise UserError(f"{file}: not found; a model folder holds {file.name} and {CONFIG_FILE}")
    with open_checkpoint(file) as checkpoint:
        if (sha256 := checkpoint.file.sha256()) != about.weights_sha256.get(weights):
            raise UserError(
                f"{file}: its sha256 is not the one in {CONFIG_FILE}: damaged, or files of two models mixed; copy "
                "the folder again or "
                "resume the run"
            )
        yield checkpoint, sha256

"""Our own model folders: weights in safetensors under LlamaGen's names, and a config.json that says what they are.

    model.safetensors     the student
    teacher.safetensors   the EMA teacher, where there is one
    config.json           ModelConfig, class names, sha256 of the weights, and the record of the run (method, step, images seen ...)
    tokenizer/            the VQ tokenizer that made the codes, where it is known

A folder is whole or absent: it is written beside its place, then renamed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from star_fast.config import ConfigError, ModelConfig
from star_fast.errors import UserError
from star_fast.model.llamagen import checkpoint_config, empty_transformer, load_strictly, load_transformer, read_checkpoint, require_fit, safetensors_bytes
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.transformer import Transformer
from star_fast.records import from_dict, to_dict
from star_fast.storage import StorageError, atomic_write_bytes, atomic_write_json, explain_write_errors, read_json, sha256_of_bytes, sha256_of_file, sync_folder

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
TOKENIZER_FOLDER = "tokenizer"
WEIGHTS_FILES = {"student": "model.safetensors", "teacher": "teacher.safetensors"}
_MEMBERS = {CONFIG_FILE, TOKENIZER_FOLDER, *WEIGHTS_FILES.values()}

Weights = Literal["student", "teacher"]


@dataclass(frozen=True)
class LoadedModel:
    """A model and what is known about it."""

    transformer: Transformer  # eval mode, CPU
    class_names: list[str]  # one a class; of a LlamaGen file, which has none, the class numbers
    tokenizer_folder: Path | None  # for VQTokenizer.load; None where the model came without one
    record: dict[str, Any]  # what save_model was given; empty for a LlamaGen file
    weights_sha256: str  # of the file that the weights were read from


def save_model(folder: str | Path, transformer: Transformer, *, class_names: Sequence[str], teacher: Transformer | Mapping[str, Tensor] | None = None,
               tokenizer: VQTokenizer | str | Path | None = None, record: Mapping[str, Any] | None = None) -> None:
    """Write a model folder, whole or not at all; an older model folder in its place is replaced.

    Args:
        folder: where to. What is there already must be a model folder, or empty.
        transformer: the student, any device; weights are stored in their dtype.
        class_names: one a class, in order of label.
        teacher: the EMA copy, or its weights under LlamaGen's names.
        tokenizer: the tokenizer or its folder.
        record: anything JSON can hold: method settings, step, images_seen, tokenizer hash ...

    Raises:
        ValueError: number of class names, or teacher's weights, do not fit. UserError: other files are in `folder`.
        StorageError: the disk is full, or the place cannot be written.
    """
    folder, config = Path(folder), transformer.config
    if len(class_names) != config.num_classes:
        raise ValueError(f"save_model: class_names must name {config.num_classes} classes, got {len(class_names)}")
    states = {"student": transformer.state_dict()}
    if teacher is not None:
        states["teacher"] = teacher.state_dict() if isinstance(teacher, Transformer) else dict(teacher)
        shapes, teacher_shapes = ({name: tuple(tensor.shape) for name, tensor in state.items()} for state in (states["student"], states["teacher"]))
        if shapes != teacher_shapes:
            differing = sorted(name for name in {*shapes, *teacher_shapes} if shapes.get(name) != teacher_shapes.get(name))
            raise ValueError(f"save_model: teacher must have the student's weights, names and shapes; differing: {', '.join(differing[:6])}")
    if tokenizer is not None and not isinstance(tokenizer, VQTokenizer):
        tokenizer = VQTokenizer.load(tokenizer)
    _refuse_foreign_files(folder)

    staging, replaced = (folder.with_name(f".{folder.name}.{os.getpid()}.{suffix}") for suffix in ("tmp", "old"))
    try:
        hashes = {}
        for name, state in states.items():
            data = safetensors_bytes(state, config)
            hashes[name] = sha256_of_bytes(data)
            atomic_write_bytes(staging / WEIGHTS_FILES[name], data)
        if tokenizer is not None:
            tokenizer.save(staging / TOKENIZER_FOLDER)
        atomic_write_json(staging / CONFIG_FILE, {"format_version": FORMAT_VERSION, "model": to_dict(config), "class_names": list(class_names),
                                                  "weights_sha256": hashes, "record": dict(record or {})})
        with explain_write_errors(folder):
            if folder.exists():
                os.rename(folder, replaced)
            try:
                os.rename(staging, folder)
            except OSError:
                if replaced.exists():
                    os.rename(replaced, folder)
                raise
            sync_folder(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def load_model(path: str | Path, *, weights: Weights = "student", dtype: torch.dtype | None = None) -> LoadedModel:
    """The model in a model folder, in a run folder (its model/), or in a LlamaGen file; eval mode, CPU.

    Args:
        path: folder or file.
        weights: "student" or "teacher".
        dtype: of the transformer's weights; None keeps the file's.

    Raises:
        UserError: something is missing, truncated, mixed up or of another size, or there is no teacher. One line.
    """
    folder = _model_folder(path, weights)
    if folder is None:
        return _load_released(Path(path), dtype)
    file = folder / WEIGHTS_FILES[weights]
    about, config = _read_config(folder)
    stored, sha256 = _read_weights(file, weights, about)
    transformer = empty_transformer(config, dtype or next(iter(stored.values())).dtype)
    load_strictly(transformer, stored, file)
    tokenizer_folder = folder / TOKENIZER_FOLDER
    return LoadedModel(transformer, about["class_names"], tokenizer_folder if tokenizer_folder.is_dir() else None, about["record"], sha256)


def load_into(transformer: Transformer, path: str | Path, *, weights: Weights = "student", tokenizer_hash: str = "") -> None:
    """Copy the weights at `path` (as for load_model) into `transformer`, casting to its dtype: how a run starts from given weights.

    `tokenizer_hash` names the tokenizer whose codes will be trained on; a model folder that names another one is refused.

    Raises:
        UserError: as load_model; or the weights know the codes of another tokenizer, are of another size (which tensor, expected and found
            shapes), or of another number of heads or positions.
    """
    config, folder = transformer.config, _model_folder(path, weights)
    if folder is None:
        file = Path(path)
        checkpoint = read_checkpoint(file)
        stored = checkpoint.weights
        require_fit(transformer, stored, file)
        found = checkpoint_config(file, checkpoint, config.heads, config.positions)  # raises where the file contradicts ours
    else:
        file = folder / WEIGHTS_FILES[weights]
        about, found = _read_config(folder)
        trained_on = about["record"].get("tokenizer_hash", "")
        if tokenizer_hash and trained_on and trained_on != tokenizer_hash:
            raise UserError(f"{folder}: trained on codes of tokenizer {trained_on[:12]}, the code store here is of tokenizer {tokenizer_hash[:12]}: the same "
                            f"code means another image patch; prepare the codes with star-fast prepare --tokenizer {folder / TOKENIZER_FOLDER}")
        stored, _ = _read_weights(file, weights, about)
        require_fit(transformer, stored, file)
    # Heads and positions leave no trace in the weights' shapes.
    for name in ("heads", "positions"):
        if getattr(found, name) != getattr(config, name):
            raise UserError(f"{file}: model.{name} is {getattr(found, name)} there and {getattr(config, name)} here; the weights cannot be used")
    load_strictly(transformer, stored, file)


def _model_folder(path: str | Path, weights: str) -> Path | None:
    """The model folder that `path` means, or None for a LlamaGen file."""
    if weights not in WEIGHTS_FILES:
        raise UserError(f"weights: expected {' or '.join(WEIGHTS_FILES)}, got {weights!r}")
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: not found; expected a model folder (with {CONFIG_FILE}), a run folder or a LlamaGen file")
    if path.is_dir():
        return path / "model" if not (path / CONFIG_FILE).exists() and (path / "model" / CONFIG_FILE).exists() else path
    if path.name in WEIGHTS_FILES.values() and (path.parent / CONFIG_FILE).exists():
        raise UserError(f"{path}: part of a model folder; give the folder {path.parent} (and weights student or teacher)")
    if weights == "teacher":
        raise UserError(f"{path}: a LlamaGen file holds no teacher; use weights student")
    return None


def _load_released(path: Path, dtype: torch.dtype | None) -> LoadedModel:
    transformer = load_transformer(path, dtype=dtype)
    return LoadedModel(transformer, [str(label) for label in range(transformer.config.num_classes)], None, {}, sha256_of_file(path))


def _read_config(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    file = folder / CONFIG_FILE
    try:
        about = read_json(file, "expected a model folder as a training run writes it")
        if about.get("format_version") != FORMAT_VERSION:
            raise UserError(f"{file}: expected format_version {FORMAT_VERSION}, got {about.get('format_version')!r}; it is not a model folder of this version")
        for name, kind in (("model", dict), ("class_names", list), ("weights_sha256", dict), ("record", dict)):
            if not isinstance(about.get(name), kind):
                raise UserError(f"{file}: expected {name!r} to be a {kind.__name__}, got {type(about.get(name)).__name__}")
        config = from_dict(ModelConfig, about["model"], "model.")
    except (StorageError, ConfigError) as error:
        raise UserError(str(error) if str(file) in str(error) else f"{file}: {error}") from error
    if len(about["class_names"]) != config.num_classes:
        raise UserError(f"{file}: expected {config.num_classes} class names (model.num_classes), got {len(about['class_names'])}")
    return about, config


def _read_weights(file: Path, weights: str, about: dict[str, Any]) -> tuple[dict[str, Tensor], str]:
    """The tensors and the sha256 of a weights file, which must be the one that config.json names."""
    if not file.exists():
        if weights == "teacher":
            raise UserError(f"{file.parent}: holds no teacher (no {file.name}): trained without one, or not saved; use weights student")
        raise UserError(f"{file}: not found; a model folder holds {file.name} and {CONFIG_FILE}")
    stored, sha256 = read_checkpoint(file).weights, sha256_of_file(file)
    if sha256 != about["weights_sha256"].get(weights):
        raise UserError(f"{file}: its sha256 is not the one in {CONFIG_FILE}: damaged, or files of two models mixed; copy the folder again or resume the run")
    return stored, sha256


def _refuse_foreign_files(folder: Path) -> None:
    """Replacing a folder removes what is in it: only files of a model may be."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file; expected a folder to save the model in")
    foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in _MEMBERS) if folder.exists() else []
    if foreign:
        raise UserError(f"{folder}: holds other files than a model's ({', '.join(foreign[:6])}); save the model in a folder of its own")

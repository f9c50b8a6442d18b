"""LlamaGen's released files in and out: strict, without running code from the file, and saying where each setting came
from.

A file is a dict whose weights sit under `model`, `module` or `state_dict`, or the bare state dict; .pt (of torch 1.6 or
newer, read by torch_files.py, argparse.Namespace allowed) or .safetensors. Names and sizes: method.md section 3.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from star_fast.config import ConfigError, ModelConfig
from star_fast.errors import UserError
from star_fast.model.bounded_file import BoundedFile, StoredTensor, shown
from star_fast.model.tensor_files import fill, hold, open_tensors, require_finite, require_fit, some
from star_fast.model.tokenizer import VQTokenizer, empty_tokenizer, tokenizer_config
from star_fast.model.torch_files import write_archive
from star_fast.model.transformer import Transformer
from star_fast.storage import atomic_write_bytes, atomic_writer, parse_json

log = logging.getLogger(__name__)

CLASS_TABLE = "cls_embedding.embedding_table.weight"
# Plain or DDP, DeepSpeed, others; FSDP files are bare. LlamaGen's own order
WRAPPERS = ("model", "module", "state_dict")
DEFAULT_POSITIONS = 256  # 256 px at downsampling 16
RELEASED_DOWNSAMPLING = 16
_MOST_ARGUMENT = 2**24  # of the whole numbers among LlamaGen's training arguments
# Positions x head size: sequences of 65536 codes at head size 64. No weight tells the positions, so no file's length
# bounds them
_MOST_ROTARY = 2**22


class Size(NamedTuple):
    """One row of LlamaGen's table of sizes."""

    blocks: int
    heads: int
    width: int


SIZES = {
    "B": Size(12, 12, 768),
    "L": Size(24, 16, 1024),
    "XL": Size(36, 20, 1280),
    "XXL": Size(48, 24, 1536),
    "XXXL": Size(48, 40, 2560),
    "1B": Size(22, 32, 2048),
    "3B": Size(24, 32, 3200),
    "7B": Size(32, 32, 4096),
}
_HEADS_BY_WIDTH = {size.width: size.heads for size in SIZES.values()}
_FILE_NAME = re.compile(r"(?:^|[^A-Za-z0-9])c2i_(\w+?)_([0-9]{1,5})(?:$|[^0-9])")
_LAYER = re.compile(r"layers\.([0-9]{1,4})\.")


class Checkpoint(NamedTuple):
    """What a file describes: weights under LlamaGen's names and where they lie, the shape of `freqs_cis` if that was
    there, the training arguments if any.
    """

    weights: Mapping[str, StoredTensor]
    freqs_cis: tuple[int, ...] | None
    args: dict[Any, Any]
    file: BoundedFile


def load_transformer(
    path: str | Path, *, heads: int | None = None, positions: int | None = None, dtype: torch.dtype | None = None
) -> Transformer:
    """The transformer in a LlamaGen file, in eval mode on the CPU.

    Heads and positions are not told by the weights' shapes. They come from: the argument, the shape of `freqs_cis`, the
    file's `args`, its name (c2i_SIZE_PIXELS), the table of widths and T = 256, in this order; the source is logged. All
    but the last must agree.

    Args:
        path: .pt, .pth or .safetensors.
        heads, positions: H and T, where the file cannot say or to make sure.
        dtype: of the weights; None keeps the file's.

    Raises:
        UserError: no such file, damaged, not a class-conditional LlamaGen transformer, weights that differ in name or
            shape (listed) or are not finite, or sources that contradict each other.
    """
    path = Path(path)
    with open_checkpoint(path) as checkpoint:
        return read_transformer(path, checkpoint, checkpoint_config(path, checkpoint, heads, positions), dtype)


def save_transformer(model: Transformer, path: str | Path) -> None:
    """Write the weights so that LlamaGen's code and `load_transformer` read them: .safetensors, or else a torch file
    with the weights under `model`.

    Heads and positions go along (under `args`, or in the safetensors header), in plain types that need no allow-list.

    Raises:
        UserError: weights that are not finite. StorageError: the disk is full or the place cannot be written. The old
            file, if any, stays.
    """
    path = Path(path)
    require_finite(model.state_dict(), f"{path}: not saved")
    if path.suffix == ".safetensors":
        atomic_write_bytes(path, safetensors_bytes(model.state_dict(), model.config))
        return
    weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    with atomic_writer(path) as file:
        write_archive({"model": weights, "args": _args(model.config)}, file)


def load_tokenizer(path: str | Path, *, image_size: int = 256) -> VQTokenizer:
    """The VQ tokenizer in a LlamaGen file (its shape is read off the weights) or in a tokenizer folder of this project;
    eval mode, CPU.

    Args:
        path: .pt or .safetensors file, or folder.
        image_size: pixels a side, of files only: the weights fit any size, so this only fills
            TokenizerConfig.image_size.

    Raises:
        UserError: no such file, damaged, or not the weights of a VQ tokenizer (differences listed). StorageError: a
            damaged folder.
    """
    path = Path(path)
    if os.path.isdir(path):  # of os.path: unlike Path.is_dir it raises for no name
        return VQTokenizer.load(path)
    with open_checkpoint(path) as checkpoint:
        weights = {name: tensor for name, tensor in checkpoint.weights.items() if name != "quantize.codebook_used"}
        tokenizer = empty_tokenizer(tokenizer_config(weights, path, image_size=image_size), weights, path)
        fill(tokenizer, weights, checkpoint.file)
    return tokenizer


@contextlib.contextmanager
def open_checkpoint(path: Path, wanted: str = "") -> Iterator[Checkpoint]:
    """Open a file and read what it describes, without running code from it.

    Args:
        wanted: what the weights sit under, say "ema", which LlamaGen's training keeps beside "model"; "": the first of
            WRAPPERS, or the file is bare.

    Raises:
        UserError: missing, damaged, unsafe, or without weights, or without those that are wanted.
    """
    with open_tensors(path, "expected a LlamaGen checkpoint (.pt or .safetensors)") as opened:
        content = opened.content
        if not isinstance(content, Mapping):
            raise UserError(
                f"{path}: expected a dict of weights, got {type(content).__name__}; is it a LlamaGen checkpoint?"
            )
        if wanted:
            held = [key for key, value in content.items() if isinstance(key, str) and _are_weights(value)]
            if wanted not in held:
                raise UserError(
                    f"{path}: holds no weights {shown(wanted)}; it has "
                    + (some(held) if held else "weights without a name" if _are_weights(content) else "none")
                )
        weights = (
            content[wanted]
            if wanted
            else next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
        )
        if not _are_weights(weights):
            raise UserError(
                f"{path}: expected tensors by name, bare or under {', '.join(map(repr, WRAPPERS))}; found "
                f"{some([str(name) for name in weights])}"
            )
        weights = dict(weights)
        if sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in weights.values()) > opened.file.size:
            raise UserError(f"{path}: its tensors together say to hold more than the file; copy or download it again")
        freqs_cis = weights.pop("freqs_cis", None)
        args = _json_args(path, opened.metadata["args"]) if "args" in opened.metadata else content.get("args")
        args = vars(args) if isinstance(args, argparse.Namespace) else dict(args) if isinstance(args, Mapping) else {}
        yield Checkpoint(weights, None if freqs_cis is None else freqs_cis.shape, args, opened.file)


def checkpoint_config(
    path: Path,
    checkpoint: Checkpoint,
    heads: int | None = None,
    positions: int | None = None,
    *,
    default_positions: int = DEFAULT_POSITIONS,
) -> ModelConfig:
    """The sizes of the transformer in a file, from the sources that `load_transformer` names; T is `default_positions`
    where none tells it.

    Raises UserError when they are missing or contradict.
    """
    weights, args = checkpoint.weights, checkpoint.args
    kind = args.get("gpt_type", "c2i")
    if any(name.startswith("cls_embedding.cap_proj") for name in weights) or (isinstance(kind, str) and kind != "c2i"):
        raise UserError(f"{path}: a text-conditional LlamaGen model; only class-conditional ones (c2i) can be loaded")
    for name in ("tok_embeddings.weight", CLASS_TABLE, "layers.0.attention.wqkv.weight"):
        if name not in weights or weights[name].ndim != 2:
            raise UserError(
                f"{path}: expected the weights of a LlamaGen transformer, but the matrix {name!r} is not among "
                f"them; found {some(weights)}"
            )
    vocab, width = weights["tok_embeddings.weight"].shape
    num_classes = weights[CLASS_TABLE].shape[0] - 1
    numbers = {int(match[1]) for name in weights if (match := _LAYER.match(name))}
    blocks = len(numbers)
    if max(numbers) != blocks - 1:
        absent = min(set(range(blocks)) - numbers)
        raise UserError(
            f"{path}: expected blocks numbered without a gap, found layers.{max(numbers)} but nothing of "
            f"layers.{absent}"
        )

    told: list[tuple[str, Mapping[str, int | None]]] = [
        ("the argument", {"heads": heads, "positions": positions}),
        ("the shape of freqs_cis", _told_by_freqs_cis(path, checkpoint.freqs_cis, width)),
        ("the file's args", _told_by_args(path, args)),
        ("the file's name", _told_by_name(path.name)),
    ]
    sizes = {"blocks": blocks, "width": width, "vocab": vocab, "num_classes": num_classes}
    agreed: dict[str, tuple[int, str]] = {}
    for source, claims in (("the weights' shapes", sizes), *told):
        for name, value in claims.items():
            first, first_source = agreed.setdefault(name, (value, source)) if value is not None else (None, "")
            if first != value:
                raise UserError(
                    f"{path}: {first_source} and {source} contradict each other: {name} {first} against {value}"
                )
    if "heads" not in agreed:
        if width not in _HEADS_BY_WIDTH:
            raise UserError(
                f"{path}: nothing tells the number of heads of a model of width {width}; give heads: "
                "load_transformer(path, heads=...)"
            )
        agreed["heads"] = (_HEADS_BY_WIDTH[width], "LlamaGen's table of widths")
    agreed.setdefault(
        "positions",
        (default_positions, "LlamaGen's default" if default_positions == DEFAULT_POSITIONS else "the default given"),
    )
    for name in ("heads", "positions"):
        log.info("%s: %s %d, from %s", path, name, *agreed[name])
    for name, least in (("positions", 1), ("vocab", 1), ("num_classes", 1)):
        if agreed[name][0] < least:
            raise UserError(f"{path}: {name} must be {least} or more, got {agreed[name][0]} from {agreed[name][1]}")
    if math.isqrt(agreed["positions"][0]) ** 2 != agreed["positions"][0]:
        raise UserError(
            f"{path}: positions must be a square number, got {agreed['positions'][0]} from {agreed['positions'][1]}"
        )
    try:
        return ModelConfig(
            blocks=blocks,
            heads=agreed["heads"][0],
            width=width,
            vocab=vocab,
            positions=agreed["positions"][0],
            num_classes=num_classes,
        )
    except ConfigError as error:
        raise UserError(f"{path}: not a LlamaGen transformer: {error}") from error


def read_transformer(
    source: str | Path, checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype | None = None
) -> Transformer:
    """The transformer of an open file, in eval mode on the CPU. Memory is taken only once everything is known to fit.

    Raises:
        UserError: the weights are not exactly those that `config` asks for (what differs is listed), or not finite.
    """
    if config.positions * config.head_size > _MOST_ROTARY:
        raise UserError(
            f"{source}: {config.positions:,} positions at head size {config.head_size} are more than any model "
            "has; expected at most "
            f"{_MOST_ROTARY // config.head_size:,}"
        )
    # Not even one tensor each: a thousand blocks take a second to build, in memory or not
    if config.blocks > len(checkpoint.weights):
        raise UserError(
            f"{source}: expected the weights of {config.blocks} blocks, found {len(checkpoint.weights)} tensors"
        )
    with torch.device("meta"):
        transformer = Transformer(config)
    require_fit(transformer, checkpoint.weights, source)
    transformer = hold(transformer, dtype or checkpoint.weights["tok_embeddings.weight"].dtype, source)
    fill(transformer, checkpoint.weights, checkpoint.file)
    return transformer


def safetensors_bytes(weights: Mapping[str, Tensor], config: ModelConfig) -> bytes:
    """A safetensors file of transformer weights, with what their shapes don't tell in its header."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    # One entry: safetensors writes several in random order, and the same weights should make the same file.
    return safetensors.torch.save(tensors, metadata={"args": json.dumps(_args(config))})


def _are_weights(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(isinstance(name, str) and isinstance(value, StoredTensor) for name, value in content.items())
    )


def _json_args(path: Path, text: str) -> dict[str, Any]:
    try:
        args = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path}: expected the args in its header to be JSON ({error}); save the file again") from error
    if not isinstance(args, dict):
        raise UserError(
            f"{path}: expected the args in its header to be a JSON object, got {type(args).__name__}; save the "
            "file again"
        )
    return args


def _told_by_freqs_cis(path: Path, shape: tuple[int, ...] | None, width: int) -> dict[str, int]:
    """(T + 1, E/2, 2): the class position, then the grid of T."""
    if shape is None:
        return {}
    if len(shape) != 3 or shape[2] != 2 or shape[1] < 1 or width % (2 * shape[1]):
        raise UserError(
            f"{path}: freqs_cis must be (T + 1, E/2, 2) with a head size E that divides the width {width}, got {shape}"
        )
    return {"heads": width // (2 * shape[1]), "positions": shape[0] - 1}


def _told_by_args(path: Path, args: Mapping[Any, Any]) -> dict[str, int]:
    """LlamaGen's training arguments; `n_head` and `block_size` (its ModelArgs' names) are what `save_transformer` adds
    for sizes outside its table.
    """
    for name in ("gpt_model", "gpt_type"):
        if not isinstance(args.get(name, ""), (str, type(None))):
            raise UserError(f"{path}: args.{name}: expected text, got {shown(args[name])}")
    numbers = {}
    for name in ("n_head", "block_size", "vocab_size", "num_classes", "image_size", "downsample_size"):
        if args.get(name) is not None:
            if type(args[name]) is not int or not 1 <= args[name] <= _MOST_ARGUMENT:
                raise UserError(
                    f"{path}: args.{name}: expected a whole number in 1 ... {_MOST_ARGUMENT}, got {shown(args[name])}"
                )
            numbers[name] = args[name]
    names = {"heads": "n_head", "positions": "block_size", "vocab": "vocab_size", "num_classes": "num_classes"}
    claims = _told_by_size((args.get("gpt_model") or "").removeprefix("GPT-")) | {
        ours: numbers[theirs] for ours, theirs in names.items() if theirs in numbers
    }
    if "positions" not in claims and "image_size" in numbers and "downsample_size" in numbers:
        claims["positions"] = (numbers["image_size"] // numbers["downsample_size"]) ** 2
    return claims


def _told_by_name(name: str) -> dict[str, int]:
    match = _FILE_NAME.search(Path(name).stem)
    if match is None or match[1] not in SIZES:
        return {}
    return _told_by_size(match[1]) | {"positions": (int(match[2]) // RELEASED_DOWNSAMPLING) ** 2}


def _told_by_size(size: str) -> dict[str, int]:
    return SIZES[size]._asdict() if size in SIZES else {}


def _args(config: ModelConfig) -> dict[str, int | str]:
    named = {f"GPT-{name}" for name, size in SIZES.items() if size == Size(config.blocks, config.heads, config.width)}
    return {
        **({"gpt_model": named.pop()} if named else {}),
        "gpt_type": "c2i",
        "cls_token_num": 1,
        "n_head": config.heads,
        "block_size": config.positions,
        "vocab_size": config.vocab,
        "num_classes": config.num_classes,
    }

"""LlamaGen's released files in and out: strict, without running code from the file, and saying where each setting came from.

A file is a dict whose weights sit under `model`, `module` or `state_dict`, or the bare state dict; .pt (read with weights_only=True,
argparse.Namespace allowed) or .safetensors. Names and sizes: method.md section 3.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from star_fast.config import ConfigError, ModelConfig, TokenizerConfig
from star_fast.errors import UserError
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.transformer import Transformer
from star_fast.storage import atomic_write_bytes, atomic_writer

log = logging.getLogger(__name__)

WRAPPERS = ("model", "module", "state_dict")  # plain or DDP, DeepSpeed, others; FSDP files are bare. LlamaGen's own order
DEFAULT_POSITIONS = 256  # 256 px at downsampling 16
RELEASED_DOWNSAMPLING = 16
_NAMES_SHOWN = 6  # of each list in an error line


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
_FILE_NAME = re.compile(r"(?:^|[^A-Za-z0-9])c2i_(\w+?)_(\d+)(?:$|[^0-9])")


class Checkpoint(NamedTuple):
    """What a file holds: its weights under LlamaGen's names, the shape of `freqs_cis` if that was there, and the training arguments if any."""

    weights: dict[str, Tensor]
    freqs_cis: tuple[int, ...] | None
    args: dict[str, Any]


def load_transformer(path: str | Path, *, heads: int | None = None, positions: int | None = None, dtype: torch.dtype | None = None) -> Transformer:
    """The transformer in a LlamaGen file, in eval mode on the CPU.

    Heads and positions are not told by the weights' shapes. They come from: the argument, the shape of `freqs_cis`, the file's `args`, its
    name (c2i_SIZE_PIXELS), the table of widths and T = 256, in this order; the source is logged. All but the last must agree.

    Args:
        path: .pt, .pth or .safetensors.
        heads, positions: H and T, where the file cannot say or to make sure.
        dtype: of the weights; None keeps the file's.

    Raises:
        UserError: no such file, damaged, not a class-conditional LlamaGen transformer, weights that differ in name or shape (listed), or
            sources that contradict each other.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    config = checkpoint_config(path, checkpoint, heads, positions)
    transformer = empty_transformer(config, dtype or checkpoint.weights["tok_embeddings.weight"].dtype)
    load_strictly(transformer, checkpoint.weights, path)
    return transformer


def save_transformer(model: Transformer, path: str | Path) -> None:
    """Write the weights so that LlamaGen's code and `load_transformer` read them: .safetensors, or else a torch file with the weights under `model`.

    Heads and positions go along (under `args`, or in the safetensors header), in plain types that need no allow-list.

    Raises:
        StorageError: the disk is full or the place cannot be written; the old file, if any, stays.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        atomic_write_bytes(path, safetensors_bytes(model.state_dict(), model.config))
        return
    weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    with atomic_writer(path) as file:
        torch.save({"model": weights, "args": _args(model.config)}, file)


def load_tokenizer(path: str | Path, *, image_size: int = 256) -> VQTokenizer:
    """The VQ tokenizer in a LlamaGen file (its shape is read off the weights) or in a tokenizer folder of this project; eval mode, CPU.

    Args:
        path: .pt or .safetensors file, or folder.
        image_size: pixels a side, of files only: the weights fit any size, so this only fills TokenizerConfig.image_size.

    Raises:
        UserError: no such file, damaged, or not the weights of a VQ tokenizer (differences listed). StorageError: a damaged folder.
    """
    path = Path(path)
    if path.is_dir():
        return VQTokenizer.load(path)
    weights = {name: tensor for name, tensor in read_checkpoint(path).weights.items() if name != "quantize.codebook_used"}
    try:
        config = _tokenizer_config(weights, image_size)
    except KeyError as error:
        raise UserError(f"{path}: expected the weights of a LlamaGen VQ tokenizer, but {error.args[0]!r} is not among them; found {_some(weights)}") from error
    except ConfigError as error:
        raise UserError(f"{path}: not the weights of a LlamaGen VQ tokenizer: {error}") from error
    tokenizer = VQTokenizer(config).to(weights["quantize.embedding.weight"].dtype)
    load_strictly(tokenizer, weights, path)
    return tokenizer.eval()


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file without running code from it. Raises UserError: missing, damaged, unsafe, or without weights."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a LlamaGen checkpoint (.pt or .safetensors)")
    content, args = _read_safetensors(path) if path.suffix == ".safetensors" else (_read_torch(path), None)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: expected a dict of weights, got {type(content).__name__}; is it a LlamaGen checkpoint?")
    args = content.get("args") if args is None else args
    weights = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not weights or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()):
        raise UserError(f"{path}: expected tensors by name, bare or under {', '.join(map(repr, WRAPPERS))}; found {_some(map(str, weights))}")
    weights = dict(weights)
    freqs_cis = weights.pop("freqs_cis", None)
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, Mapping) else {}
    return Checkpoint(weights, None if freqs_cis is None else tuple(freqs_cis.shape), dict(args))


def checkpoint_config(path: Path, checkpoint: Checkpoint, heads: int | None = None, positions: int | None = None) -> ModelConfig:
    """The sizes of the transformer in a file, from the sources that `load_transformer` names. Raises UserError when they are missing or contradict."""
    weights, args = checkpoint.weights, checkpoint.args
    if any(name.startswith("cls_embedding.cap_proj") for name in weights) or args.get("gpt_type", "c2i") != "c2i":
        raise UserError(f"{path}: a text-conditional LlamaGen model; only class-conditional ones (c2i) can be loaded")
    for name in ("tok_embeddings.weight", "cls_embedding.embedding_table.weight", "layers.0.attention.wqkv.weight"):
        if name not in weights or weights[name].ndim != 2:
            raise UserError(f"{path}: expected the weights of a LlamaGen transformer, but the matrix {name!r} is not among them; found {_some(weights)}")
    vocab, width = weights["tok_embeddings.weight"].shape
    num_classes = len(weights["cls_embedding.embedding_table.weight"]) - 1
    blocks = 1 + max(int(match[1]) for name in weights if (match := re.match(r"layers\.(\d+)\.", name)))

    told = [("the argument", {"heads": heads, "positions": positions}), ("the shape of freqs_cis", _told_by_freqs_cis(path, checkpoint.freqs_cis, width)),
            ("the file's args", _told_by_args(args)), ("the file's name", _told_by_name(path.name))]
    shapes = ("the weights' shapes", {"blocks": blocks, "width": width, "vocab": vocab, "num_classes": num_classes})
    agreed: dict[str, tuple[int, str]] = {}
    for source, claims in (shapes, *told):
        for name, value in claims.items():
            first, first_source = agreed.setdefault(name, (value, source)) if value is not None else (None, "")
            if first != value:
                raise UserError(f"{path}: {first_source} and {source} contradict each other: {name} {first} against {value}")
    if "heads" not in agreed:
        if width not in _HEADS_BY_WIDTH:
            raise UserError(f"{path}: nothing tells the number of heads of a model of width {width}; give heads: load_transformer(path, heads=...)")
        agreed["heads"] = (_HEADS_BY_WIDTH[width], "LlamaGen's table of widths")
    agreed.setdefault("positions", (DEFAULT_POSITIONS, "LlamaGen's default"))
    for name in ("heads", "positions"):
        log.info("%s: %s %d, from %s", path, name, *agreed[name])
    if math.isqrt(agreed["positions"][0]) ** 2 != agreed["positions"][0]:
        raise UserError(f"{path}: positions must be a square number, got {agreed['positions'][0]} from {agreed['positions'][1]}")
    try:
        return ModelConfig(blocks=blocks, heads=agreed["heads"][0], width=width, vocab=vocab, positions=agreed["positions"][0], num_classes=num_classes)
    except ConfigError as error:
        raise UserError(f"{path}: not a LlamaGen transformer: {error}") from error


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy `weights` into `module` (casting to its dtype), all or none. Raises UserError as `require_fit` does."""
    require_fit(module, weights, source)
    module.load_state_dict(weights)


def require_fit(module: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Raises UserError, in one line that lists what is of another shape, missing or unexpected, unless `weights` are exactly the module's."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in expected]
    reshaped = [f"{name}: expected {shape}, found {tuple(weights[name].shape)}" for name, shape in expected.items()
                if name in weights and tuple(weights[name].shape) != shape]
    differences = [f"{what} {_some(names, '; ')}" for what, names in (("other shapes:", reshaped), ("missing:", missing), ("unexpected:", unexpected)) if names]
    if differences:
        raise UserError(f"{source}: these weights are not of the model that was expected; {' | '.join(differences)}")


def empty_transformer(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    """A transformer in eval mode whose weights are yet to be written (no time is spent on drawing initial ones)."""
    with torch.device("meta"):
        transformer = Transformer(config)
    return transformer.to(dtype).to_empty(device="cpu").eval()


def safetensors_bytes(weights: Mapping[str, Tensor], config: ModelConfig) -> bytes:
    """A safetensors file of transformer weights, with what their shapes don't tell in its header."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    # One entry: safetensors writes several in random order, and the same weights should make the same file.
    return safetensors.torch.save(tensors, metadata={"args": json.dumps(_args(config))})


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        foreign = re.search(r"Unsupported (?:global|class|operand)[^.]*?: (?:GLOBAL )?([\w.]+)", str(error))
        if foreign:
            raise UserError(f"{path}: holds {foreign[1]}, which is neither tensor nor plain data; such files can run code and are not loaded") from error
        raise UserError(f"{path}: not a torch checkpoint; expected LlamaGen weights (.pt or .safetensors)") from error
    except Exception as error:  # anything can come of garbage that is read as a pickle
        raise UserError(f"{path}: truncated or not a torch checkpoint ({_first_line(error)}); copy or download it again") from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata.get("args", "{}"))  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: truncated or not a safetensors file ({_first_line(error)}); copy or download it again") from error


def _told_by_freqs_cis(path: Path, shape: tuple[int, ...] | None, width: int) -> dict[str, int]:
    """(T + 1, E/2, 2): the class position, then the grid of T."""
    if shape is None:
        return {}
    if len(shape) != 3 or shape[2] != 2 or shape[1] < 1 or width % (2 * shape[1]):
        raise UserError(f"{path}: freqs_cis must be (T + 1, E/2, 2) with a head size E that divides the width {width}, got {shape}")
    return {"heads": width // (2 * shape[1]), "positions": shape[0] - 1}


def _told_by_args(args: dict[str, Any]) -> dict[str, int]:
    """LlamaGen's training arguments; `n_head` and `block_size` (its ModelArgs' names) are what `save_transformer` adds for sizes outside its table."""
    claims = dict(_told_by_size(str(args.get("gpt_model", "")).removeprefix("GPT-")))
    names = {"heads": "n_head", "positions": "block_size", "vocab": "vocab_size", "num_classes": "num_classes"}
    claims |= {ours: args[theirs] for ours, theirs in names.items() if theirs in args}
    if "positions" not in claims and "image_size" in args and "downsample_size" in args:
        claims["positions"] = (args["image_size"] // args["downsample_size"]) ** 2
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
    return {**({"gpt_model": named.pop()} if named else {}), "gpt_type": "c2i", "cls_token_num": 1, "n_head": config.heads, "block_size": config.positions,
            "vocab_size": config.vocab, "num_classes": config.num_classes}


def _tokenizer_config(weights: Mapping[str, Tensor], image_size: int) -> TokenizerConfig:
    """The shape of a VQ tokenizer, from its weights. Raises KeyError: a weight that it is read off is not there; ConfigError: a contradiction."""
    channels = {name: tuple(weights[name].shape) for name in ("encoder.conv_in.weight", "encoder.conv_out.weight", "quantize.embedding.weight")}
    base, image_channels = channels["encoder.conv_in.weight"][:2]
    blocks = [(int(m[1]), int(m[2])) for name in weights if (m := re.fullmatch(r"encoder\.conv_blocks\.(\d+)\.res\.(\d+)\.conv1\.weight", name))]
    if not blocks:
        raise KeyError("encoder.conv_blocks.0.res.0.conv1.weight")
    widths = [len(weights[f"encoder.conv_blocks.{level}.res.0.conv1.weight"]) for level in range(1 + max(level for level, _ in blocks))]
    if any(width % base for width in widths):
        raise ConfigError(f"the widths of its levels, {widths}, must be multiples of the first convolution's {base}")
    codebook, code_channels = channels["quantize.embedding.weight"]
    return TokenizerConfig(base_channels=base, multipliers=tuple(width // base for width in widths), residual_blocks=1 + max(block for _, block in blocks),
                           z_channels=channels["encoder.conv_out.weight"][0], code_channels=code_channels, codebook=codebook,
                           image_channels=image_channels, image_size=image_size)


def _some(names: Any, separator: str = ", ") -> str:
    """The first few names, and how many more."""
    names = list(names)
    return (separator.join(names[:_NAMES_SHOWN]) or "nothing") + (f"{separator}and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else "")


def _first_line(error: Exception) -> str:
    """What went wrong, without the advice that libraries add to it."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0].split('. ')[0][:150]}" if str(error).strip() else type(error).__name__

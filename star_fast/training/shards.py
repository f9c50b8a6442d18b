"""A run's state as plain safetensors: what each rank holds, and the same put together for any number of ranks.

As saved: `optimizer-R.safetensors` (rank R's float32 masters and AdamW's moments, by shard) and
`teacher-R.safetensors`. Each names in its metadata which elements of which parameters its shards hold. Put together:
one file a kind, whole tensors by parameter name, which any layout can be filled from.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from star_fast.errors import UserError
from star_fast.storage import explain_write_errors, require_regular
from star_fast.training.engine import Engine
from star_fast.training.masters import Piece, Shard

DAMAGED = "the checkpoint is damaged: remove this folder to resume from the one before"
MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"  # how many steps AdamW has taken
# Kind put together: which files it comes from
_WHOLE = {"master": "optimizer", "exp_avg": "optimizer", "exp_avg_sq": "optimizer", "teacher": "teacher"}


def save(engine: Engine, folder: Path) -> None:
    """Write this rank's files; whole tensors are rank 0's to write."""
    if not engine.masters.sharded and engine.rank:
        return
    shards, optimizer = engine.masters.shards(), engine.deepspeed.basic_optimizer
    tensors: dict[str, Tensor] = {}
    for index, shard in enumerate(shards):
        state = _state(optimizer, shard.tensor)
        tensors |= {
            f"{index}.master": shard.tensor.detach(),
            f"{index}.{STEP}": torch.as_tensor(state[STEP], dtype=torch.float32),
        }
        tensors |= {f"{index}.{moment}": state[moment] for moment in MOMENTS}
    shapes = {name: list(shape) for name, shape in engine.masters.shapes().items()}
    _write(tensors, _file(folder, "optimizer", engine), shards, shapes)
    if engine.teacher is not None:
        shards = engine.masters.teacher_shards(engine.teacher)
        _write(
            {f"{index}.teacher": shard.tensor for index, shard in enumerate(shards)},
            _file(folder, "teacher", engine),
            shards,
            shapes,
        )


def read(engine: Engine, folder: Path, whole: bool) -> Callable[[], None]:
    """Read what this rank needs and check its names, shapes and dtypes; returns what puts it in place (see also
    engine.publish).

    Args:
        whole: the folder's files are put together; else they are this very layout's.

    Raises:
        UserError: a file is missing, damaged or another layout's.
    """
    shards, optimizer = engine.masters.shards(), engine.deepspeed.basic_optimizer
    teachers = engine.masters.teacher_shards(engine.teacher) if engine.teacher is not None else []
    fill = _from_whole if whole else _from_own
    masters = fill(engine, folder, "optimizer", shards, ("master", *MOMENTS, STEP))
    averages = fill(engine, folder, "teacher", teachers, ("teacher",)) if teachers else []

    def put() -> None:
        with torch.no_grad():
            for shard, found in zip(shards, masters, strict=True):
                shard.tensor.data.copy_(found["master"])
                _set_state(optimizer, shard.tensor, found)
            for shard, found in zip(teachers, averages, strict=True):
                shard.tensor.copy_(found["teacher"])

    return put


def put_together(source: Path, target: Path) -> list[str]:
    """Write the whole tensors of `source`, a checkpoint's folder, into `target`, one kind at a time; returns the files'
    names.

    Raises:
        UserError: a file is missing or damaged, or the files do not cover a parameter. StorageError: the disk is full.
    """
    names = []
    for kind, prefix in _WHOLE.items():
        files = sorted(source.glob(f"{prefix}-*.safetensors"))
        if files:
            with ExitStack() as stack:
                opened = [stack.enter_context(_open(file)) for file in files]
                try:
                    tensors = _joined(opened, files, kind)
                    if kind == "master":
                        tensors[STEP] = opened[0].get_tensor(f"0.{STEP}")
                except (SafetensorError, RuntimeError, KeyError) as error:
                    # A missing tensor, one of another size, a shape that fits no memory
                    raise UserError(
                        f"{source}: its {prefix} files do not fit together "
                        f"({' '.join(str(error).split())[:120]}); {DAMAGED}"
                    ) from error
                names.append(f"{kind}.safetensors")
                _save(tensors, target / names[-1], None)
    return names


def _joined(opened: list[Any], files: list[Path], kind: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    covered: dict[str, int] = {}
    for file, path in zip(opened, files, strict=True):
        layout, shapes = _layout(file, path)
        for name, shape in shapes.items():
            tensors.setdefault(name, torch.empty(shape, dtype=torch.float32))
        for index, pieces in enumerate(layout):
            flat = file.get_tensor(f"{index}.{kind}").view(-1)
            for name, first, count, place in pieces:
                tensors[name].view(-1)[first : first + count] = flat[place : place + count]
                covered[name] = covered.get(name, 0) + count
    for name, whole in tensors.items():
        if covered.get(name, 0) != whole.numel():
            raise UserError(
                f"{files[0].parent}: {covered.get(name, 0)} of {whole.numel()} elements of {name} are there; {DAMAGED}"
            )
    return tensors


def _layout(file: Any, path: Path) -> tuple[list[list[tuple[str, int, int, int]]], dict[str, list[int]]]:
    """Pieces by shard, and the whole parameters' shapes, from a file's metadata."""
    try:
        found = json.loads((file.metadata() or {})["layout"])
        shapes = {str(name): [int(size) for size in shape] for name, shape in found["shapes"].items()}
        layout = [
            [(str(name), int(first), int(count), int(place)) for name, first, count, place in pieces]
            for pieces in found["shards"]
        ]
        for name, first, count, place in (piece for pieces in layout for piece in pieces):
            if min(first, count, place) < 0 or first + count > math.prod(shapes[name]):
                raise ValueError(name)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: its metadata do not say what its shards hold; {DAMAGED}") from error
    return layout, shapes


def _from_own(
    engine: Engine, folder: Path, prefix: str, shards: list[Shard], kinds: Iterable[str]
) -> list[dict[str, Tensor]]:
    path = _file(folder, prefix, engine)
    require_regular(path, DAMAGED)
    try:
        saved = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated or not a safetensors file; {DAMAGED}") from error
    wanted = {
        f"{index}.{kind}": torch.Size() if kind == STEP else shard.tensor.shape
        for index, shard in enumerate(shards)
        for kind in kinds
    }
    if saved.keys() != wanted.keys():
        raise UserError(f"{path}: expected {len(wanted)} tensors, it holds {len(saved)} or others; {DAMAGED}")
    for name, shape in wanted.items():
        if saved[name].shape != shape or saved[name].dtype != torch.float32:
            raise UserError(
                f"{path}: tensor {name} should be torch.float32 {tuple(shape)}, it is {saved[name].dtype} "
                f"{tuple(saved[name].shape)}; {DAMAGED}"
            )
    return [{kind: saved[f"{index}.{kind}"] for kind in kinds} for index in range(len(shards))]


def _from_whole(
    engine: Engine, folder: Path, prefix: str, shards: list[Shard], kinds: Iterable[str]
) -> list[dict[str, Tensor]]:
    shapes = engine.masters.shapes()
    filled: list[dict[str, Tensor]] = [{} for _ in shards]
    for kind in (kind for kind in kinds if kind != STEP):
        path = folder / f"{kind}.safetensors"
        with _open(path) as file:
            names = set(file.keys())
            for shard, found in zip(shards, filled, strict=True):
                found[kind] = torch.zeros(shard.tensor.numel(), dtype=torch.float32)
                for piece in shard.pieces:
                    found[kind][piece.place : piece.place + piece.length] = _part(
                        file, path, names, piece, shapes[piece.name]
                    )
                found[kind] = found[kind].view(shard.tensor.shape)
            if kind == "master":
                if STEP not in names:
                    raise UserError(f"{path}: tensor {STEP} is missing; {DAMAGED}")
                step = file.get_tensor(STEP)
                for found in filled:
                    found[STEP] = step
    return filled


def _part(file: Any, path: Path, names: set[str], piece: Piece, shape: torch.Size) -> Tensor:
    found = file.get_slice(piece.name) if piece.name in names else None
    if found is None or list(found.get_shape()) != list(shape) or found.get_dtype() != "F32":
        is_there = "is missing" if found is None else f"is {found.get_dtype()} {tuple(found.get_shape())}"
        raise UserError(f"{path}: tensor {piece.name} should be F32 {tuple(shape)}, it {is_there}; {DAMAGED}")
    return (
        file.get_tensor(piece.name).view(-1)[piece.first : piece.first + piece.length]
        if piece.length
        else torch.empty(0)
    )


def _state(optimizer: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Any]:
    state = optimizer.state[tensor]
    return state if STEP in state else {**state, STEP: _group(optimizer, tensor)[STEP]}  # apex counts by group


def _set_state(optimizer: torch.optim.Optimizer, tensor: Tensor, found: dict[str, Tensor]) -> None:
    state = optimizer.state[tensor]
    for moment in MOMENTS:
        if moment in state:
            state[moment].copy_(found[moment])
        else:
            state[moment] = found[moment].to(tensor.device, copy=True)
    if "fused" in optimizer.defaults:  # torch's AdamW
        state[STEP] = found[STEP].to(tensor.device, copy=True)
    else:
        for group in optimizer.param_groups:
            group[STEP] = int(found[STEP])


def _group(optimizer: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Any]:
    return next(
        (group for group in optimizer.param_groups if any(parameter is tensor for parameter in group["params"])),
        optimizer.param_groups[0],
    )


def _file(folder: Path, prefix: str, engine: Engine) -> Path:
    return folder / f"{prefix}-{engine.rank if engine.masters.sharded else 0:05d}.safetensors"


def _open(path: Path) -> Any:
    require_regular(path, DAMAGED)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated or not a safetensors file; {DAMAGED}") from error


def _write(tensors: dict[str, Tensor], path: Path, shards: list[Shard], shapes: dict[str, list[int]]) -> None:
    held = {piece.name for shard in shards for piece in shard.pieces}
    layout = {
        "shards": [[list(piece) for piece in shard.pieces if piece.length] for shard in shards],
        "shapes": {name: shape for name, shape in shapes.items() if name in held},
    }
    _save(tensors, path, {"layout": json.dumps(layout)})


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
    with explain_write_errors(path):
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(errno.ENOSPC if "os error 28" in str(error) else errno.EIO, str(error)) from error
        with path.open("rb") as file:
            os.fsync(file.fileno())

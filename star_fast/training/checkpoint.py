"""Saving and resuming a run exactly, and exporting what it learned.

A checkpoint is a folder checkpoints/step-XXXXXXX, complete or absent: it is written under a temporary name, flushed to disk, listed with
the size of each file in complete.json, and renamed last.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from star_fast.data.codes import CodeStore
from star_fast.errors import UserError
from star_fast.records import to_dict
from star_fast.storage import atomic_write_json, explain_write_errors, sync_folder
from star_fast.training.engine import Engine

FORMAT = 1


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lives."""
    return run / "checkpoints" / f"step-{step:07d}"


def latest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return max((folder for folder in (run / "checkpoints").glob("step-*") if folder.suffix != ".tmp" and folder.is_dir()), default=None)


def codes_identity(store: CodeStore) -> dict[str, Any]:
    """Which codes a run trains on: a resume must find the same."""
    return {"tokenizer": store.tokenizer_hash, "images": len(store), "codes": store.manifest["files"]["codes.bin"]["sha256"]}


def save(engine: Engine, store: CodeStore, run: Path, step: int, keep: int) -> Path:
    """Save everything a resume needs, as of `step` finished steps; older checkpoints beyond `keep` are removed. A collective."""
    final = step_folder(run, step)
    if final.exists():
        return final
    temporary = final.with_suffix(".tmp")
    with explain_write_errors(final):
        if engine.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        dist.barrier()
        engine.deepspeed.save_checkpoint(str(temporary), tag="deepspeed", save_latest=False)
        if engine.teacher is not None and (engine.masters.sharded or engine.rank == 0):
            save_file({str(index): tensor.contiguous() for index, tensor in enumerate(engine.teacher.masters)},
                      temporary / f"teacher-{engine.rank:05d}.safetensors")
        dist.barrier()
        if engine.rank == 0:
            files = {str(path.relative_to(temporary)): path.stat().st_size for path in sorted(temporary.rglob("*")) if path.is_file()}
            atomic_write_json(temporary / "complete.json", {"format": FORMAT, "step": step, "ranks": engine.ranks, "zero_stage":
                              engine.config.train.zero_stage, "torch": torch.__version__, "config": to_dict(engine.config),
                              "codes": codes_identity(store), "files": files})
            _sync_tree(temporary)
            os.replace(temporary, final)
            for old in sorted((run / "checkpoints").glob("step-*"))[:-keep]:
                shutil.rmtree(old, ignore_errors=True)
        dist.barrier()
    return final


def _sync_tree(folder: Path) -> None:
    """Flush every file below `folder`, and the folders' entries, to disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


def _same_run(found: dict[str, Any], wanted: dict[str, Any], where: Path) -> None:
    """Settings that would make a resume something else than the same run must agree; how long and how often to log may change."""
    free = {"train": {"epochs", "max_steps", "save_every_steps", "keep_checkpoints", "log_every_steps", "validate_every_steps", "tensorboard"},
            "data": {"codes"}, "tokenizer": None}
    for section, values in wanted.items():
        ignored = free.get(section, set())
        for name, value in values.items() if ignored is not None else ():
            if name not in ignored and found.get(section, {}).get(name) != value:
                raise UserError(f"{where}: it was saved with {section}.{name} = {found.get(section, {}).get(name)!r}, this run has {value!r}; "
                                "resume with the same settings, or start another run with --init")


def check(folder: Path, engine: Engine, store: CodeStore) -> int:
    """The step of a complete, fitting checkpoint.

    Raises:
        UserError: a file is missing or cut short, or the checkpoint belongs to another model, code store, ZeRO stage or number of ranks.
    """
    try:
        record = json.loads((folder / "complete.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{folder}: not a complete checkpoint (complete.json cannot be read: {error}); remove this folder to resume from the "
                        "one before") from error
    if record.get("format") != FORMAT:
        raise UserError(f"{folder}: checkpoint format {record.get('format')}, this version reads {FORMAT}")
    for name, size in record["files"].items():
        found = (folder / name).stat().st_size if (folder / name).exists() else None
        if found != size:
            raise UserError(f"{folder}: {name} should have {size} bytes, {'it is missing' if found is None else f'it has {found}'}; "
                            "the checkpoint is damaged: remove this folder to resume from the one before")
    if (record["ranks"], record["zero_stage"]) != (engine.ranks, engine.config.train.zero_stage):
        raise UserError(f"{folder}: saved by {record['ranks']} ranks with ZeRO stage {record['zero_stage']}, this run has {engine.ranks} ranks with "
                        f"stage {engine.config.train.zero_stage}; resume with the same, or start from its weights with --init {folder.parent.parent / 'model'}")
    _same_run(record["config"], to_dict(engine.config), folder)
    found = codes_identity(store)
    if record["codes"] != found:
        what = "tokenizer" if record["codes"]["tokenizer"] != found["tokenizer"] else "codes"
        raise UserError(f"{folder}: trained on a code store of {what} {record['codes'][what][:12]}, {store.path} has {found[what][:12]}; "
                        "give the code store that the run began with")
    return record["step"]


def load(engine: Engine, store: CodeStore, folder: Path) -> int:
    """Put a checkpoint back; returns the number of finished steps. Weights, optimizer state and teacher are bit-identical after."""
    step = check(folder, engine, store)
    loaded, _ = engine.deepspeed.load_checkpoint(str(folder), tag="deepspeed")
    if loaded is None:
        raise UserError(f"{folder}: DeepSpeed could not load it")
    if engine.teacher is not None:
        saved = load_file(folder / f"teacher-{engine.rank if engine.masters.sharded else 0:05d}.safetensors")
        for index, master in enumerate(engine.teacher.masters):
            master.copy_(saved[str(index)])
        engine.teacher.refresh()
    return step

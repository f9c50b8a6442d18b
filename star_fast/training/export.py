"""What a run learned, as a folder that sampling, probing and other runs load."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch

from star_fast.data.codes import CodeStore
from star_fast.model.tensor_files import Undrawn
from star_fast.model.transformer import Transformer
from star_fast.model.weights import save_model
from star_fast.records import to_dict
from star_fast.training.engine import Engine
from star_fast.training.ranks import together


def export(engine: Engine, store: CodeStore, folder: Path, step: int) -> Path:
    """Write a model folder: student and teacher from their float32 masters, config, class names, tokenizer. A
    collective; rank 0 writes.
    """
    student = _whole(engine, engine.masters.tensors())
    teacher = _whole(engine, engine.teacher.masters) if engine.teacher is not None else None

    def write() -> None:
        assert student is not None, "rank 0 has it whole"
        record = {
            "step": step,
            "images_seen": step * engine.config.train.images_per_step,
            "contrast_depth": engine.config.contrast_depth,
            "method": to_dict(engine.config.method),
            "tokenizer_hash": store.tokenizer_hash,
            "precision": engine.config.train.precision,
            "environment": environment(engine),
        }
        tokenizer = store.path / "tokenizer"  # absent where codes were imported: then sampling asks for one
        save_model(
            folder,
            student,
            class_names=store.class_names,
            teacher=teacher,
            tokenizer=tokenizer if tokenizer.exists() else None,
            record=record,
        )

    together(lambda: write() if engine.rank == 0 else None)
    return folder


def environment(engine: Engine) -> dict[str, str]:
    """What the run trained on, for the report."""
    cuda = engine.device.type == "cuda"
    device = (
        torch.cuda.get_device_name(engine.device)
        if cuda
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    return {
        "device": f"{engine.ranks} x {device}",
        "torch": torch.__version__,
        "deepspeed": importlib.metadata.version("deepspeed"),
        "python": platform.python_version(),
    }


def _whole(engine: Engine, masters: list) -> Transformer | None:
    """A float32 transformer on rank 0's CPU from (possibly sharded) masters. A collective."""
    named = {name: tensor for name, tensor in engine.masters.gather(masters) if engine.rank == 0}
    if engine.rank:
        return None
    with Undrawn():  # else as many random numbers are drawn on one core, and thrown away
        transformer = Transformer(engine.config.model)
    for name, parameter in transformer.named_parameters():
        parameter.data = named[name].contiguous()
    return transformer

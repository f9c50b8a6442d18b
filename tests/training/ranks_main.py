"""The jobs of tests/training/test_ranks.py: small trainings through Engine and what they saw. Not a test itself.

One rank runs them in the test's own process; several ranks in one launch of

    python -m tests.training.ranks_main FOLDER      (rank and world size from the environment; FOLDER/codes: the store)

which runs all jobs one after the other and leaves FOLDER/rank-N.pt.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from star_fast.config import MethodConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from star_fast.data.codes import CodeStore
from star_fast.errors import UserError
from star_fast.method.batch_norm import BatchNorm
from star_fast.training import checkpoint, shards, zero1
from star_fast.training.batches import Batches, resolve
from star_fast.training.engine import Engine, build_student
from star_fast.training.export import export
from star_fast.training.ranks import end, start_ranks, together
from star_fast.training.telemetry import Telemetry
from star_fast.training.validation import held_out_batches
from star_fast.training.watch import Diverged, LossWatch

# None of them the default
CHOICES = {"mim_positions": "hidden", "negatives": "all_slots", "projector_norm": "batch", "teacher_label": "kept"}
# How late a rank is made to come where the others must wait for it: a race that is lost shows, one that is won costs
# this much
LATE_S = 0.4


def settings(
    store: CodeStore,
    *,
    precision: str = "fp32",
    stage: int = 0,
    micro: int = 0,
    dropout: float = 0.0,
    decay: float = 0.9999,
    warmup: bool = False,
    **choices: str,
) -> RunConfig:
    """Eight images a step; `choices` are settings of the method."""
    return resolve(
        RunConfig(
            ModelConfig(2, 2, 32, dropout=dropout),
            MethodConfig(contrast_positions=3, projector_width=24, ema_decay=decay, ema_warmup=warmup, **choices),
            OptimConfig(lr_per_256_images=0.03),
            TrainConfig(
                images_per_step=8,
                micro_batch_images=micro,
                precision=precision,
                zero_stage=stage,
                seed=4,
                gradient_precision="bf16" if (precision, stage) == ("bf16", 0) else "fp32",
            ),
        ),
        store,
    )


def start(config: RunConfig, store: CodeStore, device: torch.device) -> tuple[Engine, Batches]:
    """A fresh engine and its batches."""
    batches = Batches(store, config, dist.get_rank(), dist.get_world_size())
    return Engine(config, build_student(config), device, batches.micro_images, batches.accumulation), batches


def whole(engine: Engine, masters: list[Tensor]) -> dict[str, Tensor]:
    """Every float32 master, gathered from the ranks."""
    return {name: value.clone() for name, value in engine.masters.gather(masters)}


def read(named: Any) -> dict[str, Tensor]:
    """Copies of (name, parameter), which under ZeRO-3 are put together for the moment."""
    import deepspeed

    named = list(named)
    sharded = any(hasattr(parameter, "ds_tensor") for _, parameter in named)
    with deepspeed.zero.GatheredParameters([parameter for _, parameter in named], enabled=sharded):
        return {name: parameter.detach().clone() for name, parameter in named}


def train(config: RunConfig, store: CodeStore, device: torch.device, steps: int) -> dict[str, Any]:
    """A few steps: mean losses of all ranks, gradient norms, student and teacher after each."""
    engine, batches = start(config, store, device)
    saved: dict[str, Any] = {
        "student": [whole(engine, engine.masters.tensors())],
        "teacher": [whole(engine, engine.teacher.masters)],
    }
    terms, norms = [], []
    for step, micro in batches.steps(0, steps):
        losses, norm = engine.step(micro, step, config.lr)
        norms.append(float(norm))
        dist.all_reduce(losses)
        terms.append(losses / engine.ranks)
        saved["student"].append(whole(engine, engine.masters.tensors()))
        saved["teacher"].append(whole(engine, engine.teacher.masters))
    engine.settle()
    return saved | {
        "losses": torch.stack(terms),
        "norms": torch.tensor(norms),
        "copies": read(engine.teacher.model.named_parameters()),
        "trained": any(value.requires_grad or value.grad is not None for value in engine.teacher.model.parameters()),
    }


def in_small_buckets(config: RunConfig, store: CodeStore, device: torch.device) -> dict[str, Any]:
    """The same, gradients travelling in many small pieces: in every order that backward may finish them the sums are
    the same.
    """
    usual, zero1._BUCKET_ELEMENTS = zero1._BUCKET_ELEMENTS, 700
    try:
        assert len(start(config, store, device)[0].deepspeed.optimizer._buckets) > 10
        return train(config, store, device, 4)
    finally:
        zero1._BUCKET_ELEMENTS = usual


def gradients(config: RunConfig, store: CodeStore, device: torch.device) -> dict[str, Tensor]:
    """The gradient of the first step, before the optimizer touches it."""
    engine, batches = start(config, store, device)
    engine.deepspeed.backward(engine.losses(batches.step(0)[0]).total)
    return {name: value.grad.clone() for name, value in engine.student.named_parameters()}


def normed(rank: int, ranks: int) -> dict[str, Tensor]:
    """Batch norm in float64 of this rank's rows, of which rank 0 has more than the others: outputs, and the gradients
    of a sum over all ranks.
    """
    norm = BatchNorm(4).double()
    generator = torch.Generator().manual_seed(0)
    rows, weights = (torch.randn(11, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    starts = [0, *(8 + (11 - 8) * other // max(1, ranks - 1) for other in range(ranks))] if ranks > 1 else [0, 11]
    mine = slice(starts[rank], starts[rank + 1])
    x = rows[mine].clone().requires_grad_()
    out = norm(x)
    (out * weights[mine]).sum().backward()
    return {"out": out.detach(), "rows": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}


def validation(config: RunConfig, store: CodeStore, device: torch.device) -> float:
    """The held-out loss of weights drawn anew: an untrained model's is the same for every image."""
    engine, _ = start(config, store, device)
    torch.nn.init.normal_(engine.student.transformer.output.weight, generator=torch.Generator().manual_seed(0))
    return engine.evaluate(held_out_batches(store, config, engine.rank, engine.ranks))


def own_loss(config: RunConfig, store: CodeStore, device: torch.device) -> float:
    """L_MIM of this rank when every rank gets rank 0's images: it differs between ranks by dropout alone."""
    engine, _ = start(config, store, device)
    engine.deepspeed.train()
    with torch.no_grad():
        return engine.losses(Batches(store, config, 0, engine.ranks).step(0)[0]).mim.item()


def log_line(folder: Path) -> dict[str, Any]:
    """What is logged when rank r has losses 10 r + (0 ... 4), the same each step."""
    telemetry = Telemetry(
        folder, 0, 2, 8, log_every=2, main=dist.get_rank() == 0, tensorboard=False, watch=LossWatch(0.0)
    )
    for step in range(2):
        telemetry.step(step, torch.arange(5.0) + 10 * dist.get_rank(), torch.tensor(3.0), 0.1)
    telemetry.close()
    dist.barrier()
    return json.loads((folder / "metrics.jsonl").read_text())


@contextmanager
def slow(owner: Any, name: str, *, after: bool = False) -> Iterator[None]:
    """Within the block a function comes LATE_S late, or returns so late."""
    original: Callable = getattr(owner, name)

    def late(*args: Any, **more: Any) -> Any:
        time.sleep(0 if after else LATE_S)
        try:
            return original(*args, **more)
        finally:
            time.sleep(LATE_S if after else 0)

    setattr(owner, name, late)
    try:
        yield
    finally:
        setattr(owner, name, original)


def save_and_load(config: RunConfig, store: CodeStore, device: torch.device, run: Path) -> dict[str, Any]:
    """Two steps, a checkpoint with the last rank late, a third step; then a fresh engine loads the checkpoint and takes
    the third step too.
    """
    engine, batches = start(config, store, device)
    last = engine.ranks - 1
    for step, micro in batches.steps(0, 2):
        engine.step(micro, step, config.lr)
    saved = [value.clone() for value in engine.teacher.masters]
    seen: dict[str, Any] = {
        "student": whole(engine, engine.masters.tensors()),
        "teacher": whole(engine, engine.teacher.masters),
    }
    with slow(engine.deepspeed, "save_checkpoint", after=True) if engine.rank == last else slow(os, "replace"):
        folder = checkpoint.save(engine, store, run, 2, 1)
    seen["there_on_return"] = (folder / "complete.json").exists()  # here as on every rank
    engine.step(batches.step(2), 2, config.lr)
    other, _ = start(dataclasses.replace(config), store, device)
    checkpoint.load(other, store, folder)
    seen["loaded"] = all(torch.equal(a, b) for a, b in zip(saved, other.teacher.masters, strict=True))
    other.step(batches.step(2), 2, config.lr)
    for one in (engine, other):
        one.settle()
    pairs = [
        (engine.masters.tensors(), other.masters.tensors()),
        (engine.teacher.masters, other.teacher.masters),
        (list(engine.teacher.model.parameters()), list(other.teacher.model.parameters())),
    ]
    seen["equal"] = [all(torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in pairs]
    with slow(os, "rename") if engine.rank == 0 else slow(os, "replace"):
        seen["model_on_return"] = (export(engine, store, run / "model", 3) / "config.json").exists()
    return seen


def faults(config: RunConfig, store: CodeStore, device: torch.device, run: Path) -> dict[str, Any]:
    """What every rank is told, and what is on the disk, when something is wrong on the last rank, or with one file,
    alone.
    """
    engine, batches = start(config, store, device)
    engine.step(batches.step(0), 0, config.lr)
    last = engine.rank == engine.ranks - 1

    def told(job: Callable[[], Any]) -> str:
        try:
            job()
        except (Diverged, UserError) as error:
            return str(error)
        finally:
            dist.barrier()
        return "nothing"

    def full(*_: Any) -> None:
        raise UserError("the disk is full")

    seen: dict[str, Any] = {}
    for owner, name, on in (
        (shards, "_write", engine.ranks - 1),
        (checkpoint, "_describe", engine.ranks - 1),
        (checkpoint, "complete", 0),
    ):
        original = getattr(owner, name)
        setattr(owner, name, full if engine.rank == on else original)
        seen[name] = (
            told(lambda: checkpoint.save(engine, store, run, 1, 1)),
            sorted(path.name for path in (run / "checkpoints").iterdir()),
        )
        setattr(owner, name, original)
    folder = checkpoint.save(engine, store, run, 1, 1)
    seen["damaged"] = {}
    for name in checkpoint._listing(folder):
        if name != checkpoint.RECORD_FILE:
            whole_file = (folder / name).read_bytes()
            dist.barrier()
            if engine.rank == 0:
                (folder / name).write_bytes(whole_file[:-1] + bytes([whole_file[-1] ^ 1]))
            dist.barrier()
            seen["damaged"][name] = told(lambda: together(lambda: checkpoint.check(folder, engine, store)))
            if engine.rank == 0:
                (folder / name).write_bytes(whole_file)
            dist.barrier()
    seen["whole"] = told(lambda: together(lambda: checkpoint.check(folder, engine, store)))
    if last:
        engine.masters.tensors()[0].view(-1)[3] = float("inf")
    seen["infinite"] = told(lambda: engine.require_finite(1))
    return seen


def main() -> None:
    """All jobs of several ranks."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    store = CodeStore.open(folder / "codes")
    rank, ranks, device = start_ranks()
    seen = {
        "plain": train(settings(store), store, device, 20),
        "accumulated": train(settings(store, micro=4 // ranks, decay=0.5, warmup=True), store, device, 6),
        "bf16": train(
            settings(store, precision="bf16", stage=2, micro=4 // ranks, decay=0.5, warmup=True), store, device, 4
        ),
        "zero1": train(
            settings(store, precision="bf16", stage=1, micro=4 // ranks, decay=0.5, warmup=True), store, device, 4
        ),
        "zero1, small buckets": in_small_buckets(
            settings(store, precision="bf16", stage=1, micro=4 // ranks, decay=0.5, warmup=True), store, device
        ),
        "gradients": gradients(settings(store), store, device),
        "choices": train(settings(store, **CHOICES), store, device, 6),
        "choices_gradients": gradients(settings(store, **CHOICES), store, device),
        "normed": normed(rank, ranks),
        "validation": validation(settings(store), store, device),
        "own_loss": own_loss(settings(store, dropout=0.3), store, device),
        "log_line": log_line(folder),
        "saved": save_and_load(settings(store, precision="bf16", stage=1, dropout=0.2), store, device, folder / "run"),
        "faults": faults(settings(store, precision="bf16", stage=1), store, device, folder / "faulty"),
    }
    torch.save(seen, folder / f"rank-{rank}.pt")
    dist.barrier()
    atexit.register(os.abort)  # as Python's own end may: the job's work is done, and its status must say so
    end(0)


if __name__ == "__main__":
    main()

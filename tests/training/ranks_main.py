"""A rank of tests/training/test_ranks.py: trains a few steps through Engine and saves what it saw. Not a test itself.

usage: python -m tests.training.ranks_main STORE OUT STEPS PRECISION ZERO_STAGE   (rank and world size from the environment)
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from star_fast.config import MethodConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from star_fast.data.codes import CodeStore
from star_fast.training.batches import Batches, resolve
from star_fast.training.engine import Engine, build_student, start_ranks


def main() -> None:
    store_path, out, steps, precision, stage = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
    torch.set_num_threads(1)
    store = CodeStore.open(store_path)
    config = resolve(RunConfig(
        ModelConfig(2, 2, 32, dropout=0.0), MethodConfig(contrast_positions=3, projector_width=24, ema_decay=0.9999, ema_warmup=False),
        OptimConfig(lr_per_256_images=0.03), TrainConfig(images_per_step=8, precision=precision, zero_stage=stage, seed=4)), store)
    rank, ranks, device = start_ranks()
    batches = Batches(store, config, rank, ranks)
    engine = Engine(config, build_student(config), device, batches.micro_images, batches.accumulation)
    saved = {"names": [name for name, _ in engine.student.transformer.named_parameters()], "requires_grad":
             any(parameter.requires_grad for parameter in engine.teacher.model.parameters())}
    whole = {"student": [], "teacher": []}

    def note() -> None:
        for name, masters in (("student", engine.masters.tensors()), ("teacher", engine.teacher.masters)):
            whole[name].append({key: value.clone() for key, value in engine.masters.gather(masters)})

    note()
    if stage == 0 and precision == "fp32":  # the gradient of step 1, before the optimizer touches it
        losses = engine.losses(batches.step(0)[0])
        engine.deepspeed.backward(losses.total)
        saved["gradients"] = {name: parameter.grad.clone() for name, parameter in engine.student.named_parameters()}
        engine.student.zero_grad()
    terms = []
    for step, micro in batches.steps(0, steps):
        losses, _ = engine.step(micro, step, config.lr)
        torch.distributed.all_reduce(losses)
        terms.append(losses / ranks)
        note()
    saved |= {"losses": torch.stack(terms), **whole, "copies": {name: p.detach().clone() for name, p in engine.teacher.model.named_parameters()},
              "copies_grad": any(p.grad is not None for p in engine.teacher.model.parameters())}
    if rank == 0:
        torch.save(saved, out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

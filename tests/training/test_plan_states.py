"""What `star-fast plan` says of weights, optimizer and teacher is what the engine holds: a layout that changes without
its formula shows here.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from star_fast.planning.states import states
from star_fast.training.engine import Engine
from tests.training.ranks_main import settings, start
from tests.training.store import write_store


@pytest.mark.parametrize(
    ("precision", "gradients", "stage"),
    [
        ("fp32", "fp32", 0),
        ("fp32", "fp32", 1),
        ("fp32", "fp32", 2),
        ("bf16", "bf16", 0),
        ("bf16", "fp32", 1),
        ("bf16", "bf16", 1),
        ("bf16", "fp32", 2),
        ("bf16", "fp32", 3),
    ],
)
def test_bytes_that_stay_between_steps(
    precision: str, gradients: str, stage: int, tmp_path: Path, one_rank: torch.device
) -> None:
    store = write_store(tmp_path / "codes")
    config = settings(store, precision="fp32")
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, precision=precision, gradient_precision=gradients, zero_stage=stage),
    )
    engine, batches = start(config, store, one_rank)
    engine.step(batches.step(0), 0, config.lr)  # makes the moments
    held = states(config, stage, 1)
    assert lasting_bytes(engine) == pytest.approx(held.weights + held.optimizer + held.teacher, rel=0.01)


def lasting_bytes(engine: Engine) -> int:
    """Of all tensors that weights, optimizer and teacher consist of, each once. ZeRO-3 keeps its masters out of the
    parameter groups between steps.
    """
    optimizer = engine.deepspeed.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    tensors = [
        *engine.student.parameters(),
        *engine.teacher.model.parameters(),
        *engine.teacher.masters,
        *getattr(optimizer, "fp32_partitioned_groups_flat", []),
        *(parameter for group in inner.param_groups for parameter in group["params"]),
        *(value for state in inner.state.values() for value in state.values() if isinstance(value, torch.Tensor)),
    ]
    tensors = [getattr(tensor, "ds_tensor", tensor) for tensor in tensors]
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())

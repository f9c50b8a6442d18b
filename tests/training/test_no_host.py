"""Between two log lines the host asks a device nothing and builds nothing for it: no step waits for the one before."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from star_fast.config import MethodConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from star_fast.data.codes import CodeStore
from star_fast.training.batches import Batches, resolve
from star_fast.training.engine import Engine, build_student
from star_fast.training.telemetry import Telemetry
from star_fast.training.watch import LossWatch
from tests.training.store import write_store

# What reads a value back (on a GPU: waits for all before), and what makes a tensor from Python numbers (on a GPU: a
# copy from pageable memory, which waits).
WAITS = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_dim",
    "aten::_unique2",
    "aten::lift_fresh",
}


class NoHost(TorchDispatchMode):
    """Notes every such call, with the line that made it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        masks = func._schema.name in ("aten::index", "aten::index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if func._schema.name in WAITS or masks:
            lines = [
                f"{frame.filename}:{frame.lineno} {frame.name}"
                for frame in traceback.extract_stack()
                if "site-packages/torch" not in frame.filename
            ]
            self.found.append(f"{func._schema.name} from {' < '.join(reversed(lines[-5:-1]))}")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops look at values on the CPU only: here they do not, as on a GPU."""
    for name in ("masked_attention", "linear_cross_entropy", "slot_contrast"):
        monkeypatch.setattr(importlib.import_module(f"star_fast.ops.{name}"), "FakeTensor", torch.Tensor)


def test_the_net_catches_what_waits() -> None:
    for what, job in (
        ("item", lambda x: x.sum().item()),
        ("bool", lambda x: bool((x > 0).all())),
        ("index", lambda x: x[x > 0]),
        ("construction", lambda x: x + torch.tensor([1.0, 2.0])),
    ):
        with NoHost() as net:
            job(torch.ones(2))
        assert net.found, what
    with NoHost() as net:
        (torch.ones(2) * 2 + 1).sum().clamp(min=0).sqrt()
    assert not net.found


@pytest.mark.parametrize(
    "method",
    [
        MethodConfig(contrast_positions=3, projector_width=24),
        MethodConfig(views=1, mask_ratio=0.0, mim_weight=0.0, contrast_weight=0.0),
        MethodConfig(
            contrast_positions=3,
            projector_width=24,
            mim_positions="hidden",
            negatives="all_slots",
            projector_norm="batch",
            teacher_label="kept",
        ),
    ],
    ids=["ST-AR", "plain", "choices"],
)
@pytest.mark.parametrize(("precision", "stage"), [("bf16", 1), ("fp32", 0)])
def test_a_step_between_two_log_lines_does_not_wait(
    one_rank: torch.device, tmp_path: Path, as_on_a_gpu: None, precision: str, stage: int, method: MethodConfig
) -> None:
    store: CodeStore = write_store(tmp_path / "codes")
    config = resolve(
        RunConfig(
            ModelConfig(2, 2, 32, dropout=0.1),
            method,
            OptimConfig(0.03, clip_norm=0.1),
            TrainConfig(images_per_step=8, micro_batch_images=4, precision=precision, zero_stage=stage),
        ),
        store,
    )
    batches = Batches(store, config)
    engine = Engine(config, build_student(config), one_rank, batches.micro_images, batches.accumulation)
    telemetry = Telemetry(tmp_path, 0, 10, 8, log_every=10, main=True, tensorboard=False, watch=LossWatch(6.0))
    given: list[Callable] = [batches.step(step) for step in range(3)]
    telemetry.step(0, *engine.step(given[0], 0, 0.1), 0.1)  # AdamW makes its state
    with NoHost() as net:
        for step in (1, 2):
            telemetry.step(step, *engine.step(given[step], step, 0.1), 0.1)
    telemetry.close()
    assert not net.found, "\n".join(net.found)
    assert all(torch.isfinite(losses).all() for losses in telemetry.pending)

"""The CUDA path of training, traced on fake "cuda" tensors without a driver: every op takes its fused backend, shapes
and dtypes hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from star_fast.config import MethodConfig, ModelConfig
from star_fast.method import objective
from star_fast.method.student import Projector, Student
from star_fast.method.teacher import Teacher
from star_fast.model import transformer
from star_fast.model.transformer import Transformer
from star_fast.ops import dispatch
from star_fast.ops.ema_update import ema_update

B, M, T, K = 4, 2, 256, 4
MODEL = ModelConfig(12, 12, 768, vocab=16384, positions=T, num_classes=1000)
METHOD = MethodConfig()


@pytest.fixture
def fake_cuda() -> Iterator[None]:
    """Tensors are fake, on "cuda"; parameters are born bfloat16, since fake ones cannot be cast in place."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode(allow_non_fake_inputs=False), torch.device("cuda"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def batch() -> dict[str, torch.Tensor]:
    return {
        "tokens": torch.zeros(B * M, T - 1, dtype=torch.int64),
        "label": torch.zeros(B * M, dtype=torch.int64),
        "targets": torch.zeros(B * M, T, dtype=torch.int64),
        "keep": torch.ones(B * M, T, dtype=torch.bool),
    }


def test_student_forward(fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # Drawn on the host, which is not fake in training
    monkeypatch.setattr(transformer, "_dropout_seeds", lambda count: list(range(count)))
    student = Student(Transformer(MODEL), Projector(768, 2048, 3), METHOD, 6)
    last, keys = torch.empty(B * M, T, 768, dtype=torch.bfloat16), torch.empty(M * K, B, 768, dtype=torch.bfloat16)
    with dispatch.record() as calls, torch.no_grad():
        losses = student(**batch(), teacher_last=last, keys=keys, positions=torch.zeros(K, dtype=torch.int64))
    assert all(term.shape == () and term.device.type == "cuda" for term in losses)
    assert all(term.dtype == torch.float32 for term in losses)
    chosen = Counter((call.op, call.backend) for call in calls)
    assert chosen == {
        ("add_rms_norm", "triton"): 25,
        ("masked_attention_qkv", "triton"): 12,
        ("swiglu", "triton"): 12,
        ("linear_cross_entropy", "triton"): 1,
        ("feature_distance", "triton"): 1,
        ("slot_contrast", "triton"): 1,
    }
    launches = Counter(launch.kernel for call in calls for launch in call.launches)
    assert launches["attention_forward"] == 12
    assert launches["add_rms_norm_forward"] == 25
    assert all(call.launches for call in calls), "an op without launches"
    assert all(min(launch.grid) >= 1 for call in calls for launch in call.launches)


def test_student_forward_with_everything_chosen_otherwise(fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in it reads a number back from the device, which a fake one could not give; all_slots is the one op
    without a kernel.
    """
    monkeypatch.setattr(transformer, "_dropout_seeds", lambda count: list(range(count)))
    method = MethodConfig(mim_positions="hidden", negatives="all_slots", projector_norm="batch", teacher_label="kept")
    student = Student(Transformer(MODEL), Projector(768, 2048, 3, "batch"), method, 6)
    last, keys = torch.empty(B * M, T, 768, dtype=torch.bfloat16), torch.empty(M * K, B, 768, dtype=torch.bfloat16)
    with dispatch.record() as calls, torch.no_grad():
        losses = student(**batch(), teacher_last=last, keys=keys, positions=torch.zeros(K, dtype=torch.int64))
    assert all(term.shape == () and term.device.type == "cuda" and term.dtype == torch.float32 for term in losses)
    chosen = Counter((call.op, call.backend) for call in calls)
    assert chosen["feature_distance", "triton"] == 1 and chosen["all_slots_contrast", "reference"] == 1
    assert not any(op == "slot_contrast" for op, _ in chosen)


def test_teacher_forward_and_update(fake_cuda: None) -> None:
    # Its copy would need a real model; what is traced is the forward pass and the update
    teacher = Teacher.__new__(Teacher)
    teacher.model, teacher.method, teacher.contrast_depth, teacher._arrivals = Transformer(MODEL).eval(), METHOD, 6, []
    data = batch()
    with dispatch.record() as calls:
        last, slots = teacher.features(data["tokens"], data["label"], torch.zeros(K, dtype=torch.int64))
        masters, averages = (
            [torch.empty(768, 768, dtype=torch.float32), torch.empty(768, dtype=torch.float32)] for _ in range(2)
        )
        ema_update(averages, masters, 0.9999, copy_to=[torch.empty(768, 768), torch.empty(768)])
    assert (last.shape, last.dtype) == ((B * M, T, 768), torch.bfloat16)
    assert (slots.shape, slots.dtype) == ((M * K, B, 768), torch.bfloat16)
    chosen = Counter((call.op, call.backend) for call in calls)
    # Rotary inside; before torch's own attention it would cost five times the bytes
    assert chosen["masked_attention_qkv", "triton"] == 12
    assert chosen["add_rms_norm", "triton"] == 25
    assert chosen["ema_update", "triton"] == 1
    assert len(next(call for call in calls if call.op == "ema_update").launches) == 1


def test_fused_objective_in_five_launches(fake_cuda: None) -> None:
    """One call from features to the four terms: mask and contrast losses take three kernels, cross-entropy one a chunk
    of rows.
    """
    hidden, last = torch.empty(B * M, T, 768, dtype=torch.bfloat16), torch.empty(B * M, T, 768, dtype=torch.bfloat16)
    anchor, key = torch.empty(M * K, B, 768, dtype=torch.bfloat16), torch.empty(M * K, B, 768, dtype=torch.bfloat16)
    with dispatch.record() as calls:
        losses = objective.objective(
            hidden,
            torch.empty(16384, 768, dtype=torch.bfloat16),
            torch.zeros(B * M, T, dtype=torch.int64),
            last,
            anchor,
            torch.empty_like(last),
            key,
            METHOD,
        )
    assert all(term.shape == () for term in losses)
    launches = {call.op: len(call.launches) for call in calls}
    assert launches["feature_distance"] == 1
    assert launches["slot_contrast"] <= 2
    assert launches["linear_cross_entropy"] == 1  # B * M * T = 2048 rows

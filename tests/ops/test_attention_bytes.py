"""Which path attention takes on CUDA, by counted bytes: rotary in torch's own operations costs what it costs, and the
cheapest whole path goes first.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from star_fast.config import MethodConfig, ModelConfig
from star_fast.method.teacher import Teacher
from star_fast.model.transformer import Transformer
from star_fast.ops import dispatch, rotary
from star_fast.ops.shapes import SHAPES

op = import_module("star_fast.ops.masked_attention")
VIEWS = {
    "view",
    "_unsafe_view",
    "unsqueeze",
    "slice",
    "select",
    "view_as_complex",
    "view_as_real",
    "alias",
    "_reshape_alias",
    "expand",
    "empty",
    "device",
}


class Traffic(TorchDispatchMode):
    """Bytes of every operation that is no view: tensors in and out, each once; and their names."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.names = 0, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name not in VIEWS and isinstance(out, Tensor):
            self.names.append(name)
            self.bytes += sum(x.numel() * x.element_size() for x in (*args, out) if isinstance(x, Tensor))
        return out


@pytest.fixture
def without_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("star_fast.ops.attention_by_flash"), "installed", lambda: False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_eager_rotary_counts_as_what_it_is(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        q = torch.empty(64, 256, 3, 12, 64, dtype=dtype, device="cuda")[:, :, 0]
        table = torch.empty(256, 1, 32, 2, device="cuda")
        with Traffic() as seen:
            rotary.rotate(q, table)
    assert rotary.rotate_bytes(q.numel(), dtype) == seen.bytes - 4 * table.numel()
    assert len(rotary.rotate_launches("q", q.numel(), dtype)) == len(seen.names), seen.names


def teacher_bytes(preset: str) -> list[tuple[str, int]]:
    """(backend, bytes) of the attention of each layer of a teacher of two blocks at a preset's micro-batch."""
    shape = SHAPES[preset]
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode(), torch.device("cuda"), dispatch.record() as calls:
            teacher = Teacher.__new__(Teacher)  # its copy would need a real model
            model = Transformer(ModelConfig(2, shape.H, shape.D, vocab=shape.V, positions=shape.T, num_classes=1000))
            teacher.model, teacher.method, teacher.contrast_depth, teacher._arrivals = (
                model.eval(),
                MethodConfig(),
                1,
                [],
            )
            teacher.features(
                torch.zeros(shape.sequences, shape.T - 1, dtype=torch.int64),
                torch.zeros(shape.sequences, dtype=torch.int64),
                torch.zeros(shape.K, dtype=torch.int64),
            )
    finally:
        torch.set_default_dtype(torch.float32)
    return [(call.backend, call.moved_bytes) for call in calls if call.op == "masked_attention_qkv"]


# Megabytes a layer that the teacher's attention may move. Rotary in torch's own operations before a fused kernel: 604
# (B), 1007 (XL).
@pytest.mark.parametrize(("preset", "most"), [("B", 204), ("L", 272), ("XL", 340)])
def test_the_teacher_takes_the_cheapest_whole_path(preset: str, most: int, without_flash: None) -> None:
    layers = teacher_bytes(preset)
    assert len(layers) == 2
    assert all(backend == "triton" and moved <= most * 1e6 for backend, moved in layers), layers


def test_the_bar_sees_eager_rotary(without_flash: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the order as it was, torch's attention whenever no key is hidden."""
    monkeypatch.setitem(dispatch._OPS["masked_attention_qkv"].order, "cuda", ("sdpa",))
    assert [(backend, round(moved / 1e6)) for backend, moved in teacher_bytes("XL")] == [("sdpa", 1008)] * 2


@pytest.mark.parametrize(
    ("flash", "turned", "chosen"),
    [(True, False, "flash"), (False, False, "sdpa"), (True, True, "triton"), (False, True, "triton")],
)
def test_without_rotary_torchs_kernel_is_as_cheap(
    flash: bool, turned: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("star_fast.ops.attention_by_flash"), "installed", lambda: flash)
    with FakeTensorMode(), dispatch.record() as calls:
        qkv = torch.empty(2, 64, 3, 4, 64, dtype=torch.bfloat16, device="cuda")
        op.masked_attention_qkv(qkv, rotary=torch.empty(64, 32, 2, device="cuda") if turned else None)
    assert [call.backend for call in calls] == [chosen]

"""One description of each launch: real calls compile to what the proof compiles, and every launch happens on its
tensors' device.
"""

from __future__ import annotations

import ast
import contextlib
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from star_fast.ops import dispatch, swiglu
from star_fast.ops.triton import launching
from star_fast.ops.triton.described import CASES, Case, described
from star_fast.ops.triton.launching import Call
from tests.cuda_double import CudaDouble, needs_no_gpu
from tests.cuda_tensors import DeviceTensor

KERNELS = Path(launching.__file__).parent
pytestmark = needs_no_gpu


def without_data(x: Tensor) -> Tensor:
    """A real tensor for a fake one: its memory is never touched, so a large one costs nothing; whole numbers are 0,
    truth values True.
    """
    if x.is_floating_point():
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    return torch.full(x.shape, x.dtype == torch.bool, dtype=x.dtype)


def real_arguments(case: Case, preset: str, dtype: torch.dtype) -> dict[str, Any]:
    with FakeTensorMode():
        fakes = case.arguments(preset, dtype)
    return tree_map_only(Tensor, without_data, fakes)


@contextlib.contextmanager
def nothing_starts() -> Iterator[list[dispatch.Launch]]:
    with mock.patch.object(launching, "start", return_value=None), dispatch.note_launches() as launches:
        yield launches


@pytest.mark.parametrize("draw", range(4))
def test_real_calls_compile_to_the_keys_of_the_proof(draw: int) -> None:
    chosen = random.Random(draw)
    preset, dtype = (
        chosen.choice(["unit", "tiny", "B", "L", "XL", "XL-384", "E96", "3B"]),
        chosen.choice([torch.bfloat16, torch.float16, torch.float32]),
    )
    small = preset in ("unit", "tiny")  # the products of linear_cross_entropy, which are torch's, really run
    cases = [case for case in CASES if small or case.op != "linear_cross_entropy"]
    proved = {kernel.call.compilation().key for kernel in described(preset, dtype, cases)}
    launched: set[str] = set()
    for case in chosen.sample(cases, 4):
        launched |= {
            call._replace(arguments=tree_map_only(DeviceTensor, lambda x: x.inner, call.arguments)).compilation().key
            for call, _ in on_gpu(case, preset, dtype)
        }
    assert launched <= proved, f"{preset} {dtype}: not proved: {launched - proved}"


def test_another_stride_or_dtype_is_another_key() -> None:
    """What the test above compares does tell kernels apart."""
    keys = []
    for x in (
        torch.empty(8, 64),
        torch.empty(8, 65)[:, :64],
        torch.empty(8, 64, dtype=torch.bfloat16),
        torch.empty(8 * 64 + 1)[1:].view(8, 64),
    ):
        with nothing_starts() as launches:
            swiglu(x, backend="triton")
        keys.append(launches[0].call.compilation().key)
    assert len(set(keys)) == 4


def test_nothing_is_started_elsewhere() -> None:
    """`kernel[grid](...)` stands in launching.py alone."""
    seen = 0
    for path in KERNELS.glob("*.py"):
        tree = ast.parse(path.read_text())
        functions = {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
        }
        seen += len(functions)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and path.stem != "launching":
                assert ast.unparse(node.func.value) not in functions, (
                    f"{path.name}:{node.lineno} : a start past launching.py, which holds the guard"
                )
    assert seen > 20


class _Context(SimpleNamespace):
    """What a torch.autograd.Function keeps, without autograd: torch's own engine would ask for a GPU."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self.materialize = value


def forward_and_backward(wanted: bool, cls: type, *arguments: Any) -> Any:
    """In place of Function.apply: forward, and backward at once if gradients are wanted."""
    context = _Context(needs_input_grad=[wanted and isinstance(x, Tensor) and x.is_floating_point() for x in arguments])
    with torch.no_grad():
        out = cls.forward(context, *arguments)
        if wanted:
            cls.backward(context, *(torch.empty_like(o) for o in (out if isinstance(out, tuple) else (out,))))
    return out


def on_gpu(case: Case, preset: str, dtype: torch.dtype) -> list[tuple[Call, int]]:
    """The launches, forward and backward, of a call on real tensors of the CUDA double's cuda:1, and the device that
    was current at each.
    """
    arguments, current = real_arguments(case, preset, dtype), []
    with CudaDouble() as double, dispatch.note_launches() as launches:
        placed = tree_map_only(Tensor, lambda x: double.place(x, torch.device("cuda:1")), arguments)
        for name in case.gradients:
            placed[name].requires_grad_()
        with (
            mock.patch.object(
                launching, "start", side_effect=lambda *call: current.append(torch.cuda.current_device())
            ),
            mock.patch.object(
                torch.autograd.Function, "apply", classmethod(partial(forward_and_backward, bool(case.gradients)))
            ),
        ):
            case._replace(gradients=()).make(placed)
        assert double.current == 0
    assert len(launches) == len(current) > 0
    return [(launch.call, device) for launch, device in zip(launches, current, strict=True)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op + case.note)
def test_every_launch_is_on_its_tensors_device(case: Case) -> None:
    made = on_gpu(case, "unit", torch.float32)
    for call, current in made:
        assert current == 1 and {x.device.index for x in call.arguments if isinstance(x, Tensor)} == {1}, call
    assert {call.kernel.title for call, _ in made} == {
        kernel.title.removesuffix(case.note.format(dtype="float32"))
        for kernel in described("unit", torch.float32, [case])
    }

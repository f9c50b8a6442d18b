"""Real kernels on a real GPU: every op's triton backend against the float64 reference, and bit-equal reruns. Run by
scripts/gpu_acceptance.sh.
"""

from __future__ import annotations

import math
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from star_fast.ops import dispatch
from star_fast.ops.decode_attention import KVCache
from tests import contract

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
PRESETS = ("unit", "B")  # odd and tiny (also what the memory and race checkers run), and a training shape

# op file -> (public function, arguments that get gradients)
DIFFERENTIABLE = {
    "masked_attention": ("masked_attention_qkv", ("qkv",)),
    "linear_cross_entropy": ("linear_cross_entropy", ("hidden", "weight")),
    "feature_distance": ("feature_distance", ("student",)),
    "slot_contrast": ("slot_contrast", ("anchor",)),
    "add_rms_norm": ("add_rms_norm", ("x", "residual", "weight")),
    "swiglu": ("swiglu", ("w1w3",)),
}


def op_and_call(file: str, preset: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any], tuple[str, ...]]:
    """The op as contract.py wants it, its arguments on the GPU, and which of them get gradients."""
    module, (function, wanted) = import_module(f"star_fast.ops.{file}"), DIFFERENTIABLE[file]
    call = module.inputs(preset, dtype, DEVICE)
    # The rotary table keeps float32 whatever the dtype of the rest, and contract.py would round it.
    fixed = {"rotary": call.pop("rotary")} if "rotary" in call else {}
    op = SimpleNamespace(
        __name__=function,
        reference=partial(module.reference, **fixed),
        **{function: partial(getattr(module, function), **fixed)},
    )
    return op, call, wanted


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("file", DIFFERENTIABLE)
def test_error_rule(file: str, dtype: torch.dtype, preset: str) -> None:
    op, call, wanted = op_and_call(file, preset, dtype)
    contract.check_op(op, "triton", call, wanted, dtype)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("file", DIFFERENTIABLE)
def test_same_bits(file: str, preset: str) -> None:
    op, call, wanted = op_and_call(file, preset, torch.bfloat16)
    contract.check_same_bits(op, "triton", call, wanted)


def copied(cache: KVCache, dtype: torch.dtype | None = None) -> KVCache:
    """A cache of its own, 16-bit or float tensors in `dtype` if given."""
    return KVCache(
        *(
            None if t is None else t.clone() if dtype is None or not t.is_floating_point() else t.to(dtype, copy=True)
            for t in cache
        )
    )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_attention(dtype: torch.dtype, preset: str) -> None:
    op = import_module("star_fast.ops.decode_attention")
    call = op.inputs(preset, dtype, DEVICE)
    cache, rest = call.pop("cache"), call
    exact = {name: contract.cast(value, torch.float64) for name, value in rest.items()}
    truth = op.reference(cache=copied(cache, torch.float64), **exact)
    plain = op.reference(cache=copied(cache), **rest)
    caches = [copied(cache), copied(cache)]
    first, second = (op.decode_attention(cache=own, **rest, backend="triton") for own in caches)
    contract.assert_error_rule(f"decode_attention [triton, {dtype}]", first, plain, truth)
    assert (
        torch.equal(first, second) and torch.equal(caches[0].k, caches[1].k) and torch.equal(caches[0].v, caches[1].v)
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_decode_attention_takes_its_position_from_the_device(preset: str) -> None:
    op = import_module("star_fast.ops.decode_attention")
    call = op.inputs(preset, torch.bfloat16, DEVICE)
    cache = call.pop("cache")
    from_host = op.decode_attention(cache=copied(cache), **call, backend="triton")
    call["position"] = torch.tensor(call["position"], device=DEVICE)
    assert torch.equal(op.decode_attention(cache=copied(cache), **call, backend="triton"), from_host)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("student_dtype", [torch.float32, torch.bfloat16])
def test_ema_update(student_dtype: torch.dtype, preset: str) -> None:
    op = import_module("star_fast.ops.ema_update")
    call = op.inputs(preset, torch.bfloat16, DEVICE)
    student = [s.to(student_dtype) for s in call["student"]]
    truth = [
        t.double() + (1 - call["decay"]) * (s.double() - t.double())
        for t, s in zip(call["teacher"], student, strict=True)
    ]
    plain = [t.clone() for t in call["teacher"]]
    op.reference(plain, student, call["decay"])
    again = [t.clone() for t in call["teacher"]]
    op.ema_update(call["teacher"], student, call["decay"], call["copy_to"], backend="triton")
    op.ema_update(again, student, call["decay"], backend="triton")
    for got, same, expected, copy, repeated in zip(call["teacher"], plain, truth, call["copy_to"], again, strict=True):
        contract.assert_error_rule("ema_update", got, same, expected)
        assert torch.equal(copy, got.bfloat16()) and torch.equal(got, repeated)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "size",  # images, channels, side: one pixel, odd sizes, the built-in digits', the least and the largest of VQ-16
    [(2, 24, 1), (3, 130, 17), (8, 64, 28), (8, 512, 16), (2, 128, 256)],
    ids=str,
)
def test_group_norm_silu(size: tuple[int, int, int], dtype: torch.dtype, silu: bool) -> None:
    """The error rule, also far from zero; the same bits again, in place, and for an image alone."""
    op = import_module("star_fast.ops.group_norm_silu")
    images, channels, side = size
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(images, side, side, channels, device=DEVICE, generator=generator).permute(0, 3, 1, 2)
    weight, bias = 1 + torch.randn(2, channels, device=DEVICE, generator=generator)
    call = {"x": x, "weight": weight, "bias": bias, "groups": math.gcd(32, channels), "silu": silu}
    contract.check_op(op, "triton", call, (), dtype)
    contract.check_op(op, "triton", call | {"x": x + 300}, (), dtype)
    call = {name: contract.cast(value, dtype) for name, value in call.items()}
    made = op.group_norm_silu(**call)
    assert made.stride() == call["x"].stride()
    contract.check_same_bits(op, "triton", call, ())
    assert torch.equal(made[1:], op.group_norm_silu(**call | {"x": call["x"][1:].clone()}, backend="triton"))
    op.group_norm_silu(**call | {"out": call["x"]}, backend="triton")
    assert torch.equal(call["x"], made)


@pytest.mark.parametrize("preset", PRESETS)
def test_dropout_mask_is_the_cpu_mask(preset: str) -> None:
    op = import_module("star_fast.ops.add_rms_norm")
    call = op.inputs(preset, torch.bfloat16, DEVICE)
    rows, width = call["x"].shape
    _, new_residual = op.add_rms_norm(
        torch.ones_like(call["x"]), None, call["weight"], dropout=0.1, seed=7, backend="triton"
    )
    assert torch.equal((new_residual != 0).cpu(), op.kept(rows, width, 0.1, 7) != 0)


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 100}, {"top_p": 0.9}, {"top_k": 2000, "top_p": 0.9, "temperature": 0.7}]
)
def test_sample_tokens_are_the_reference_tokens(settings: dict[str, Any]) -> None:
    op = import_module("star_fast.ops.sample_tokens")
    call = op.inputs("B", torch.float32, DEVICE)
    try:
        got = op.sample_tokens(**call, **settings, backend="cpp")
    except dispatch.BackendUnavailable as reason:
        pytest.skip(str(reason))
    on_cpu = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    assert torch.equal(got.cpu(), op.sample_tokens(**on_cpu, **settings, backend="reference"))

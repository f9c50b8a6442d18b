"""Every kernel launch of a training step and of a decoding step, made by the ops themselves on tensors that have no
data.

What the compile proof (benchmarks/kernel_resources.py) compiles is read off the launches that come out of here, so a
kernel's argument, tile or alignment cannot differ between the proof and a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from star_fast.ops import dispatch
from star_fast.ops.dispatch import Cost
from star_fast.ops.triton.launching import Call


class Case(NamedTuple):
    """One way to call an op, as training or sampling does."""

    op: str  # the file, ops/<op>.py
    function: str  # in it
    gradients: tuple[str, ...] = ()  # arguments that ask for a gradient
    note: str = ""  # added to the kernels' titles
    change: Callable[[dict[str, Any], torch.dtype], dict[str, Any]] | None = None  # of what `inputs` makes
    capability: int = 80  # the least compute capability that compiles it

    def arguments(self, preset: str, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of the call at a preset's shape; under a FakeTensorMode without data."""
        module = import_module(f"star_fast.ops.{self.op}")
        call = module.inputs(preset, dtype)
        return call if self.change is None else self.change(call, dtype)

    def make(self, arguments: dict[str, Any]) -> None:
        """Call the op and take its gradients."""
        for name in self.gradients:
            arguments[name].requires_grad_()
        out = getattr(import_module(f"star_fast.ops.{self.op}"), self.function)(**arguments, backend="triton")
        if self.gradients:
            outs = out if isinstance(out, tuple) else (out,)
            torch.autograd.grad(outs, [arguments[name] for name in self.gradients], [torch.empty_like(o) for o in outs])


class Described(NamedTuple):
    """One kernel of the table."""

    title: str
    call: Call
    capability: int  # the least that compiles it

    def cost(self) -> Cost:
        """Least bytes and FLOPs of the launch."""
        return self.call.cost()


def _on_device(call: dict[str, Any], cache_dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The position in a tensor, as a step graph has it, and a cache of `cache_dtype`."""
    cache = call["cache"]
    if cache_dtype is not None:
        scale = cache.k.new_empty(cache.k.shape[:3], dtype=torch.float32)
        cache = type(cache)(cache.k.to(cache_dtype), cache.v.to(cache_dtype), scale, torch.empty_like(scale))
    return {**call, "cache": cache, "position": torch.tensor(call["position"])}


def _largest_pictures(call: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """8 images where VQ-16 decodes 256 pixels a side: 128 channels."""
    x = call["x"].new_empty(8, 256, 256, 128).permute(0, 3, 1, 2)
    return {"x": x, "weight": x.new_empty(128), "bias": x.new_empty(128), "groups": 32}


# What a training step, a decoding step and the turning of codes into pixels launch.
MAIN = (
    Case("add_rms_norm", "add_rms_norm", ("x", "residual", "weight")),
    Case("decode_attention", "decode_attention", note=", {dtype} cache", change=lambda call, dtype: _on_device(call)),
    Case(
        "decode_attention",
        "decode_attention",
        note=", int8 cache",
        change=lambda call, dtype: _on_device(call, torch.int8),
    ),
    Case("ema_update", "ema_update", note=", one block"),
    Case("feature_distance", "feature_distance", ("student",)),
    Case("group_norm_silu", "group_norm_silu"),
    Case("linear_cross_entropy", "linear_cross_entropy", ("hidden", "weight")),
    Case("masked_attention", "masked_attention_qkv", ("qkv",)),
    Case("slot_contrast", "slot_contrast", ("anchor",)),
    Case("swiglu", "swiglu", ("w1w3",)),
)
# What else may be launched: by the teacher, training without masks, an 8-bit cache of newer devices, a loop on the
# host, a tokenizer's largest images and its attention.
VARIANTS = (
    Case("add_rms_norm", "add_rms_norm", note=", no dropout", change=lambda call, dtype: {**call, "dropout": 0.0}),
    Case(
        "decode_attention",
        "decode_attention",
        note=", float8_e4m3fn cache",
        change=lambda call, dtype: _on_device(call, torch.float8_e4m3fn),
        capability=89,
    ),
    Case("decode_attention", "decode_attention", note=", {dtype} cache, position of the host"),
    Case("group_norm_silu", "group_norm_silu", note=", 8 images of 256 px", change=_largest_pictures),
    Case("group_norm_silu", "group_norm_silu", note=", no SiLU", change=lambda call, dtype: {**call, "silu": False}),
    Case("masked_attention", "masked_attention_qkv", ("qkv",), ", no mask", lambda call, dtype: {**call, "keep": None}),
    Case(
        "masked_attention",
        "masked_attention_qkv",
        (),
        ", no mask, no gradient",
        lambda call, dtype: {**call, "keep": None},
    ),
)
CASES = MAIN + VARIANTS


class Part(NamedTuple):
    """Cases at a shape and dtype: a part of the compile proof."""

    shape: str  # of ops/shapes.py
    dtype: torch.dtype
    cases: tuple[Case, ...]


# What the table of resources holds: all cases at E 64 and at E 100, the main ones at the other presets, at E 96 and at
# T 576, and in float32 at one shape. No command makes a float16 model, and its kernels are bfloat16's with another
# conversion. Launches of one key share a compilation (benchmarks/kernel_resources.py), as nearly all of XL's and all
# of T 576's do.
PROVED = (
    Part("B", torch.bfloat16, CASES),
    Part("B", torch.float32, MAIN),
    Part("L", torch.bfloat16, MAIN),
    Part("XL", torch.bfloat16, MAIN),
    Part("XL-384", torch.bfloat16, MAIN),
    Part("E96", torch.bfloat16, MAIN),
    Part("3B", torch.bfloat16, CASES),
)


def described(preset: str, dtype: torch.dtype = torch.bfloat16, cases: Iterable[Case] = CASES) -> list[Described]:
    """The distinct kernels that `cases` launch at a preset's shape (ops/shapes.py), in their order."""
    found: dict[str, Described] = {}
    for case in cases:
        with FakeTensorMode(), dispatch.note_launches() as launches:
            case.make(case.arguments(preset, dtype))
        for launch in launches:
            title = launch.call.kernel.title + case.note.format(dtype=str(dtype).removeprefix("torch."))
            found.setdefault(title, Described(title, launch.call, case.capability))
    return list(found.values())

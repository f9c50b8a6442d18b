"""One small call of every op on every backend that this machine has, against the reference in float64: seconds, and no
test suite needed.

The first thing to run on a new GPU (`star-fast doctor --self-test`): a driver, compiler or architecture that a kernel
does not get along with shows here, with the kernel's name, before a model is involved. The suite's tests say the rest:
odd shapes, gradcheck, equal bits.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from star_fast.ops import dispatch
from star_fast.ops.decode_attention import laid_out
from star_fast.ops.kv_cache import KVCache, in_rows

# What an op is differentiated by; ops that are not named here have no gradient.
_GRADIENTS = {
    "add_rms_norm": ("x", "residual", "weight"),
    "masked_attention_qkv": ("qkv",),
    "linear_cross_entropy": ("hidden", "weight"),
    "feature_distance": ("student",),
    "slot_contrast": ("anchor",),
    "all_slots_contrast": ("anchor",),
    "swiglu": ("w1w3",),
}
_EXACT = {"sample_tokens", "int8_linear"}  # every backend gives the same numbers
# Calls beside the usual one: {op: [(what is other, changes to `inputs`, changes to its arguments)]}.
_MORE_CALLS: dict[str, list[tuple[str, dict[str, Any], dict[str, Any]]]] = {
    "masked_attention_qkv": [(", nothing hidden", {}, {"keep": None})],
    "decode_attention": [(", 8-bit cache", {"cache_dtype": torch.int8}, {})],
}
# Error allowed beside twice that of the reference in the same dtype, of the truth's largest entry: one rounding more.
_FLOORS = {torch.float32: 1e-6, torch.bfloat16: 2**-7}
_FLOOR_WHOLE = 2**-11  # an 8-bit cache in blocks is multiplied by whole numbers of 15 bits


class Checked(NamedTuple):
    """What came of one call."""

    op: str
    backend: str
    call: str  # dtype, and what else is special
    passed: bool | None  # None: the backend cannot serve this device or dtype
    told: str  # the largest error as a share of what is allowed, or what went wrong
    seconds: float  # compiling included


def self_test(device: str, shape: str = "unit") -> Iterator[Checked]:
    """Check every op, reference apart, at a shape of ops/shapes.py on "cpu" or "cuda". Whatever a backend does, the
    others are still checked.
    """
    for name in dispatch.op_names():
        for backend in dispatch.module_paths(name):
            for dtype, (label, made, changed) in itertools.product(_FLOORS, [("", {}, {}), *_MORE_CALLS.get(name, [])]):
                since = time.perf_counter()
                try:
                    arguments = {**dispatch.module_of(name).inputs(shape, dtype, device, 0, **made), **changed}
                    passed, told = _check(name, backend, arguments)
                except dispatch.BackendUnavailable as error:
                    passed, told = None, str(error).rpartition("cannot serve this call: ")[2]
                except Exception as error:  # a compiler's, a driver's: whatever it is belongs in the table
                    passed, told = (
                        False,
                        f"{type(error).__name__}: "
                        f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}",
                    )
                yield Checked(
                    name, backend, str(dtype).removeprefix("torch.") + label, passed, told, time.perf_counter() - since
                )


def _check(name: str, backend: str, arguments: dict[str, Any]) -> tuple[bool, str]:
    public, wanted = getattr(dispatch.module_of(name), name), _GRADIENTS.get(name, ())
    suited = {
        name: laid_out(value, backend) if isinstance(value, KVCache) else value for name, value in arguments.items()
    }
    got = _outcome(lambda **given: public(**given, backend=backend), suited, wanted)
    plain = _outcome(lambda **given: public(**given, backend="reference"), arguments, wanted)
    truth = (
        plain
        if name in _EXACT
        else _outcome(lambda **given: public(**given, backend="reference"), _cast(arguments, torch.float64), wanted)
    )
    whole = any(
        isinstance(value, KVCache) and value.layout is not None and value.k_scale is not None
        for value in suited.values()
    )
    worst = 0.0
    for mine, theirs, exact in zip(got, plain, truth, strict=True):
        if not mine.is_floating_point():
            if not torch.equal(mine, theirs):
                return False, f"{int((mine != theirs).sum())} of {mine.numel()} numbers differ"
            continue
        exact = exact.double()
        allowed = 2 * (theirs.double() - exact).abs().max().item() + max(
            _FLOORS[mine.dtype], _FLOOR_WHOLE * whole
        ) * max(exact.abs().max().item(), 1e-30)
        error = (mine.double() - exact).abs().max().item()
        if not error <= allowed:  # NaN too
            return False, f"error {error:.3g}, {allowed:.3g} is allowed"
        worst = max(worst, error / allowed)
    return True, "the same numbers" if name in _EXACT else f"{worst:.2f} of the error that is allowed"


def _outcome(function: Callable[..., Any], arguments: dict[str, Any], wanted: tuple[str, ...]) -> list[Tensor]:
    """What a call gives: outputs, gradients for a fixed cotangent, and what it wrote into its arguments."""
    given = {
        name: _copy(value).requires_grad_() if name in wanted else _copy(value) for name, value in arguments.items()
    }
    outs = _tensors(function(**given))
    gradients: list[Tensor] = []
    if wanted:
        generator = torch.Generator().manual_seed(1)
        cotangents = [
            torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device, out.dtype) for out in outs
        ]
        gradients = list(torch.autograd.grad(outs, [given[name] for name in wanted], cotangents))
    written = [] if wanted else _tensors(list(given.values()))
    return [tensor.detach() for tensor in (*outs, *gradients, *written)]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, KVCache):
        value = in_rows(value)
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _copy(value: Any) -> Any:
    return _each(value, lambda tensor: tensor.detach().clone())


def _cast(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: _each(value, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
        for name, value in arguments.items()
    }


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in it changed, those in lists and in a cache included; a cache's scales are float32
    whatever the model is.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, KVCache):
        k_scale, v_scale = (None if scale is None else scale.clone() for scale in (value.k_scale, value.v_scale))
        return value._replace(k=change(value.k), v=change(value.v), k_scale=k_scale, v_scale=v_scale)
    return type(value)(_each(item, change) for item in value) if isinstance(value, (list, tuple)) else value

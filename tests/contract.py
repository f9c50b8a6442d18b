"""The checks that every op gets, on every backend.

Error rule: truth is the reference in float64. A backend's error may be at most twice the error that the reference makes
in the same dtype, plus a floor. Floors (below) allow for one rounding more: they are stated per dtype, relative to the
truth's largest entry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# One unit in the last place, relative to the largest entry of the truth. bfloat16: Triton's interpreter truncates where
# hardware rounds, hence one whole ulp (2^-7) instead of half.
FLOORS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def cast(value: Any, dtype: torch.dtype) -> Any:
    """`value` with every floating-point tensor in it converted to `dtype`; other values unchanged."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(cast(item, dtype) for item in value)
    return value


def run_with_gradients(
    function: Callable[..., Any], arguments: dict[str, Any], wanted: tuple[str, ...], cotangent_seed: int = 1
) -> tuple[Any, dict[str, Tensor]]:
    """Output of `function(**arguments)` (a tensor or a tuple of tensors) and the gradient of every argument in
    `wanted`, for one fixed random cotangent.
    """
    arguments = {
        name: value.detach().clone(memory_format=torch.preserve_format).requires_grad_() if name in wanted else value
        for name, value in arguments.items()
    }
    out = function(**arguments)
    outs = out if isinstance(out, tuple) else (out,)
    detached = tuple(o.detach() for o in out) if isinstance(out, tuple) else out.detach()
    if not wanted:
        return detached, {}
    generator = torch.Generator().manual_seed(cotangent_seed)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, o.dtype) for o in outs]
    gradients = torch.autograd.grad(outs, [arguments[name] for name in wanted], cotangents)
    return detached, dict(zip(wanted, gradients, strict=True))


def _as_tuple(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def assert_error_rule(what: str, got: Tensor, same_dtype: Tensor, truth: Tensor, floor: float | None = None) -> None:
    """|got - truth| <= 2 |same_dtype - truth| + floor * max|truth|, by the largest entry; the message names the worst
    index and the three values.
    """
    assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    if not truth.numel():
        return
    truth = truth.double().cpu()
    error, allowed_error = (got.double().cpu() - truth).abs(), (same_dtype.double().cpu() - truth).abs().max().item()
    assert torch.isfinite(got.double()).all() or not torch.isfinite(truth).all(), (
        f"{what}: not finite where the truth is"
    )
    floor = FLOORS[got.dtype] if floor is None else floor
    bound = 2 * allowed_error + floor * max(truth.abs().max().item(), 1e-30)
    worst = int(error.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape)) if truth.ndim else ()
    assert error.max().item() <= bound, (
        f"{what}: error {error.max().item():.3e} over the bound {bound:.3e} at {index}: got "
        f"{got.double().cpu()[index].item():.9g}, "
        f"same-dtype reference {same_dtype.double().cpu()[index].item():.9g}, truth {truth[index].item():.9g}"
    )


def check_op(
    op: Any,
    backend: str,
    arguments: dict[str, Any],
    wanted: tuple[str, ...],
    dtype: torch.dtype,
    floor: float | None = None,
) -> None:
    """The error rule for the output and each gradient; dtype, shape and device of the output and of each gradient.

    `op` is the module (ops/x.py) whose public function bears the module's last name; `arguments` are rounded to `dtype`
    first, so that truth and candidate see the same numbers.
    """
    name = op.__name__.rsplit(".", 1)[-1]
    public = getattr(op, name)
    rounded = {key: cast(value, dtype) for key, value in arguments.items()}
    exact = {key: cast(value, torch.float64) for key, value in rounded.items()}
    truth, truth_gradients = run_with_gradients(op.reference, exact, wanted)
    plain, plain_gradients = run_with_gradients(op.reference, rounded, wanted)
    got, gradients = run_with_gradients(lambda **kw: public(**kw, backend=backend), rounded, wanted)
    for i, (g, p, t) in enumerate(zip(*map(_as_tuple, (got, plain, truth)), strict=True)):
        assert g.dtype == p.dtype and g.device == p.device, (
            f"{name}: {g.dtype} on {g.device}, expected {p.dtype} on {p.device}"
        )
        assert_error_rule(f"{name} [{backend}, {dtype}] output {i}", g, p, t, floor)
    for key in wanted:
        assert gradients[key].dtype == rounded[key].dtype and gradients[key].shape == rounded[key].shape, (
            f"{name}: gradient of {key}"
        )
        assert_error_rule(
            f"{name} [{backend}, {dtype}] gradient of {key}",
            gradients[key],
            plain_gradients[key],
            truth_gradients[key],
            floor,
        )


def check_gradcheck(op: Any, backend: str, arguments: dict[str, Any], wanted: tuple[str, ...]) -> None:
    """torch.autograd.gradcheck in float64 of one backend (the reference included)."""
    name = op.__name__.rsplit(".", 1)[-1]
    public = getattr(op, name)
    exact = {key: cast(value, torch.float64) for key, value in arguments.items()}
    leaves = tuple(exact[key].detach().clone().requires_grad_() for key in wanted)
    assert torch.autograd.gradcheck(
        lambda *values: public(**{**exact, **dict(zip(wanted, values, strict=True))}, backend=backend),
        leaves,
        eps=1e-6,
        atol=1e-7,
        rtol=1e-5,
    )


def check_same_bits(op: Any, backend: str, arguments: dict[str, Any], wanted: tuple[str, ...]) -> None:
    """Two runs give the same bits, output and gradients."""
    public = getattr(op, op.__name__.rsplit(".", 1)[-1])
    first, first_gradients = run_with_gradients(lambda **kw: public(**kw, backend=backend), arguments, wanted)
    second, second_gradients = run_with_gradients(lambda **kw: public(**kw, backend=backend), arguments, wanted)
    assert all(torch.equal(a, b) for a, b in zip(_as_tuple(first), _as_tuple(second), strict=True))
    assert all(torch.equal(first_gradients[key], second_gradients[key]) for key in wanted)

"""Which backend each operation would take here, and why not the others: asked of dispatch itself,
with small arguments.
"""

from __future__ import annotations

import copy
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from star_fast.doctor.findings import WITHOUT, Finding
from star_fast.ops import dispatch
from star_fast.ops.decode_attention import laid_out
from star_fast.ops.int8_linear import Int8Weight
from star_fast.ops.kv_cache import KVCache

NONE, ELSEWHERE = "none", "elsewhere"
_NAMES = {"reference": "plain torch", "cpp": "C++", "triton": "Triton", NONE: "nothing can", ELSEWHERE: "CPU alone"}
_SHAPE, _DTYPE = "unit", torch.bfloat16


class Choice(NamedTuple):
    """One operation."""

    op: str
    backend: str  # that a call takes
    # Each other backend, and why not: "" where it could, and comes later in the order or moves more bytes
    others: dict[str, str]


def choices(device: str) -> list[Choice]:
    """Of every operation on "cpu" or "cuda". Nothing is launched on a GPU: fake tensors have shapes and no data. On a
    CPU backends that are asked for run.
    """
    return [_choice(name, device) for name in dispatch.op_names()]


def _choice(name: str, device: str) -> Choice:
    if getattr(dispatch.module_of(name), "ONLY_ON", device) != device:
        return Choice(name, ELSEWHERE, {})
    arguments = _arguments(name, None, device)
    call = getattr(dispatch.module_of(name), name)
    failed: dict[str, str] = {}
    try:
        with FakeTensorMode(), torch.no_grad(), dispatch.record() as recorded:
            call(**_fake(arguments, device))
        taken = recorded[-1].backend
    except dispatch.BackendUnavailable:  # STAR_FAST_BACKEND names one that cannot serve it
        taken = NONE
    except Exception as error:  # of a backend that was taken: the doctor goes on, and tells
        taken, failed = NONE, {"any": _told(error)}
    others = dict(failed)
    for backend in [*dispatch.module_paths(name), "reference"]:
        if backend not in (taken, "reference"):
            others[backend] = _why_not(name, call, backend, device)
    return Choice(name, taken, others)


def _why_not(name: str, call: Any, backend: str, device: str) -> str:
    arguments = _arguments(name, backend, device)
    try:
        if device == "cpu":  # fake tensors would do for a kernel that needs a GPU
            call(**arguments, backend=backend)
        else:
            with FakeTensorMode(), torch.no_grad():
                call(**_fake(arguments, device), backend=backend)
    except dispatch.BackendUnavailable as error:
        return str(error).rpartition("cannot serve this call: ")[2]
    except Exception as error:
        return _told(error)
    return ""


def _arguments(name: str, backend: str | None, device: str) -> dict[str, Any]:
    """A small call's, the cache of decoding as it is laid out for this backend on a CPU; a GPU's read rows."""
    arguments = dispatch.module_of(name).inputs(_SHAPE, _DTYPE, "cpu", 0)
    return {
        key: laid_out(value, backend) if isinstance(value, KVCache) and device == "cpu" else value
        for key, value in arguments.items()
    }


def _told(error: Exception) -> str:
    return f"it fails with {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _fake(value: Any, device: str) -> Any:
    """Tensors without data, on `device`, in place of those in `value`; within a FakeTensorMode."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    if isinstance(value, dict):
        return {name: _fake(item, device) for name, item in value.items()}
    if isinstance(value, Int8Weight):
        made = copy.copy(value)
        vars(made).update(_fake(vars(value), device))
        return made
    if hasattr(value, "_fields"):
        return type(value)(*(_fake(item, device) for item in value))
    return [_fake(item, device) for item in value] if isinstance(value, list) else value


def operations(found: list[Choice]) -> list[Finding]:
    """One line a backend with its operations, then one a reason with those that it keeps from a backend."""
    taken: dict[str, list[str]] = {}
    reasons: dict[tuple[str, str], list[str]] = {}
    for choice in found:
        taken.setdefault(choice.backend, []).append(choice.op)
        for backend, reason in choice.others.items():
            if reason:
                reasons.setdefault((backend, reason), []).append(choice.op)
    asked = os.environ.get("STAR_FAST_BACKEND")
    first = (
        [
            Finding(
                WITHOUT,
                "asked for",
                f"STAR_FAST_BACKEND={asked}: every call takes it or stops",
                "unset STAR_FAST_BACKEND",
            )
        ]
        if asked
        else []
    )
    return [
        *first,
        *(Finding("  ", _NAMES.get(backend, backend), ", ".join(ops)) for backend, ops in taken.items()),
        *(Finding("  ", f"not {backend}", f"{reason}: {', '.join(ops)}") for (backend, reason), ops in reasons.items()),
    ]

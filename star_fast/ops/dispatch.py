"""The registry of ops and the one switch that chooses a backend.

An op is a public function in `star_fast/ops/<name>.py`. Its `reference` is plain torch. Further backends are modules,
loaded by name at first use, that define functions with the op's own arguments:

    run(...)       computes the op (with gradients, where the op has them)
    why_not(...)   None, or one sentence saying why this call cannot be served
    fake(...)      an empty result of the right shape, dtype and device, for FakeTensors
    launches(...)  the kernel launches of the forward pass, as a list of `Launch`
    new_cache(...)     optional, decode_attention: a cache in the layout that `run` reads (see ops/kv_cache.py)
    moved_bytes(...)   optional: bytes that the whole forward path moves, torch's own launches around a kernel included

`fake` and `launches` are for backends whose kernels nobody here launches. A Triton backend has neither: its `run` takes
FakeTensors, and the one place that launches (ops/triton/launching.py) then notes what it would launch.

Choice, at each call: argument `backend=` -> `with use_backend(...)` -> environment STAR_FAST_BACKEND -> the op's order
for the device: the first that can serve the call or, of those that count their bytes, the one that moves the fewest. A
backend that was asked for and cannot serve the call raises with the reason; one that was merely first in the order
gives way to the next, logged once. Every backend meets the same error bound, so giving way never changes the numerics.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the kernel's name and its grid (numbers of programs)."""

    kernel: str
    grid: tuple[int, ...]
    # A Triton launch with its arguments: ops/triton/launching.Call
    call: Any = field(default=None, compare=False, repr=False)


class Cost(NamedTuple):
    """What one call must do at least: bytes read and written (each input and output once) and floating-point
    operations.
    """

    bytes_moved: int
    flops: int


class Recorded(NamedTuple):
    """One op call seen on FakeTensors: which backend was chosen and what it would launch."""

    op: str
    backend: str
    launches: list[Launch]
    moved_bytes: int | None = None  # of the whole path, where the backend counts it


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot serve the call."""


@dataclass
class _Op:
    name: str
    reference: Callable[..., Any]
    modules: dict[str, str]
    order: dict[str, tuple[str, ...]]
    loaded: dict[str, ModuleType | ImportError] = field(default_factory=dict)

    def module(self, backend: str) -> ModuleType | ImportError:
        """A backend's module, or why it cannot be imported: asked of Python once, since every call asks."""
        if backend not in self.loaded:
            try:
                self.loaded[backend] = importlib.import_module(self.modules[backend])
            except ImportError as error:
                self.loaded[backend] = error
        return self.loaded[backend]


_OPS: dict[str, _Op] = {}
_override: tuple[str, dict[str, str]] | None = None  # a plain global: torch.compile traces it, a ContextVar it does not
_gave_way: set[tuple[str, str, str]] = set()
_recorder: list[Recorded] | None = None
_noted: list[Launch] | None = None


def register(
    name: str,
    reference: Callable[..., Any],
    *,
    modules: dict[str, str] | None = None,
    order: dict[str, tuple[str, ...]] | None = None,
) -> None:
    """Make an op known: `modules` maps backend names to module paths, `order` lists per device type what to try before
    the reference.
    """
    _OPS[name] = _Op(name, reference, modules or {}, order or {})


def op_names() -> list[str]:
    """Names of all registered ops, in order of registration."""
    return list(_OPS)


def backends(name: str) -> list[str]:
    """Names of an op's backends, the reference last."""
    return [*_OPS[name].modules, "reference"]


def module_of(name: str) -> ModuleType:
    """The module of an op: its public function, reference, `inputs` and `cost`."""
    return importlib.import_module(_OPS[name].reference.__module__)


def module_paths(name: str) -> dict[str, str]:
    """Where an op's backends live: backend name -> module path, the reference left out."""
    return dict(_OPS[name].modules)


@contextlib.contextmanager
def use_backend(backend: str, **of_op: str) -> Iterator[None]:
    """Within the block every op runs on `backend`, an op named in `of_op` on its own; an op without a backend of that
    name raises.

    Example: use_backend("triton", sample_tokens="cpp").
    """
    global _override
    before, _override = _override, (backend, of_op)
    try:
        yield
    finally:
        _override = before


class _AsThen:
    """A block, entered any number of times, with the choice that held when it was made."""

    def __init__(self) -> None:
        self.then = _override
        self.before: list[tuple[str, dict[str, str]] | None] = []

    def __enter__(self) -> None:
        global _override
        self.before.append(_override)
        _override = self.then

    def __exit__(self, *error: object) -> None:
        global _override
        _override = self.before.pop()


def same_choice_again() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """`context_fn` of torch.utils.checkpoint: what backward computes anew, often after the block of `use_backend`,
    chooses as the first time.
    """
    return contextlib.nullcontext(), _AsThen()


@contextlib.contextmanager
def record() -> Iterator[list[Recorded]]:
    """Within the block, calls on FakeTensors are noted: yields the growing list of `Recorded`."""
    global _recorder
    before, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = before


@contextlib.contextmanager
def note_launches() -> Iterator[list[Launch]]:
    """Within the block, Triton launches are noted, real or on FakeTensors: yields the growing list."""
    global _noted
    before, _noted = _noted, []
    try:
        yield _noted
    finally:
        if before is not None:
            before.extend(_noted)
        _noted = before


def noting() -> bool:
    """Whether somebody wants to know of launches."""
    return _noted is not None


def note(launch: Launch) -> None:
    """Tell of a launch. Called by ops/triton/launching.py."""
    assert _noted is not None, "asked only where noting()"
    _noted.append(launch)


def call(
    name: str, device: torch.device, args: tuple, kwargs: dict[str, Any] | None = None, *, backend: str | None = None
) -> Any:
    """Run op `name` on the backend chosen for this call. Called by the public functions only, after they checked their
    arguments.

    Raises:
        BackendUnavailable: `backend`, `use_backend` or STAR_FAST_BACKEND names one that does not exist or cannot serve
            the call.
    """
    op, kwargs = _OPS[name], kwargs or {}
    asked = _asked(name, backend)
    if asked is not None:
        return _run(op, asked, *_usable(op, asked, args, kwargs), args, kwargs)
    return _run(op, *_first_or_cheapest(op, device, args, kwargs), args, kwargs)


def module_for(name: str, device: torch.device, *, backend: str | None = None) -> ModuleType | None:
    """The module that calls on this device will go to first: of the backend asked for, else the first of the op's order
    that is there. None: the reference.

    For data that is laid out before the first call. A backend asked for that does not exist is the call's to report.
    """
    op, asked = _OPS[name], _asked(name, backend)
    for candidate in op.order.get(device.type, ()) if asked is None else (asked,):
        module = op.module(candidate) if candidate in op.modules else None
        if isinstance(module, ModuleType):
            return module
    return None


def _asked(name: str, backend: str | None) -> str | None:
    """The backend that the call, a block around it or the environment names."""
    overridden = _override[1].get(name, _override[0]) if _override is not None else None
    return backend or overridden or os.environ.get("STAR_FAST_BACKEND")


def _first_or_cheapest(
    op: _Op, device: torch.device, args: tuple, kwargs: dict[str, Any]
) -> tuple[str, ModuleType | None]:
    """Of the op's order the first backend that serves the call; of several that count their bytes the cheapest, the
    earlier where equal.
    """
    best: tuple[str, ModuleType | None] = ("reference", None)
    fewest = None
    for candidate in op.order.get(device.type, ()):
        module, reason = _try(op, candidate, args, kwargs)
        if module is not None and reason is None:
            if not hasattr(module, "moved_bytes"):
                return (candidate, module) if fewest is None else best
            moved = module.moved_bytes(*args, **kwargs)
            if fewest is None or moved < fewest:
                best, fewest = (candidate, module), moved
        elif reason is not None and (op.name, candidate, reason) not in _gave_way:
            _gave_way.add((op.name, candidate, reason))
            log.info("%s: backend %s gives way: %s", op.name, candidate, reason)
    return best


def _try(op: _Op, backend: str, args: tuple, kwargs: dict[str, Any]) -> tuple[ModuleType | None, str | None]:
    module = op.module(backend)
    if isinstance(module, ImportError):
        return None, f"{op.modules[backend]} cannot be imported: {module}"
    return module, module.why_not(*args, **kwargs)


def _usable(op: _Op, backend: str, args: tuple, kwargs: dict[str, Any]) -> tuple[ModuleType | None]:
    if backend == "reference":
        return (None,)
    if backend not in op.modules:
        raise BackendUnavailable(f"{op.name}: no backend {backend!r}; it has {', '.join(backends(op.name))}")
    module, reason = _try(op, backend, args, kwargs)
    if reason is not None:
        raise BackendUnavailable(f"{op.name}: backend {backend!r} was asked for and cannot serve this call: {reason}")
    return (module,)


def _run(op: _Op, backend: str, module: ModuleType | None, args: tuple, kwargs: dict[str, Any]) -> Any:
    if not _fake(args[0]):
        return (op.reference if module is None else module.run)(*args, **kwargs)
    if module is None:
        launches, result = [], op.reference(*args, **kwargs)
    elif hasattr(module, "fake"):
        launches, result = module.launches(*args, **kwargs), module.fake(*args, **kwargs)
    else:
        with note_launches() as launches:
            result = module.run(*args, **kwargs)
    if _recorder is not None:
        moved = module.moved_bytes(*args, **kwargs) if module is not None and hasattr(module, "moved_bytes") else None
        _recorder.append(Recorded(op.name, backend, launches, moved))
    return result


def _fake(first: Any) -> bool:
    """Whether a call is on FakeTensors, told by its first argument, a tensor or a list of some: a call has all its
    data, or a trace has none of it.
    """
    return isinstance(first[0] if isinstance(first, list) else first, FakeTensor)

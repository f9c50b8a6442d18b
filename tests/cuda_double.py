"""CUDA without a GPU: tensors that say "cuda:N" and hold real numbers, streams whose order is checked, graphs that
replay.

Within `CudaDouble()`, code for CUDA runs as it is:

- An operator runs on the CPU at once. Its tensors must share one device.
- Streams: nothing runs late, but every access is held against what its stream is known to have waited for (vector
  clocks), so a missing wait raises `Race` whatever the timing. Memory freed while another stream may still use it
  raises too, unless `record_stream` was called.
- A capture notes each operator and kernel launch with the very storages it met, and undoes what they wrote: as on a GPU
  nothing has happened when it ends. `replay` runs the very same operators on the very same storages, no line of Python
  in between. What was freed since is gone: outside memory raises `Dangling`, memory of the graph's own pool holds
  garbage (0xff) again before each replay.
- Kernel launches need their tensors' device to be the current one, captures record on the current device: else
  `WrongDevice`.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from importlib import import_module
from types import TracebackType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from star_fast.ops import error_flag
from star_fast.ops.triton import launching
from tests.cuda_order import HOST, CaptureBroken, Clock, Event, Graph, Memory, Node, Race, Stream, WrongDevice, join
from tests.cuda_tensors import ON_CUDA_ALONE, Calls, DeviceTensor

needs_no_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the double, and Triton's interpreter in it, stand in for a GPU that is not there"
)

DEVICES = 2


class CudaDouble(TorchDispatchMode):
    """See the head of this file."""

    def __init__(self) -> None:
        super().__init__()
        self.current, self.capturing, self.target, self.sync_debug = 0, None, None, 0
        self.host: Clock = {HOST: 0}
        self.streams: list[Stream] = []
        self.faults: list[str] = []
        self.launches: list[tuple[str, int]] = []  # kernels in order, and the current device at each
        self.host_memory: dict[int, Memory] = {}
        self.Stream, self.Event, self.Graph = (
            type(kind.__name__, (kind,), {"double": self}) for kind in (Stream, Event, Graph)
        )
        self.default = [self.Stream(index) for index in range(DEVICES)]
        self.chosen = list(self.default)

    # The parts of torch.cuda.

    def device(self, device: Any = None) -> torch.device:
        if device is None or (isinstance(device, (str, torch.device)) and torch.device(device).index is None):
            return torch.device("cuda", self.current)
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)

    def current_stream(self, device: Any = None) -> Stream:
        return self.chosen[self.device(device).index]

    @contextlib.contextmanager
    def on(self, device: Any) -> Iterator[None]:
        before, self.current = self.current, self.device(device).index
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        index = stream.device.index
        before, self.chosen[index] = self.chosen[index], stream
        try:
            with self.on(stream.device):
                yield
        finally:
            self.chosen[index] = before

    def synchronize(self, device: Any = None) -> None:
        self.not_in_capture("synchronize")
        for stream in self.streams:
            if stream.device == self.device(device):
                join(self.host, stream.clock)

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self.sync_debug = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)

    def not_in_capture(self, what: str) -> None:
        if self.capturing is not None:
            raise CaptureBroken(f"{what}: the host waits for the device during a capture")

    def waits(self, what: str) -> None:
        """An operator that makes the host wait: not in a capture, nor where torch's debug mode forbids it (which does
        not see an explicit synchronize).
        """
        self.not_in_capture(what)
        if self.sync_debug == 2:
            raise RuntimeError("called a synchronizing CUDA operation")

    @contextlib.contextmanager
    def graph(self, graph: Graph, pool: Any = None, stream: Stream | None = None) -> Iterator[None]:
        self.synchronize()
        graph.device = self.device()
        with self.stream(stream or self.Stream(graph.device)):
            self.capturing = graph
            try:
                yield
            finally:
                self.capturing = None
                with self.plainly():
                    for memory, contents in graph.saved.items():
                        memory.bytes().copy_(contents)
                    for _, contents in graph.own:
                        contents.fill_(255)
                graph.saved = {}

    @contextlib.contextmanager
    def plainly(self) -> Iterator[None]:
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            yield

    # What an operator or a launch does.

    def use(self, memory: Memory, device: torch.device, writes: bool, what: str) -> None:
        stream = self.current_stream(device)
        join(stream.clock, self.host)
        stream.clock[stream.number] = stream.clock.get(stream.number, 0) + 1
        memory.use(stream.number, stream.clock, writes, what)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunction():
            return self.operator(func, args, kwargs)

    def operator(self, func: Any, args: tuple, kwargs: dict) -> Any:
        given, run = (
            [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)],
            ON_CUDA_ALONE.get(func, func),
        )
        on_device = [x for x in given if isinstance(x, DeviceTensor)]
        asked = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        target = asked if asked is not None and asked.type == "cuda" else self.target
        if not on_device and target is None:
            return self.on_host(func, args, kwargs, given)
        device = on_device[0].device if on_device else target
        if any(x.device != device for x in on_device):
            raise WrongDevice(f"{func}: tensors on {[str(x.device) for x in on_device]}")
        to_host = bool(on_device) and asked is not None and asked.type == "cpu"
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        written = {
            id(value)
            for value, argument in self.named(func, args, kwargs)
            if argument.alias_info is not None and argument.alias_info.is_write
        }
        inner_args, inner_kwargs = tree_map_only(DeviceTensor, lambda x: x.inner, (args, kwargs))
        plain = [x for x in given if not isinstance(x, DeviceTensor)]
        if to_host or any(id(x) in written for x in plain):  # device to host
            return self.to_host(func, args, inner_args, inner_kwargs, on_device, plain)
        if self.capturing is not None:
            if any(x.ndim for x in plain):
                raise CaptureBroken(f"{func}: reads host memory during a capture")
            inner_args, inner_kwargs = tree_map_only(
                Tensor, lambda x: x.clone() if any(x is y for y in plain) else x, (inner_args, inner_kwargs)
            )
        for x in plain:
            self.read_by_host(x, func)
        self.before(on_device, written, str(func))
        result = run(*inner_args, **inner_kwargs)
        by_inner, by_storage = (
            {id(x.inner): x for x in on_device},
            {x.inner.untyped_storage()._cdata: x.memory for x in on_device},
        )
        if any(isinstance(x, (bool, int, float)) for x in tree_flatten(result)[0]):
            self.waits(str(func))
            join(self.host, self.current_stream(device).clock)
            self.access(on_device, set(), device, str(func))
            return result
        fresh: list[Tensor] = []

        def wrapped(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if id(x) in by_inner:
                return by_inner[id(x)]
            memory = by_storage.get(x.untyped_storage()._cdata)
            if memory is None:
                fresh.append(x)
                memory = self.allocate(x, str(func), device)
            return DeviceTensor(x, memory, device)

        out = tree_map(wrapped, result)
        if (fresh or written) and "empty" not in str(func):  # taking memory is no work: a replay does not repeat it
            new = [x for x in tree_flatten(out)[0] if isinstance(x, DeviceTensor)]
            self.after(
                str(func),
                lambda: run(*inner_args, **inner_kwargs),
                on_device,
                new,
                written | {id(x) for x in new},
                fresh,
                device,
            )
        return out

    def named(self, func: Any, args: tuple, kwargs: dict) -> Iterator[tuple[Any, Any]]:
        """Each tensor with the schema's argument it stands for; those of a list one by one."""
        schema = func._schema.arguments
        for argument, value in [
            *zip(schema, args, strict=False),
            *((a, kwargs[a.name]) for a in schema if a.name in kwargs),
        ]:
            for x in tree_flatten(value)[0]:
                if isinstance(x, Tensor):
                    yield x, argument

    def before(self, tensors: list[DeviceTensor], written: set[int], what: str) -> None:
        """During a capture: the right stream and device, and a copy of what will be written, to undo it."""
        if self.capturing is None:
            return
        for x in tensors:
            if x.device != self.capturing.device:
                raise WrongDevice(f"{what}: on {x.device}, while {self.capturing.device} captures")
            if x.memory.graph is not self.capturing and id(x) in written and x.memory not in self.capturing.saved:
                self.capturing.saved[x.memory] = x.memory.bytes().clone()

    def after(
        self,
        what: str,
        run: Callable[[], Any],
        used: list[DeviceTensor],
        new: list[DeviceTensor],
        written: set[int],
        fresh: list[Tensor],
        device: torch.device,
    ) -> None:
        if self.capturing is None:
            self.access([*used, *new], written, device, what)
            return
        outside = [(weakref.ref(x.memory), id(x) in written) for x in used if x.memory.graph is not self.capturing]
        self.capturing.nodes.append(Node(what, run, fresh, outside))

    def access(self, tensors: list[DeviceTensor], written: set[int], device: torch.device, what: str) -> None:
        for x in tensors:
            self.use(x.memory, device, id(x) in written, what)

    def allocate(self, inner: Tensor, origin: str, device: torch.device) -> Memory:
        memory = Memory(self, inner, origin, self.current_stream(device), self.capturing)
        if self.capturing is not None:
            self.capturing.own.append((weakref.ref(memory), memory.bytes()))
        return memory

    def upload(self, x: Tensor, device: torch.device) -> DeviceTensor:
        """A copy of a host tensor on a device."""
        self.waits("a copy from the host")
        self.read_by_host(x, "a copy to the device")
        with self.plainly():
            made = self.place(x.detach().clone(memory_format=torch.preserve_format), device)
        self.access([made], {id(made)}, device, "a copy from the host")
        join(self.host, self.current_stream(device).clock)  # from memory that is not pinned: the host waits
        return made

    def place(self, inner: Tensor, device: torch.device) -> DeviceTensor:
        """A device tensor whose memory is that of `inner`."""
        return DeviceTensor(inner, self.allocate(inner, "a copy from the host", device), device)

    def on_host(self, func: Any, args: tuple, kwargs: dict, given: list[Tensor]) -> Any:
        for x in given:
            self.read_by_host(x, func)
        return func(*args, **kwargs)

    def read_by_host(self, x: Tensor, what: Any) -> None:
        memory = self.host_memory.get(x.untyped_storage()._cdata)
        if memory is not None:
            memory.use(HOST, self.host, False, str(what))

    def to_host(
        self,
        func: Any,
        args: tuple,
        inner_args: tuple,
        inner_kwargs: dict,
        on_device: list[DeviceTensor],
        plain: list[Tensor],
    ) -> Any:
        """A copy to host memory: the host waits for the stream, unless it said non_blocking."""
        device = on_device[0].device
        waits = not (inner_kwargs.get("non_blocking") or (len(inner_args) > 2 and inner_args[2] is True))
        (self.waits if waits else self.not_in_capture)(str(func))
        self.access(on_device, set(), device, str(func))
        result = func(*inner_args, **inner_kwargs)
        if waits:
            join(self.host, self.current_stream(device).clock)
        else:
            target = plain[0] if plain else result
            memory = self.host_memory.setdefault(target.untyped_storage()._cdata, Memory(self, target, str(func), None))
            self.use(memory, device, True, str(func))
        return result

    def start(self, function: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """In place of launching.start: the kernel in Triton's interpreter."""
        tensors = [x for x in arguments if isinstance(x, DeviceTensor)]
        self.launches.append((function.__name__, self.current))
        if not tensors or any(x.device.index != self.current for x in tensors):
            raise WrongDevice(
                f"{function.__name__} starts on cuda:{self.current}, its tensors are on "
                f"{[str(x.device) for x in tensors]}"
            )
        device, inner = self.device(), tuple(x.inner if isinstance(x, DeviceTensor) else x for x in arguments)
        self.before(tensors, {id(x) for x in tensors}, function.__name__)
        with self.plainly():
            old = [x.inner.clone() for x in tensors]
            function[grid](*inner, **options)
            written = {id(x) for x, before in zip(tensors, old, strict=True) if not same(x.inner, before)}
        if self.capturing is not None:
            written = {id(x) for x in tensors}
        self.after(function.__name__, lambda: function[grid](*inner, **options), tensors, [], written, [], device)

    def __enter__(self) -> CudaDouble:
        # As FakeTensorMode does: torch's own device guard would ask a driver that is not there
        torch._C._ensureCUDADeviceGuardSet()
        self._patches = contextlib.ExitStack()
        patch = self._patches.enter_context
        for attribute, value in {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: DEVICES,
            "current_device": lambda: self.current,
            "set_device": lambda device: setattr(self, "current", self.device(device).index),
            "device": self.on,
            "stream": self.stream,
            "Stream": self.Stream,
            "Event": self.Event,
            "CUDAGraph": self.Graph,
            "graph": self.graph,
            "graph_pool_handle": object,
            "current_stream": self.current_stream,
            "synchronize": self.synchronize,
            "set_sync_debug_mode": self.set_sync_debug_mode,
            "get_sync_debug_mode": lambda: self.sync_debug,
            "is_current_stream_capturing": lambda: self.capturing is not None,
            "get_device_capability": lambda device=None: (9, 0),
        }.items():
            patch(mock.patch.object(torch.cuda, attribute, value))
        patch(mock.patch.object(launching, "start", self.start))
        patch(mock.patch.object(error_flag, "_flags", {}))
        patch(mock.patch.object(import_module("star_fast.ops.sample_tokens"), "_bad_rows", {}))
        patch(mock.patch.object(torch.__future__, "_overwrite_module_params_on_conversion", True))
        patch(Calls(self))
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._patches.close()
        if kind is None and self.faults:
            raise Race("; ".join(self.faults))


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits."""
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))

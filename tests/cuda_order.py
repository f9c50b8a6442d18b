"""The parts of the CUDA double (tests/cuda_double.py) that order work: memory with its users,
streams, events, graphs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

if TYPE_CHECKING:
    from tests.cuda_double import CudaDouble

HOST = -1  # the host's place in a clock


class Race(AssertionError):
    """Two streams, or a stream and the host, use memory in an order that nothing enforces."""


class Dangling(AssertionError):
    """A graph uses memory that was freed after its capture."""


class WrongDevice(AssertionError):
    """A launch or capture on another device than its tensors'."""


class CaptureBroken(RuntimeError):
    """Something that a CUDA graph cannot hold: the host waits, or another stream is used."""


Clock = dict[int, int]  # agent -> how many of its acts are known to be over


def join(clock: Clock, other: Clock) -> None:
    for agent, time in other.items():
        clock[agent] = max(clock.get(agent, 0), time)


class Memory:
    """One allocation, and who used it last."""

    def __init__(
        self, double: CudaDouble, inner: Tensor, origin: str, stream: Stream | None, graph: Graph | None = None
    ) -> None:
        self.inner, self.origin, self.stream, self.graph = inner, origin, stream, graph
        self.written: tuple[int, int] | None = None
        self.read: Clock = {}
        self.recorded: set[int] = set()
        self._double = weakref.ref(double)

    def bytes(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8).set_(self.inner.untyped_storage())

    def record(self, stream: Stream) -> None:
        """Tensor.record_stream."""
        self.recorded.add(stream.number)

    def use(self, agent: int, clock: Clock, writes: bool, what: str) -> None:
        """Hold an access by `agent` against what it knows, and note it."""
        before = [*([self.written] if self.written else []), *(self.read.items() if writes else [])]
        for other, time in before:
            if clock.get(other, 0) < time:
                raise Race(
                    f"{what} by {name(agent)} uses memory made by {self.origin} while {name(other)} may not be "
                    "done with it: a wait is missing"
                )
        if writes:
            self.written, self.read = (agent, clock[agent]), {}
        else:
            self.read[agent] = clock[agent]

    def __del__(self) -> None:
        double = self._double()
        if double is None or self.stream is None or self.graph is not None:
            return
        known = dict(self.stream.clock)
        join(known, double.host)  # who frees after waiting may
        for agent, time in [*([self.written] if self.written else []), *self.read.items()]:
            if agent not in (self.stream.number, HOST) and agent not in self.recorded and known.get(agent, 0) < time:
                double.faults.append(
                    f"memory made by {self.origin} on {name(self.stream.number)} is freed while {name(agent)} may "
                    "still use it"
                )


def name(agent: int) -> str:
    return "the host" if agent == HOST else f"stream {agent}"


class Stream:
    """torch.cuda.Stream."""

    double: CudaDouble

    def __init__(self, device: Any = None) -> None:
        self.device = self.double.device(device)
        self.number, self.clock = len(self.double.streams), {}
        self.double.streams.append(self)

    def wait_stream(self, other: Stream) -> None:
        join(self.clock, other.clock)

    def synchronize(self) -> None:
        self.double.not_in_capture("synchronize")
        join(self.double.host, self.clock)


class Event:
    """torch.cuda.Event."""

    double: CudaDouble

    def __init__(self, enable_timing: bool = False) -> None:
        self.enable_timing, self.time_s = enable_timing, None

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from one record to the other; raises as torch does where one was not to keep time, or is not
        over.
        """
        if not (self.enable_timing and end.enable_timing) or self.time_s is None or end.time_s is None:
            raise ValueError(
                "both events must be made with enable_timing and be recorded before the time between them is asked for"
            )
        return 1e3 * (end.time_s - self.time_s)

    def record(self, stream: Stream | None = None) -> None:
        self.time_s = perf_counter()
        self.clock = dict((stream or self.double.current_stream()).clock)

    def synchronize(self) -> None:
        self.double.not_in_capture("synchronize")
        join(self.double.host, self.clock)


@dataclass
class Node:
    """One operator or launch of a graph."""

    what: str
    run: Callable[[], Any]  # on the inner tensors
    outputs: list[Tensor]  # fresh memory that its results go to
    uses: list[tuple[weakref.ref[Memory], bool]]  # outside memory, and whether it is written


class Graph:
    """torch.cuda.CUDAGraph."""

    double: CudaDouble

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.saved: dict[Memory, Tensor] = {}
        self.own: list[tuple[weakref.ref[Memory], Tensor]] = []  # memory of the pool, and its bytes

    def replay(self) -> None:
        """Run what was captured, on the device of the capture."""
        double = self.double
        with double.plainly():
            for memory, contents in self.own:
                if memory() is None:
                    contents.fill_(255)
            for node in self.nodes:
                for reference, writes in node.uses:
                    memory = reference()
                    if memory is None:
                        raise Dangling(f"replay: {node.what} uses memory that was freed after the capture")
                    double.use(memory, self.device, writes, f"replay of {node.what}")
                results = (
                    [x for x in tree_flatten(node.run())[0] if isinstance(x, Tensor)] if node.outputs else node.run()
                )
                for output, result in zip(node.outputs, results if node.outputs else [], strict=True):
                    output.copy_(result)

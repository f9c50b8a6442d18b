"""The decoding step as a CUDA graph: whatever changes from step to step lives on the device, so one launch replays the
whole step. What a step computes is the decoder's (`Decoder.advance`); here it is captured and replayed.

The first step, whose input is the class, is a graph of its own, captured once as the later ones are. Made outside it is
297 launches (XL) through Python, some 4 ms at 6 us for torch's products and 20 for our kernels, where the step's
kernels take 1 ms for 16 rows: as much as four more positions.

On an H100 a step of B with 32 images takes 0.57 ms on average (benchmarks/results/h100.md). Elsewhere it is traced on
fake CUDA tensors by tests/generation/test_device_step.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from star_fast.generation.sampling import Sampling
from star_fast.ops import error_flag
from star_fast.ops.on_device import on_device
from star_fast.ops.sample_tokens import bad_rows_flag

WARM_UP_RUNS = 2  # compile the kernels, then run once as captured


@dataclass
class DeviceState:
    """What a step reads and writes, at fixed addresses on the device."""

    label: Tensor  # (B,) int64, the class of each image
    tokens: Tensor  # (B,) int64, drawn last
    image_index: Tensor  # (B,) int64
    position: Tensor  # 0-d int64, of the next draw
    seed: Tensor  # 0-d int64
    codes_TB: Tensor  # (T, B) int64, all draws

    @classmethod
    def empty(cls, batch: int, positions: int, device: torch.device) -> DeviceState:
        """State of a batch of `batch` images, at position 0."""

        def numbers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        return cls(numbers(batch), numbers(batch), numbers(batch), numbers(), numbers(), numbers(positions, batch))

    def begin(self, label: Tensor, image_index: Tensor, seed: int) -> None:
        """Back to position 0 for another batch."""
        self.label.copy_(label)
        self.image_index.copy_(image_index)
        self.seed.fill_(seed)
        self.position.zero_()

    def keep_tokens(self) -> None:
        """Store the tokens just drawn and move on to the next position."""
        self.codes_TB.index_copy_(0, self.position.view(1), self.tokens.view(1, -1))
        self.position.add_(1)


# (state, sampling, guided, first): one step. It reads nothing back to the host
Advance = Callable[[DeviceState, Sampling, bool, bool], None]


class StepGraphs:
    """The states and captured steps of one Decoder, one for each batch size and set of sampling numbers that it met."""

    def __init__(self) -> None:
        self._states: dict[int, DeviceState] = {}
        self._graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self._pool: torch.cuda._POOL_HANDLE | None = None

    def state(self, batch: int, positions: int, device: torch.device) -> DeviceState:
        """The state of this batch size, allocated at its first use."""
        if batch not in self._states:
            self._states[batch] = DeviceState.empty(batch, positions, device)
        return self._states[batch]

    def step(
        self, advance: Advance, state: DeviceState, sampling: Sampling, guided: bool, first: bool = False
    ) -> Callable[[], None]:
        """A function that replays `advance`, always the same decoder's. Captures it at first use, which overwrites
        cache positions 0 and 1: call before decoding a batch.
        """
        key = (
            len(state.tokens),
            first,
            guided,
            sampling.guidance if guided else 1.0,
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
        )
        if key not in self._graphs:
            with on_device(state.tokens.device):  # torch captures on the current device, whatever the tensors' device
                self._graphs[key] = self._capture(advance, state, sampling, guided, first)
        return self._graphs[key].replay

    def _capture(
        self, advance: Advance, state: DeviceState, sampling: Sampling, guided: bool, first: bool
    ) -> torch.cuda.CUDAGraph:
        device = state.tokens.device
        bad_rows_flag(device)  # both flags are allocated outside the graph, which keeps their addresses
        error_flag.flag(device)
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP_RUNS):
                state.position.fill_(0 if first else 1)
                advance(state, sampling, guided, first)
            state.position.fill_(0 if first else 1)
        torch.cuda.current_stream(device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            advance(state, sampling, guided, first)
        return graph

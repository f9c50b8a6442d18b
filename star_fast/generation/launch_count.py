"""Kernel launches of one decoding step, counted without a GPU: the step is traced on fake CUDA tensors, which have
shapes and no data.

Eight a block, and no fewer without a product of our own: four products by cuBLAS, and one kernel of ours between each
two of them (norm, attention, norm, gate), so that no two of ours are neighbours that could be joined. A product that
takes the norm or the gate along on its way in would save three
launches a block: 0.2 ms of the 1.0 ms that a step of XL takes for 16 rows at 2 us a launch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from star_fast.config import ModelConfig
from star_fast.generation.decoder import Decoder
from star_fast.generation.sampling import Sampling
from star_fast.generation.step_graph import DeviceState
from star_fast.model.transformer import Transformer
from star_fast.ops import dispatch

# What torch does without launching a kernel: views, and memory taken.
_NO_LAUNCH = {
    "view",
    "_unsafe_view",
    "reshape",
    "t",
    "transpose",
    "permute",
    "expand",
    "unsqueeze",
    "squeeze",
    "select",
    "slice",
    "split",
    "unbind",
    "chunk",
    "as_strided",
    "alias",
    "detach",
    "unflatten",
    "flatten",
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
}


class StepLaunches(NamedTuple):
    """Launches of one step after the first."""

    by_kernel: dict[str, int]  # torch operators by their aten name, kernels of ops by their own
    blocks: int  # transformer blocks, L
    per_block: float  # launches between the first norm and the last block's output, over L
    outside: int  # embedding, last norm, guidance, output matrix, draw, bookkeeping
    backends: dict[str, str]  # the backend that each op chose

    @property
    def total(self) -> int:
        """All launches of a step."""
        return sum(self.by_kernel.values())


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and name not in _NO_LAUNCH:
            self.counts[f"aten.{name}"] += 1
        return func(*args, **(kwargs or {}))


def step_launches(
    config: ModelConfig,
    batch: int = 8,
    sampling: Sampling | None = None,
    cache_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> StepLaunches:
    """Trace one step of `batch` images (guidance 2.0, top-k 2000 unless told) on a fake GPU. Two depths are traced:
    their difference is one block's cost.
    """
    sampling = sampling or Sampling(guidance=2.0, top_k=2000)
    shallow, deep = (
        _trace(replace(config, blocks=blocks), batch, sampling, cache_dtype, dtype)[0] for blocks in (1, 2)
    )
    all_blocks, backends = _trace(config, batch, sampling, cache_dtype, dtype)
    per_block = deep.total() - shallow.total()
    return StepLaunches(
        dict(all_blocks), config.blocks, per_block, all_blocks.total() - config.blocks * per_block, backends
    )


def _trace(
    config: ModelConfig, batch: int, sampling: Sampling, cache_dtype: torch.dtype | None, dtype: torch.dtype
) -> tuple[Counter[str], dict[str, str]]:
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        model = _born_in(dtype, config)
        decoder = Decoder(model, 2 * batch if sampling.guided else batch, cache_dtype)
        state = DeviceState.empty(batch, config.positions, decoder.device)
        with dispatch.record() as recorded, _Counting() as counting:
            decoder.advance(state, sampling, sampling.guided)
    for call in recorded:
        counting.counts.update(launch.kernel for launch in call.launches)
    return counting.counts, {call.op: call.backend for call in recorded}


def _born_in(dtype: torch.dtype, config: ModelConfig) -> Transformer:
    """A model whose parameters are made in `dtype`: fake ones cannot be cast afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return Transformer(config).eval()
    finally:
        torch.set_default_dtype(before)

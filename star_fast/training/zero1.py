"""ZeRO-1 with float32 gradients and no waste: what replaces the step of DeepSpeed's BF16_Optimizer, whose layout it
keeps.

DeepSpeed's own step reads the gradient norm back to the host, scans and clips the gradients in passes of their own,
zeroes their buffers and reduces them only after backward. Here a gradient goes straight into its float32 place as
backward makes it and travels while backward goes on; norm, clipping and the check for infinities stay on the device,
fused into AdamW; the new weights travel while the teacher is averaged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# 128 MiB of float32: large enough for full bandwidth, small enough that most travel before backward ends
_BUCKET_ELEMENTS = 2**25


def take_over(optimizer: Any) -> None:
    """Give DeepSpeed's BF16_Optimizer the steps below. Other optimizers stay as they are."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    if type(optimizer) is not BF16_Optimizer:
        return
    optimizer.__class__ = type("Zero1Optimizer", (_Steps, BF16_Optimizer), {})
    optimizer.prepare()


def global_norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean norm of all of them, 0-d float32 on their device."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)))


def scale_in_step(
    optimizer: torch.optim.Optimizer, gradients: list[Tensor], norm: Tensor, clip: float, ranks: int = 1
) -> None:
    """Let the optimizer's next step divide its `gradients` by ranks * max(1, (norm + 1e-6) / clip), and skip itself if
    `norm` is not finite.

    Args:
        norm: of the gradients' mean over ranks, 0-d. clip: largest norm; 0: none. ranks: over how many the gradients
            are summed.
    """
    scale = ((norm + 1e-6) / clip).clamp(min=1.0).mul_(ranks) if clip else torch.full_like(norm, ranks)
    if "fused" in optimizer.defaults:  # torch's AdamW
        fused: Any = optimizer  # whose type does not name the two
        fused.grad_scale, fused.found_inf = scale, (~torch.isfinite(norm)).float()
    else:  # apex's FusedAdam takes no such tensors: a step that is not finite shows in the weights
        torch._foreach_div_(gradients, scale)


class _Steps:
    """Methods laid over BF16_Optimizer's.

    Per parameter group DeepSpeed gives: `fp32_groups_gradients_flat`, the float32 gradients of all its parameters,
    whole on each rank; slices of it in `fp32_groups_gradients`; `fp32_groups_has_gradients`, which of them this step
    has written; `fp32_groups_flat_partition`, this rank's masters.
    """

    fp32_groups_gradients: list[list[Tensor]]
    fp32_groups_gradients_flat: list[Tensor]
    fp32_groups_has_gradients: list[list[bool]]
    fp32_groups_flat_partition: list[Tensor]
    fp32_groups_gradient_flat_partition: list[Tensor]
    bf16_groups_flat: list[Tensor]
    bf16_partitioned_groups: list[list[Tensor]]
    optimizer: torch.optim.Optimizer
    clip_grad: float
    _lazy_init_hp_params_optimizer_state: Callable[[], None]

    def prepare(self) -> None:
        """Once: buckets of neighbouring gradients, in the order in which backward finishes them (the last parameters
        first).
        """
        self.ranks, self._boundary = dist.get_world_size(), True
        self._waits: list[Any] = []  # gradients on their way
        self._arrivals: list[Any] = []  # weights on their way
        self._buckets: list[tuple[Tensor, int]] = []  # (part of a flat buffer, its parameters)
        self._bucket_of: dict[tuple[int, int], int] = {}
        for group, gradients in enumerate(self.fp32_groups_gradients):
            end, elements = len(gradients), 0
            for index in reversed(range(len(gradients))):
                elements += gradients[index].numel()
                self._bucket_of[group, index] = len(self._buckets)
                if elements >= _BUCKET_ELEMENTS or index == 0:
                    start = sum(gradient.numel() for gradient in gradients[:index])
                    self._buckets.append(
                        (self.fp32_groups_gradients_flat[group][start : start + elements], end - index)
                    )
                    end, elements = index, 0
        for partition, gradient in zip(
            self.fp32_groups_flat_partition, self.fp32_groups_gradient_flat_partition, strict=True
        ):
            partition.grad = gradient
        self._expect_all()

    def _expect_all(self) -> None:
        self._missing, self._next = [members for _, members in self._buckets], 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Called before each backward: whether it is the last of its optimizer step."""
        self._boundary = is_boundary

    def backward_prologue(self) -> None:
        """Nothing to clear: gradients in the working dtype are gone as soon as they are made."""

    @torch.no_grad()
    def accumulate_hp_grads_and_remove_lp(self, parameter: Tensor, group: int, index: int) -> None:
        """Called by autograd when a parameter's gradient is complete: add it in float32 and let it go."""
        assert parameter.grad is not None
        place = self.fp32_groups_gradients[group][index].view(parameter.shape)
        if self.fp32_groups_has_gradients[group][index]:
            place.add_(parameter.grad)
        else:
            place.copy_(parameter.grad)
            self.fp32_groups_has_gradients[group][index] = True
        parameter.grad = None
        if self._boundary and self.ranks > 1:
            self._missing[self._bucket_of[group, index]] -= 1
            while self._next < len(self._buckets) and self._missing[self._next] == 0:
                self._send()

    def _send(self) -> None:
        # In the list's order on every rank, whatever order their gradients came in.
        self._waits.append(dist.all_reduce(self._buckets[self._next][0], async_op=True))
        self._next += 1

    @torch.no_grad()
    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Called after the last backward of a step: parameters that got no gradient have zero, and what has not left
        yet leaves.
        """
        for places, written in zip(self.fp32_groups_gradients, self.fp32_groups_has_gradients, strict=True):
            for place, there in zip(places, written, strict=True):
                if not there:
                    place.zero_()
        while self.ranks > 1 and self._next < len(self._buckets):
            self._send()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One AdamW step on the masters, then the rounded weights to all ranks. Nothing is read back to the host.

        With gradients g summed over R ranks: norm n = ||g|| / R; AdamW sees g / (R * max(1, (n + 1e-6) / clip)), and
        skips the step if n is not finite.
        """
        for wait in self._waits:
            wait.wait()
        self._waits.clear()
        norm = global_norm(self.fp32_groups_gradients_flat) / self.ranks
        self._global_grad_norm, self.overflow = norm, False
        scale_in_step(self.optimizer, self.fp32_groups_gradient_flat_partition, norm, self.clip_grad, self.ranks)
        self.optimizer.step()
        self._lazy_init_hp_params_optimizer_state()
        self.update_lp_params()
        self.clear_hp_grads()

    @torch.no_grad()
    def update_lp_params(self) -> None:
        """Round the masters into this rank's part of the weights, and start their way to the others."""
        for flat, parts, masters in zip(
            self.bf16_groups_flat, self.bf16_partitioned_groups, self.fp32_groups_flat_partition, strict=True
        ):
            mine = parts[dist.get_rank()]
            mine.copy_(masters)
            if self.ranks > 1:
                self._arrivals.append(dist.all_gather_into_tensor(flat, mine, async_op=True))

    def wait_for_weights(self) -> None:
        """Before the weights are read."""
        for arrival in self._arrivals:
            arrival.wait()
        self._arrivals.clear()

    def clear_hp_grads(self) -> None:
        """The next gradients overwrite these: nothing is zeroed."""
        self.fp32_groups_has_gradients = [[False] * len(group) for group in self.fp32_groups_has_gradients]
        self._expect_all()

    def clear_lp_grads(self, set_to_none: bool = False) -> None:
        """There are none."""

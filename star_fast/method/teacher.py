"""The teacher: an exponential moving average of the student's weights; it never sees a gradient, a
key mask or dropout.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from star_fast.config import MethodConfig
from star_fast.method import objective
from star_fast.model.features import FeatureModel
from star_fast.ops.ema_update import ema_update


def ema_decay(method: MethodConfig, step: int) -> float:
    """Decay of the update after optimizer step `step` (counted from 0): min(decay, (1 + step) / (10 + step)) while
    warming up.
    """
    return min(method.ema_decay, (1 + step) / (10 + step)) if method.ema_warmup else method.ema_decay


class Teacher:
    """The EMA copy of the student's model: our transformer, or any nn.Module that is a FeatureModel. Buffers stay as
    they were when it was copied.

    `model` runs in the student's dtype. `masters` are its float32 weights, laid out as the student's own masters are:
    whole tensors, or this rank's shards under ZeRO. An average kept in bf16 would not move at decay 0.9999, so `model`
    only ever receives rounded copies.
    """

    def __init__(self, transformer: FeatureModel, method: MethodConfig, contrast_depth: int) -> None:
        frozen = cast(nn.Module, copy.deepcopy(transformer)).eval().requires_grad_(False)
        self.model = cast(FeatureModel, frozen)
        self.method = method
        self.contrast_depth = contrast_depth
        self.masters: list[Tensor] = []
        self._copies: list[Tensor] | None = None
        self._publish: Callable[[], list[Any]] = list
        self._arrivals: list[Any] = []
        self._attached = False  # a rank's share of the masters may be empty

    def attach_whole(self) -> Self:
        """Where nothing is sharded: average into the model's own weights, or into float32 copies where they are of less
        precision. Returns itself.

        `update` then takes the student's weights (`list(model.parameters())`), float32 too: masters, where the student
        trains in less precision.
        """
        own = list(cast(nn.Module, self.model).parameters())
        exact = all(weight.dtype == torch.float32 for weight in own)
        self.attach(own if exact else [weight.detach().float() for weight in own], None if exact else own)
        return self

    def attach(
        self, masters: Sequence[Tensor], copies: Sequence[Tensor] | None, publish: Callable[[], list[Any]] = list
    ) -> None:
        """Tell where the weights live.

        Args:
            masters: float32 tensors to average into. They may be `model`'s own parameters; then `copies` is None.
            copies: tensors of the same shapes in `model`'s dtype that receive the rounded masters.
            publish: called after each update: starts to spread this rank's copies to all ranks' models, and returns
                what to wait for.
        """
        self._attached = True
        self.masters, self._copies, self._publish = list(masters), None if copies is None else list(copies), publish

    @torch.no_grad()
    def update(self, student_masters: Sequence[Tensor], step: int) -> None:
        """teacher += (1 - decay) * (student - teacher), once after optimizer step `step` (counted from 0).

        Raises:
            ValueError: nothing is attached yet, or the student's weights are not as many, or of other shapes.
        """
        if not self._attached:
            raise ValueError(
                "Teacher.update: expected attach or attach_whole to have told where the weights live, got neither"
            )
        self.settle()
        near = self._copies is not None and self._copies[0].device == self.masters[0].device
        ema_update(
            self.masters, list(student_masters), ema_decay(self.method, step), copy_to=self._copies if near else None
        )
        if self._copies is not None and not near:  # masters in host memory
            torch._foreach_copy_(self._copies, self.masters)
        self._arrivals = self._publish()

    def settle(self) -> None:
        """Wait until `model` has arrived from all ranks."""
        for arrival in self._arrivals:
            arrival.wait()
        self._arrivals = []

    @torch.no_grad()
    def refresh(self) -> None:
        """Make `model` equal to `masters` (after these were loaded)."""
        if self._copies is not None:
            torch._foreach_copy_(self._copies, self.masters)
        self._arrivals = self._publish()

    @torch.no_grad()
    def features(self, tokens: Tensor, label: Tensor, positions: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What the losses compare with: (last features (B*M, T, D) or None, slots (S, B, D) at `positions` or None).

        Args:
            tokens: (B*M, T-1) int64, the student's. label: (B*M,) int64, the student's, dropped ones included, or the
                true ones (`method.teacher_label`).
            positions: (K,) int64, the position set I; S = K * M slots. None where no contrast is on.

        Returns:
            None, None where no loss needs a teacher.

        Raises:
            ValueError: no positions where a contrast is on. TypeError, ValueError: features of another shape or dtype.
        """
        if not self.method.has_teacher:
            return None, None
        if self.method.contrasts and positions is None:
            raise ValueError("Teacher.features: positions must be given where a contrastive loss is on, got none")
        self.settle()
        # Without L_MIM nothing is asked of the later blocks.
        out = self.model.features(
            tokens, label, block=self.contrast_depth if self.method.contrasts else 0, last=bool(self.method.mim_weight)
        )
        slots = None
        if self.method.contrasts:
            assert positions is not None
            middle = cast(Tensor, out.middle)  # gather_slots refuses none
            slots = objective.slots_first(objective.gather_slots(middle, positions, self.method.views)).contiguous()
        return out.last if self.method.mim_weight else None, slots

"""The student: a model and a projector as the one module that is trained; its forward pass returns the losses.

The model is LlamaGen's transformer, or any decoder that shows its features (model/features.py). No parameter is read
outside this module's forward: under ZeRO-3 a weight exists only there.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Self, cast

import torch
from torch import Tensor, nn

from star_fast.config import MethodConfig
from star_fast.method import objective
from star_fast.method.batch_norm import BatchNorm
from star_fast.method.objective import Losses
from star_fast.method.shape_checks import check_shapes
from star_fast.model.features import FeatureModel, Features


class Projector(nn.Sequential):
    """f: an MLP on each sampled position, student side only: linear layers with biases, SiLU between, (..., D) -> (...,
    D).

    With norm "batch" every hidden layer is linear, batch norm, SiLU; the output layer has no norm. Hidden layers then
    have no biases of their own: the norm takes any away again.
    """

    def __init__(self, width: int, hidden: int, layers: int, norm: str = "none") -> None:
        sizes = [width, *[hidden] * (layers - 1), width]
        modules: list[nn.Module] = []
        for index, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            normed = norm == "batch" and index < layers - 1
            modules += [nn.SiLU()] if index else []
            modules += [nn.Linear(fan_in, fan_out, bias=not normed)]
            modules += [BatchNorm(fan_out)] if normed else []
        super().__init__(*modules)

    @classmethod
    def of_method(cls, width: int, method: MethodConfig, generator: torch.Generator | None = None) -> Self | None:
        """The projector, initialised, that `method` wants for features of `width` numbers; None where no contrastive
        loss is on.
        """
        if not method.contrasts:
            return None
        projector = cls(width, method.projector_width, method.projector_layers, method.projector_norm)
        projector.init_weights(generator)
        return projector

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Normal weights of variance 1/fan_in, so that features keep their scale; zero biases;
        norms that scale by 1.
        """
        for module in self:
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, module.in_features**-0.5, generator=generator)
            elif isinstance(module, BatchNorm):
                module.weight.fill_(1.0)
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                bias.zero_()


class Student(nn.Module):
    """A model plus, where a contrastive loss is on, projector.

    Args:
        transformer: ours, or any nn.Module that is a FeatureModel.
        projector: see Projector.of_method.
        contrast_depth: block whose output is contrasted, counted from 1.
    """

    pairs: Tensor | None

    def __init__(
        self, transformer: FeatureModel, projector: Projector | None, method: MethodConfig, contrast_depth: int
    ) -> None:
        super().__init__()
        if (projector is not None) != method.contrasts:
            raise ValueError("Student: a projector exists exactly where a contrastive loss is on")
        self.transformer = transformer
        self.projector = projector
        self.method = method
        self.contrast_depth = contrast_depth
        pairs = (
            objective.pair_table(method.views, method.contrast_positions, method.step_contrast, method.view_contrast)
            if method.contrasts
            else None
        )
        self.register_buffer("pairs", pairs, persistent=False)  # on the device once, not copied there in every step

    def forward(
        self,
        tokens: Tensor,
        label: Tensor,
        targets: Tensor,
        keep: Tensor | None = None,
        teacher_last: Tensor | None = None,
        keys: Tensor | Callable[[], Tensor] | None = None,
        positions: Tensor | None = None,
        row_offset: int = 0,
        *,
        only_ar: bool = False,
    ) -> Losses:
        """The losses of one micro-batch of B images with M views each (sequence b*M + m is view m of image b).

        Args:
            tokens: (B*M, T-1) int64. label: (B*M,) int64, dropped ones are the null class. targets: (B*M, T) int64.
            keep: (B*M, T) bool, visible keys, or None. Where `mim_positions` is "hidden" every row must hide
                masking.hidden_count of them.
            teacher_last: (B*M, T, D) the teacher's last features; None where L_MIM is off.
            keys: (S, B_all, D) the teacher's features at the sampled positions, of all ranks' images, or a function
                that waits for them and returns them; None where no contrast is on.
            positions: (K,) int64 the position set I, with `keys`.
            row_offset: key row of this rank's first image.
            only_ar: the next-token loss alone, as validation wants it; the other terms are 0.

        Raises:
            TypeError, ValueError: a tensor of another shape or dtype, or none where a loss that is on needs it.
        """
        sizes = check_shapes("Student", targets=(targets, "B*M T", torch.int64), label=(label, "B*M", torch.int64))
        if sizes["T"] > 1:
            check_shapes("Student", tokens=(tokens, f"{sizes['B*M']} {sizes['T'] - 1}", torch.int64))
        if keep is not None:
            check_shapes("Student", keep=(keep, f"{sizes['B*M']} {sizes['T']}", torch.bool))
        if only_ar:
            hidden = self.transformer.features(tokens, label, keep).hidden
            ar = objective.autoregressive_loss(hidden, self.transformer.output.weight, targets)
            return Losses(ar, ar, *[ar.new_zeros(())] * 3)
        if sizes["B*M"] % self.method.views:
            raise ValueError(
                f"Student: targets must hold {self.method.views} views of each image (method.views), got "
                f"{sizes['B*M']} sequences"
            )
        if self.method.contrasts and (positions is None or keys is None):
            raise ValueError("Student: positions and keys must be given where a contrastive loss is on, got none")
        out = self.transformer.features(tokens, label, keep, block=self.contrast_depth if self.method.contrasts else 0)
        check_features(self.transformer, out, (sizes["B*M"], sizes["T"]), self.method.contrasts)
        anchor = None
        if self.method.contrasts:
            assert out.middle is not None and positions is not None and self.projector is not None
            # The projector needs no other position than the K sampled ones: project these only.
            slots_BMKD = objective.gather_slots(out.middle, positions, self.method.views)
            anchor = objective.slots_first(self.projector(slots_BMKD))
        if callable(keys):
            keys = keys()
        return objective.objective(
            out.hidden,
            self.transformer.output.weight,
            targets,
            out.last,
            anchor,
            teacher_last,
            keys,
            self.method,
            row_offset,
            keep,
            self.pairs,
        )


def check_features(model: FeatureModel, out: Features, size: tuple[int, int], middle: bool) -> None:
    """Raises TypeError or ValueError, in the name of the model's own method, for features that are not of `size` (N,
    T), or a missing `middle`.
    """
    wanted: dict[str, tuple[Tensor, str]] = {
        "hidden": (out.hidden, f"{size[0]} {size[1]} D"),
        "last": (out.last, f"{size[0]} {size[1]} D"),
    }
    if middle:
        wanted["middle"] = (cast(Tensor, out.middle), f"{size[0]} {size[1]} D")  # none is told like another shape
    check_shapes(f"{type(model).__name__}.features", **wanted)

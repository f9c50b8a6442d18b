"""The objective of ST-AR, one function per equation (arXiv 2509.15185; numbers as in the paper and docs/method.md
section 2).

    L = L_AR + alpha * L_MIM + beta * (L_step + L_view) / 2

Everything here works on features; which model made them is student.py's and teacher.py's business.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from star_fast.config import MethodConfig
from star_fast.method.masking import hidden_count
from star_fast.method.shape_checks import check_shapes
from star_fast.ops.all_slots_contrast import all_slots_contrast
from star_fast.ops.feature_distance import feature_distance
from star_fast.ops.linear_cross_entropy import linear_cross_entropy
from star_fast.ops.slot_contrast import check_call, slot_contrast


class Losses(NamedTuple):
    """The four terms and their weighted sum: scalars (0-d tensors). A term that is switched off is 0."""

    total: Tensor
    ar: Tensor
    mim: Tensor
    step: Tensor
    view: Tensor


def autoregressive_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """L_AR: mean cross-entropy of the masked student's predictions over all B*M*T targets.

    Args:
        hidden: (B*M, T, D) after the final norm. weight: (V, D) output matrix. targets: (B*M, T) int64.
    """
    check_shapes(
        "autoregressive_loss",
        hidden=(hidden, "B*M T D"),
        weight=(weight, "V D"),
        targets=(targets, "B*M T", torch.int64),
    )
    return linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten())


def masked_feature_loss(student_last: Tensor, teacher_last: Tensor, hidden: Tensor | None = None) -> Tensor:
    """L_MIM: mean over positions of 1 - cos(h, h^), both (B*M, T, D), outputs of the last block; no gradient to the
    teacher.

    Args:
        hidden: (B*M, n) int64, the positions of each sequence that count (see `hidden_positions`); None: all.
    """
    check_shapes("masked_feature_loss", student_last=(student_last, "B*M T D"), teacher_last=(teacher_last, "B*M T D"))
    student, teacher = student_last.flatten(0, 1), teacher_last.flatten(0, 1)
    if hidden is not None:
        check_shapes("masked_feature_loss", hidden=(hidden, f"{len(student_last)} n", torch.int64))
        # Row of each sequence's position 0
        first = torch.arange(0, len(student), student_last.shape[1], device=hidden.device)
        rows = (hidden + first[:, None]).flatten()
        student, teacher = student.index_select(0, rows), teacher.index_select(0, rows)
    return feature_distance(student, teacher)


def hidden_positions(keep: Tensor, count: int) -> Tensor:
    """The positions that a key mask hides, ascending: (B*M, T) bool, True where visible -> (B*M, count) int64.

    Every row must hide exactly `count`: the number is known beforehand, so nothing waits for the device to count.
    """
    sizes = check_shapes("hidden_positions", keep=(keep, "B*M T", torch.bool))
    if not 0 < count <= sizes["T"]:
        raise ValueError(f"hidden_positions: count must be in 1 ... {sizes['T']}, the positions of keep, got {count}")
    return keep.to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


def gather_slots(features: Tensor, positions: Tensor, views: int) -> Tensor:
    """Features at the K sampled positions: (B*M, T, D), (K,) int64 -> (B, M, K, D)."""
    sizes = check_shapes("gather_slots", features=(features, "B*M T D"), positions=(positions, "K", torch.int64))
    if views < 1 or sizes["B*M"] % views:
        raise ValueError(
            f"gather_slots: features must hold {views} views of each image, B*M a multiple of it, got "
            f"{sizes['B*M']} sequences"
        )
    return features.index_select(1, positions).unflatten(0, (-1, views))


def slots_first(features_BMKD: Tensor) -> Tensor:
    """(B, M, K, D) -> (S, B, D), S = M*K; slot m*K + i is view m at position I[i]."""
    check_shapes("slots_first", features_BMKD=(features_BMKD, "B M K D"))
    return features_BMKD.flatten(1, 2).transpose(0, 1)


def step_pairs(views: int, positions: int) -> list[tuple[int, int]]:
    """(anchor slot, key slot) of L_step: the same view, ordered pairs of different positions i != j."""
    return [
        (m * positions + i, m * positions + j)
        for m in range(views)
        for i in range(positions)
        for j in range(positions)
        if i != j
    ]


def view_pairs(views: int, positions: int) -> list[tuple[int, int]]:
    """(anchor slot, key slot) of L_view: the same position, ordered pairs of different views m != m'."""
    return [
        (m * positions + i, n * positions + i)
        for i in range(positions)
        for m in range(views)
        for n in range(views)
        if m != n
    ]


def pair_table(views: int, positions: int, step: bool = True, view: bool = True) -> Tensor:
    """(anchor slot, key slot) of L_step's pairs, then L_view's: (P, 2) int64."""
    return torch.tensor(
        (step_pairs(views, positions) if step else []) + (view_pairs(views, positions) if view else []),
        dtype=torch.int64,
    )


def contrastive_losses(
    anchor: Tensor,
    key: Tensor,
    views: int,
    temperature: float,
    row_offset: int = 0,
    *,
    step: bool = True,
    view: bool = True,
    negatives: str = "slot",
    pairs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """L_step and L_view in one call of an op: means of NCE(m,i -> m',j) over their pairs.

    Args:
        anchor: (S, B, D) projected student features, slots as in `slots_first`.
        key: (S, B_all, D) teacher features of the images that all ranks hold in this micro-batch; no gradient.
        views: M. temperature: tau. row_offset: key row of this rank's first image.
        step, view: which terms are on; one that is off is 0.
        negatives: the other images' keys in the denominator: "slot", those at (m', j) (ops.slot_contrast, fused on
            CUDA); "all_slots", those at all S slots (ops.all_slots_contrast, plain torch on every device). Other slots
            of the same image are never negatives.
        pairs: `pair_table` on the features' device, where a caller keeps it; None: made here.
    """
    slots = check_shapes("contrastive_losses", anchor=(anchor, "S B D"), key=(key, "S B_all D"))["S"]
    if views < 1 or slots % views:
        raise ValueError(
            f"contrastive_losses: anchor must hold S = views * K slots, a multiple of views = {views}, got {slots}"
        )
    positions = slots // views
    for name, on, needed, other in (("step", step, positions, "positions a view"), ("view", view, views, "views")):
        if on and needed < 2:
            raise ValueError(
                f"contrastive_losses: {name} needs two {other} or more, got {needed}; switch it off or give more"
            )
    if not (step or view):
        raise ValueError("contrastive_losses: expected step or view to be on, got neither")
    if negatives not in ("slot", "all_slots"):
        raise ValueError(f"contrastive_losses: negatives must be 'slot' or 'all_slots', got {negatives!r}")
    steps = views * positions * (positions - 1) if step else 0
    if pairs is None:
        pairs = pair_table(views, positions, step, view).to(anchor.device)
    check_call("contrastive_losses", anchor, key, pairs, temperature, row_offset, "pair")
    expected = steps + (slots * (views - 1) if view else 0)
    if len(pairs) != expected:
        raise ValueError(
            f"contrastive_losses: pairs must be pair_table's {expected} rows for views = {views} and {positions} "
            f"positions, got {len(pairs)}"
        )
    contrast = {"slot": slot_contrast, "all_slots": all_slots_contrast}[negatives]
    per_pair = contrast(anchor, key, pairs, temperature, row_offset, reduction="pair")
    zero = per_pair.new_zeros(())
    return per_pair[:steps].mean() if step else zero, per_pair[steps:].mean() if view else zero


def weighted_sum(ar: Tensor, mim: Tensor, step: Tensor, view: Tensor, method: MethodConfig) -> Losses:
    """L = L_AR + alpha * L_MIM + beta * (L_step + L_view) / 2; a term of weight 0 is left out, bit for bit."""
    total = ar
    if method.mim_weight:
        total = total + method.mim_weight * mim
    if method.contrasts:
        total = total + method.contrast_weight * (step + view) / 2
    return Losses(total, ar, mim, step, view)


def objective(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    last: Tensor,
    anchor: Tensor | None,
    teacher_last: Tensor | None,
    key: Tensor | None,
    method: MethodConfig,
    row_offset: int = 0,
    keep: Tensor | None = None,
    pairs: Tensor | None = None,
) -> Losses:
    """All of ST-AR in one call, from features to the four terms and their sum; on CUDA each term is one fused op.

    Args:
        hidden, weight, targets: see autoregressive_loss.
        last, teacher_last: (B*M, T, D) outputs of the last block of student and teacher; the teacher's None where L_MIM
            is off.
        anchor: (S, B, D) projected student features at the sampled positions; key: (S, B_all, D) the teacher's. None
            where no contrast is on.
        row_offset: key row of this rank's first image.
        keep: (B*M, T) bool, the key mask; needed where `method.mim_positions` is "hidden".
        pairs: see contrastive_losses.

    Raises:
        TypeError, ValueError: a tensor of another shape or dtype, or none where a loss that is on needs it.
    """
    check_shapes(
        "objective", hidden=(hidden, "B*M T D"), weight=(weight, "V D"), targets=(targets, "B*M T", torch.int64)
    )
    _require("mim_weight", bool(method.mim_weight), last=last, teacher_last=teacher_last)
    _require("contrast_weight", method.contrasts, anchor=anchor, key=key)
    ar = autoregressive_loss(hidden, weight, targets)
    mim = step = view = ar.new_zeros(())
    if method.mim_weight:
        assert teacher_last is not None
        mim = masked_feature_loss(last, teacher_last, _counted(method, keep))
    if method.contrasts:
        assert anchor is not None and key is not None
        step, view = contrastive_losses(
            anchor,
            key,
            method.views,
            method.temperature,
            row_offset,
            step=method.step_contrast,
            view=method.view_contrast,
            negatives=method.negatives,
            pairs=pairs,
        )
    return weighted_sum(ar, mim, step, view, method)


def _require(weight: str, on: bool, **tensors: Tensor | None) -> None:
    if on and (missing := [name for name, tensor in tensors.items() if tensor is None]):
        raise ValueError(
            f"objective: {' and '.join(missing)} must be given where method.{weight} is more than 0, got none"
        )


def _counted(method: MethodConfig, keep: Tensor | None) -> Tensor | None:
    """The positions that L_MIM averages over, None for all."""
    if method.mim_positions == "all":
        return None
    if keep is None:
        raise ValueError("objective: mim_positions 'hidden' needs the key mask, got none")
    return hidden_positions(keep, hidden_count(keep.shape[1], method.mask_ratio))

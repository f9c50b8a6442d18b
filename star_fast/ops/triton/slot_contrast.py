"""Slot-contrast kernels: forward makes losses and gradients of all pairs without storing a similarity; backward adds up
each slot's pairs.

One program takes a pair, a tile of anchor rows and a part of the columns of the gradient. It walks over the keys with
an online softmax, as attention does with the keys as their own values: with z, k unit vectors, p the softmax and + the
positive, the gradient by z is sum over b' != + of p[b'] (k[b'] - k[+]) / temperature. It is made beside the loss, so
backward is a sum over pairs.

Products take the inputs as they are; norms, which divide rows and columns of a product, come in afterwards in float32.
The product is held transposed, (keys, rows), so that the long side of each product is the one that tensor cores want
long.

A (32, D) gradient does not fit one program's registers, hence the parts, each of which repeats the first product. A key
is loaded once from memory if a slot's keys stay in the L2 cache, and (parts + 1) times from there by every pair and
tile of rows that meets it.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_fast.ops import error_flag
from star_fast.ops.dispatch import Cost
from star_fast.ops.triton.feature_distance import inverse_norm
from star_fast.ops.triton.launching import Kernel, accumulator, ceil_div, operand, why_not_device
from star_fast.ops.triton.tiles import SLOT_CONTRAST, SLOT_CONTRAST_SUM, SLOT_CONTRAST_WIDE

_SLOT_OUT_OF_RANGE = tl.constexpr(error_flag.SLOT_OUT_OF_RANGE)


@triton.jit(do_not_specialize=["row_offset"])
def slot_contrast_forward(
    anchor_ptr,
    key_ptr,
    pairs_ptr,
    loss_ptr,
    gradient_ptr,
    flag_ptr,
    anchor_slot_stride,
    anchor_row_stride,
    key_slot_stride,
    key_row_stride,
    anchor_slots,
    key_slots,
    n_rows,
    n_keys,
    n_cols,
    row_offset,
    SHARPNESS: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    COLS: tl.constexpr,
    PART: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """loss[pair, row], and gradient[pair, row, part]: B times the derivative of the pair's loss by its anchors.

    SHARPNESS = 1 / temperature.
    """
    pair = tl.program_id(1).to(tl.int64)
    anchor_slot, key_slot = tl.load(pairs_ptr + 2 * pair), tl.load(pairs_ptr + 2 * pair + 1)
    if (anchor_slot < 0) | (anchor_slot >= anchor_slots) | (key_slot < 0) | (key_slot >= key_slots):
        tl.atomic_or(flag_ptr, _SLOT_OUT_OF_RANGE)
        anchor_slot, key_slot = anchor_slot * 0, key_slot * 0
    anchor_ptr += anchor_slot * anchor_slot_stride
    key_ptr += key_slot * key_slot_stride
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_inside = rows < n_rows
    anchor_rows = anchor_ptr + rows[:, None].to(tl.int64) * anchor_row_stride
    a_squares = tl.zeros((ROWS,), ACC)
    for first in range(0, n_cols, COLS):
        cols = first + tl.arange(0, COLS)
        a = tl.load(anchor_rows + cols[None, :], mask=row_inside[:, None] & (cols < n_cols)[None, :], other=0.0).to(ACC)
        a_squares += tl.sum(a * a, 1)  # (ROWS,), a (ROWS, COLS)
    a_inverse = inverse_norm(a_squares)

    top = tl.full((ROWS,), float("-inf"), ACC)
    total = tl.zeros((ROWS,), ACC)
    positive = tl.zeros((ROWS,), ACC)  # cosine with the positive
    if WITH_GRADIENT:
        # Sums over the negatives alone: where the positive has nearly all the weight, 1 - softmax[positive] would lose
        # its digits.
        others = tl.zeros((ROWS,), ACC)  # weights
        expected = tl.zeros((ROWS,), ACC)  # weights * cosines
        pulled = tl.zeros((PART, ROWS), ACC)  # weights * unit keys, transposed
        positive_inverse = tl.zeros((ROWS,), ACC)
        part = tl.program_id(2) * PART + tl.arange(0, PART)
        part_inside = part < n_cols
    for start in range(0, n_keys, KEYS):
        keys = start + tl.arange(0, KEYS)
        key_inside = keys < n_keys
        key_rows = key_ptr + keys[:, None].to(tl.int64) * key_row_stride
        products = tl.zeros((KEYS, ROWS), ACC)
        k_squares = tl.zeros((KEYS,), ACC)
        for first in range(0, n_cols, COLS):
            cols = first + tl.arange(0, COLS)
            k = tl.load(key_rows + cols[None, :], mask=key_inside[:, None] & (cols < n_cols)[None, :], other=0.0)
            a = tl.load(anchor_rows + cols[None, :], mask=row_inside[:, None] & (cols < n_cols)[None, :], other=0.0)
            # (KEYS, ROWS)
            products = tl.dot(k.to(DOT), tl.trans(a.to(DOT)), products, input_precision="ieee", out_dtype=ACC)
            k_squares += tl.sum(k.to(ACC) * k.to(ACC), 1)
        k_inverse = inverse_norm(k_squares)
        cosines = products * k_inverse[:, None] * a_inverse[None, :]
        logits = tl.where(key_inside[:, None], cosines * SHARPNESS, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 0))
        rescale = tl.exp(top - higher)
        weights = tl.exp(logits - higher[None, :])  # (KEYS, ROWS), as cosines and logits
        total = total * rescale + tl.sum(weights, 0)
        top = higher
        is_positive = keys[:, None] == (row_offset + rows)[None, :]
        positive += tl.sum(tl.where(is_positive, cosines, 0.0), 0)
        if WITH_GRADIENT:
            weights = tl.where(is_positive, 0.0, weights)
            others = others * rescale + tl.sum(weights, 0)
            expected = expected * rescale + tl.sum(weights * cosines, 0)
            positive_inverse += tl.sum(tl.where(is_positive, k_inverse[:, None], 0.0), 0)
            k = tl.load(key_rows + part[None, :], mask=key_inside[:, None] & part_inside[None, :], other=0.0)
            weights = (weights * k_inverse[:, None]).to(k.dtype).to(DOT)  # (KEYS, ROWS); k (KEYS, PART)
            pulled = tl.dot(
                tl.trans(k.to(DOT)), weights, pulled * rescale[None, :], input_precision="ieee", out_dtype=ACC
            )

    if tl.program_id(2) == 0:
        tl.store(loss_ptr + pair * n_rows + rows, top + tl.log(total) - positive * SHARPNESS, mask=row_inside)
    if WITH_GRADIENT:
        inside = row_inside[:, None] & part_inside[None, :]
        k = tl.load(
            key_ptr + (row_offset + rows)[:, None].to(tl.int64) * key_row_stride + part[None, :], mask=inside, other=0.0
        ).to(ACC)
        a = tl.load(anchor_rows + part[None, :], mask=inside, other=0.0).to(ACC)
        along = a_inverse * (expected - others * positive)  # dz . z, which the division by the norm removes
        # (ROWS, PART), as k and a here
        gradient = tl.trans(pulled) - k * (others * positive_inverse)[:, None] - a * along[:, None]
        gradient *= (a_inverse * SHARPNESS / total)[:, None]
        where = gradient_ptr + (pair * n_rows + rows[:, None]) * n_cols + part[None, :]
        tl.store(where, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)


@triton.jit
def slot_contrast_backward(
    gradient_ptr,
    pairs_ptr,
    dout_ptr,
    danchor_ptr,
    dout_stride,
    n_pairs,
    slot_numbers,
    divisor,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """danchor[slot] = sum over the pairs of that slot, in their order, of dout[pair] / divisor * gradient[pair]."""
    slot = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < slot_numbers  # (BLOCK,), as all tiles here
    total = tl.zeros((BLOCK,), ACC)
    for pair in range(n_pairs):
        if tl.load(pairs_ptr + 2 * pair) == slot:
            factor = tl.load(dout_ptr + pair * dout_stride).to(ACC) / divisor
            total += factor * tl.load(gradient_ptr + index, mask=inside, other=0.0).to(ACC)
        gradient_ptr += slot_numbers
    tl.store(danchor_ptr + slot * slot_numbers + index, total.to(danchor_ptr.dtype.element_ty), mask=inside)


def _forward_cost(a: SimpleNamespace) -> Cost:
    n_pairs, (_, keys, width), size = a.grid[1], a.key_ptr.shape, a.anchor_ptr.element_size()
    gradients = n_pairs * a.n_rows * width * size if a.WITH_GRADIENT else 0
    return Cost(
        a.anchor_ptr.nbytes + a.key_ptr.nbytes + gradients + a.loss_ptr.nbytes + a.pairs_ptr.nbytes,
        (4 if a.WITH_GRADIENT else 2) * n_pairs * a.n_rows * keys * width,
    )


FORWARD = Kernel("slot_contrast forward", slot_contrast_forward, _forward_cost)
BACKWARD = Kernel(
    "slot_contrast backward",
    slot_contrast_backward,
    lambda a: Cost(a.gradient_ptr.nbytes + a.danchor_ptr.nbytes, 2 * a.gradient_ptr.numel()),
)


class _SlotContrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, key: Tensor, pairs: Tensor, temperature: float, row_offset: int, reduction: str
    ) -> Tensor:
        gradient = anchor.new_empty((pairs.shape[0], *anchor.shape[1:]))
        losses = _forward(anchor, key, pairs, temperature, row_offset, gradient)
        ctx.save_for_backward(gradient, pairs)
        ctx.shape = anchor.shape
        return losses.mean() if reduction == "mean" else losses.mean(dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        gradient, pairs = ctx.saved_tensors
        slots, n_rows, n_cols = ctx.shape
        danchor, n_pairs = gradient.new_empty((slots, n_rows, n_cols)), pairs.shape[0]
        BACKWARD.launch(
            (ceil_div(n_rows * n_cols, SLOT_CONTRAST_SUM.block[0]), slots),
            (
                gradient,
                pairs,
                dout,
                danchor,
                dout.stride(0) if dout.ndim else 0,
                n_pairs,
                n_rows * n_cols,
                n_rows if dout.ndim else n_rows * n_pairs,
            ),
            BLOCK=SLOT_CONTRAST_SUM.block[0],
            ACC=accumulator(gradient.dtype),
            num_warps=SLOT_CONTRAST_SUM.num_warps,
            num_stages=SLOT_CONTRAST_SUM.num_stages,
        )
        return danchor, None, None, None, None, None


def _forward(
    anchor: Tensor, key: Tensor, pairs: Tensor, temperature: float, row_offset: int, gradient: Tensor | None
) -> Tensor:
    """(P, B) losses; fills `gradient` (P, B, D), if there is one, with the derivative of each loss by its anchor."""
    anchor, key = (x if x.stride(2) == 1 else x.contiguous() for x in (anchor, key))
    (slots, n_rows, n_cols), (key_slots, n_keys, _), n_pairs = anchor.shape, key.shape, pairs.shape[0]
    losses = anchor.new_empty((n_pairs, n_rows), dtype=torch.promote_types(anchor.dtype, torch.float32))
    settings = _settings(anchor.dtype)
    FORWARD.launch(
        (
            ceil_div(n_rows, settings["ROWS"]),
            n_pairs,
            1 if gradient is None else ceil_div(n_cols, settings["PART"]),
        ),  # without a gradient no part repeats
        (
            anchor,
            key,
            pairs,
            losses,
            losses if gradient is None else gradient,
            error_flag.flag_for(anchor),
            *anchor.stride()[:2],
            *key.stride()[:2],
            slots,
            key_slots,
            n_rows,
            n_keys,
            n_cols,
            row_offset,
        ),
        SHARPNESS=1 / temperature,
        WITH_GRADIENT=gradient is not None,
        **settings,
    )
    return losses


@functools.cache  # a Python launch costs more than this kernel runs
def _settings(dtype: torch.dtype) -> dict[str, Any]:
    tile = SLOT_CONTRAST if dtype.itemsize == 2 else SLOT_CONTRAST_WIDE
    return {
        **dict(zip(("ROWS", "KEYS", "COLS", "PART"), tile.block, strict=True)),
        "DOT": operand(dtype),
        "ACC": accumulator(dtype),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def run(
    anchor: Tensor, key: Tensor, pairs: Tensor, temperature: float, row_offset: int = 0, *, reduction: str = "mean"
) -> Tensor:
    """See ops/slot_contrast.py."""
    pairs = pairs.contiguous()
    if torch.is_grad_enabled() and anchor.requires_grad:
        return _SlotContrast.apply(anchor, key, pairs, temperature, row_offset, reduction)
    losses = _forward(anchor, key, pairs, temperature, row_offset, None)
    return losses.mean() if reduction == "mean" else losses.mean(dim=1)


def why_not(
    anchor: Tensor, key: Tensor, pairs: Tensor, temperature: float, row_offset: int = 0, *, reduction: str = "mean"
) -> str | None:
    """None if the kernels can serve this call."""
    if pairs.shape[0] > 65535 or anchor.shape[0] > 65535:
        return f"a grid has at most 65535 pairs and slots, got {pairs.shape[0]} and {anchor.shape[0]}"
    return why_not_device(anchor)

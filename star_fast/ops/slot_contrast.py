"""InfoNCE between slots (a view and a position) over the images of a batch: L_step and L_view of the method."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from star_fast.ops import dispatch
from star_fast.ops.feature_distance import inverse_norm
from star_fast.ops.shapes import SHAPES

_SIMILARITY_BYTES = 2**26  # similarities computed at once on the CPU


def slot_contrast(
    anchor: Tensor,
    key: Tensor,
    pairs: Tensor,
    temperature: float,
    row_offset: int = 0,
    *,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """For each pair (a, s): mean over b of -log softmax over b' of (z[a, b] . k[s, b'] / temperature), at b' =
    row_offset + b.

    z and k are `anchor` and `key` divided by their norms; a vector of norm < 1e-12 has cosine 0 and gradient 0.
    Backward, with P the softmax: dz[a, b] = sum over the pairs p of a of dout[p] / (B temperature) * (sum over b' of
    P[b'] k[s, b'] - k[s, row_offset + b]), then through the division: danchor = (dz - z (z . dz)) / |anchor|. No
    gradient goes to the keys.

    One call serves both contrastive losses: with reduction "pair" the caller averages the pairs of each loss.

    Args:
        anchor: (S, B, D) float: S anchor slots of this rank's B images. S, B, D >= 1.
        key: (S', B_all, D), dtype and device of `anchor`: the key slots of all ranks' images.
        pairs: (P, 2) int64 on the device of `anchor`: (anchor slot, key slot), P >= 1.
        temperature: a number > 0, tau.
        row_offset: the key row that holds this rank's first image; 0 <= row_offset <= B_all - B.
        reduction: "mean" over pairs, or "pair": one value each.
        backend: name of a backend; None chooses (see dispatch).

    Returns:
        float32 (float64 for float64): a scalar, or (P,) for "pair".

    Numerics:
        Products of the inputs as given, summed in float32; norms, softmax and losses in float32 (float64 for float64).
        The Triton kernel rounds the softmax weights to the dtype of the inputs for its second product. Deterministic.

    Memory:
        Triton never stores similarities; where a gradient is wanted it keeps one (B, D) block a pair in the dtype of
        `anchor`. The reference keeps one (B, B_all) block a pair for backward.

    Raises:
        TypeError: anchor not floating point, pairs not int64, temperature or row_offset not numbers. ValueError:
        shapes, dtypes, devices or numbers that do not fit; a slot of `pairs` out of range (checked on the CPU; on CUDA
        the kernel sets the error flag, see ops/error_flag.py).

    Source:
        ST-AR (arXiv 2509.15185), the inter-step and inter-view losses; InfoNCE: van den Oord et al. (arXiv 1807.03748).
    """
    check_call("slot_contrast", anchor, key, pairs, temperature, row_offset, reduction)
    return dispatch.call(
        "slot_contrast",
        anchor.device,
        (anchor, key.detach(), pairs, float(temperature), row_offset),
        {"reduction": reduction},
        backend=backend,
    )


def check_call(
    op: str, anchor: Tensor, key: Tensor, pairs: Tensor, temperature: float, row_offset: int, reduction: str
) -> None:
    """Raises TypeError or ValueError, in the name of `op`, for arguments that break the contract of `slot_contrast`."""
    _check_tensors(op, anchor, key, pairs)
    _check_numbers(op, anchor, key, temperature, row_offset, reduction)


def _check_tensors(op: str, anchor: Tensor, key: Tensor, pairs: Tensor) -> None:
    if not anchor.is_floating_point():
        raise TypeError(f"{op}: anchor must be floating point, got {anchor.dtype}")
    if anchor.ndim != 3 or 0 in anchor.shape:
        raise ValueError(f"{op}: anchor must be (S, B, D) with S, B, D >= 1, got shape {tuple(anchor.shape)}")
    if key.ndim != 3 or key.shape[2] != anchor.shape[2] or 0 in key.shape:
        raise ValueError(
            f"{op}: key must be (S', B_all, D) with D = {anchor.shape[2]} like anchor, got shape {tuple(key.shape)}"
        )
    if key.dtype != anchor.dtype or key.device != anchor.device:
        raise ValueError(
            f"{op}: key must be {anchor.dtype} on {anchor.device} like anchor, got {key.dtype} on {key.device}"
        )
    if pairs.dtype != torch.int64:
        raise TypeError(f"{op}: pairs must be int64 (anchor slot, key slot), got {pairs.dtype}")
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.shape[0] == 0 or pairs.device != anchor.device:
        raise ValueError(
            f"{op}: pairs must be (P, 2) with P >= 1 on {anchor.device} like anchor, got {tuple(pairs.shape)} on "
            f"{pairs.device}"
        )
    if pairs.device.type == "cpu" and not isinstance(pairs, FakeTensor):
        for column, (name, slots) in enumerate((("anchor", anchor.shape[0]), ("key", key.shape[0]))):
            low, high = (int(value) for value in torch.aminmax(pairs[:, column]))
            if low < 0 or high >= slots:
                raise ValueError(
                    f"{op}: pairs[:, {column}] must name {name} slots 0 ... {slots - 1}, got values from {low} to "
                    f"{high}"
                )


def _check_numbers(op: str, anchor: Tensor, key: Tensor, temperature: float, row_offset: int, reduction: str) -> None:
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"{op}: temperature must be a Python number, got {type(temperature).__name__}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature must be finite and > 0, got {temperature}")
    if isinstance(row_offset, bool) or not isinstance(row_offset, int):
        raise TypeError(f"{op}: row_offset must be an int, got {type(row_offset).__name__}")
    if not 0 <= row_offset <= key.shape[1] - anchor.shape[1]:
        raise ValueError(
            f"{op}: row_offset must be in 0 ... B_all - B = {key.shape[1]} - {anchor.shape[1]}, so that each "
            "anchor row has its key row, "
            f"got {row_offset}"
        )
    if reduction not in ("mean", "pair"):
        raise ValueError(f"{op}: reduction must be 'mean' or 'pair', got {reduction!r}")


def reference(
    anchor: Tensor, key: Tensor, pairs: Tensor, temperature: float, row_offset: int = 0, *, reduction: str = "mean"
) -> Tensor:
    """The formula, in plain torch: one batched product a chunk of pairs, log-sum-exp over the keys, the positive on the
    diagonal.
    """
    exact = torch.promote_types(anchor.dtype, torch.float32)
    anchor, key = anchor.to(exact), key.detach().to(exact)
    z, k = anchor * differentiable_inverse_norm(anchor), key * inverse_norm(key)
    chunk = max(1, _SIMILARITY_BYTES // (4 * anchor.shape[1] * key.shape[1]))
    losses = []
    for anchor_slots, key_slots in zip(pairs[:, 0].split(chunk), pairs[:, 1].split(chunk), strict=True):
        logits = torch.bmm(z[anchor_slots], k[key_slots].transpose(1, 2)) / temperature
        positive = logits.diagonal(row_offset, dim1=1, dim2=2)
        losses.append((torch.logsumexp(logits, dim=2) - positive).mean(dim=1))
    loss = torch.cat(losses)
    return loss.mean() if reduction == "mean" else loss


def differentiable_inverse_norm(x: Tensor) -> Tensor:
    """`inverse_norm` with a gradient: the short vectors leave the square root before it, whose slope at 0 would be
    infinite.
    """
    squares = (x * x).sum(-1, keepdim=True)
    short = inverse_norm(x.detach()) == 0
    return torch.where(short, 0.0, torch.where(short, 1.0, squares).rsqrt())


def inputs(preset: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Arguments for one call at a preset's training shape: slots m*K + i of M views and K positions, all pairs of both
    losses.
    """
    shape = SHAPES[preset]
    generator = torch.Generator().manual_seed(seed)
    slots = [(m, i) for m in range(shape.M) for i in range(shape.K)]
    pairs = [(a, s) for a, (m, i) in enumerate(slots) for s, (n, j) in enumerate(slots) if (m == n) != (i == j)]
    key = torch.randn(len(slots), shape.B, shape.D, generator=generator)
    anchor = 0.5 * key + torch.randn(len(slots), shape.B, shape.D, generator=generator)
    return {
        "anchor": anchor.to(device, dtype),
        "key": key.to(device, dtype),
        "pairs": torch.tensor(pairs).to(device),
        "temperature": 0.2,
    }


def cost(call: dict[str, Any], backward: bool = False) -> dispatch.Cost:
    """Least bytes and FLOPs of one call without gradient, or if `backward` of what the gradient adds (one product
    more).
    """
    anchor, key, pairs = call["anchor"], call["key"], call["pairs"]
    size, products = anchor.element_size(), len(pairs) * anchor.shape[1] * key.shape[1]
    if backward:  # writes the gradient of the anchors
        return dispatch.Cost(anchor.numel() * size, products * (2 * anchor.shape[2] + 2))
    return dispatch.Cost(
        (anchor.numel() + key.numel()) * size + pairs.numel() * 8 + 4 * len(pairs), products * (2 * anchor.shape[2] + 5)
    )


dispatch.register(
    "slot_contrast", reference, modules={"triton": "star_fast.ops.triton.slot_contrast"}, order={"cuda": ("triton",)}
)

"""InfoNCE between slots with the other images' keys in all slots as negatives: L_step and L_view where `negatives` is
"all_slots".
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from star_fast.ops import dispatch
from star_fast.ops.feature_distance import inverse_norm
from star_fast.ops.slot_contrast import check_call, differentiable_inverse_norm
from star_fast.ops.slot_contrast import inputs as inputs  # the same call


def all_slots_contrast(
    anchor: Tensor,
    key: Tensor,
    pairs: Tensor,
    temperature: float,
    row_offset: int = 0,
    *,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """For each pair (a, s): mean over b of -log(e(s, o + b) / (e(s, o + b) + sum over b' != o + b and all slots s' of
    e(s', b'))).

    e(s', b') = exp(z[a, b] . k[s', b'] / temperature) and o = row_offset; z and k are `anchor` and `key` divided by
    their norms; a vector of norm < 1e-12 has cosine 0 and gradient 0. So every slot of every other image is a negative,
    and no other slot of the same image is. With one image in all there are no negatives: the value is 0. Backward is
    autograd's; no gradient goes to the keys.

    There is no kernel for it: plain torch on every device. A backend asked for by name raises.

    Args:
        anchor, key, pairs, temperature, row_offset, reduction: as of slot_contrast: (S, B, D), (S', B_all, D), (P, 2)
            int64, a number > 0, 0 <= row_offset <= B_all - B, "mean" or "pair".
        backend: None or "reference".

    Returns:
        float32 (float64 for float64): a scalar, or (P,) for "pair".

    Numerics:
        Everything in float32 (float64 for float64) from the inputs as given.

    Memory:
        The log-sum-exp over the negatives is taken once for each anchor and shared by all its pairs; its S * B * S' *
        B_all similarities are kept for backward, where a gradient is wanted.

    Raises:
        As slot_contrast.

    Source:
        ST-AR (arXiv 2509.15185), the inter-step and inter-view losses, with "negative samples come from other images in
        the batch" read as all of their features; InfoNCE: van den Oord et al. (arXiv 1807.03748).
    """
    check_call("all_slots_contrast", anchor, key, pairs, temperature, row_offset, reduction)
    return dispatch.call(
        "all_slots_contrast",
        anchor.device,
        (anchor, key.detach(), pairs, float(temperature), row_offset),
        {"reduction": reduction},
        backend=backend,
    )


def reference(
    anchor: Tensor, key: Tensor, pairs: Tensor, temperature: float, row_offset: int = 0, *, reduction: str = "mean"
) -> Tensor:
    """The formula, in plain torch: one product of all anchors with all keys, log-sum-exp over the other images,
    softplus of its distance to the positive.
    """
    exact = torch.promote_types(anchor.dtype, torch.float32)
    anchor, key = anchor.to(exact), key.detach().to(exact)
    z, k = anchor * differentiable_inverse_norm(anchor), key * inverse_norm(key)
    slots, images, keys = anchor.shape[0], anchor.shape[1], key.shape[1]
    own = k[:, row_offset : row_offset + images]
    positive_BSS = torch.einsum("abd,sbd->bas", z, own) / temperature
    if keys == 1:  # a log-sum-exp of nothing: its gradient would be 0 / 0
        others_SB = z.new_full((slots, images), -torch.inf)
    else:
        logits_SBSB = (z.flatten(0, 1) @ k.flatten(0, 1).T / temperature).view(slots, images, len(key), keys)
        image = torch.arange(keys, device=anchor.device)
        same = image[row_offset : row_offset + images, None] == image
        others_SB = logits_SBSB.masked_fill(same[None, :, None], -torch.inf).flatten(2).logsumexp(2)
    # -log(p / (p + n)) = softplus(log n - log p), which keeps the digits of a small loss.
    gap_PB = positive_BSS[:, pairs[:, 0], pairs[:, 1]].T - others_SB[pairs[:, 0]]
    losses = -F.logsigmoid(gap_PB).mean(dim=1)
    return losses.mean() if reduction == "mean" else losses


def cost(call: dict[str, Any], backward: bool = False) -> dispatch.Cost:
    """Least bytes and FLOPs of one call without gradient, or if `backward` of what the gradient adds (one product
    more).
    """
    anchor, key, pairs = call["anchor"], call["key"], call["pairs"]
    size, products = anchor.element_size(), anchor.shape[0] * anchor.shape[1] * key.shape[0] * key.shape[1]
    if backward:  # writes the gradient of the anchors
        return dispatch.Cost(anchor.numel() * size, products * (2 * anchor.shape[2] + 2))
    return dispatch.Cost(
        (anchor.numel() + key.numel()) * size + pairs.numel() * 8 + 4 * len(pairs), products * (2 * anchor.shape[2] + 5)
    )


dispatch.register("all_slots_contrast", reference)

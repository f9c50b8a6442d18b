"""Keeping a VQ tokenizer's codebook alive while it is trained: entries that no image uses are moved to where they are
needed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def move_codes(
    codebook: Tensor,
    which: Tensor,
    latents: Tensor,
    generator: torch.Generator,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Move the codebook entries `which` (V,) bool onto latents (N, Z) that the kept entries serve worst, in place, and
    forget their Adam moments.

    Latents are drawn one by one with probability proportional to their squared distance from the nearest entry, those
    just placed included (k-means++), so that a pile of equal latents (an empty background) takes one entry, not most of
    them.
    """
    places = which.nonzero().flatten().tolist()
    kept = F.normalize(codebook[~which].float(), dim=-1)
    distance = (
        (2 - 2 * (latents @ kept.t()).amax(1)) if len(kept) else torch.full((len(latents),), 2.0, device=latents.device)
    )
    for place in places:
        weight = distance.clamp_min(0).cpu() + 1e-8
        pick = int(torch.multinomial(weight, 1, generator=generator))
        codebook[place] = latents[pick].to(codebook.dtype)
        distance = torch.minimum(distance, 2 - 2 * latents @ latents[pick])
    state = optimizer.state.get(codebook, {}) if optimizer is not None else {}
    for name in ("exp_avg", "exp_avg_sq"):
        if name in state:
            state[name][which] = 0

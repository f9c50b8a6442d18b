"""Weights for Inception that nothing was learnt with: drawn so that the last features of two images differ, and written
where a test wants them.
"""

from __future__ import annotations

from pathlib import Path

import torch

from star_fast.evaluation.inception import Inception


def random_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict of the whole network: convolutions by He's rule, batch norms with means and spreads of their own."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in Inception(None).network.state_dict().items():
        if value.ndim == 4:
            made = torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5
        elif name.endswith("running_var") or name.endswith("bn.weight"):
            made = 0.8 + 0.4 * torch.rand(value.shape, generator=generator)
        elif value.ndim == 0:
            made = value
        else:
            made = 0.05 * torch.randn(value.shape, generator=generator)
        state[name] = made.to(value.dtype)
    return state


def write_random_weights(path: Path) -> dict[str, torch.Tensor]:
    """Write them as torch-fidelity's file is written; returns them."""
    state = random_state()
    torch.save(state, path)
    return state

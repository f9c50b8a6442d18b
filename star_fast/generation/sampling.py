"""The numbers that turn logits into tokens, checked once, and the draw itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeGuard

from torch import Tensor

from star_fast.ops.sample_tokens import sample_tokens

_MOST_TOKENS = 2**31  # what the kernels count with


@dataclass(frozen=True)
class Sampling:
    """How logits become tokens (method.md section 3, Sampling)."""

    # Scale s of classifier-free guidance; 1 switches it off, and the null-class rows are not computed
    guidance: float = 1.0
    # n >= 0: image tokens 0 ... n+1 are guided, later ones use the class alone; -1: all are guided
    cfg_interval: int = -1
    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # tokens kept, ties at the k-th stay; 0: all
    top_p: float = 1.0  # share of the probability kept, of what top_k left; 1: all
    seed: int = 0  # with image index and position it names the random numbers of a draw

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("guidance", is_number(self.guidance) and 1 <= self.guidance < 1e6, "a number from 1 (off) to 1e6"),
            (
                "cfg_interval",
                is_int(self.cfg_interval) and -1 <= self.cfg_interval < _MOST_TOKENS,
                "-1 (always) or n >= 0, below 2^31 (image tokens 0 ... n+1 are guided)",
            ),
            (
                "temperature",
                is_number(self.temperature) and (self.temperature == 0 or 1e-5 <= self.temperature <= 1e5),
                "0 (the likeliest) or 1e-5 ... 1e5",
            ),
            (
                "top_k",
                is_int(self.top_k) and 0 <= self.top_k < _MOST_TOKENS,
                "0 (all) or a number of tokens below 2^31",
            ),
            ("top_p", is_number(self.top_p) and 0 <= self.top_p <= 1, "a share in [0, 1]"),
            ("seed", is_int(self.seed) and 0 <= self.seed < 2**63, "a whole number in 0 ... 2^63 - 1"),
        ):
            if not good:
                raise ValueError(f"generate: {name} must be {expected}, got {getattr(self, name)!r:.80}")

    @property
    def guided(self) -> bool:
        """Whether guidance does anything."""
        return self.guidance > 1

    def guided_at(self, position: int) -> bool:
        """Whether the image token drawn at `position` is guided."""
        return self.guided and (self.cfg_interval < 0 or position <= self.cfg_interval + 1)


def draw(
    logits_BV: Tensor, sampling: Sampling, seed: int | Tensor, image_index: Tensor, position: int | Tensor, out: Tensor
) -> Tensor:
    """ops.sample_tokens on logits that are guided already; on CUDA `seed` and `position` live on the device."""
    return sample_tokens(
        logits_BV,
        seed=seed,
        image_index=image_index,
        position=position,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        out=out,
    )


def is_int(value: object) -> TypeGuard[int]:
    """A whole number, and not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """A finite number that a float can hold, and not a truth value."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False

"""Views to codes in batches: float32 as the tokenizer was made, or its convolutions in bfloat16, and what share of the
codes that changes.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

from star_fast.config import ConfigError
from star_fast.model.ieee import ieee_products
from star_fast.model.tokenizer import VQTokenizer, from_uint8

PRECISIONS = ("fp32", "bf16")


class Encoder:
    """Encodes views with a copy of the tokenizer whose weights lie channels last, as fast convolutions read them on CPU
    and GPU.

    Args:
        tokenizer: float32, on the device to encode on.
        precision: "fp32": IEEE products, no TF32: codes are a nearest neighbour, which rounding changes. "bf16": the
            encoder in bfloat16; the search for the nearest entry stays float32.
        batch_views: views encoded at once; a view's codes may depend on it in the last bit of a sum.
    """

    def __init__(self, tokenizer: VQTokenizer, precision: str, batch_views: int) -> None:
        if precision not in PRECISIONS:
            raise ConfigError(f"precision: expected 'fp32' or 'bf16', got {precision!r}")
        self.device, self.batch_views = next(tokenizer.parameters()).device, batch_views
        self.tokenizer = copy.deepcopy(tokenizer).to(memory_format=torch.channels_last)
        if precision == "bf16":
            self.tokenizer.encoder.bfloat16()
            self.tokenizer.quant_conv.bfloat16()

    def __call__(self, views: np.ndarray | Tensor) -> np.ndarray:
        """Codes (N, T) int64 of views (N, C, H, W) uint8."""
        with ieee_products():
            parts = [
                self.tokenizer.encode(from_uint8(part.to(self.device)).contiguous(memory_format=torch.channels_last))
                for part in torch.as_tensor(views).split(self.batch_views)
            ]
            return torch.cat(parts).cpu().numpy()


def codes_that_differ(tokenizer: VQTokenizer, views: Tensor, batch_views: int) -> dict[str, float | int]:
    """What encoding views (N, C, H, W) uint8 in bfloat16 changes: {"images": N, "codes_that_differ": share of all their
    codes}.
    """
    exact, rounded = (Encoder(tokenizer, precision, batch_views)(views) for precision in PRECISIONS)
    return {"images": len(views), "codes_that_differ": round(float((exact != rounded).mean()), 6)}

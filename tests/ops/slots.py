"""Calls of the two contrastive ops, and unit vectors in Python numbers: what both of their tests start from."""

from __future__ import annotations

import math
from typing import Any

import torch

PAIRS = torch.tensor([[0, 1], [2, 0], [2, 0], [2, 1]])  # one pair twice; anchor slot 1 in none


def call(rows: int, keys: int, width: int, row_offset: int = 0, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rows)
    key = 2 * torch.randn(2, keys, width, generator=generator)
    anchor = 0.5 * key[:1, row_offset : row_offset + rows] + torch.randn(3, rows, width, generator=generator)
    return {"anchor": anchor, "key": key, "pairs": PAIRS, "temperature": 0.2, "row_offset": row_offset, **more}


def unit(vector: list[float]) -> list[float]:
    norm = math.hypot(*vector)
    return [0.0] * len(vector) if norm < 1e-12 else [x / norm for x in vector]

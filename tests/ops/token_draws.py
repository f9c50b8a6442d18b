"""Draws of ops.sample_tokens as its tests make them: logits, a whole call, the backends that are there."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

op = importlib.import_module("star_fast.ops.sample_tokens")
HAS_EXTENSION = importlib.util.find_spec("star_fast._C") is not None
needs_extension = pytest.mark.skipif(
    not HAS_EXTENSION, reason="star_fast._C is not built (python setup.py build_ext --inplace)"
)
BACKENDS = [pytest.param("cpp", marks=needs_extension), "reference"]
FAST = "cpp" if HAS_EXTENSION else "reference"


def logits_of(rows: int, vocab: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def draw(logits: Tensor, backend: str = FAST, **settings: Any) -> Tensor:
    given = {"seed": 1, "image_index": torch.arange(logits.shape[0]), "position": 0, **settings}
    return op.sample_tokens(logits, **given, backend=backend)

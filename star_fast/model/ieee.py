"""Float32 as it is meant: without TF32, which a GPU's convolutions use unless they are told otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def ieee_products() -> Iterator[None]:
    """Within the block float32 convolutions and matrix products on CUDA are not rounded to TF32. A setting of the whole
    process, put back afterwards.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)

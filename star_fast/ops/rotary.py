"""The rotary position code on interleaved pairs, as the attention ops' references apply it."""

from __future__ import annotations

import torch
from torch import Tensor

from star_fast.ops.dispatch import Launch


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair (x[2p], x[2p+1]) of a head by its table entry (cos, sin): (x0 cos - x1 sin, x0 sin + x1 cos), a
    complex product.

    A plain product with the table: an all-zero entry (LlamaGen's class position) makes the pair zero.

    Args:
        x: (..., E) float.
        table: (..., E/2, 2) float32 (or float64) = (cos, sin), shaped to broadcast against the pairs of `x`.

    Returns:
        The shape and dtype of `x`; computed in float32 (float64 for float64), rounded once.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    # Complex products are one fast loop on the CPU
    pairs = torch.view_as_complex(x.to(compute).contiguous().unflatten(-1, (-1, 2)))
    turned = pairs * torch.view_as_complex(table.to(compute).contiguous())
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def rotate_bytes(numbers: int, dtype: torch.dtype) -> int:
    """Bytes that `rotate` moves for a strided tensor of that many numbers on a GPU, where each torch operation is a
    launch: a copy in float32, the complex product, and the rounding."""
    wide, narrow = torch.promote_types(dtype, torch.float32).itemsize, dtype.itemsize
    return numbers * ((narrow + wide) + 2 * wide + (wide + narrow if narrow < wide else 0))


def rotate_launches(name: str, numbers: int, dtype: torch.dtype) -> list[Launch]:
    """Those launches, for the tensor called `name`; torch sizes its grids itself, given here as programs of 1024
    numbers.
    """
    steps = ("copy to float32", "complex product", *(["rounding"] if dtype.itemsize < 4 else []))
    return [Launch(f"torch rotary of {name}: {step}", (max(1, numbers // 1024),)) for step in steps]


def check_table(op: str, table: Tensor, positions: int, head_size: int, device: torch.device) -> None:
    """Raise unless `table` is (>= positions, head_size / 2, 2) float32 or float64 on `device`."""
    if table.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: rotary must be float32 (cos, sin), got {table.dtype}")
    if head_size % 2 or table.ndim != 3 or table.shape[0] < positions or table.shape[1:] != (head_size // 2, 2):
        raise ValueError(
            f"{op}: rotary must be ({positions} positions or more, {head_size} / 2 pairs, 2), got shape "
            f"{tuple(table.shape)}"
        )
    if table.device != device:
        raise ValueError(f"{op}: rotary must be on {device} like qkv, got {table.device}")


def random_table(positions: int, head_size: int, generator: torch.Generator) -> Tensor:
    """(T, E/2, 2) float32 of random angles with position 0 all zero, as LlamaGen's class position: for tests and
    benchmarks of the ops.
    """
    angle = torch.rand(positions, head_size // 2, generator=generator) * 6.2831853
    table = torch.stack((angle.cos(), angle.sin()), dim=-1)
    table[0] = 0
    return table

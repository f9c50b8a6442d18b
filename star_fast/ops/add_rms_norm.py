"""Residual add, dropout and LlamaGen's RMSNorm in one op: what stands between two matrix products of a transformer
block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_fast.ops import dispatch
from star_fast.ops.shapes import SHAPES

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
# Of a mask made at once: its 1 MiB stays in the cache; smaller blocks pay more for starting threads
_BLOCK_NUMBERS = 2**18


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    dropout: float = 0.0,
    seed: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """new_residual = residual + dropout(x);  normed = round(new_residual / rms(new_residual)) * weight.

    rms(h) = sqrt(mean(h^2) + eps) over the last dimension. dropout(x) is 0 with probability `dropout`, else x / (1 -
    dropout); which elements survive is a function of (seed, row, column) alone (`kept`), the same on every backend and
    in backward.

    Backward, with h = new_residual, n = h / rms(h), g the gradient of normed, e that of new_residual:
    dh = (g * weight - n * mean(g * weight * n)) / rms(h) + e;  dresidual = dh;  dx = dropout(dh);  dweight = sum over
    rows of g * n.

    Args:
        x: (..., D) float, D >= 1: the output of attention or feed-forward.
        residual: like `x`, or None: then new_residual = dropout(x).
        weight: (D,), dtype and device of `x`.
        eps: added to the mean square; > 0.
        dropout: share of elements of `x` set to zero, in [0, 1).
        seed: 0 <= seed < 2^63: names the mask. Take another for every site and step.
        backend: name of a backend; None chooses (see dispatch).

    Returns:
        (normed, new_residual), each (..., D) of x's dtype and device. With residual None and dropout 0 the second is
        `x` itself.

    Numerics:
        new_residual is rounded to x's dtype first; the norm of that is computed in float32 (float64 for float64),
        rounded to x's dtype, then multiplied by the weight: LlamaGen's order. Deterministic, gradients included.

    Memory:
        Kernels save new_residual and weight only (the next residual add holds new_residual as well); the mask is never
        stored.

    Raises:
        TypeError: not floating point, or dtypes differ. ValueError: shapes or devices differ, a number out of range.

    Source:
        Zhang & Sennrich 2019 (arXiv 1910.07467); LlamaGen (arXiv 2406.06525), RMSNorm and TransformerBlock.
    """
    if not x.is_floating_point():
        raise TypeError(f"add_rms_norm: x must be floating point, got {x.dtype}")
    shape = x.shape
    if not shape or shape[-1] == 0:
        raise ValueError(f"add_rms_norm: x must be (..., D) with D >= 1, got shape {tuple(shape)}")
    if residual is not None:
        _check_beside("residual", residual, x, shape)
    _check_beside("weight", weight, x, shape[-1:])
    if not eps > 0:
        raise ValueError(f"add_rms_norm: eps must be more than 0, got {eps}")
    if not 0 <= dropout < 1:
        raise ValueError(f"add_rms_norm: dropout must be in [0, 1), got {dropout}")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"add_rms_norm: seed must be an int with 0 <= seed < 2^63, got {seed!r}")
    return dispatch.call("add_rms_norm", x.device, (x, residual, weight, eps, dropout, seed), backend=backend)


def _check_beside(name: str, tensor: Tensor, x: Tensor, shape: torch.Size) -> None:
    if tensor.dtype != x.dtype:
        raise TypeError(f"add_rms_norm: {name} must have x's dtype {x.dtype}, got {tensor.dtype}")
    if tensor.shape != shape or tensor.device != x.device:
        raise ValueError(
            f"add_rms_norm: {name} must be {tuple(shape)} on {x.device}, got {tuple(tensor.shape)} on {tensor.device}"
        )


def reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-5, dropout: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The formula, in plain torch."""
    branch = _Dropout.apply(x, dropout, seed) if dropout else x
    new_residual = branch if residual is None else residual + branch
    h = new_residual if x.dtype in (torch.float32, torch.float64) else new_residual.float()
    normed = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight, new_residual


class _Dropout(torch.autograd.Function):
    """x * kept / (1 - dropout); backward draws the same mask again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: float, seed: int) -> Tensor:
        ctx.dropout, ctx.seed = dropout, seed
        rows = x.reshape(-1, x.shape[-1])
        out, limit = torch.empty(rows.shape, dtype=x.dtype, device=x.device), threshold(dropout)
        row_hashes, column_hashes = _hashes(rows.shape[0], rows.shape[1], seed, x.device)
        step = max(1, _BLOCK_NUMBERS // rows.shape[1])
        for block in range(0, rows.shape[0], step):
            mask = _survivors(row_hashes[block : block + step], column_hashes, limit).to(x.dtype)
            torch.mul(rows[block : block + step], mask, out=out[block : block + step]).mul_(1 / (1 - dropout))
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        return _Dropout.apply(dout, ctx.dropout, ctx.seed), None, None


def kept(rows: int, width: int, dropout: float, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The dropout mask as (rows, width) int32, 1 where an element survives: hash(row key + column key) below a
    threshold.

    Row and column are hashed with two keys of the seed and their sum is hashed again, so an element costs one hash, and
    masks of different seeds are unrelated. int32 throughout and in place: wrapping products and logical shifts, at a
    few passes' cost.
    """
    return _survivors(*_hashes(rows, width, seed, device), threshold(dropout))


def _hashes(rows: int, width: int, seed: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Hashes of the row numbers (rows, 1) and of the column numbers (width,), each under its key."""
    row_key, column_key = keys(seed)
    return (
        _hash(torch.arange(rows, dtype=torch.int32, device=device).bitwise_xor_(row_key))[:, None],
        _hash(torch.arange(width, dtype=torch.int32, device=device).bitwise_xor_(column_key)),
    )


def _survivors(row_hashes: Tensor, column_hashes: Tensor, limit: int) -> Tensor:
    """1 where the hash of the sum is below `limit`, else 0; written without a comparison, which is slow on the CPU."""
    return _hash(row_hashes + column_hashes).clamp_(limit - 1, limit).sub_(limit).neg_()


def keys(seed: int) -> tuple[int, int]:
    """Two signed 32-bit keys from a 64-bit seed: one step of splitmix64 (Steele et al. 2014), which scatters
    neighbouring seeds.
    """
    z = (seed + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    z ^= z >> 31
    return _signed(z >> 32), _signed(z & _MASK32)


def threshold(dropout: float) -> int:
    """An element survives when its hash, as signed 32-bit number, is below this."""
    return min(max(round((1 - dropout) * 2**32) - 2**31, -(2**31) + 1), 2**31 - 1)


def _hash(x: Tensor) -> Tensor:
    """lowbias32 (github.com/skeeto/hash-prospector) in place; an arithmetic shift and a mask make the logical shift
    that int32 lacks.
    """
    shifted = torch.empty_like(x)
    for shift, factor in ((16, 0x7FEB352D), (15, _signed(0x846CA68B)), (16, 1)):
        torch.bitwise_right_shift(x, shift, out=shifted)
        x ^= shifted.bitwise_and_(_MASK32 >> shift)
        if factor != 1:
            x *= factor
    return x


def _signed(word: int) -> int:
    return word - (word >> 31 << 32)


def inputs(preset: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """Arguments for one call at a preset's training shape: x and residual (N, D), weight (D,), dropout 0.1."""
    shape = SHAPES[preset]
    generator = torch.Generator().manual_seed(seed)
    x, residual = torch.randn(2, shape.rows, shape.D, generator=generator).to(device, dtype)
    weight = (1 + 0.1 * torch.randn(shape.D, generator=generator)).to(device, dtype)
    return {"x": x, "residual": residual, "weight": weight, "dropout": 0.1, "seed": seed}


def cost(call: dict[str, Any], backward: bool = False) -> dispatch.Cost:
    """Least bytes and FLOPs of one call with these arguments, of the backward pass if `backward` (integer hashing not
    counted).
    """
    x, residual, dropout = call["x"], call.get("residual"), call.get("dropout", 0.0)
    numbers, size, width = x.numel(), x.element_size(), x.shape[-1]
    separate = residual is not None or dropout > 0  # new_residual is a tensor of its own
    # Reads h, dnormed, dnew_residual (which is x's own affair where that is x) and weight; writes dh, dropout(dh) if
    # another, dweight
    if backward:
        written = 2 if residual is not None and dropout > 0 else 1
        return dispatch.Cost((2 + separate + written) * size * numbers + 2 * size * width, 11 * numbers)
    return dispatch.Cost((1 + (residual is not None) + 1 + separate) * size * numbers + size * width, 6 * numbers)


dispatch.register(
    "add_rms_norm",
    reference,
    modules={"triton": "star_fast.ops.triton.add_rms_norm", "cpp": "star_fast.ops.add_rms_norm_cpp"},
    order={"cuda": ("triton",), "cpu": ("cpp",)},
)

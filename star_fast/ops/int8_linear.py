"""A matrix product in 8 bits on the CPU, for decoding: both factors rounded to 8 bits, sums in int32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from star_fast.ops import dispatch
from star_fast.ops.shapes import SHAPES

LARGEST_CODE = 127.0  # of a row's largest entry
TAKEN_FOR_ZERO = 1e-35  # a row whose largest entry is smaller has no scale that float32 can invert
MOST_INNER = 65536  # entries of a row: 65536 * 255 * 127 is below 2^31
ONLY_ON = "cpu"  # the one kind of device that this operation is for
TILE, BLOCK, GROUP, LANES = 16, 64, 256, 16  # csrc/int8_product.h
DTYPES = (torch.float32, torch.bfloat16)
_CPU = torch.device("cpu")


class Int8Weight:
    """A matrix W (N, K) in 8 bits, H w ~ code * scale of its row, in the order in which csrc/int8_cpu.cpp reads it: N
    is padded to 16, K to 256, with zeros.

    Attributes:
        packed: (N / 16, K / 4, 16, 4) int8: N * K bytes, and nothing beside them but 8 a row.
        scale: (N padded,) float32, the largest of each rotated row / 127; a row of zeros has 0.
        correction: (N padded,) int32, 128 times the sum of each row's codes: what a batch's codes count too much, since
            128 stands for 0 in them.
        shape: N and K.
    """

    def __init__(self, weight: Tensor) -> None:
        """Args: weight: (N, K) float, finite, on the CPU, K at most 65536.

        Raises:
            ValueError: another shape or device, or an entry that is not finite.
        """
        if weight.ndim != 2 or not weight.numel() or weight.shape[1] > MOST_INNER or weight.device.type != "cpu":
            raise ValueError(
                f"Int8Weight: expected (N, K) with K <= {MOST_INNER} on the CPU, got {tuple(weight.shape)} on "
                f"{weight.device}"
            )
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"Int8Weight: the weights {tuple(weight.shape)} hold NaN or infinity")
        codes, scale = rounded(rotated(weight.detach()) / LANES)
        self.shape = tuple(weight.shape)
        codes = F.pad(codes, (0, 0, 0, -len(codes) % TILE))
        in_blocks = codes.to(torch.int8).view(-1, TILE, codes.shape[1] // BLOCK, 4, BLOCK // 4)
        self.packed = in_blocks.permute(0, 2, 4, 1, 3).flatten(1, 2).contiguous()
        self.scale = F.pad(scale, (0, -len(scale) % TILE))
        self.correction = (codes.sum(1, dtype=torch.float64) * 128).to(torch.int32)

    def codes(self) -> Tensor:
        """(N, K padded) int8, in the rotated matrix's own order."""
        in_blocks = self.packed.unflatten(1, (-1, BLOCK // 4)).permute(0, 3, 1, 4, 2)
        return in_blocks.reshape(self.scale.numel(), -1)[: self.shape[0]]


def int8_linear(x: Tensor, weight: Int8Weight, *, backend: str | None = None) -> Tensor:
    """x W^T with x rotated and rounded as W is: y[r, n] = (sum over k of codes_x[r, k] * codes_w[n, k]) * scale_w[n] *
    scale_x[r].

    Before rounding, every 16 entries of a row that lie 16 apart are multiplied by the Hadamard matrix H of size 16, and
    W's by H / 16, which undoes it: a few large entries, as a gate or attention makes them, are spread over sixteen, and
    the row's scale falls. It costs four additions an entry.

    Args:
        x: (R, K) float32 or bfloat16 on the CPU, R >= 1, any strides.
        weight: of (N, K).
        backend: name of a backend; None chooses (see dispatch).

    Returns:
        (R, N), dtype of `x`.

    Numerics:
        Rotated in float32; scale = a row's largest / 127, codes rounded to nearest, ties to even: at most half a scale
        off. Sums are exact; they and the scales are multiplied in float32, and the result is rounded once to x's dtype.
        Deterministic, the same bits on every backend and instruction set; a row's result depends on no other row. A row
        that holds NaN or infinity (or comes to it, above 2e37) comes out as NaN whole, one whose rotated entries are
        all below 1e-35 as zeros.

    Memory:
        R * K bytes of codes, R rounded up to 16 and K to 256; sums stay in registers.

    Raises:
        TypeError, ValueError: dtype or shapes.
    """
    shape = x.shape
    if len(shape) != 2 or not shape[0] or shape[1] != weight.shape[1] or not x.is_cpu:
        raise ValueError(
            f"int8_linear: x must be (R, {weight.shape[1]}) with R >= 1 on the CPU, got {tuple(shape)} on {x.device}"
        )
    if x.dtype not in DTYPES:
        raise TypeError(f"int8_linear: x must be float32 or bfloat16, got {x.dtype}")
    return dispatch.call("int8_linear", _CPU, (x, weight), backend=backend)


def reference(x: Tensor, weight: Int8Weight) -> Tensor:
    """The formula in plain torch: sums in float64, which holds them exactly."""
    codes, scale = rounded(rotated(x))
    sums = codes.double() @ weight.codes().double().t()
    return (sums.float() * weight.scale[: weight.shape[0]] * scale[:, None]).to(x.dtype)


def rotated(x: Tensor) -> Tensor:
    """(R, K) float -> (R, K padded to 256) float32, H times every 16 entries 16 apart: sums and differences at distance
    1, 2, 4, 8, in this order.
    """
    parts = F.pad(x.float(), (0, -x.shape[1] % GROUP)).view(-1, GROUP // LANES, LANES)
    for distance in (1, 2, 4, 8):
        first, second = parts.view(len(parts), -1, 2, distance, LANES).unbind(2)
        parts = torch.stack([first + second, first - second], 2).view(len(parts), -1, LANES)
    return parts.reshape(len(x), -1)


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """(R, K) float32 -> whole numbers in -127 ... 127 (R, K) float32 and scales (R,), x ~ codes * scale; the scale of a
    row that is not finite is NaN.
    """
    most = x.abs().amax(1)
    finite, tiny = most.isfinite(), most < TAKEN_FOR_ZERO
    # Number / tensor would round twice
    inverse = torch.where(finite & ~tiny, torch.full_like(most, LARGEST_CODE) / most, 0.0)
    scale = torch.where(finite, torch.where(tiny, 0.0, most / LARGEST_CODE), torch.nan)
    return torch.where(finite[:, None], (x * inverse[:, None]).round_(), 0.0), scale


def inputs(preset: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Tensor | Int8Weight]:
    """Arguments for one call at a preset's feed-forward: rows = its sequences. Weights as they
    start, Normal(0, 0.02).
    """
    if torch.device(device).type != "cpu":
        raise dispatch.BackendUnavailable(
            f"int8_linear: backends cannot serve this call: 8-bit products are for the CPU, got {device}"
        )
    shape, generator = SHAPES[preset], torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(2 * shape.F, shape.D, generator=generator)
    return {"x": torch.randn(shape.sequences, shape.D, generator=generator).to(dtype), "weight": Int8Weight(weight)}


def cost(call: dict[str, Any], backward: bool = False) -> dispatch.Cost:
    """Least bytes and operations of one call with these arguments; it has no backward pass."""
    x, (N, K) = call["x"], call["weight"].shape
    return dispatch.Cost(N * K + 4 * N + len(x) * (K + N) * x.element_size(), 2 * len(x) * N * K)


dispatch.register("int8_linear", reference, modules={"cpp": "star_fast.ops.int8_linear_cpp"}, order={"cpu": ("cpp",)})

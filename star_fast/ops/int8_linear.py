"""A matrix product in 8 bits on the CPU, for decoding: both factors rounded to 8 bits, sums in int32."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from star_fast.ops import dispatch
from star_fast.ops.shapes import SHAPES

LARGEST_CODE = 127.0  # of a row's largest entry
ZERO_POINT = 128  # the code of 0 in a batch's rows: oneDNN is slow on signed rows where there is no AMX
TAKEN_FOR_ZERO = 1e-35  # a row whose largest entry is smaller has no scale that float32 can invert


class Int8Weight:
    """A matrix W (N, K) in 8 bits, w ~ code * scale of its row, in the order in which oneDNN's kernel reads it.

    Attributes:
        packed: (K, N) int8, opaque, N * K bytes and nothing beside them.
        scale: (N,) float32, max|w| / 127 of each row; a row of zeros has 0.
        zero_point: (N,) int64 zeros, which the operator asks for.
    """

    def __init__(self, weight: Tensor, rows: int) -> None:
        """Args: weight: (N, K) float, finite, on the CPU. rows: a hint for the layout: rows of a batch.

        Raises:
            ValueError: another shape or device, or an entry that is not finite. RuntimeError: `why_not_here` says why.
        """
        if weight.ndim != 2 or not weight.numel() or weight.device.type != "cpu" or not bool(torch.isfinite(weight).all()):
            raise ValueError(f"Int8Weight: expected a finite (N, K) matrix on the CPU, got {tuple(weight.shape)} {weight.dtype} on {weight.device}")
        if (reason := why_not_here()) is not None:
            raise RuntimeError(f"Int8Weight: {reason}")
        codes, self.scale = rounded(weight.detach())
        self.packed = torch.ops.onednn.qlinear_prepack(codes.to(torch.int8), [rows, weight.shape[1]])
        self.zero_point = torch.zeros(len(weight), dtype=torch.int64)


def int8_linear(x: Tensor, weight: Int8Weight, *, backend: str | None = None) -> Tensor:
    """x W^T with x rounded as W is: y[r, n] = (sum over k of codes_x[r, k] * codes_w[n, k]) * scale_w[n] * scale_x[r].

    Args:
        x: (R, K) float32 or bfloat16 on the CPU, R >= 1, any strides.
        weight: of (N, K).
        backend: name of a backend; None chooses (see dispatch).

    Returns:
        (R, N), dtype of `x`.

    Numerics:
        scale = max|x| / 127 of a row, codes rounded to nearest, ties to even: at most half a scale off. Sums are exact; each scale is multiplied in float32 and
        the result rounded once to x's dtype. Deterministic; a row's result depends on no other row. A row that holds NaN or infinity comes out as NaN whole, one
        whose entries are all below 1e-35 as zeros.

    Memory:
        R * K bytes of codes and R * N * 4 of sums.

    Raises:
        TypeError, ValueError: dtype or shapes.
    """
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"int8_linear: x must be float32 or bfloat16, got {x.dtype}")
    if x.ndim != 2 or not len(x) or x.shape[1] != weight.packed.shape[0]:
        raise ValueError(f"int8_linear: x must be (R, {weight.packed.shape[0]}) with R >= 1, got {tuple(x.shape)}")
    return dispatch.call("int8_linear", x.device, (x, weight), backend=backend)


def reference(x: Tensor, weight: Int8Weight) -> Tensor:
    """The formula in plain torch around the same operator: several passes where the extension makes two."""
    codes, scale = rounded(x)
    product = torch.ops.onednn.qlinear_pointwise((codes + ZERO_POINT).to(torch.uint8), 1.0, ZERO_POINT, weight.packed, weight.scale, weight.zero_point, None,
                                                 1.0, 0, torch.float32, "none", [], "")
    return (product * scale[:, None]).to(x.dtype)


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """(R, K) float -> whole numbers in -127 ... 127 (R, K) float32 and scales (R,) float32, x ~ codes * scale; the scale of a row that is not finite is NaN."""
    x = x.float()
    most = x.abs().amax(1)
    finite, tiny = most.isfinite(), most < TAKEN_FOR_ZERO
    inverse = torch.where(finite & ~tiny, torch.full_like(most, LARGEST_CODE) / most, 0.0)  # number / tensor would round twice
    scale = torch.where(finite, torch.where(tiny, 0.0, most / LARGEST_CODE), torch.nan)
    return torch.where(finite[:, None], (x * inverse[:, None]).round_(), 0.0), scale


@functools.cache
def why_not_here() -> str | None:
    """None if PyTorch's 8-bit products are exact on this processor, else the reason. Tried, not looked up: on processors without 8-bit dot products (AVX2
    and AVX-512 without VNNI) oneDNN adds pairs of products in 16 bits, where large ones overflow without a word."""
    weight = torch.full((64, 256), 127, dtype=torch.int8)
    codes = torch.full((8, 256), 255, dtype=torch.uint8)
    try:
        packed = torch.ops.onednn.qlinear_prepack(weight, list(codes.shape))
        product = torch.ops.onednn.qlinear_pointwise(codes, 1.0, ZERO_POINT, packed, torch.ones(64), torch.zeros(64, dtype=torch.int64), None, 1.0, 0,
                                                     torch.float32, "none", [], "")
    except (AttributeError, RuntimeError) as error:
        return f"this build of PyTorch has no 8-bit products by oneDNN: {str(error).strip().splitlines()[0]}"
    if not bool((product == 256 * 127 * 127).all()):
        return "this processor has no 8-bit dot products (AVX-512 VNNI, AVX-VNNI or AMX): their sums overflow"
    return None


def inputs(preset: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Tensor | Int8Weight]:
    """Arguments for one call at a preset's feed-forward: rows = its sequences. Weights as they start, Normal(0, 0.02)."""
    if (reason := f"8-bit products are for the CPU, got {device}" if torch.device(device).type != "cpu" else why_not_here()) is not None:
        raise dispatch.BackendUnavailable(f"int8_linear: no backend can serve this call: {reason}")
    shape, generator = SHAPES[preset], torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(2 * shape.F, shape.D, generator=generator)
    return {"x": torch.randn(shape.sequences, shape.D, generator=generator).to(dtype), "weight": Int8Weight(weight, shape.sequences)}


def cost(call: dict[str, Tensor | Int8Weight], backward: bool = False) -> dispatch.Cost:
    """Least bytes and operations of one call with these arguments; it has no backward pass."""
    x, (K, N) = call["x"], call["weight"].packed.shape
    return dispatch.Cost(N * K + 4 * N + len(x) * (K + N) * x.element_size(), 2 * len(x) * N * K)


dispatch.register("int8_linear", reference, modules={"cpp": "star_fast.ops.int8_linear_cpp"}, order={"cpu": ("cpp",)})

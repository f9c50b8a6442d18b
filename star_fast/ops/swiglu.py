"""SwiGLU on packed rows: the gated half of LlamaGen's feed-forward, between its two matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from star_fast.ops import dispatch
from star_fast.ops.shapes import SHAPES


def swiglu(w1w3: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(a) * b for rows that hold a and b side by side: out[..., f] = a[..., f] * sigmoid(a[..., f]) * b[..., f].

    Backward, with s = sigmoid(a): da = dout * b * s * (1 + a * (1 - s)), db = dout * a * s.

    Args:
        w1w3: (..., 2F) float; a = w1w3[..., :F] (the product with w1), b = w1w3[..., F:] (with w3). Any strides; F >=
            1.
        backend: name of a backend; None chooses (see dispatch).

    Returns:
        (..., F), dtype and device of `w1w3`.

    Numerics:
        Computed in float32 (float64 for float64), rounded once. Deterministic.

    Memory:
        Saves its input only; backward recomputes the sigmoid.

    Raises:
        TypeError: not floating point. ValueError: the last dimension is odd, empty or missing.

    Source:
        Shazeer 2020 (arXiv 2002.05202); LlamaGen (arXiv 2406.06525), FeedForward.
    """
    if not w1w3.is_floating_point():
        raise TypeError(f"swiglu: w1w3 must be floating point, got {w1w3.dtype}")
    if not (shape := w1w3.shape) or shape[-1] % 2 or shape[-1] == 0:
        raise ValueError(f"swiglu: w1w3 must be (..., 2F) with F >= 1, got shape {tuple(w1w3.shape)}")
    return dispatch.call("swiglu", w1w3.device, (w1w3,), backend=backend)


def reference(w1w3: Tensor) -> Tensor:
    """The formula, in plain torch."""
    a, b = w1w3.chunk(2, dim=-1)
    return F.silu(a) * b


def inputs(preset: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """Arguments for one call at a preset's training shape: {"w1w3": (N, 2F)}."""
    shape = SHAPES[preset]
    generator = torch.Generator().manual_seed(seed)
    return {"w1w3": torch.randn(shape.rows, 2 * shape.F, generator=generator).to(device, dtype)}


def cost(call: dict[str, Tensor], backward: bool = False) -> dispatch.Cost:
    """Least bytes and FLOPs of one call with these arguments, of the backward pass if `backward`."""
    x = call["w1w3"]
    rows, width, size = x.numel() // x.shape[-1], x.shape[-1] // 2, x.element_size()
    if backward:  # reads w1w3 and dout, writes dw1w3
        return dispatch.Cost(rows * width * 5 * size, rows * width * 11)
    return dispatch.Cost(rows * width * 3 * size, rows * width * 5)


dispatch.register(
    "swiglu",
    reference,
    modules={"triton": "star_fast.ops.triton.swiglu", "cpp": "star_fast.ops.swiglu_cpp"},
    order={"cuda": ("triton",), "cpu": ("cpp",)},
)

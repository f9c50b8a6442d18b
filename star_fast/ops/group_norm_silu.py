"""GroupNorm and SiLU in one op: what stands before every convolution of the VQ tokenizer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from star_fast.ops import dispatch
from star_fast.ops.shapes import SHAPES

_SIDE = 16  # of the images that `inputs` makes: the lowest level of a 256-pixel tokenizer


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-6,
    *,
    silu: bool = True,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """silu(n) with n = (x - mean) / sqrt(var + eps) * weight + bias; n itself without `silu`.

    Mean and (biased) variance are taken for each image over all pixels of a group of C / groups neighbouring channels.
    Backward is autograd's.

    Args:
        x: (B, C, H, W) float, in any layout; channels last is the fast one.
        weight, bias: (C,), dtype and device of `x`.
        groups: a divisor of C.
        eps: added to the variance; > 0.
        silu: whether n goes through n * sigmoid(n).
        out: where to write, like `x` in all; it may be `x`, which saves a pass over memory and the pages of a new
            tensor. Without gradients only.
        backend: name of a backend; None chooses (see dispatch).

    Returns:
        (B, C, H, W), dtype, device and layout of `x`.

    Numerics:
        Kernels take both sums in float32 about a number near the mean, part by part; the parts are added up in
        float64 on the CPU, in float32 about a mean on CUDA. n and silu(n) are computed in float32 and rounded once (the
        reference rounds n, too). Deterministic, on any number of threads; an image's numbers do not depend on the
        others.

    Memory:
        Inference alone has kernels: they save nothing, and only the result is as large as `x`.

    Raises:
        TypeError: not floating point, or dtypes differ. ValueError: shapes or devices differ, a number out of range.

    Source:
        Wu & He 2018 (arXiv 1803.08494); Elfwing et al. 2017 (arXiv 1702.03118); LlamaGen (arXiv 2406.06525), VQ
        tokenizer.
    """
    if not x.is_floating_point():
        raise TypeError(f"group_norm_silu: x must be floating point, got {x.dtype}")
    if x.ndim != 4 or groups < 1 or x.shape[1] == 0 or x.shape[1] % groups:
        raise ValueError(
            f"group_norm_silu: x must be (B, C, H, W) with C a multiple of groups, got shape {tuple(x.shape)} and "
            f"{groups} groups"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.dtype != x.dtype:
            raise TypeError(f"group_norm_silu: {name} must have x's dtype {x.dtype}, got {tensor.dtype}")
        if tensor.shape != x.shape[1:2] or tensor.device != x.device:
            raise ValueError(
                f"group_norm_silu: {name} must be {tuple(x.shape[1:2])} on {x.device}, got {tuple(tensor.shape)} "
                f"on {tensor.device}"
            )
    if out is not None and (
        out.shape != x.shape or out.dtype != x.dtype or out.device != x.device or out.stride() != x.stride()
    ):
        raise ValueError(
            f"group_norm_silu: out must be like x, {tuple(x.shape)} {x.dtype} of strides {x.stride()} on "
            f"{x.device}, got {tuple(out.shape)} "
            f"{out.dtype} of strides {out.stride()} on {out.device}"
        )
    if not eps > 0:
        raise ValueError(f"group_norm_silu: eps must be more than 0, got {eps}")
    return dispatch.call("group_norm_silu", x.device, (x, weight, bias, groups, eps, silu, out), backend=backend)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-6,
    silu: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """The formula, in plain torch."""
    normed = F.group_norm(x, groups, weight, bias, eps)
    result = F.silu(normed) if silu else normed
    return result if out is None else out.copy_(result)


def inputs(preset: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Tensor | int]:
    """Arguments for one call: the images of a preset as 16 x 16 pixels of its width D, channels last, in groups of 4
    channels or more.
    """
    shape = SHAPES[preset]
    generator = torch.Generator().manual_seed(seed)
    x = (0.5 + torch.randn(shape.B, _SIDE, _SIDE, shape.D, generator=generator)).to(device, dtype).permute(0, 3, 1, 2)
    weight, bias = (start + 0.1 * torch.randn(shape.D, generator=generator) for start in (1, 0))
    return {"x": x, "weight": weight.to(device, dtype), "bias": bias.to(device, dtype), "groups": min(32, shape.D // 4)}


def cost(call: dict[str, Tensor], backward: bool = False) -> dispatch.Cost:
    """Least bytes and FLOPs of one call with these arguments, of the backward pass if `backward`."""
    numbers, size = call["x"].numel(), call["x"].element_size()
    if backward:  # reads x and dout, writes dx, dweight and dbias
        return dispatch.Cost(size * (3 * numbers + 3 * call["weight"].numel()), 20 * numbers)
    return dispatch.Cost(size * (2 * numbers + 2 * call["weight"].numel()), 10 * numbers)


dispatch.register(
    "group_norm_silu",
    reference,
    modules={"triton": "star_fast.ops.triton.group_norm_silu", "cpp": "star_fast.ops.group_norm_silu_cpp"},
    order={"cpu": ("cpp",), "cuda": ("triton",)},
)

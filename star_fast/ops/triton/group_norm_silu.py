"""GroupNorm + SiLU kernels for channels-last images, forward: each part's moments, their merging, and the pass that
writes; x is read twice, the result written once, and nothing is turned to another layout.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_fast.ops.dispatch import Cost
from star_fast.ops.triton.launching import Kernel, ceil_div, why_not_device
from star_fast.ops.triton.tiles import GROUP_NORM_MERGE, GROUP_NORM_MOMENTS, GROUP_NORM_SCALED, Tile

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_GROUP = 8192  # channels of a group: 64 float32 registers a thread of the program that merges it


@triton.jit
def group_norm_moments(x_ptr, moments_ptr, n_rows, n_cols, n_parts, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Mean and sum of squared deviations of each channel over a part, ROWS pixels of an image.

    The tile stays in registers: about its first pixel a sum for the mean, then about the mean a sum of squares, so that
    neither a mean far above the deviation nor a single far pixel costs digits. Neighbouring programs read neighbouring
    memory.
    """
    n_blocks = tl.cdiv(n_cols, COLS)
    part = tl.program_id(0) // n_blocks  # of all images
    first = part % n_parts * ROWS
    cols = tl.program_id(0) % n_blocks * COLS + tl.arange(0, COLS)[None, :]
    row = first + tl.arange(0, ROWS)[:, None]
    inside = (row < n_rows) & (cols < n_cols)
    start_ptr = x_ptr + (part // n_parts).to(tl.int64) * n_rows * n_cols
    # (1, COLS)
    centre = tl.load(start_ptr + first.to(tl.int64) * n_cols + cols, mask=cols < n_cols, other=0.0)
    x = tl.load(start_ptr + row.to(tl.int64) * n_cols + cols, mask=inside, other=0.0)  # (ROWS, COLS), as all tiles here
    x = tl.where(inside, x.to(tl.float32) - centre.to(tl.float32), 0.0)
    mean = tl.sum(x, 0, keep_dims=True) / tl.minimum(n_rows - first, ROWS)
    x = tl.where(inside, x - mean, 0.0)
    out_ptr = moments_ptr + part.to(tl.int64) * 2 * n_cols + cols
    tl.store(out_ptr, centre.to(tl.float32) + mean, mask=cols < n_cols)
    tl.store(out_ptr + n_cols, tl.sum(x * x, 0, keep_dims=True), mask=cols < n_cols)


@triton.jit
def group_norm_merge(
    moments_ptr,
    weight_ptr,
    scaling_ptr,
    n_rows,
    n_cols,
    n_parts,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Mean of a group and weight / sqrt(var + eps) of its channels, from the moments of all its channels and parts
    (Chan, Golub & LeVeque 1979), PARTS parts at once, always in the same order.
    """
    n_groups = n_cols // GROUP
    image = (tl.program_id(0) // n_groups).to(tl.int64)
    lane = tl.arange(0, WIDTH)[None, :]
    cols = tl.program_id(0) % n_groups * GROUP + lane
    start_ptr = moments_ptr + image * n_parts * 2 * n_cols
    centre = tl.load(start_ptr + tl.program_id(0) % n_groups * GROUP)
    n = n_rows * 1.0 * GROUP
    total = tl.zeros((PARTS, WIDTH), dtype=tl.float32)  # as all tiles here
    for i in range(0, n_parts, PARTS):
        part = i + tl.arange(0, PARTS)[:, None]
        inside = (part < n_parts) & (lane < GROUP)
        count = tl.minimum(n_rows - part * ROWS, ROWS).to(tl.float32)
        mean = tl.load(start_ptr + part.to(tl.int64) * 2 * n_cols + cols, mask=inside, other=0.0)
        total += tl.where(inside, count * (mean - centre), 0.0)
    centre += tl.sum(tl.sum(total, 1), 0) / n
    total = tl.zeros((PARTS, WIDTH), dtype=tl.float32)
    for i in range(0, n_parts, PARTS):
        part = i + tl.arange(0, PARTS)[:, None]
        inside = (part < n_parts) & (lane < GROUP)
        count = tl.minimum(n_rows - part * ROWS, ROWS).to(tl.float32)
        part_ptr = start_ptr + part.to(tl.int64) * 2 * n_cols + cols
        away = tl.load(part_ptr, mask=inside, other=0.0) - centre
        squares = tl.load(part_ptr + n_cols, mask=inside, other=0.0)
        total += tl.where(inside, squares + count * away * away, 0.0)
    inverse = tl.rsqrt(tl.sum(tl.sum(total, 1), 0) / n + EPS)
    weight = tl.load(weight_ptr + cols, mask=lane < GROUP, other=0.0).to(tl.float32)
    out_ptr = scaling_ptr + image * 2 * n_cols + cols
    tl.store(out_ptr, tl.zeros((1, WIDTH), dtype=tl.float32) + centre, mask=lane < GROUP)
    tl.store(out_ptr + n_cols, weight * inverse, mask=lane < GROUP)


@triton.jit
def group_norm_scaled(
    x_ptr,
    scaling_ptr,
    bias_ptr,
    out_ptr,
    n_rows,
    n_cols,
    n_parts,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out = silu((x - mean) * scale + bias), ROWS pixels of an image a program; out may be x.

    The last programs' pixels first: they are what `group_norm_moments` read last and what the cache still holds.
    """
    n_blocks = tl.cdiv(n_cols, COLS)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    part = program // n_blocks
    image = (part // n_parts).to(tl.int64)
    cols = program % n_blocks * COLS + tl.arange(0, COLS)[None, :]
    row = part % n_parts * ROWS + tl.arange(0, ROWS)[:, None]
    inside = (row < n_rows) & (cols < n_cols)
    at = (image * n_rows + row) * n_cols + cols
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)  # (ROWS, COLS), as all tiles here
    mean = tl.load(scaling_ptr + image * 2 * n_cols + cols, mask=cols < n_cols, other=0.0)  # (1, COLS), as the next two
    scale = tl.load(scaling_ptr + image * 2 * n_cols + n_cols + cols, mask=cols < n_cols, other=0.0)
    bias = tl.load(bias_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    out = (x - mean) * scale + bias
    if SILU:
        out = out / (1.0 + tl.exp(-out))
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


def _merge_cost(a: SimpleNamespace) -> Cost:
    return Cost(a.moments_ptr.nbytes + a.weight_ptr.nbytes + a.scaling_ptr.nbytes, 4 * a.moments_ptr.numel())


def _scaled_cost(a: SimpleNamespace) -> Cost:
    return Cost(a.x_ptr.nbytes + a.scaling_ptr.nbytes + a.bias_ptr.nbytes + a.out_ptr.nbytes, 6 * a.x_ptr.numel())


MOMENTS = Kernel(
    "group_norm_silu moments",
    group_norm_moments,
    lambda a: Cost(a.x_ptr.nbytes + a.moments_ptr.nbytes, 4 * a.x_ptr.numel()),
)
MERGE = Kernel("group_norm_silu merge", group_norm_merge, _merge_cost)
SCALED = Kernel("group_norm_silu scaled", group_norm_scaled, _scaled_cost)


@functools.cache  # a Python launch costs more than most kernels run
def _settings(tile: Tile, pixels: int, channels: int) -> dict[str, int]:
    """Rows and columns of a program, by an image's sizes alone: images beside it change no order of its sums.

    tile.block: most numbers of a program, fewest, about how many parts a small image has (rows are rounded up to a
    power of two), most channels.
    """
    most, fewest, parts, most_cols = tile.block
    cols = min(most_cols, triton.next_power_of_2(channels))
    rows = min(most // cols, max(fewest // cols, triton.next_power_of_2(ceil_div(pixels, parts))))
    return {"ROWS": rows, "COLS": cols, "num_warps": tile.num_warps, "num_stages": tile.num_stages}


@functools.cache
def _merge_settings(group: int, rows: int) -> dict[str, int]:
    width = triton.next_power_of_2(group)
    return {
        "ROWS": rows,
        "GROUP": group,
        "PARTS": max(1, GROUP_NORM_MERGE.block[0] // width),
        "WIDTH": width,
        "num_warps": GROUP_NORM_MERGE.num_warps,
        "num_stages": GROUP_NORM_MERGE.num_stages,
    }


def run(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, out: Tensor | None) -> Tensor:
    """See ops/group_norm_silu.py."""
    images, channels, pixels = len(x), x.shape[1], x.shape[2] * x.shape[3]
    out = torch.empty_like(x) if out is None else out
    tile, scaled = _settings(GROUP_NORM_MOMENTS, pixels, channels), _settings(GROUP_NORM_SCALED, pixels, channels)
    parts = ceil_div(pixels, tile["ROWS"])
    moments = torch.empty((images, parts, 2, channels), dtype=torch.float32, device=x.device)
    scaling = torch.empty((images, 2, channels), dtype=torch.float32, device=x.device)
    MOMENTS.launch((images * parts * ceil_div(channels, tile["COLS"]),), (x, moments, pixels, channels, parts), **tile)
    MERGE.launch(
        (images * groups,),
        (moments, weight.contiguous(), scaling, pixels, channels, parts),
        EPS=eps,
        **_merge_settings(channels // groups, tile["ROWS"]),
    )
    parts = ceil_div(pixels, scaled["ROWS"])
    SCALED.launch(
        (images * parts * ceil_div(channels, scaled["COLS"]),),
        (x, scaling, bias.contiguous(), out, pixels, channels, parts),
        SILU=silu,
        **scaled,
    )
    return out


def why_not(x: Tensor, weight: Tensor, bias: Tensor, groups: int, *settings: object) -> str | None:
    """None if the kernels can serve this call."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        return "it has no gradient: it is for inference"
    if x.dtype not in _DTYPES or not x.numel() or not x.is_contiguous(memory_format=torch.channels_last):
        return (
            f"it takes float32, bfloat16 or float16, channels last and not empty, got {x.dtype} of shape "
            f"{tuple(x.shape)} and strides {x.stride()}"
        )
    if x.shape[1] // groups > _MOST_GROUP:
        return f"a group's channels are held in registers: at most {_MOST_GROUP}, got {x.shape[1] // groups}"
    return why_not_device(x)

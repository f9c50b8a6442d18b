"""Masked causal attention: one forward kernel, two backward kernels (queries, then keys), rotary inside, no atomics.

How keys are hidden, decided by counting. A hidden key gets position HIDDEN, beyond every query, so the comparison that causality needs
anyway (query >= key position) hides it too: nothing is added per score. Per key it is one byte read beside the 4 E bytes of k and v in bfloat16
(0.4 % at E = 64), and in PTX for sm_90 85 of the 669 instructions of the forward's loop, 45 of 350 and 1 of 354 of the backward's.
The other way, gathering the visible keys so that a quarter of the rows is never touched, would save at T = 256 one
of ten key tiles of 64 (queries in blocks of 64 see 1 + 2 + 3 + 4; with 192 keys visible 1 + 2 + 3 + 3), and a quarter of k and v, which is 2/4
of the forward's bytes and 2/8 of the backward's: 12.5 % and 6 %. At B (64 sequences, 12 heads) the forward moves 101 MB, 30 us at 3.35 TB/s, so
that is at most 4 us. But finding the visible positions takes a launch of its own a call (2-3 us), or T comparisons per key of a tile inside
the kernel (16384 integer operations beside the tile's 4096 exponentials), gathered rows rule out block loads, and dk and dv of hidden keys
must be zeroed separately. What is left to win is below one per cent of a training step.

Bytes: backward reads q, k, v and dout twice (once a kernel): 13 tensors of (B, T, H, E) where 8 are the least, if no cache helps.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_fast.ops.dispatch import Launch
from star_fast.ops.shapes import Shape
from star_fast.ops.triton.launching import FP_FUSION, Variant, accumulator, interpreting, pointer, why_not_device
from star_fast.ops.triton.tiles import (
    ATTENTION_BACKWARD,
    ATTENTION_BACKWARD_FULL_PRECISION,
    ATTENTION_FORWARD,
    ATTENTION_FORWARD_FULL_PRECISION,
    Tile,
)

HIDDEN = tl.constexpr(2**30)  # the position a hidden key is given: beyond every query


@triton.jit
def inside(rows, n_rows, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Which entries of a (len(rows), BLOCK_E) tile exist."""
    mask = rows[:, None] < n_rows
    if E != BLOCK_E:
        mask = mask & (tl.arange(0, BLOCK_E)[None, :] < E)
    return mask


@triton.jit
def turn(x, table_ptr, rows, n_rows, SIGN: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr):
    """Rotary on a (BLOCK, BLOCK_E) tile: each pair (x0, x1) becomes (x0 cos - x1 sin, x0 sin + x1 cos); SIGN -1 turns back (the transpose)."""
    cols = tl.arange(0, BLOCK_E)
    table = tl.load(table_ptr + rows[:, None] * E + cols[None, :], mask=inside(rows, n_rows, E, BLOCK_E), other=0.0).to(ACC)
    cos, sin = tl.split(tl.reshape(table, (BLOCK, BLOCK_E // 2, 2)))
    even, odd = tl.split(tl.reshape(x.to(ACC), (BLOCK, BLOCK_E // 2, 2)))
    sin = sin * SIGN
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (BLOCK, BLOCK_E))


@triton.jit
def load_tile(ptr, rows, row_stride, n_rows, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Rows of one head as a (len(rows), BLOCK_E) tile, zero outside."""
    cols = tl.arange(0, BLOCK_E)
    return tl.load(ptr + rows[:, None] * row_stride + cols[None, :], mask=inside(rows, n_rows, E, BLOCK_E), other=0.0)


@triton.jit
def load_turned(ptr, table_ptr, rows, row_stride, n_rows, E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr, ROTARY: tl.constexpr,
                DOT: tl.constexpr, ACC: tl.constexpr):
    """`load_tile`, rotary applied and rounded to the input's dtype, as an operand of tl.dot."""
    x = load_tile(ptr, rows, row_stride, n_rows, E, BLOCK_E)
    if ROTARY:
        x = turn(x, table_ptr, rows, n_rows, 1, E, BLOCK, BLOCK_E, ACC).to(x.dtype)
    return x.to(DOT)


@triton.jit
def store_tile(ptr, x, rows, row_stride, n_rows, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Write a tile back, rounded to the pointer's dtype."""
    cols = tl.arange(0, BLOCK_E)
    tl.store(ptr + rows[:, None] * row_stride + cols[None, :], x.to(ptr.dtype.element_ty), mask=inside(rows, n_rows, E, BLOCK_E))


@triton.jit
def key_positions(keep_ptr, offset, cols, n_positions, MASK: tl.constexpr):
    """Position of each key, HIDDEN where no query may see it; position 0 is always visible."""
    if MASK:
        keep = tl.load(keep_ptr + offset + cols, mask=cols < n_positions, other=0)
        return tl.where((keep != 0) | (cols == 0), cols, HIDDEN)
    return cols


@triton.jit
def attention_forward(qkv_ptr, keep_ptr, table_ptr, out_ptr, lse_ptr, batch_stride, position_stride, part_stride, n_positions, n_heads,
                      n_tiles, HEAD_STRIDE: tl.constexpr, SCALE: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                      BLOCK_E: tl.constexpr, MASK: tl.constexpr, ROTARY: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr):
    """One block of queries of one head: streams the keys up to the last query; lse is in base 2, of the scaled scores."""
    tile = n_tiles - 1 - tl.program_id(0) % n_tiles  # long rows first
    head = (tl.program_id(0) // n_tiles) % n_heads
    batch = (tl.program_id(0) // (n_tiles * n_heads)).to(tl.int64)
    q_ptr = qkv_ptr + batch * batch_stride + head * HEAD_STRIDE
    k_ptr, v_ptr = q_ptr + part_stride, q_ptr + 2 * part_stride
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_turned(q_ptr, table_ptr, rows, position_stride, n_positions, E, BLOCK_M, BLOCK_E, ROTARY, DOT, ACC)
    top = tl.full((BLOCK_M,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    acc = tl.zeros((BLOCK_M, BLOCK_E), ACC)
    for start in tl.range(0, tl.minimum((tile + 1) * BLOCK_M, n_positions), BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        positions = key_positions(keep_ptr, batch * n_positions, cols, n_positions, MASK)
        k = load_turned(k_ptr, table_ptr, cols, position_stride, n_positions, E, BLOCK_N, BLOCK_E, ROTARY, DOT, ACC)
        v = load_tile(v_ptr, cols, position_stride, n_positions, E, BLOCK_E).to(DOT)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC)
        scores = tl.where(rows[:, None] >= positions[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * SCALE)  # finite: position 0 is in the first tile
        weights = tl.exp2(scores * SCALE - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v_ptr.dtype.element_ty).to(DOT), v, acc * shrink[:, None], input_precision="ieee", out_dtype=ACC)
        top = new_top
    out_ptr += (batch * n_positions * n_heads + head) * E
    store_tile(out_ptr, acc * (1.0 / total)[:, None], rows, n_heads * E, n_positions, E, BLOCK_E)
    tl.store(lse_ptr + (batch * n_heads + head) * n_positions + rows, top + tl.log2(total), mask=rows < n_positions)


@triton.jit
def attention_backward_queries(qkv_ptr, keep_ptr, table_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, batch_stride, position_stride,
                               part_stride, n_positions, n_heads, n_tiles, HEAD_STRIDE: tl.constexpr, SCALE: tl.constexpr, ROOT: tl.constexpr, E: tl.constexpr,
                               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, MASK: tl.constexpr, ROTARY: tl.constexpr,
                               DOT: tl.constexpr, ACC: tl.constexpr):
    """dq of one block of queries, and delta = rowsum(dout * out) for the keys' kernel."""
    tile = n_tiles - 1 - tl.program_id(0) % n_tiles
    head = (tl.program_id(0) // n_tiles) % n_heads
    batch = (tl.program_id(0) // (n_tiles * n_heads)).to(tl.int64)
    q_ptr = qkv_ptr + batch * batch_stride + head * HEAD_STRIDE
    k_ptr, v_ptr = q_ptr + part_stride, q_ptr + 2 * part_stride
    offset = (batch * n_positions * n_heads + head) * E
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_stat = (batch * n_heads + head) * n_positions + rows
    dout = load_tile(dout_ptr + offset, rows, n_heads * E, n_positions, E, BLOCK_E)
    out = load_tile(out_ptr + offset, rows, n_heads * E, n_positions, E, BLOCK_E)
    delta = tl.sum(dout.to(ACC) * out.to(ACC), 1)
    tl.store(delta_ptr + row_stat, delta, mask=rows < n_positions)
    lse = tl.load(lse_ptr + row_stat, mask=rows < n_positions, other=0.0)
    q = load_turned(q_ptr, table_ptr, rows, position_stride, n_positions, E, BLOCK_M, BLOCK_E, ROTARY, DOT, ACC)
    dout = dout.to(DOT)
    acc = tl.zeros((BLOCK_M, BLOCK_E), ACC)
    for start in tl.range(0, tl.minimum((tile + 1) * BLOCK_M, n_positions), BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        positions = key_positions(keep_ptr, batch * n_positions, cols, n_positions, MASK)
        k = load_turned(k_ptr, table_ptr, cols, position_stride, n_positions, E, BLOCK_N, BLOCK_E, ROTARY, DOT, ACC)
        v = load_tile(v_ptr, cols, position_stride, n_positions, E, BLOCK_E).to(DOT)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC)
        weights = tl.exp2(tl.where(rows[:, None] >= positions[None, :], scores * SCALE - lse[:, None], float("-inf")))
        dweights = tl.dot(dout, tl.trans(v), input_precision="ieee", out_dtype=ACC)
        dscores = weights * (dweights - delta[:, None])
        acc = tl.dot(dscores.to(k_ptr.dtype.element_ty).to(DOT), k, acc, input_precision="ieee", out_dtype=ACC)
    acc *= ROOT
    if ROTARY:
        acc = turn(acc, table_ptr, rows, n_positions, -1, E, BLOCK_M, BLOCK_E, ACC)
    dq_ptr = dqkv_ptr + batch * n_positions * 3 * n_heads * E + head * E
    store_tile(dq_ptr, acc, rows, 3 * n_heads * E, n_positions, E, BLOCK_E)


@triton.jit
def attention_backward_keys(qkv_ptr, keep_ptr, table_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, batch_stride, position_stride, part_stride,
                            n_positions, n_heads, n_tiles, HEAD_STRIDE: tl.constexpr, SCALE: tl.constexpr, ROOT: tl.constexpr, E: tl.constexpr,
                            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, MASK: tl.constexpr, ROTARY: tl.constexpr,
                            DOT: tl.constexpr, ACC: tl.constexpr):
    """dk and dv of one block of keys: streams the queries from the first key on; the tiles are (keys, queries)."""
    tile = tl.program_id(0) % n_tiles  # the first keys have the most queries
    head = (tl.program_id(0) // n_tiles) % n_heads
    batch = (tl.program_id(0) // (n_tiles * n_heads)).to(tl.int64)
    q_ptr = qkv_ptr + batch * batch_stride + head * HEAD_STRIDE
    k_ptr, v_ptr = q_ptr + part_stride, q_ptr + 2 * part_stride
    dout_ptr += (batch * n_positions * n_heads + head) * E
    row_stats = (batch * n_heads + head) * n_positions
    cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    positions = key_positions(keep_ptr, batch * n_positions, cols, n_positions, MASK)
    k = load_turned(k_ptr, table_ptr, cols, position_stride, n_positions, E, BLOCK_N, BLOCK_E, ROTARY, DOT, ACC)
    v = load_tile(v_ptr, cols, position_stride, n_positions, E, BLOCK_E).to(DOT)
    dk = tl.zeros((BLOCK_N, BLOCK_E), ACC)
    dv = tl.zeros((BLOCK_N, BLOCK_E), ACC)
    for start in tl.range(tile * BLOCK_N // BLOCK_M * BLOCK_M, n_positions, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q = load_turned(q_ptr, table_ptr, rows, position_stride, n_positions, E, BLOCK_M, BLOCK_E, ROTARY, DOT, ACC)
        dout = load_tile(dout_ptr, rows, n_heads * E, n_positions, E, BLOCK_E)  # zero past the end: those rows add nothing
        lse = tl.load(lse_ptr + row_stats + rows, mask=rows < n_positions, other=0.0)
        delta = tl.load(delta_ptr + row_stats + rows, mask=rows < n_positions, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee", out_dtype=ACC)
        weights = tl.exp2(tl.where(rows[None, :] >= positions[:, None], scores * SCALE - lse[None, :], float("-inf")))
        dv = tl.dot(weights.to(dout.dtype).to(DOT), dout.to(DOT), dv, input_precision="ieee", out_dtype=ACC)
        dweights = tl.dot(v, tl.trans(dout.to(DOT)), input_precision="ieee", out_dtype=ACC)
        dscores = weights * (dweights - delta[None, :])
        dk = tl.dot(dscores.to(dout.dtype).to(DOT), q, dk, input_precision="ieee", out_dtype=ACC)
    dk *= ROOT
    if ROTARY:
        dk = turn(dk, table_ptr, cols, n_positions, -1, E, BLOCK_N, BLOCK_E, ACC)
    dk_ptr = dqkv_ptr + batch * n_positions * 3 * n_heads * E + (n_heads + head) * E
    store_tile(dk_ptr, dk, cols, 3 * n_heads * E, n_positions, E, BLOCK_E)
    store_tile(dk_ptr + n_heads * E, dv, cols, 3 * n_heads * E, n_positions, E, BLOCK_E)


class _MaskedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, keep: Tensor | None, table: Tensor | None) -> Tensor:
        batch, positions, _, heads, size = qkv.shape
        qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
        keep, table = (None if x is None else x.contiguous() for x in (keep, table))
        out = torch.empty(batch, positions, heads, size, dtype=qkv.dtype, device=qkv.device)
        lse = torch.empty(batch, heads, positions, dtype=torch.promote_types(qkv.dtype, torch.float32), device=qkv.device)
        _launch(attention_forward, qkv, keep, table, out, lse)
        ctx.save_for_backward(qkv, keep, table, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor, None, None]:
        qkv, keep, table, out, lse = ctx.saved_tensors
        dout = dout.contiguous()
        dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        delta = torch.empty_like(lse)
        _launch(attention_backward_queries, qkv, keep, table, out, dout, lse, delta, dqkv)
        _launch(attention_backward_keys, qkv, keep, table, dout, lse, delta, dqkv)
        return dqkv, None, None


def kernel_tile(kernel: object, size: int, dtype: torch.dtype) -> Tile:
    """Blocks of (rows that a program owns, rows that it streams): queries and keys, for attention_backward_keys keys and queries."""
    if kernel is attention_forward:
        table = ATTENTION_FORWARD if dtype.itemsize == 2 else ATTENTION_FORWARD_FULL_PRECISION
    else:
        table = ATTENTION_BACKWARD if dtype.itemsize == 2 else ATTENTION_BACKWARD_FULL_PRECISION
    return table[_padded(size)]


def _launch(kernel: object, qkv: Tensor, keep: Tensor | None, table: Tensor | None, *more: Tensor) -> None:
    """Run a kernel on all blocks of all heads of all sequences."""
    batch, positions, _, heads, size = qkv.shape
    tile = kernel_tile(kernel, size, qkv.dtype)
    n_tiles = triton.cdiv(positions, tile.block[0])
    if batch:
        kernel[(batch * heads * n_tiles,)](
            qkv, keep, table, *more, *qkv.stride()[:3], positions, heads, n_tiles, **_constants(kernel, size, qkv.stride(3), qkv.dtype, keep, table),
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=FP_FUSION)


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _constants(kernel: object, size: int, head_stride: int, dtype: torch.dtype, keep: object, table: object) -> dict[str, object]:
    """The constexpr arguments of a kernel, in its order."""
    block = kernel_tile(kernel, size, dtype).block
    queries, keys = block[::-1] if kernel is attention_backward_keys else block
    root = size**-0.5
    return {"HEAD_STRIDE": head_stride, "SCALE": root * math.log2(math.e), **({} if kernel is attention_forward else {"ROOT": root}), "E": size,
            "BLOCK_M": queries, "BLOCK_N": keys, "BLOCK_E": _padded(size), "MASK": keep is not None, "ROTARY": table is not None,
            "DOT": _operand(dtype), "ACC": accumulator(dtype)}


def _operand(dtype: torch.dtype) -> tl.dtype:
    """Operand dtype of tl.dot: the input's own; the interpreter multiplies bfloat16 as bit patterns, so there it is float32 (values already rounded)."""
    return {torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16,
            torch.bfloat16: tl.float32 if interpreting() else tl.bfloat16}[dtype]


def run(qkv: Tensor, keep: Tensor | None = None, *, rotary: Tensor | None = None) -> Tensor:
    """See ops/masked_attention.py."""
    return _MaskedAttention.apply(qkv, keep, rotary)


def why_not(qkv: Tensor, keep: Tensor | None = None, *, rotary: Tensor | None = None) -> str | None:
    """None if the kernels can serve this call."""
    if qkv.shape[-1] > 128:
        return f"the kernels take head sizes up to 128, got {qkv.shape[-1]}"
    if qkv.dtype == torch.float64 and qkv.device.type == "cuda":
        return "float64 is for tests in the interpreter: its tiles do not fit the registers of a GPU"
    return why_not_device(qkv)


def fake(qkv: Tensor, keep: Tensor | None = None, *, rotary: Tensor | None = None) -> Tensor:
    """An empty result."""
    batch, positions, _, heads, size = qkv.shape
    return qkv.new_empty(batch, positions, heads, size)


def launches(qkv: Tensor, keep: Tensor | None = None, *, rotary: Tensor | None = None) -> list[Launch]:
    """The forward launch."""
    batch, positions, _, heads, size = qkv.shape
    return [Launch("attention_forward", (batch * heads * triton.cdiv(positions, kernel_tile(attention_forward, size, qkv.dtype).block[0]),))]


def moved_bytes(qkv: Tensor, keep: Tensor | None = None, *, rotary: Tensor | None = None) -> int:
    """q, k, v read and the result written, one float32 a query, the mask and the rotary table; nothing comes before or after."""
    batch, positions, _, heads, size = qkv.shape
    side = (0 if keep is None else batch * positions) + (0 if rotary is None else 4 * positions * size)
    return (4 * size * qkv.element_size() + 4) * batch * positions * heads + side


def variants(shape: Shape, dtype: torch.dtype) -> list[Variant]:
    """What to compile for the student's training step at `shape`: key mask and rotary on."""
    size, heads, batch = dtype.itemsize, shape.H, shape.sequences
    p = pointer(dtype)
    integers = {"batch_stride": 3 * shape.T * heads * shape.E, "position_stride": 3 * heads * shape.E, "part_stride": heads * shape.E,
                "n_positions": shape.T, "n_heads": heads, "n_tiles": 1}
    divisible = [name for name, value in integers.items() if value % 16 == 0]
    passes = shape.rows * heads * shape.E * size  # bytes of one (B, T, H, E) tensor
    statistic = 4 * shape.rows * heads  # lse or delta
    side = shape.rows + 4 * shape.T * shape.E + statistic  # keep, rotary table, lse
    product = 2 * batch * heads * shape.E * shape.T * (shape.T + 1) // 2  # FLOPs of one causal product
    found = []
    for name, kernel, pointers, bytes_moved, flops in (
            ("masked_attention forward", attention_forward, {"out_ptr": p, "lse_ptr": "*fp32"}, 4 * passes + side, 2 * product),
            ("masked_attention backward, queries", attention_backward_queries,
             {"out_ptr": p, "dout_ptr": p, "lse_ptr": "*fp32", "delta_ptr": "*fp32", "dqkv_ptr": p}, 6 * passes + side + statistic, 3 * product),
            ("masked_attention backward, keys", attention_backward_keys,
             {"dout_ptr": p, "lse_ptr": "*fp32", "delta_ptr": "*fp32", "dqkv_ptr": p}, 6 * passes + side + statistic, 4 * product)):
        tile = kernel_tile(kernel, shape.E, dtype)
        constants = {**_constants(kernel, shape.E, shape.E, dtype, True, True), **({"DOT": tl.bfloat16} if dtype == torch.bfloat16 else {})}
        pointers = {"qkv_ptr": p, "keep_ptr": "*i1", "table_ptr": "*fp32", **pointers}
        signature = {**pointers, **dict.fromkeys(integers, "i32"), **dict.fromkeys(constants, "constexpr")}
        found.append(Variant(name, kernel, signature, constants, tile.num_warps, tile.num_stages, (*pointers, *divisible), (bytes_moved, flops),
                             (batch * heads * triton.cdiv(shape.T, tile.block[0]),)))
    return found

"""Masked causal attention: a launch that turns the keys and packs the mask, one forward kernel, two backward kernels; no atomics.

The kernels, and what was decided about them by counting, are in masked_attention_kernels.py.

Bytes, in tensors of (B, T, H, E): forward 4 (q, k, v, out), 2 more where rotary is applied (keys read and written), 1 more where a gradient is wanted
(turned queries written), 6 more where the caller keeps its qkv (a copy). Backward reads q, k, v and dout twice (once a kernel): 13 where 8 are the
least, if no cache helps.
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
from star_fast.ops.triton.masked_attention_kernels import attention_backward_keys, attention_backward_queries, attention_forward, attention_prepare
from star_fast.ops.triton.tiles import (
    ATTENTION_BACKWARD,
    ATTENTION_BACKWARD_FULL_PRECISION,
    ATTENTION_FORWARD,
    ATTENTION_FORWARD_FULL_PRECISION,
    ATTENTION_PREPARE,
    Tile,
)

_WORDS = {16: torch.int16, 32: torch.int32, 64: torch.int64}  # a word of the packed mask, by the keys in it


class _MaskedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, keep: Tensor | None, table: Tensor | None, overwrite: bool) -> Tensor:
        batch, positions, _, heads, size = qkv.shape
        keep, table = (None if x is None else x.contiguous() for x in (keep, table))
        if table is None:
            qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
        else:  # q and k are turned in place
            qkv = qkv.contiguous() if overwrite or not qkv.is_contiguous() else qkv.clone()
        words = _prepare(qkv, keep, table)
        out = torch.empty(batch, positions, heads, size, dtype=qkv.dtype, device=qkv.device)
        lse = torch.empty(batch, heads, positions, dtype=torch.promote_types(qkv.dtype, torch.float32), device=qkv.device)
        _launch(attention_forward, qkv, words, table, out, lse, LEAVE_TURNED=table is not None and ctx.needs_input_grad[0])
        ctx.save_for_backward(qkv, words, table, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor, None, None, None]:
        qkv, words, table, out, lse = ctx.saved_tensors
        dout = dout.contiguous()
        dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        delta = torch.empty_like(lse)
        _launch(attention_backward_queries, qkv, words, table, out, dout, lse, delta, dqkv)
        _launch(attention_backward_keys, qkv, words, table, dout, lse, delta, dqkv)
        return dqkv, None, None, None


def _prepare(qkv: Tensor, keep: Tensor | None, table: Tensor | None) -> Tensor | None:
    """Turn the keys of a contiguous qkv in place and pack the mask: (B, ceil(T / 64)) int64, bit s % 64 of word s // 64 is set where key s is visible."""
    batch, positions, _, heads, size = qkv.shape
    words = None if keep is None else torch.empty(batch, triton.cdiv(positions, 64), dtype=torch.int64, device=qkv.device)
    grid = _prepare_grid(qkv, keep, table)
    if math.prod(grid):
        attention_prepare[grid](
            qkv, table, keep, None if words is None else words.view(_WORDS[ATTENTION_PREPARE.block[0]]), positions, grid[0] // batch, heads * size,
            **_prepare_constants(size, qkv.dtype, keep, table),
            num_warps=ATTENTION_PREPARE.num_warps, num_stages=ATTENTION_PREPARE.num_stages, enable_fp_fusion=FP_FUSION)
    return words


def _prepare_grid(qkv: Tensor, keep: object, table: object) -> tuple[int, int]:
    """Programs of attention_prepare: groups of rows (of all words of the mask, so that none is left unwritten), and of columns where keys are turned."""
    batch, positions, _, heads, size = qkv.shape
    rows, cols = ATTENTION_PREPARE.block
    if keep is None and table is None:
        return (0, 0)
    return (batch * triton.cdiv(positions, 64) * (64 // rows), 1 if table is None else triton.cdiv(heads * size, cols))


def _prepare_constants(size: int, dtype: torch.dtype, keep: object, table: object) -> dict[str, object]:
    rows, cols = ATTENTION_PREPARE.block
    return {"E": size, "ROWS": rows, "COLS": cols, "MASK": keep is not None, "ROTARY": table is not None, "ACC": accumulator(dtype)}


def kernel_tile(kernel: object, size: int, dtype: torch.dtype) -> Tile:
    """Blocks of (rows that a program owns, rows that it streams): queries and keys, for attention_backward_keys keys and queries."""
    if kernel is attention_forward:
        table = ATTENTION_FORWARD if dtype.itemsize == 2 else ATTENTION_FORWARD_FULL_PRECISION
    else:
        table = ATTENTION_BACKWARD if dtype.itemsize == 2 else ATTENTION_BACKWARD_FULL_PRECISION
    return table[_padded(size)]


def _launch(kernel: object, qkv: Tensor, words: Tensor | None, table: Tensor | None, *more: Tensor, **constants: bool) -> None:
    """Run a kernel on all blocks of all heads of all sequences."""
    batch, positions, _, heads, size = qkv.shape
    tile = kernel_tile(kernel, size, qkv.dtype)
    n_tiles = triton.cdiv(positions, tile.block[0])
    constants = {**_constants(kernel, size, qkv.stride(3), qkv.dtype, words, table), **constants}
    if words is not None:
        words = words.view(_WORDS[constants["BLOCK_N"]])
    if batch:
        kernel[(batch * heads * n_tiles,)](
            qkv, words, table, *more, *qkv.stride()[:3], positions, heads, n_tiles, 0 if words is None else words.shape[1], **constants,
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


def run(qkv: Tensor, keep: Tensor | None = None, *, rotary: Tensor | None = None, overwrite: bool = False) -> Tensor:
    """See ops/masked_attention.py."""
    return _MaskedAttention.apply(qkv, keep, rotary, overwrite)


def why_not(qkv: Tensor, keep: Tensor | None = None, *, rotary: Tensor | None = None, overwrite: bool = False) -> str | None:
    """None if the kernels can serve this call."""
    if qkv.shape[-1] > 128:
        return f"the kernels take head sizes up to 128, got {qkv.shape[-1]}"
    if qkv.dtype == torch.float64 and qkv.device.type == "cuda":
        return "float64 is for tests in the interpreter: its tiles do not fit the registers of a GPU"
    return why_not_device(qkv)


def fake(qkv: Tensor, keep: Tensor | None = None, *, rotary: Tensor | None = None, overwrite: bool = False) -> Tensor:
    """An empty result."""
    batch, positions, _, heads, size = qkv.shape
    return qkv.new_empty(batch, positions, heads, size)


def launches(qkv: Tensor, keep: Tensor | None = None, *, rotary: Tensor | None = None, overwrite: bool = False) -> list[Launch]:
    """The forward launches."""
    batch, positions, _, heads, size = qkv.shape
    prepare = [] if keep is None and rotary is None else [Launch("attention_prepare", _prepare_grid(qkv, keep, rotary))]
    return [*prepare, Launch("attention_forward", (batch * heads * triton.cdiv(positions, kernel_tile(attention_forward, size, qkv.dtype).block[0]),))]


def moved_bytes(qkv: Tensor, keep: Tensor | None = None, *, rotary: Tensor | None = None, overwrite: bool = False) -> int:
    """The tensors counted at the head of this file, one float32 a query, the mask and its bits, the rotary table."""
    batch, positions, _, heads, size = qkv.shape
    tensors = 4
    if rotary is not None:
        tensors += 2 + (torch.is_grad_enabled() and qkv.requires_grad) + (0 if overwrite else 6)
    side = (0 if keep is None else batch * (positions + 2 * positions // 8)) + (0 if rotary is None else 4 * positions * size)
    return (tensors * size * qkv.element_size() + 4) * batch * positions * heads + side


def variants(shape: Shape, dtype: torch.dtype) -> list[Variant]:
    """What to compile for the student's training step at `shape`: key mask and rotary on."""
    size, heads, batch = dtype.itemsize, shape.H, shape.sequences
    p = pointer(dtype)
    integers = {"batch_stride": 3 * shape.T * heads * shape.E, "position_stride": 3 * heads * shape.E, "part_stride": heads * shape.E,
                "n_positions": shape.T, "n_heads": heads, "n_tiles": 1, "n_words": 1}
    divisible = [name for name, value in integers.items() if value % 16 == 0]
    passes = shape.rows * heads * shape.E * size  # bytes of one (B, T, H, E) tensor
    statistic = 4 * shape.rows * heads  # lse or delta
    bits, table = shape.rows // 8, 4 * shape.T * shape.E
    side = bits + table + statistic
    product = 2 * batch * heads * shape.E * shape.T * (shape.T + 1) // 2  # FLOPs of one causal product
    rows, cols = ATTENTION_PREPARE.block
    found = [Variant(
        "masked_attention prepare", attention_prepare,
        {"qkv_ptr": p, "table_ptr": "*fp32", "keep_ptr": "*i1", "words_ptr": pointer(_WORDS[rows]), "n_positions": "i32", "n_groups": "i32", "width": "i32",
         **dict.fromkeys(_prepare_constants(shape.E, dtype, True, True), "constexpr")}, _prepare_constants(shape.E, dtype, True, True),
        ATTENTION_PREPARE.num_warps, ATTENTION_PREPARE.num_stages, ("qkv_ptr", "table_ptr", "keep_ptr", "words_ptr", "n_positions", "width"),
        (2 * passes + shape.rows + bits + table, 3 * shape.rows * heads * shape.E), (shape.rows // rows, triton.cdiv(heads * shape.E, cols)))]
    for name, kernel, pointers, bytes_moved, flops in (
            ("masked_attention forward", attention_forward, {"out_ptr": p, "lse_ptr": "*fp32"}, 5 * passes + side, 2 * product),
            ("masked_attention backward, queries", attention_backward_queries,
             {"out_ptr": p, "dout_ptr": p, "lse_ptr": "*fp32", "delta_ptr": "*fp32", "dqkv_ptr": p}, 6 * passes + side + statistic, 3 * product),
            ("masked_attention backward, keys", attention_backward_keys,
             {"dout_ptr": p, "lse_ptr": "*fp32", "delta_ptr": "*fp32", "dqkv_ptr": p}, 6 * passes + side + statistic, 4 * product)):
        tile = kernel_tile(kernel, shape.E, dtype)
        constants = {**_constants(kernel, shape.E, shape.E, dtype, True, True), **({"DOT": tl.bfloat16} if dtype == torch.bfloat16 else {}),
                     **({"LEAVE_TURNED": True} if kernel is attention_forward else {})}
        pointers = {"qkv_ptr": p, "words_ptr": pointer(_WORDS[constants["BLOCK_N"]]), "table_ptr": "*fp32", **pointers}
        signature = {**pointers, **dict.fromkeys(integers, "i32"), **dict.fromkeys(constants, "constexpr")}
        found.append(Variant(name, kernel, signature, constants, tile.num_warps, tile.num_stages, (*pointers, *divisible), (bytes_moved, flops),
                             (batch * heads * triton.cdiv(shape.T, tile.block[0]),)))
    return found

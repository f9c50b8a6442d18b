"""The kernels of masked_attention: what is done once a call, the forward pass, and the two backward passes (queries,
then keys).

How keys are hidden, decided by counting. `attention_prepare` packs the mask, a bit a key, so that a tile of keys reads
one word. The forward and the queries' kernel test its bits: four shifts a tile and one instruction a column, none a
score. The keys' kernel tests nothing in its loop: a hidden key's gradients are a row of their own, zeroed at the end.
The other way, gathering the visible keys so that a quarter of the rows is never touched, would save at T = 256 one of
ten key tiles of 64 (queries in blocks of 64 see 1 + 2 + 3 + 4; with 192 keys visible 1 + 2 + 3 + 3), and a quarter of k
and v, 12.5 % of the forward's bytes and 6 % of the backward's. At B (64 sequences, 12 heads) the forward moves 101 MB,
30 us at 3.35 TB/s, so that is at most 4 us. But gathered rows rule out block loads, and dk and dv of hidden keys must
be zeroed separately. It is below one per cent of a training step.

Where rotary is applied, decided by counting too. Every tile of queries streams all keys before it, so turning keys in
the loop does the same work 2.5 times at T = 256, moves a 16 KB table for 8 KB of keys, and puts registers between
memory and the matrix unit: 676 instructions a tile of keys on sm_90, against 426 now. So `attention_prepare` turns the
keys once, in place (2 passes over a (B, T, H, E) tensor beside the forward's 4), and the forward kernel its own
queries, each of which one program alone reads; where a gradient is wanted it leaves them turned (1 pass), and backward
finds both. Turned copies beside qkv would cost the same passes and 2 of the 16 tensors of width D that a block keeps
for backward.

Only tiles on the diagonal compare positions: a branch that all threads of a program take alike. Rows past the end are
read as the last row, which costs one minimum a row where a predicate costs three instructions a load; they are hidden
by causality, and in the keys' kernel by lse = infinity.

Letters in the comments: M queries, N keys of a tile, E padded head size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from star_fast.ops.triton.rotary import turn


@triton.jit
def inside(rows, n_rows, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Which entries of a (len(rows), BLOCK_E) tile exist."""
    mask = rows[:, None] < n_rows
    if E != BLOCK_E:
        mask = mask & (tl.arange(0, BLOCK_E)[None, :] < E)
    return mask


@triton.jit
def load_tile(ptr, rows, row_stride, n_rows, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Rows of one head as a (len(rows), BLOCK_E) tile, zero outside."""
    cols = tl.arange(0, BLOCK_E)
    return tl.load(ptr + rows[:, None] * row_stride + cols[None, :], mask=inside(rows, n_rows, E, BLOCK_E), other=0.0)


@triton.jit
def load_streamed(ptr, rows, row_stride, n_rows, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """`load_tile` in a loop: rows past the end repeat the last one."""
    cols = tl.arange(0, BLOCK_E)
    ptrs = ptr + tl.minimum(rows, n_rows - 1)[:, None] * row_stride + cols[None, :]
    if E == BLOCK_E:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=cols[None, :] < E, other=0.0)


@triton.jit
def store_tile(ptr, x, rows, row_stride, n_rows, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Write a tile back, rounded to the pointer's dtype."""
    cols = tl.arange(0, BLOCK_E)
    tl.store(
        ptr + rows[:, None] * row_stride + cols[None, :],
        x.to(ptr.dtype.element_ty),
        mask=inside(rows, n_rows, E, BLOCK_E),
    )


@triton.jit
def visible(word, offsets):
    """Bit `offsets` of a word, for each key of a tile.

    In two steps: the first shift is the same for all columns that a thread holds, the second is known when compiling.
    """
    return (((word >> (offsets & 7)) >> (offsets & 56)) & 1) != 0


@triton.jit
def attention_prepare(
    qkv_ptr,
    table_ptr,
    keep_ptr,
    words_ptr,
    n_positions,
    n_groups,
    width,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    MASK: tl.constexpr,
    ROTARY: tl.constexpr,
    ACC: tl.constexpr,
):
    """ROWS positions of one sequence: their keys (COLS of the `width` = heads x E columns) turned in place, their mask
    packed.

    Position 0 is packed as visible. qkv is contiguous here; words has n_groups words of ROWS bits a sequence.
    """
    group = tl.program_id(0) % n_groups
    batch = (tl.program_id(0) // n_groups).to(tl.int64)
    rows = group * ROWS + tl.arange(0, ROWS)
    if ROTARY:
        cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
        mask = (rows[:, None] < n_positions) & (cols[None, :] < width)  # (ROWS, COLS), as all tiles here
        ptrs = qkv_ptr + batch * n_positions * 3 * width + width + rows[:, None] * (3 * width) + cols[None, :]
        table = tl.load(table_ptr + rows[:, None] * E + (cols % E)[None, :], mask=mask, other=0.0)
        x = turn(tl.load(ptrs, mask=mask, other=0.0), table, 1, ROWS, COLS, ACC)
        tl.store(ptrs, x.to(qkv_ptr.dtype.element_ty), mask=mask)
    if MASK:  # noqa: SIM102 - known when compiling, unlike the next
        if tl.program_id(1) == 0:
            keep = tl.load(keep_ptr + batch * n_positions + rows, mask=rows < n_positions, other=0)
            bits = ((keep != 0) | (rows == 0)).to(words_ptr.dtype.element_ty) << tl.arange(0, ROWS)
            tl.store(words_ptr + batch * n_groups + group, tl.xor_sum(bits, 0))


@triton.jit
def attention_forward(
    qkv_ptr,
    words_ptr,
    table_ptr,
    out_ptr,
    lse_ptr,
    batch_stride,
    position_stride,
    part_stride,
    n_positions,
    n_heads,
    n_tiles,
    n_words,
    HEAD_STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    MASK: tl.constexpr,
    ROTARY: tl.constexpr,
    LEAVE_TURNED: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """One block of queries of one head: streams the keys up to the last query; lse is in base 2, of
    the scaled scores.
    """
    tile = n_tiles - 1 - tl.program_id(0) % n_tiles  # long rows first
    head = (tl.program_id(0) // n_tiles) % n_heads
    batch = (tl.program_id(0) // (n_tiles * n_heads)).to(tl.int64)
    q_ptr = qkv_ptr + batch * batch_stride + head * HEAD_STRIDE
    k_ptr, v_ptr = q_ptr + part_stride, q_ptr + 2 * part_stride
    word_ptr = words_ptr
    if MASK:
        word_ptr += batch * n_words
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_tile(q_ptr, rows, position_stride, n_positions, E, BLOCK_E)  # (M, E)
    if ROTARY:
        q = turn(q, load_tile(table_ptr, rows, E, n_positions, E, BLOCK_E), 1, BLOCK_M, BLOCK_E, ACC).to(q.dtype)
        if LEAVE_TURNED:
            store_tile(q_ptr, q, rows, position_stride, n_positions, E, BLOCK_E)
    q = q.to(DOT)
    top = tl.full((BLOCK_M,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    acc = tl.zeros((BLOCK_M, BLOCK_E), ACC)
    own, offsets = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    for start in tl.range(0, tl.minimum((tile + 1) * BLOCK_M, n_positions), BLOCK_N):
        k = load_streamed(k_ptr, start + offsets, position_stride, n_positions, E, BLOCK_E).to(DOT)  # (N, E)
        v = load_streamed(v_ptr, start + offsets, position_stride, n_positions, E, BLOCK_E).to(DOT)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC)  # (M, N)
        if MASK:
            scores = tl.where(visible(tl.load(word_ptr), offsets)[None, :], scores, float("-inf"))
            word_ptr += 1
        if start + BLOCK_N > tile * BLOCK_M:  # on the diagonal
            scores = tl.where((own + (tile * BLOCK_M - start))[:, None] >= offsets[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * SCALE)  # (M,); finite: position 0 is in the first tile
        weights = tl.exp2(scores * SCALE - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        # (M, E)
        acc = tl.dot(
            weights.to(v_ptr.dtype.element_ty).to(DOT), v, acc * shrink[:, None], input_precision="ieee", out_dtype=ACC
        )
        top = new_top
    out_ptr += (batch * n_positions * n_heads + head) * E
    store_tile(out_ptr, acc * (1.0 / total)[:, None], rows, n_heads * E, n_positions, E, BLOCK_E)
    tl.store(lse_ptr + (batch * n_heads + head) * n_positions + rows, top + tl.log2(total), mask=rows < n_positions)


@triton.jit
def attention_backward_queries(
    qkv_ptr,
    words_ptr,
    table_ptr,
    out_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
    batch_stride,
    position_stride,
    part_stride,
    n_positions,
    n_heads,
    n_tiles,
    n_words,
    HEAD_STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    ROOT: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    MASK: tl.constexpr,
    ROTARY: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """dq of one block of queries, and delta = rowsum(dout * out) for the keys' kernel. q and k come turned."""
    tile = n_tiles - 1 - tl.program_id(0) % n_tiles
    head = (tl.program_id(0) // n_tiles) % n_heads
    batch = (tl.program_id(0) // (n_tiles * n_heads)).to(tl.int64)
    q_ptr = qkv_ptr + batch * batch_stride + head * HEAD_STRIDE
    k_ptr, v_ptr = q_ptr + part_stride, q_ptr + 2 * part_stride
    word_ptr = words_ptr
    if MASK:
        word_ptr += batch * n_words
    offset = (batch * n_positions * n_heads + head) * E
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_stat = (batch * n_heads + head) * n_positions + rows
    dout = load_tile(dout_ptr + offset, rows, n_heads * E, n_positions, E, BLOCK_E)  # (M, E)
    out = load_tile(out_ptr + offset, rows, n_heads * E, n_positions, E, BLOCK_E)
    delta = tl.sum(dout.to(ACC) * out.to(ACC), 1)  # (M,)
    tl.store(delta_ptr + row_stat, delta, mask=rows < n_positions)
    lse = tl.load(lse_ptr + row_stat, mask=rows < n_positions, other=0.0)
    q = load_tile(q_ptr, rows, position_stride, n_positions, E, BLOCK_E).to(DOT)
    dout = dout.to(DOT)
    acc = tl.zeros((BLOCK_M, BLOCK_E), ACC)
    own, offsets = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    for start in tl.range(0, tl.minimum((tile + 1) * BLOCK_M, n_positions), BLOCK_N):
        k = load_streamed(k_ptr, start + offsets, position_stride, n_positions, E, BLOCK_E).to(DOT)  # (N, E)
        v = load_streamed(v_ptr, start + offsets, position_stride, n_positions, E, BLOCK_E).to(DOT)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC) * SCALE - lse[:, None]  # (M, N)
        if MASK:
            scores = tl.where(visible(tl.load(word_ptr), offsets)[None, :], scores, float("-inf"))
            word_ptr += 1
        if start + BLOCK_N > tile * BLOCK_M:  # on the diagonal
            scores = tl.where((own + (tile * BLOCK_M - start))[:, None] >= offsets[None, :], scores, float("-inf"))
        dweights = tl.dot(dout, tl.trans(v), input_precision="ieee", out_dtype=ACC)
        dscores = tl.exp2(scores) * (dweights - delta[:, None])
        # (M, E)
        acc = tl.dot(dscores.to(k_ptr.dtype.element_ty).to(DOT), k, acc, input_precision="ieee", out_dtype=ACC)
    acc *= ROOT
    if ROTARY:
        acc = turn(acc, load_tile(table_ptr, rows, E, n_positions, E, BLOCK_E), -1, BLOCK_M, BLOCK_E, ACC)
    dq_ptr = dqkv_ptr + batch * n_positions * 3 * n_heads * E + head * E
    store_tile(dq_ptr, acc, rows, 3 * n_heads * E, n_positions, E, BLOCK_E)


@triton.jit
def attention_backward_keys(
    qkv_ptr,
    words_ptr,
    table_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
    batch_stride,
    position_stride,
    part_stride,
    n_positions,
    n_heads,
    n_tiles,
    n_words,
    HEAD_STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    ROOT: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    MASK: tl.constexpr,
    ROTARY: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """dk and dv of one block of keys: streams the queries from the first key on; the tiles are (keys, queries). q and k
    come turned.
    """
    tile = tl.program_id(0) % n_tiles  # the first keys have the most queries
    head = (tl.program_id(0) // n_tiles) % n_heads
    batch = (tl.program_id(0) // (n_tiles * n_heads)).to(tl.int64)
    q_ptr = qkv_ptr + batch * batch_stride + head * HEAD_STRIDE
    k_ptr, v_ptr = q_ptr + part_stride, q_ptr + 2 * part_stride
    dout_ptr += (batch * n_positions * n_heads + head) * E
    row_stats = (batch * n_heads + head) * n_positions
    own, offsets = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    cols = tile * BLOCK_N + own
    k = load_tile(k_ptr, cols, position_stride, n_positions, E, BLOCK_E).to(DOT)  # (N, E)
    v = load_tile(v_ptr, cols, position_stride, n_positions, E, BLOCK_E).to(DOT)
    dk = tl.zeros((BLOCK_N, BLOCK_E), ACC)
    dv = tl.zeros((BLOCK_N, BLOCK_E), ACC)
    for start in tl.range(tile * BLOCK_N // BLOCK_M * BLOCK_M, n_positions, BLOCK_M):
        rows = start + offsets
        q = load_streamed(q_ptr, rows, position_stride, n_positions, E, BLOCK_E).to(DOT)  # (M, E)
        dout = load_streamed(dout_ptr, rows, n_heads * E, n_positions, E, BLOCK_E)
        # (M,); past the end every weight is 0
        lse = tl.load(lse_ptr + row_stats + rows, mask=rows < n_positions, other=float("inf"))
        delta = tl.load(delta_ptr + row_stats + rows, mask=rows < n_positions, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee", out_dtype=ACC) * SCALE - lse[None, :]  # (N, M)
        if start < (tile + 1) * BLOCK_N:  # on the diagonal
            scores = tl.where((offsets + (start - tile * BLOCK_N))[None, :] >= own[:, None], scores, float("-inf"))
        weights = tl.exp2(scores)
        dv = tl.dot(weights.to(dout.dtype).to(DOT), dout.to(DOT), dv, input_precision="ieee", out_dtype=ACC)  # (N, E)
        dweights = tl.dot(v, tl.trans(dout.to(DOT)), input_precision="ieee", out_dtype=ACC)
        dscores = weights * (dweights - delta[None, :])
        dk = tl.dot(dscores.to(dout.dtype).to(DOT), q, dk, input_precision="ieee", out_dtype=ACC)
    dk *= ROOT
    if MASK:  # each key has a row of its own, so hidden ones ran along; what came of them, infinities too, is dropped
        seen = visible(tl.load(words_ptr + batch * n_words + tile), own)[:, None]
        dk, dv = tl.where(seen, dk, 0.0), tl.where(seen, dv, 0.0)
    dk_ptr = dqkv_ptr + batch * n_positions * 3 * n_heads * E + (n_heads + head) * E
    # First, for its registers: turning takes many
    store_tile(dk_ptr + n_heads * E, dv, cols, 3 * n_heads * E, n_positions, E, BLOCK_E)
    if ROTARY:
        dk = turn(dk, load_tile(table_ptr, cols, E, n_positions, E, BLOCK_E), -1, BLOCK_N, BLOCK_E, ACC)
    store_tile(dk_ptr, dk, cols, 3 * n_heads * E, n_positions, E, BLOCK_E)

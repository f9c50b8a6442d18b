"""Tile sizes of every kernel, each with its reason. A plain table: no autotuning, so results and resources are the same
everywhere.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Tile edges in elements (meaning: per kernel), warps of 32 threads a program, software pipeline stages."""

    block: tuple[int, ...]
    num_warps: int
    num_stages: int


# One program handles a tile of `block[0]` numbers: that many columns of one row, or several narrower rows. 2048 bf16
# numbers are two 16-byte loads in flight for each thread and input at 4 warps.
SWIGLU = Tile((2048,), num_warps=4, num_stages=1)

# Forward, a program takes block[0] rows, which share the weight and the hashes of the columns, as long as that leaves
# block[1] programs (few rows, as in decoding: one row a program). Backward, block[2] programs each leave one float32
# row of dweight sums: 1 % of the bytes at 16384 rows, and a fixed number, so that the order of the sum is the same on
# every device. num_warps is the most; fewer for short rows (8 columns a thread: 16 bytes of bf16). Two stages: backward
# loads one tile ahead.
ADD_RMS_NORM = Tile((8, 1024, 512), num_warps=16, num_stages=2)
# Rows and columns of the float32 sums that a program adds at once: 64 bytes of a row, two sectors, so that there are
# programs enough to share 1.6 MB (B) to 2.6 MB (XL) that lie in the cache: 48 and 80. Four 16-byte loads a thread in
# flight, two rounds for 512 rows.
ADD_RMS_NORM_WEIGHT = Tile((256, 16), num_warps=8, num_stages=1)
# One program handles block[0] numbers of one tensor: 8 a thread, so 2 x 16 bytes of teacher and student and 16 of a
# bf16 copy.
EMA_UPDATE = Tile((2048,), num_warps=8, num_stages=1)

# GroupNorm: most and fewest numbers of a program, about how many parts a small image has (rows are rounded up to a
# power of two), most channels of a program: 128 divide the widths of VQ-16, and are 256 bytes of a pixel in bf16.
# Chosen by an image's own sizes, since images beside it must not change how its sums are split. 8 warps always: with
# more threads than channels a channel's mean and scale are loaded where its pixels lie; with fewer the whole tile goes
# through shared memory. The moments' tile stays in registers: 64 numbers a thread, eight 16-byte loads of bf16, 32 KB a
# program and two programs on a multiprocessor, and its two float32 rows are 3 % of the bytes. 65536 pixels of 128
# channels make 512 programs an image; 256 pixels of 512 channels 32, so that a piece of 16 has 512 (an H100 has 132
# multiprocessors).
GROUP_NORM_MOMENTS = Tile((16384, 2048, 8, 128), num_warps=8, num_stages=1)
# Half of that a thread, beside a mean, scale and bias of its eight channels, which are 10 bytes a channel for the 256
# that 64 pixels read and write.
GROUP_NORM_SCALED = Tile((8192, 2048, 8, 128), num_warps=8, num_stages=1)
# Parts times channels of a group that a program adds up at once: 512 parts of 4 channels at 256 pixels a side.
GROUP_NORM_MERGE = Tile((2048,), num_warps=4, num_stages=1)

# Positions and columns of their keys that a program turns and whose mask it packs into a word: the rotary table's tile
# is then as many bytes as the keys' (32 rows of 64 pairs' cos and sin, 8 KB, for 32 x 128 bf16), and a row of it 256
# bytes; 4 warps have 8 KB in flight a program.
ATTENTION_PREPARE = Tile((32, 128), num_warps=4, num_stages=1)
# Attention, by padded head size (next power of two): (rows a program owns, rows it streams). Instructions below are
# SASS a thread and score in the loop, with the causal branch, by registers a share of the warps' slots: counted for
# sm_80 and sm_90, benchmarks/results/attention_loops.md. 16-bit dtypes: 64 rows for 4 warps is the least wgmma takes,
# and less is computed above the diagonal than with 128 (41 against 49 thousand scores a head at T = 256, of 33 needed;
# 184 against 237 at T = 576, of 166), which would save 2 % of the instructions at E = 64 and 8 % at 100, and halve the
# warps. Forward streams 64 keys: at E = 100 17.6 instructions where 32 keys take 23.7, at the same occupancy. Backward
# holds two accumulators and three operands, so it streams 32: 64 spill in the keys' kernel on sm_80; in the queries'
# they save 17 % on sm_90 and nothing on sm_80, where they take all 255 registers, as the keys' kernel does at E = 100
# (sm_80) with nothing spilt since dv is stored before dk is turned. Four warps at every size: eight would share 64
# rows, and do 33 and 43 instructions a score at E = 100 for 19 and 21. Two stages: the next tile is fetched during this
# one. E = 100 loads 8 bytes a thread (rows start at multiples of 8): 16 of the forward's 564 instructions, of which
# padding in memory would save half, for two more passes over k and v.
ATTENTION_FORWARD = {
    16: Tile((64, 64), 4, 2),
    32: Tile((64, 64), 4, 2),
    64: Tile((64, 64), 4, 2),
    128: Tile((64, 64), 4, 2),
}
ATTENTION_BACKWARD = {
    16: Tile((64, 32), 4, 2),
    32: Tile((64, 32), 4, 2),
    64: Tile((64, 32), 4, 2),
    128: Tile((64, 32), 4, 2),
}
# float32 multiplies without tensor cores (full products), float64 in the interpreter only: small tiles keep the
# operands in registers (32 keys at E = 64 spill on sm_90).
ATTENTION_FORWARD_FULL_PRECISION = {
    16: Tile((32, 32), 4, 1),
    32: Tile((32, 32), 4, 1),
    64: Tile((32, 16), 4, 1),
    128: Tile((32, 16), 8, 1),
}
ATTENTION_BACKWARD_FULL_PRECISION = {
    16: Tile((32, 16), 4, 1),
    32: Tile((32, 16), 4, 1),
    64: Tile((32, 16), 4, 1),
    128: Tile((16, 16), 8, 1),
}

# One program streams the cache of one row and head, block[0] positions at a time: 64 x 64 bf16 is four 16-byte loads of
# k and four of v a thread, 16 KB in flight a program; a position's running sums stay in one thread group until the end,
# so the loop has no barrier. By padded head size.
DECODE_ATTENTION = {16: Tile((64,), 4, 1), 32: Tile((64,), 4, 1), 64: Tile((64,), 4, 1), 128: Tile((32,), 4, 1)}

# A row a program, 8 columns a thread up to 16 warps: one 16-byte access of bf16 a thread and input. Narrow rows share a
# program of 1024 numbers.
FEATURE_DISTANCE = Tile((8, 1024), num_warps=16, num_stages=1)
# Numbers a program: 16 a thread, two 16-byte accesses of bf16.
FEATURE_DISTANCE_SCALE = Tile((2048,), num_warps=4, num_stages=1)
# Most logits of one chunk of rows, in bytes: 3968 x 16384 in bf16 (16384 rows: five chunks of 3328 or less). A chunk
# moves, with n rows, V codes and width D, the weight twice and the float32 sum in and out: 12 V D bytes; and its logits
# five times: 10 n V. Weight and sum alone, 75 MB (B) to 315 MB (3B), exceed the L2 cache of an A100 (40 MB) and an H100
# (50 MB), from L on a B200's too (126 MB), and stream through it while the logits are read, so a chunk sized for the
# cache (1024 rows, as it was) finds little there and pays 12 V D often: counted without any hit, a call at 16384 rows
# moves
#                 B      L      XL     XXL     3B   GB
#     1024 rows   5.1    5.9    6.7    7.5    12.7
#     2048 rows   3.9    4.3    4.7    5.1     7.7
#     3328 rows   3.4    3.7    3.9    4.2     5.8
# and the product that accumulates, 2 n V D FLOPs on 8 V D + 2 n V bytes, meets 192 FLOPs a byte at B with 1024 rows,
# below the 295 where an H100 turns from bytes to arithmetic (A100 156, B200 281); 3328 rows meet 399 at B and more
# elsewhere. More rows would break the op's promise of 134 MB.
LOGITS_CHUNK_BYTES = 31 * 2**22
# A row of up to block[0] codes is held in registers and read once: 16 float32 a thread at 32 warps is what 64 registers
# hold (32768 columns spill). A longer one is read twice, block[1] codes at a time. block[2]: columns a thread below the
# most warps.
CROSS_ENTROPY_ROWS = Tile((16384, 8192, 16), num_warps=32, num_stages=1)
# Anchor rows, keys, columns a step of the first product, columns of the gradient a program owns. 32 rows: the images of
# one GPU at the presets; 64 keys: what one warp-group product takes; 256 columns divide every preset's width and give
# 96 to 160 programs where 512 would spill on sm_100. Each part of the columns repeats the first product: 4 (B) to 6
# (XL) times the least loads of a row tile, all but the first from the cache.
SLOT_CONTRAST = Tile((32, 64, 64, 256), num_warps=8, num_stages=3)
# For 4- and 8-byte inputs, whose products run without tensor cores: small enough for shared memory and registers.
SLOT_CONTRAST_WIDE = Tile((16, 32, 32, 128), num_warps=4, num_stages=1)
# Numbers a program of the sum over a slot's pairs: 8 a thread, one 16-byte access of bf16.
SLOT_CONTRAST_SUM = Tile((1024,), num_warps=4, num_stages=1)

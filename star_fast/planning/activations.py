"""Memory of one micro-batch: what each op saves for backward, what a block needs while it runs, what the loss holds.

Letters as in model/transformer.py: N rows (B*M*T), D width, F feed-forward width, H heads, T positions, V codebook; s
bytes of a number.
"""

from __future__ import annotations

from typing import NamedTuple

from star_fast.config import RunConfig
from star_fast.planning.sizes import Micro, number_bytes, projector

LOGITS_CHUNK_BYTES = 31 * 2**22  # of ops/triton/tiles.py
PLAIN_CHUNK_BYTES = 2**25  # of ops/linear_cross_entropy.py
PARTIAL_BYTES = 2**24  # there, on the CPU: a block of the weight gradient on its way to the float32 sum


class Activations(NamedTuple):
    """Bytes of one micro-batch on one GPU."""

    saved: int  # for backward, at the end of the forward pass
    working: int  # on top, at the worst moment of forward or backward
    logits_chunk: int  # the only logits that exist
    loss: int  # float32 gradient of the output matrix, its rounded copy, on the CPU a block of it

    @property
    def total(self) -> int:
        """All at once: an upper bound, since the loss lets go before the first block's backward."""
        return self.saved + self.working + self.logits_chunk + self.loss


def activations(config: RunConfig, size: Micro, *, fused: bool = True) -> Activations:
    """The student's micro-batch, and the teacher's forward pass before it.

    Args:
        fused: the Triton kernels' way (training on a GPU). Without: the plain torch references (training on a CPU),
            which also keep what is normed in float32 and before its weight, rotated queries and keys, silu's output and
            the (T, T) masks.
    """
    model, s, N = config.model, number_bytes(config), size.rows
    D, F = model.width, model.feed_forward
    block, inputs = saved_block(config, size, fused)
    # The first norm keeps the embedded input, the output matrix the last norm's result, the two losses their indices
    # and their gradient.
    outside = N * D * s + (N * D * s if fused else N * D * (4 + s)) + 17 * N + _contrast(config, size, fused)
    outside += int(compared_share(config) * N) * D * s
    # Backward of a feed-forward: gradients of its product (F) and of its packed input (2F; the reference splits and
    # joins: 6F), of two streams (2D).
    backward = N * s * (2 * D + (3 if fused else 6) * F) + s * 2 * F * D
    loss_rows = 2 * N * D * s  # the gradient by the hidden states, the teacher's last features
    # A forward pass without gradients holds one block's tensors, two streams and the contrasted features.
    teacher = N * s * (9 * D + (3 if fused else 4) * F) if config.method.has_teacher else 0
    if config.train.block_checkpointing:
        saved = model.blocks * inputs + outside
        working = max(loss_rows, block - inputs + backward)
    else:
        saved = model.blocks * block + outside
        working = max(loss_rows, backward)
    working = max(working, teacher - saved)
    chunk = min(max(16, (LOGITS_CHUNK_BYTES if fused else PLAIN_CHUNK_BYTES) // (model.vocab * s)), N) * model.vocab * s
    partial = 0 if fused else min(PARTIAL_BYTES, 4 * model.vocab * D)
    return Activations(saved, working, chunk, model.vocab * D * (4 + (s if s == 2 else 0)) + partial)


def saved_block(config: RunConfig, size: Micro, fused: bool = True) -> tuple[int, int]:
    """Bytes that one block saves for backward, and bytes that are left of them when blocks are recomputed."""
    model, s, N = config.model, number_bytes(config), size.rows
    D, F, lse = model.width, model.feed_forward, 4 * size.rows * model.heads
    if fused:
        # Twice: residual sum (D) and its norm (D). Attention: qkv (3D), out (D), one float32 a head. Feed-forward:
        # packed product (2F), its gate's result (F).
        kept, attention = 2 * N * D * s, 4 * N * D * s + lse
        return N * s * (8 * D + 3 * F) + lse, kept + (attention if config.train.keep_attention else 0)
    # Twice: the sum in float32, its norm before and after the weight, one float32 a row. Rotated q and k (2D). silu
    # (F). A mask a block where keys are hidden. Recomputed: the two inputs, the closing norm's three (in float32 the
    # sum is one of the inputs).
    mask = N * model.positions * s if config.method.mask_ratio else 0
    kept, attention = N * D * ((3 if s == 2 else 2) * s + 4) + 4 * N, 6 * N * D * s + lse + mask
    return N * s * (10 * D + 4 * F) + 8 * N * D + lse + 8 * N + mask, kept + (
        attention if config.train.keep_attention else 0
    )


def compared_share(config: RunConfig) -> float:
    """Share of the rows that L_MIM compares, whose gradient its op keeps."""
    method, T = config.method, config.model.positions
    if not method.mim_weight:
        return 0.0
    return 1.0 if method.mim_positions == "all" else int(method.mask_ratio * (T - 1)) / T


def _contrast(config: RunConfig, size: Micro, fused: bool) -> int:
    """Projector (inputs, and each hidden layer before and after SiLU, in batch norm twice in float32) and the
    contrastive op.
    """
    if not size.slots:
        return 0
    s, D = number_bytes(config), config.model.width
    hidden = projector(config.model, config.method).hidden
    projected = size.slots * (s * (D + 2 * hidden) + (8 * hidden if config.method.projector_norm == "batch" else 0))
    # Plain torch everywhere, in float32: normed anchors and keys, similarities of all with all and their mask
    if config.method.negatives == "all_slots":
        slots = size.slots // size.images
        return projected + 4 * D * (2 * size.slots + slots * size.keys) + 5 * size.slots * slots * size.keys
    if fused:  # one gradient block a pair
        return projected + size.pairs * size.images * D * s
    rows = size.pairs * size.images
    return projected + 4 * (2 * size.slots * D + rows * D + size.pairs * size.keys * D + rows * size.keys)

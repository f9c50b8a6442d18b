"""Arithmetic and memory traffic of one optimizer step, and how long it takes at a share of a GPU's peak.

A product of (m, k) and (k, n) counts 2mkn FLOPs; norms, activations, softmax and optimizer count none (under 1 %
together). Attention is counted causally, T(T+1)/2 pairs a head, hidden keys included; in full (as FLOP counters and
some papers do) where asked.
"""

from __future__ import annotations

from typing import NamedTuple

from star_fast.config import RunConfig
from star_fast.planning.sizes import Micro, block_weights, micro, number_bytes, parameters, projector

IMAGENET_IMAGES = 1_281_167


class Flops(NamedTuple):
    """Of one optimizer step, all GPUs together."""

    student: int  # forward and backward: three times the forward products
    teacher: int  # forward, without the output matrix
    # With block checkpointing: the blocks' forward once more (or what keep_attention leaves), but for the last product:
    # nothing needs it
    recomputed: int

    @property
    def total(self) -> int:
        """What the GPUs do."""
        return sum(self)


def forward_flops(config: RunConfig, size: Micro, *, causal: bool = True) -> tuple[int, int]:
    """(in the blocks, in output matrix, projector and contrast) of one forward pass over a micro-batch."""
    model, T = config.model, config.model.positions
    attended = T * (T + 1) // 2 if causal else T * T
    blocks = model.blocks * (2 * size.rows * block_weights(model) + 4 * size.sequences * attended * model.width)
    projected = 2 * size.slots * projector(model, config.method).matrices
    return blocks, 2 * size.rows * model.width * model.vocab + projected + contrast_flops(config, size)


def contrast_flops(config: RunConfig, size: Micro) -> int:
    """Anchors times keys: for each pair of slots, or of all slots with all."""
    compared = size.pairs * size.images if config.method.negatives == "slot" else size.slots * size.slots // size.images
    return 2 * compared * size.keys * config.model.width


def step_flops(config: RunConfig, gpus: int, micro_images: int, *, causal: bool = True) -> Flops:
    """FLOPs of one optimizer step of train.images_per_step images.

    Backward counts twice the forward; what attention recomputes inside its kernels is not counted. The teacher's keys
    need no gradient: the contrastive product counts 2 in 3.
    """
    size = micro(config, micro_images, gpus)
    blocks, rest = forward_flops(config, size, causal=causal)
    times = config.train.images_per_step // micro_images
    keys = contrast_flops(config, size)
    D, F = config.model.width, config.model.feed_forward
    a_number = config.model.blocks * 2 * size.rows  # FLOPs of all blocks for each number of a matrix
    recomputed = a_number * (D * D + 2 * D * F) if config.train.keep_attention else blocks - a_number * D * F
    # Without L_MIM the teacher stops at the contrasted block.
    teacher = blocks if config.method.mim_weight else blocks * config.contrast_depth // config.model.blocks
    return Flops(
        times * (3 * (blocks + rest) - keys),
        times * teacher if config.method.has_teacher else 0,
        times * recomputed if config.train.block_checkpointing else 0,
    )


def step_bytes(config: RunConfig, gpus: int, micro_images: int) -> int:
    """Least bytes that one GPU reads and writes in its memory in a step: every op's inputs and outputs once (the ops'
    own `cost`), logits none.

    Per row and block, forward: norms 2 x 4D, wqkv 4D, attention 4D, wo 2D, packed product D + 2F, gate 3F, w2 F + D.
    Backward: norms 2 x 5D, attention 8D, gate 5F, and each product's operands twice. Weights: read once a pass, their
    gradient written once; then AdamW on this GPU's share.
    """
    found, s, model = parameters(config), number_bytes(config), config.model
    rows = micro(config, micro_images, gpus).rows
    D, F = model.width, model.feed_forward
    forward, backward = 20 * D + 6 * F, 34 * D + 11 * F
    passes = 1 + (config.method.has_teacher) + config.train.block_checkpointing
    a_micro = (
        s * rows * model.blocks * (forward * passes + backward)
        + s * found.student * (passes + 1)
        + 4 * found.student * 2
    )
    optimizer = found.student * 30 + (found.transformer * 14 if config.method.has_teacher else 0)
    return config.train.images_per_step // (gpus * micro_images) * a_micro + optimizer // gpus


def sent_bytes(config: RunConfig, gpus: int) -> int:
    """Bytes that one GPU sends for each step under ZeRO-1: gradients reduced (twice their size in a ring), new weights
    of student and teacher.
    """
    found, s = parameters(config), number_bytes(config)
    wide = 4 if config.train.gradient_precision == "fp32" else s
    return (
        (2 * wide * found.student + s * (found.student + (found.transformer if config.method.has_teacher else 0)))
        * (gpus - 1)
        // gpus
    )


class Speed(NamedTuple):
    """What a share of the peak means."""

    share: float  # of the GPUs' dense bf16 peak that the FLOPs above reach
    step_s: float
    images_per_s: float  # all GPUs
    tokens_per_s: float  # trained ones: images * views * positions
    days_50_epochs: float  # of ImageNet
    days_300_epochs: float


def speed(config: RunConfig, flops: Flops, flops_per_s: float, share: float) -> Speed:
    """Time at `share` of `flops_per_s` (of all GPUs together)."""
    step_s = flops.total / (flops_per_s * share)
    images = config.train.images_per_step / step_s
    day = images * 86400
    return Speed(
        share,
        step_s,
        images,
        images * config.method.views * config.model.positions,
        50 * IMAGENET_IMAGES / day,
        300 * IMAGENET_IMAGES / day,
    )


def training_days(config: RunConfig, flops: Flops, flops_per_s: float, share: float) -> float:
    """Of `train.epochs` passes over ImageNet at `share` of `flops_per_s` (of all GPUs together)."""
    made = speed(config, flops, flops_per_s, share)
    return config.train.epochs * IMAGENET_IMAGES / made.images_per_s / 86400

"""What stays on a GPU between two micro-batches, for each ZeRO stage: weights, gradients, optimizer, teacher. Read off
DeepSpeed 0.19's own allocations.
"""

from __future__ import annotations

from typing import NamedTuple

from star_fast.config import RunConfig
from star_fast.planning.sizes import block_weights, number_bytes, parameters

STAGES = (0, 1, 2, 3)
# Of a reduction buffer under ZeRO-2 and 3 (training/deepspeed_settings.py): allocated whole, whatever the model's size
BUCKET_NUMBERS = 2**25
DEFAULT_BUCKET_NUMBERS = 500_000_000  # DeepSpeed's reduce_bucket_size where the settings say none
GATHERED_NUMBERS = 500_000_000  # ZeRO-3: half of DeepSpeed's stage3_max_reuse_distance
AHEAD_NUMBERS = 50_000_000  # DeepSpeed's stage3_prefetch_bucket_size


class States(NamedTuple):
    """Bytes on one GPU."""

    weights: int  # working copy of the student
    gradients: int  # as they accumulate over micro-batches
    optimizer: int  # float32 masters (where they are not the weights themselves) and two moments
    teacher: int  # working copy and float32 masters
    buffers: int  # of reductions and gathered weights, while a micro-batch runs
    at_step: int  # what the optimizer step takes in passing, when activations are gone
    # Whether the gradients' place is kept between steps; else they exist from backward to step only
    gradients_stay: bool


def float32_gradients(config: RunConfig) -> bool:
    """Whether gradients are accumulated and reduced in float32."""
    return config.train.precision == "fp32" or config.train.gradient_precision == "fp32"


def states(config: RunConfig, stage: int, gpus: int, *, touched_only: bool = False) -> States:
    """The layout of training/engine.py under ZeRO `stage` on `gpus`.

    With P parameters of the student and Q of the teacher in bf16 on R GPUs:
    stage 0: weights 2P, bf16 gradients 2P (DeepSpeed accumulates in no other type here), masters and moments 12P,
        teacher 2Q + 4Q; float32 gradients 4P exist during the optimizer step.
    stage 1: weights 2P, float32 gradients 4P whole on each GPU, masters and moments 12P/R, teacher 2Q + 4Q/R. A bf16
        gradient lives until it is added. With bf16 gradients: 2P, DeepSpeed's default reduction buffer, and 4P/R of
        float32 gradients during the step.
    stage 2: as stage 1, but the gradients 4P/R (2P/R in bf16); two reduction buffers (overlap_comm) and a float32 copy
        on its way.
    stage 3: all of these divided by R, and what is gathered: DeepSpeed keeps a weight that is used again within a
        billion numbers on the way forward and back, so half a billion of them, one block and what is fetched ahead.
    In fp32 the weights 4P are their own masters without ZeRO; with it DeepSpeed keeps float32 shards beside them. With
    train.offload_optimizer the masters and moments, the teacher's masters and what remains of the gradients lie in host
    memory.

    Args:
        touched_only: leave out reduction buffers: a CPU's memory counts only what is touched of them, late in backward
            when little else is left.
    """
    found, size = parameters(config), number_bytes(config)
    P, Q = found.student, found.transformer if config.method.has_teacher else 0
    wide, offload = float32_gradients(config), config.train.offload_optimizer and stage > 0
    bucket, default = (0, 0) if touched_only else (BUCKET_NUMBERS, DEFAULT_BUCKET_NUMBERS)
    masters, over = (0, 1) if size == 4 and stage == 0 else (4, gpus if stage else 1)
    optimizer = 0 if offload else (masters + 8) * P // over
    teacher = size * Q // (gpus if stage == 3 else 1) + (0 if offload else masters * Q // over)
    shard = 0 if offload else (4 if wide else 2) * P // gpus
    upcast = 0 if wide and size == 2 else 4 * P // gpus  # of a bf16 shard, for the step; fp32 flattens anew
    passing = 2 * bucket * size + (4 * bucket if wide and size == 2 else 0) + size * found.largest
    if stage == 0:
        return States(size * P, size * P, optimizer, teacher, 0, 4 * P if size == 2 else 0, False)
    if stage == 1 and wide and size == 2 and not offload:  # training/zero1.py
        return States(2 * P, 4 * P, optimizer, teacher, size * found.largest, 0, True)
    # Gradients lie in the buffer until they are reduced; then the shard is copied out and flattened for the step
    if stage == 1:
        return States(
            size * P,
            size * P,
            optimizer,
            teacher,
            max(0, default - P) * size,
            0 if offload else size * P // gpus + 4 * P // gpus,
            False,
        )
    if stage == 2:
        return States(size * P, shard, optimizer, teacher, passing, 0 if offload else upcast, False)
    gathered = size * min(
        P, GATHERED_NUMBERS + AHEAD_NUMBERS + max(block_weights(config.model), config.model.vocab * config.model.width)
    )
    return States(size * P // gpus, shard, optimizer, teacher, passing + gathered, 0 if offload else upcast, True)

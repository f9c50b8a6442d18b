"""What stays on a GPU between two micro-batches, for each ZeRO stage: weights, gradients, optimizer, teacher. Read off DeepSpeed 0.19's own allocations."""

from __future__ import annotations

from typing import NamedTuple

from star_fast.config import RunConfig
from star_fast.planning.sizes import block_weights, number_bytes, parameters

STAGES = (0, 1, 2, 3)
BUCKET_NUMBERS = 500_000_000  # of DeepSpeed's reduction buffer (reduce_bucket_size, default): allocated whole, whatever the model's size


class States(NamedTuple):
    """Bytes on one GPU."""

    weights: int  # working copy of the student
    gradients: int  # as they accumulate over micro-batches
    optimizer: int  # float32 masters (where they are not the weights themselves) and two moments
    teacher: int  # working copy and float32 masters
    buffers: int  # of reductions and gathered weights, while a micro-batch runs
    at_step: int  # what the optimizer step takes in passing, when activations are gone
    gradients_stay: bool  # whether the gradients' place is kept between steps; else they exist from backward to step only


def float32_gradients(config: RunConfig) -> bool:
    """Whether gradients are accumulated and reduced in float32."""
    return config.train.precision == "fp32" or getattr(config.train, "gradient_precision", "fp32") == "fp32"


def states(config: RunConfig, stage: int, gpus: int, *, bucket_numbers: int = BUCKET_NUMBERS, wide: bool | None = None) -> States:
    """The layout of training/engine.py under ZeRO `stage` on `gpus`.

    With P parameters of the student and Q of the teacher in bf16 on R GPUs:
    stage 0: weights 2P, bf16 gradients 2P (DeepSpeed accumulates in no other type here), masters and moments 12P, teacher 2Q + 4Q; float32 gradients 4P
        exist during the optimizer step.
    stage 1: weights 2P, float32 gradients 4P whole on each GPU, masters and moments 12P/R, teacher 2Q + 4Q/R. A bf16 gradient lives until it is
        added. With bf16 gradients: 2P, a reduction buffer, and 4P/R of float32 gradients during the step.
    stage 2: as stage 1, but the gradients 4P/R (2P/R in bf16); in passing a bf16 reduction buffer and its float32 copy on the way.
    stage 3: all of these divided by R, and what is gathered: two blocks (one running, one on its way) or the output matrix, of student or teacher.
    In fp32 the weights 4P are their own masters without ZeRO; with it DeepSpeed keeps float32 shards beside them.

    Args:
        bucket_numbers: size of the reduction buffer. A CPU's memory counts only what is touched, late in backward when little else is left: 0 there.
        wide: whether gradients are float32; None: as the settings say.
    """
    found, size = parameters(config), number_bytes(config)
    P, Q = found.student, found.transformer if config.method.has_teacher else 0
    wide = float32_gradients(config) if wide is None else wide
    grown = 4 if wide else 2
    masters, over = (0, 1) if size == 4 and stage == 0 else (4, gpus if stage else 1)
    optimizer = (masters + 8) * P // over
    teacher = size * Q // (gpus if stage == 3 else 1) + masters * Q // over
    own = size * found.largest  # a gradient as autograd makes it, before it is added elsewhere
    passing = (bucket_numbers * size) + (4 * min(P, bucket_numbers) if wide and size == 2 else 0)
    if stage == 0:
        return States(size * P, size * P, optimizer, teacher, 0, 4 * P if size == 2 else 0, False)
    if stage == 1 and wide and size == 2:
        return States(2 * P, 4 * P, optimizer, teacher, own, 0, True)
    if stage == 1:  # gradients lie in the buffer until they are reduced; the shard is copied out, then flattened in float32 for the step
        return States(size * P, size * P, optimizer, teacher, max(0, bucket_numbers - P) * size, size * P // gpus + 4 * P // gpus, False)
    if stage == 2:
        return States(size * P, grown * P // gpus, optimizer, teacher, passing, 0 if wide and size == 2 else 4 * P // gpus, False)
    gathered = size * max(2 * block_weights(config.model), config.model.vocab * config.model.width)
    return States(size * P // gpus, grown * P // gpus, optimizer, teacher, passing + gathered, 0 if wide and size == 2 else 4 * P // gpus, True)

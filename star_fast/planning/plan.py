"""The plan of a run: which ZeRO stage fits, how many images at once, how long it takes. Predicted, not measured."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from star_fast.config import RunConfig
from star_fast.errors import ConfigError, UserError
from star_fast.planning.activations import Activations, activations
from star_fast.planning.gpus import COUNTS, GIB, Gpu
from star_fast.planning.network import Network, Reach, check, reach
from star_fast.planning.sizes import Parameters, cache_bytes, micro, parameters
from star_fast.planning.states import STAGES, States, states
from star_fast.planning.work import Flops, Speed, sent_bytes, speed, step_bytes, step_flops

# CUDA context, libraries' workspaces, NCCL's buffers, what the allocator cannot use: an assumption, not in the tables
RESERVED_GIB = 2.0
SHARES = (0.4, 0.5, 0.6)  # of the peak: what trainers of such models report
SAMPLED_IMAGES = 64  # `star-fast sample --batch-images`, its default
_MOST_GIB = 2**20  # no GPU will have more for a while; floats overflow far above
_MOST_IMAGES = 2**20  # of a micro-batch: where the search ends


class Stage(NamedTuple):
    """One ZeRO stage at the micro-batch asked for."""

    stage: int
    offered: bool  # whether train.zero_stage takes it
    states: States
    activations: Activations
    peak_bytes: int  # the most at any moment
    fits: bool
    largest_images: int  # images of the largest micro-batch that fits; 0: none
    largest_images_recomputed: int  # the same with block checkpointing (of attention too)


class Advice(NamedTuple):
    """What to run."""

    stage: int
    micro_images: int
    accumulation: int
    peak_bytes: int
    recomputing_helps: int  # the accumulation that block checkpointing would need, where that is less; else 0


class Plan(NamedTuple):
    """All that `star-fast plan` says."""

    config: RunConfig
    gpus: int
    memory_gib: float
    gpu: Gpu
    parameters: Parameters
    micro_images: int
    stages: list[Stage]
    advice: Advice
    flops: Flops
    full_attention_flops: Flops
    bytes_a_gpu: int  # least memory traffic of one GPU and step
    sent_bytes_a_gpu: int
    speeds: list[Speed]  # of bf16; empty for fp32, which the peaks are not for
    cache_bytes: int  # of sampling SAMPLED_IMAGES images with guidance
    network: Network
    curve: list[Reach]  # the same run on other numbers of GPUs, at the first of SHARES; of bf16


def peak_bytes(held: States, work: Activations, *, accumulating: bool = True) -> int:
    """The most memory at any moment: when backward begins, when it ends, or in the optimizer step.

    Args:
        accumulating: whether gradients of earlier micro-batches are there when backward begins. Assumed of a GPU: the
            worse case.
    """
    lasting = held.weights + held.optimizer + held.teacher
    begins = (held.gradients if accumulating or held.gradients_stay else 0) + held.buffers + work.total
    return lasting + max(begins, held.gradients + held.buffers + work.working, held.gradients + held.at_step)


def gpu_bytes(config: RunConfig, stage: int, gpus: int, images: int) -> int:
    """Peak of one of `gpus` under ZeRO `stage` with micro-batches of `images`."""
    return peak_bytes(states(config, stage, gpus), activations(config, micro(config, images, gpus)))


def make_plan(config: RunConfig, gpus: int, memory_gib: float, gpu: Gpu, network: Network | None = None) -> Plan:
    """Plan a run whose sizes are set.

    Args:
        gpus: how many; R of the formulas. memory_gib: of each. gpu: whose peaks count. network: between them; None: as
            network.Network assumes.

    Raises:
        UserError, ConfigError: contradictions, or nothing fits.
    """
    _check(config, gpus, memory_gib)
    network = check(network or Network())
    share = config.train.images_per_step // gpus
    asked = config.train.micro_batch_images or share
    if share % asked:
        raise ConfigError(
            f"train.micro_batch_images: {gpus} GPUs x {asked} images must divide train.images_per_step = "
            f"{config.train.images_per_step}"
        )
    limit = int((memory_gib - RESERVED_GIB) * GIB)
    stages = [_stage(config, stage, gpus, asked, limit) for stage in STAGES]
    advice = _advice(config, stages, gpus, share, memory_gib)
    flops = step_flops(config, gpus, advice.micro_images)
    return Plan(
        config,
        gpus,
        memory_gib,
        gpu,
        parameters(config),
        asked,
        stages,
        advice,
        flops,
        step_flops(config, gpus, advice.micro_images, causal=False),
        step_bytes(config, gpus, advice.micro_images),
        sent_bytes(config, gpus),
        [
            speed(config, flops, gpus * gpu.bf16_flops_per_s, share)
            for share in SHARES
            if config.train.precision == "bf16"
        ],
        cache_bytes(config, 2 * SAMPLED_IMAGES),
        network,
        _curve(config, gpus, limit, memory_gib, gpu, network),
    )


def _curve(config: RunConfig, asked: int, limit: int, memory_gib: float, gpu: Gpu, network: Network) -> list[Reach]:
    """The run on every number of GPUs of the tables (and those asked for, and on two machines) that divides its images
    and holds it, each at its best.
    """
    rows = []
    for gpus in sorted({*COUNTS, 2 * network.gpus_a_machine, asked}):
        if config.train.precision != "bf16" or config.train.images_per_step % gpus:
            continue
        share = config.train.images_per_step // gpus
        stages = [_stage(config, stage, gpus, share, limit) for stage in STAGES]
        if not any(row.offered and row.largest_images for row in stages):
            continue
        best = _advice(config, stages, gpus, share, memory_gib)
        arithmetic_s = step_flops(config, gpus, best.micro_images).total / (gpus * gpu.bf16_flops_per_s * SHARES[0])
        compute_s = max(arithmetic_s, step_bytes(config, gpus, best.micro_images) / gpu.bytes_per_s)
        rows.append(reach(config, gpus, best.stage, best.micro_images, best.accumulation, compute_s, gpu, network))
    return rows


def _check(config: RunConfig, gpus: int, memory_gib: float) -> None:
    if gpus < 1:
        raise UserError(f"--gpus: expected at least 1, got {gpus}")
    if memory_gib > _MOST_GIB:
        raise UserError(f"--gpu-memory-gib: expected at most {_MOST_GIB}, got {memory_gib:g}")
    if not memory_gib > RESERVED_GIB:
        raise UserError(
            f"--gpu-memory-gib: expected more than the {RESERVED_GIB:g} GiB that CUDA and its libraries take, got "
            f"{memory_gib:g}"
        )
    if config.train.images_per_step % gpus:
        raise ConfigError(
            f"train.images_per_step: expected a multiple of the {gpus} GPUs, got {config.train.images_per_step}"
        )


def _stage(config: RunConfig, stage: int, gpus: int, images: int, limit: int) -> Stage:
    recomputed = dataclasses.replace(
        config, train=dataclasses.replace(config.train, block_checkpointing=True, keep_attention=False)
    )
    peak = gpu_bytes(config, stage, gpus, images)
    return Stage(
        stage,
        _offered(config, stage),
        states(config, stage, gpus),
        activations(config, micro(config, images, gpus)),
        peak,
        peak <= limit,
        _largest(config, stage, gpus, limit),
        _largest(recomputed, stage, gpus, limit),
    )


def _offered(config: RunConfig, stage: int) -> bool:
    try:
        dataclasses.replace(config.train, zero_stage=stage)
    except ConfigError:
        return False
    return True


def _largest(config: RunConfig, stage: int, gpus: int, limit: int) -> int:
    """Images of the largest micro-batch under `limit` bytes: memory only grows with them."""
    fits, too_many = 0, _MOST_IMAGES
    while fits + 1 < too_many:
        images = (fits + too_many) // 2
        if gpu_bytes(config, stage, gpus, images) <= limit:
            fits = images
        else:
            too_many = images
    return fits


def _advice(config: RunConfig, stages: list[Stage], gpus: int, share: int, memory_gib: float) -> Advice:
    """The fewest micro-batches a step (the most negatives, the least traffic); then the settings' own stage, then the
    lowest.
    """
    fitting = [row for row in stages if row.offered and row.largest_images]
    if not fitting:
        raise UserError(_nothing_fits(config, stages, gpus, memory_gib))

    def rank(row: Stage) -> tuple[int, bool, int]:
        return share // _divisor(share, row.largest_images), row.stage != config.train.zero_stage, row.stage

    best = min(fitting, key=rank)
    images = _divisor(share, best.largest_images)
    recomputed = share // _divisor(share, max(row.largest_images_recomputed for row in fitting))
    return Advice(
        best.stage,
        images,
        share // images,
        gpu_bytes(config, best.stage, gpus, images),
        recomputed if recomputed < share // images else 0,
    )


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`."""
    return next(candidate for candidate in range(min(number, most), 0, -1) if number % candidate == 0)


def _nothing_fits(config: RunConfig, stages: list[Stage], gpus: int, memory_gib: float) -> str:
    needs = {row.stage: gpu_bytes(config, row.stage, gpus, 1) / GIB + RESERVED_GIB for row in stages}
    least = min((need, stage) for stage, need in needs.items() if stages[stage].offered)
    found = (
        f"nothing fits: one image on each of {gpus} GPUs needs {least[0]:.1f} GiB at best (ZeRO-{least[1]}), they "
        f"have {memory_gib:g}"
    )
    if any(row.offered and row.largest_images_recomputed for row in stages):
        return f"{found}; --train.block-checkpointing True makes it fit"
    return f"{found}; take more or larger GPUs, or a smaller model"


def as_record(plan: Plan) -> dict[str, Any]:
    """The plan as plain data for JSON: bytes, FLOPs and seconds; `config` holds the settings that decide."""
    return record_of(plan, plan.config, ("model", "method", "train"))


def record_of(plan: Any, config: RunConfig, sections: tuple[str, ...]) -> dict[str, Any]:
    """Any plan (a named tuple) as plain data for JSON, with these sections of `config` in place of its own."""
    record = {name: _plain(value) for name, value in plan._asdict().items() if name != "config"}
    return {
        "predicted": True,
        "measured": False,
        "reserved_gib": RESERVED_GIB,
        **record,
        "config": {name: dataclasses.asdict(getattr(config, name)) for name in sections},
    }


def _plain(value: Any) -> Any:
    """Tuples by name and their properties, dataclasses, lists and mappings, down to numbers and strings."""
    if hasattr(value, "_asdict"):
        derived = [name for name, found in vars(type(value)).items() if isinstance(found, property)]
        return {
            name: _plain(item)
            for name, item in (*value._asdict().items(), *((name, getattr(value, name)) for name in derived))
        }
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value

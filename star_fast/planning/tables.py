"""A plan as plain aligned text."""

from __future__ import annotations

from star_fast.planning.gpus import COUNTS, GIB
from star_fast.planning.plan import RESERVED_GIB, SAMPLED_IMAGES, SHARES, Plan, Stage
from star_fast.planning.states import float32_gradients
from star_fast.planning.work import IMAGENET_IMAGES

CURVE_EPOCHS = 50


def text(plan: Plan, source: str, assumed: str = "") -> str:
    """All tables of a plan. `source`: where its settings come from; `assumed`: which of them were not given."""
    model, method, train = plan.config.model, plan.config.method, plan.config.train
    tokens = train.images_per_step * method.views * model.positions
    lines = [
        f"Predicted, not measured: {source} on {plan.gpus} x {plan.gpu.name.upper()} with {plan.memory_gib:g} GiB each",
        "",
        f"{plan.parameters.transformer / 1e6:.1f} M parameters, projector {plan.parameters.projector / 1e6:.1f} M"
        f"{', a teacher as large as the student' if method.has_teacher else ', no teacher'}; a step: "
        f"{train.images_per_step} images x "
        f"{method.views} views x {model.positions} positions = {tokens} tokens",
        *([assumed] if assumed else []),
        "",
        *_memory(plan),
        "",
        *_advice(plan),
        "",
        *_work(plan),
        "",
        *_speed(plan),
        *_curve(plan),
    ]
    return "\n".join(lines)


def _memory(plan: Plan) -> list[str]:
    train = plan.config.train
    gradients = "float32" if float32_gradients(plan.config) else "bf16"
    head = [
        "",
        "weights",
        "gradients",
        "optimizer",
        "teacher",
        "activations",
        "logits",
        "loss",
        "buffers",
        "peak",
        "fits",
        "largest",
        "recomputing",
    ]
    rows = [head, *(_stage(row) for row in plan.stages)]
    lines = [
        f"GiB on each GPU, micro-batches of {plan.micro_images} images, {train.precision}, {gradients} gradients, "
        f"{'blocks recomputed' if train.block_checkpointing else 'no block checkpointing'}"
        f"{', optimizer in host memory' if train.offload_optimizer else ''}:",
        *aligned(rows),
    ]
    lines += [
        f"  fits: peak + {RESERVED_GIB:g} GiB (assumed for CUDA, libraries, allocator) is within "
        f"{plan.memory_gib:g} GiB",
        "  largest: images of the largest micro-batch that fits; recomputing: the same with block checkpointing",
    ]
    if any(row.peak_bytes > _within(row) for row in plan.stages):
        lines += ["  a peak above the sum of its row is reached in the optimizer step"]
    if left_out := [f"ZeRO-{row.stage}" for row in plan.stages if not row.offered]:
        lines += [
            f"  {', '.join(left_out)}: train.zero_stage does not take it with these settings; for comparison "
            "(ZeRO-0: with bf16 gradients)"
        ]
    return lines


def _within(row: Stage) -> int:
    held = row.states
    return held.weights + held.gradients + held.optimizer + held.teacher + held.buffers + row.activations.total


def _stage(row: Stage) -> list[str]:
    held, work = row.states, row.activations
    parts = [
        held.weights,
        held.gradients,
        held.optimizer,
        held.teacher,
        work.saved + work.working,
        work.logits_chunk,
        work.loss,
        held.buffers,
        row.peak_bytes,
    ]
    return [
        f"ZeRO-{row.stage}",
        *(gib(part) for part in parts),
        "yes" if row.fits else "no",
        str(row.largest_images or "none"),
        str(row.largest_images_recomputed or "none"),
    ]


def gib(size: int) -> str:
    """Bytes in GiB, small ones with more digits."""
    found = size / GIB
    return f"{found:.2f}" if found >= 0.095 else f"{found:.4f}" if found >= 0.00095 else f"{found:.1g}"


def _advice(plan: Plan) -> list[str]:
    advice, train = plan.advice, plan.config.train
    steps = "no accumulation" if advice.accumulation == 1 else f"{advice.accumulation} micro-batches a step"
    lines = [
        f"Advised for {train.images_per_step} images a step: --train.zero-stage {advice.stage} "
        f"--train.micro-batch-images {advice.micro_images} "
        f"({steps}, {gib(advice.peak_bytes)} GiB)"
    ]
    if advice.recomputing_helps:
        lines += [
            f"  --train.block-checkpointing True would do with {advice.recomputing_helps} a step"
            f"{', so with more negatives' if plan.config.method.contrasts else ''}, and recompute each block"
        ]
    return [*lines, f"Sampling {SAMPLED_IMAGES} images with guidance: key-value cache of {gib(plan.cache_bytes)} GiB"]


def _work(plan: Plan) -> list[str]:
    flops, full = plan.flops, plan.full_attention_flops
    rows = [
        ["TFLOP a step, all GPUs:", "student", "teacher", "recomputed", "total"],
        ["  attention counted causally", *map(_tera, (*flops, flops.total))],
        ["  attention counted in full", *map(_tera, (*full, full.total))],
    ]
    memory_s, network = plan.bytes_a_gpu / plan.gpu.bytes_per_s, plan.sent_bytes_a_gpu / 1e9
    return [
        *aligned(rows),
        f"  memory traffic of a GPU: at least {plan.bytes_a_gpu / 1e9:.1f} GB a step, {1e3 * memory_s:.1f} ms at "
        f"{plan.gpu.bytes_per_s / 1e12:g} TB/s; sent by a GPU: {network:.1f} GB a step (ZeRO-1)",
    ]


def _tera(flops: int) -> str:
    return f"{flops / 1e12:.{1 if flops >= 1e13 else 4}f}" if flops else "0"


def _speed(plan: Plan) -> list[str]:
    if plan.config.train.precision == "fp32":
        return ["No time is predicted for train.precision fp32: the published peaks are those of bf16 tensor cores"]
    head = ["share of peak", "step s", "images/s", "tokens/s", "50 epochs, days", "300 epochs, days"]
    rows = [
        [
            f"{row.share:.0%}",
            f"{row.step_s:.3f}",
            f"{row.images_per_s:.0f}",
            f"{row.tokens_per_s:.0f}",
            f"{row.days_50_epochs:.2f}",
            f"{row.days_300_epochs:.2f}",
        ]
        for row in plan.speeds
    ]
    return [
        f"Time, if the causal FLOPs above{' (recomputed ones included)' if plan.flops.recomputed else ''} run at "
        "a share of "
        f"{plan.gpu.bf16_flops_per_s / 1e12:g} TFLOP/s a GPU (dense bf16); ImageNet has {IMAGENET_IMAGES} images:",
        *aligned([head, *rows]),
    ]


def _curve(plan: Plan) -> list[str]:
    """The same run on other numbers of GPUs."""
    if not plan.curve:
        return []
    images, network, alone = plan.config.train.images_per_step, plan.network, plan.curve[0]
    rows = [
        [
            "GPUs",
            "ZeRO",
            "images x times",
            "compute ms",
            "GB sent",
            "network ms",
            "images/s",
            "of linear",
            "hidden",
            f"{CURVE_EPOCHS} epochs, days",
        ]
    ]
    for row in plan.curve:
        linear = row.images_per_s / row.gpus / (alone.images_per_s / alone.gpus)
        rows.append(
            [
                str(row.gpus),
                str(row.stage),
                f"{row.micro_images} x {row.accumulation}",
                f"{1e3 * row.compute_s:.1f}",
                f"{row.sent_bytes_a_gpu / 1e9:.2f}",
                f"{1e3 * row.network_s:.1f}",
                f"{row.images_per_s:.0f}",
                f"{linear:.0%}",
                f"{row.hidden_images_per_s:.0f}",
                f"{CURVE_EPOCHS * IMAGENET_IMAGES / row.images_per_s / 86400:.3g}",
            ]
        )
    lines = [
        f"The same step on other numbers of GPUs, {network.gpus_a_machine} a machine, "
        f"at {SHARES[0]:.0%} of the peak or memory's full rate, what is slower;",
        f"NVLink {plan.gpu.nvlink_bytes_per_s / 1e9:g} GB/s each way, a machine's network {network.gbit_per_s:g} "
        "Gbit/s "
        "(assumed: --network-gbit-per-s):",
        *aligned(rows),
        "  images/s: first compute, then send; hidden: sent while computing. Small micro-batches reach less than "
        "is assumed here",
    ]
    if left_out := [str(count) for count in COUNTS if count not in [row.gpus for row in plan.curve]]:
        lines.append(
            f"  not on {', '.join(left_out)}: it does not fit, or they do not divide train.images_per_step = {images}"
        )
    return ["", *lines]


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]

"""The plans of sampling and preparation as plain aligned text, at most 120 columns."""

from __future__ import annotations

import textwrap
from typing import Any

from star_fast.planning.assumptions import listed
from star_fast.planning.plan import RESERVED_GIB
from star_fast.planning.preparation import CHUNK_IMAGES, DECODE_MS, RANGE_MS, PreparationPlan
from star_fast.planning.sampling import PIECE_IMAGES, SamplingPlan, tokenizer_at
from star_fast.planning.sizes import parameters
from star_fast.planning.tables import aligned, gib

WIDTH = 120
_NO = "no"


def sampling_text(plan: SamplingPlan, source: str, settled: str = "") -> str:
    """All tables of a plan. `source`: where its settings come from; `settled`: which of them were not given."""
    model, held, side = plan.config.model, plan.memory, tokenizer_at(plan.config).image_size
    head = [
        f"Predicted, not measured: {plan.images} images of {side} x {side}, {source}, "
        f"{'guided' if plan.guided else 'not guided'}, bf16, "
        f"{'bf16' if plan.cache == 'model' else plan.cache} cache",
        f"{parameters(plan.config).transformer / 1e6:.1f} M parameters, {model.positions} steps an image; the VQ "
        "decoder takes "
        f"{plan.pixel_flops / 1e9:.3g} GFLOP an image",
        *([settled] if settled else []),
    ]
    part = {
        "weights": held.weights,
        f"cache of {plan.batch_images} images": held.cache,
        "logits and a step's rows": held.decoding,
        f"pixels, {PIECE_IMAGES} images at once": held.pixels,
    }
    memory = [["GiB on each GPU", *part, "together"], ["", *(gib(size) for size in part.values()), gib(held.total)]]
    names = [kind.gpu.name.upper() for kind in plan.kinds]
    batches = [speed.batch_images for speed in plan.kinds[0].speeds]
    shared = [
        images
        for images in batches
        if all(any(speed.batch_images == images for speed in kind.speeds) for kind in plan.kinds)
    ]
    rows = [
        ["One GPU", *names],
        ["batch that fits, images", *(str(kind.largest_images or "none") for kind in plan.kinds)],
        [f"ms a step of {plan.batch_images} images", *(f"{1e3 * kind.chosen.step_s:.2f}" for kind in plan.kinds)],
    ]
    for images in shared:
        rows.append([f"images/s with pixels, batches of {images}", *(_at(kind, images) for kind in plan.kinds)])
    rows += [
        ["images/s, largest batch", *(_at(kind, kind.largest_images) for kind in plan.kinds)],
        ["images/s, pixels alone", *(_rate(kind.pixels_per_s) for kind in plan.kinds)],
        ["images/s, Inception alone (float32)", *(_rate(kind.features_per_s) for kind in plan.kinds)],
    ]
    own = next(row for row in plan.durations[plan.gpu.name] if row.gpus == plan.gpus)
    closing = (
        f"On {plan.gpus} x {plan.gpu.name.upper()}: drawing {_time(own.drawing_s)}, files beside it "
        f"{_time(own.storage_s)} "
        f"({plan.file_bytes / 1e9:.3g} GB), Inception on one GPU {_time(own.features_s)}, both starts "
        f"{_time(2 * plan.assumed.start_s)}; "
        f"together {_time(own.total_s)}; most of it: {own.bound}."
    )
    notes = [
        closing,
        f"A step reads {plan.traffic.weights / 1e9:.3g} GB of weights and {plan.traffic.cache / 1e9:.3g} GB of "
        f"cache for {plan.batch_images} images. "
        "GPUs send each other nothing: every process but the first hands its batches over in files. Scores beside "
        "Inception's features are not counted: "
        "covariances' roots and the distances of precision and recall take seconds to minutes on one machine.",
        f"fits: within a GPU's memory less {RESERVED_GIB:g} GiB for CUDA, libraries, allocator.",
        _assumed(plan.assumed),
    ]
    return "\n".join(
        [
            *_wrapped(head),
            "",
            *aligned(memory),
            "",
            *aligned(rows),
            "",
            *_durations(plan, f"{plan.images} images drawn and scored"),
            "",
            *_wrapped(notes),
        ]
    )


def preparation_text(plan: PreparationPlan, source: str) -> str:
    """All tables of a plan. `source`: where its settings come from."""
    side, names = plan.tokenizer.image_size, [kind.gpu.name.upper() for kind in plan.kinds]
    head = [
        f"Predicted, not measured: codes of {plan.images} images x {plan.views} views of {side} x {side}, "
        f"{plan.precision}, as {source}",
        f"The VQ encoder takes {plan.view_flops / 1e9:.3g} GFLOP a view; "
        f"{plan.batch_views} views at once take {gib(plan.memory_bytes)} GiB of each GPU; "
        f"{plan.read_bytes / 1e9:.4g} GB in, {plan.code_bytes / 1e9:.3g} GB of codes out",
    ]
    cores = plan.assumed.cores_per_gpu
    rows = [
        ["One GPU", *names],
        ["views at once that fit", *(str(kind.largest_views or "none") for kind in plan.kinds)],
        ["images/s encoded in fp32", *(_rate(kind.fp32_per_s) for kind in plan.kinds)],
        ["images/s encoded in bf16", *(_rate(kind.bf16_per_s) for kind in plan.kinds)],
        [f"images/s decoded and cropped by {cores} cores", *[_rate(1e3 * cores / plan.cpu_ms)] * len(plan.kinds)],
    ]
    own = next(row for row in plan.durations[plan.gpu.name] if row.gpus == plan.gpus)
    closing = (
        f"On {plan.gpus} x {plan.gpu.name.upper()}: encoder {_time(own.encoding_s)}, CPU {_time(own.cpu_s)}, "
        f"files {_time(own.storage_s)}, beside each "
        f"other; with the start {_time(own.total_s)}; most of it: {own.bound}."
    )
    notes = [
        closing,
        f"One core decodes and crops an image in {plan.cpu_ms:.3g} ms ({_core_time(plan)}). fp32 runs without "
        "TF32, on ordinary arithmetic units, since rounding changes codes; bf16 changes some, and the store says "
        "how many. "
        f"GPUs send each other nothing: images are dealt in chunks of {CHUNK_IMAGES}, every process but the first "
        "hands its codes over in files.",
        f"fits: within a GPU's memory less {RESERVED_GIB:g} GiB for CUDA, libraries, allocator.",
        _assumed(plan.assumed),
    ]
    return "\n".join(
        [
            *_wrapped(head),
            "",
            *aligned(rows),
            "",
            *_durations(plan, f"{plan.images} images, {plan.precision}"),
            "",
            *_wrapped(notes),
        ]
    )


def _core_time(plan: PreparationPlan) -> str:
    if plan.assumed.cpu_ms_per_image:
        return "as given"
    return (
        f"{DECODE_MS} + {RANGE_MS} for each crop range: measured on one machine, on files of about 500 x 375; "
        "--assume.cpu-ms-per-image says "
        "otherwise"
    )


def _durations(plan: SamplingPlan | PreparationPlan, what: str) -> list[str]:
    """Time by number and kind of GPUs, start included, and what most of it is on the kind that was asked for."""
    names = list(plan.durations)
    rows = [[f"{what}, by", *(name.upper() for name in names), f"{plan.gpu.name.upper()}: most of it"]]
    asked = {row.gpus: row for row in plan.durations[plan.gpu.name]}
    for index, gpus in enumerate(asked):
        times = [_time(plan.durations[kind.gpu.name][index].total_s) if kind.fits else _NO for kind in plan.kinds]
        rows.append([f"{gpus} GPU{'s' if gpus > 1 else ''}", *times, asked[gpus].bound])
    lines = aligned(rows)
    return [*lines, "  no: the batch does not fit"] if not all(kind.fits for kind in plan.kinds) else lines


def _assumed(assumed: Any) -> str:
    return f"Assumed, each a setting: {listed(assumed)}"


def _at(kind: Any, images: int) -> str:
    found = [speed for speed in kind.speeds if speed.batch_images == images <= kind.largest_images]
    return _rate(found[0].images_per_s) if found else _NO


def _rate(per_s: float) -> str:
    return f"{per_s:.0f}" if per_s >= 100 else f"{per_s:.3g}"


def _time(seconds: float) -> str:
    """With three digits, in the unit that a person would say it in."""
    for unit, length in (("days", 172_800), ("h", 7200), ("min", 120)):
        if seconds >= length:
            return f"{seconds / {'days': 86_400, 'h': 3600, 'min': 60}[unit]:.3g} {unit}"
    return f"{seconds:.3g} s"


def _wrapped(lines: list[str]) -> list[str]:
    return [
        part for line in lines for part in textwrap.wrap(line, WIDTH, break_long_words=False, break_on_hyphens=False)
    ]

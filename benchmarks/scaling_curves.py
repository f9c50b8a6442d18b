"""What scaling.py measures: how cost grows with one size, everything else fixed, beside how the work that theory counts
grows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks import memory, ops, timing, training
from benchmarks.alone import alone
from star_fast.config import RunConfig
from star_fast.host_memory import keep_freed_memory
from star_fast.ops import shapes

BASE = shapes.Shape(B=4, M=2, T=128, K=4, V=4096, D=256, H=4, E=64, F=1024, L=1)
IMAGES_OF_A_RANK = 32  # a step far longer than the sum of its gradients over the ranks


class Curve(NamedTuple):
    """A cost at growing sizes."""

    what: str
    over: str  # the size that grows, and the panel of the picture
    law: str  # in words
    sizes: list[int]
    costs: list[float]
    unit: str
    work: list[float]  # what theory counts at each size, in any unit


class Sweep(NamedTuple):
    """An op over one letter of its shape: the base shape with `shape` changed, then the letter's sizes."""

    op: str
    over: str
    law: str
    sizes: tuple[int, ...]
    shape: dict[str, int]


# What is bound by memory begins beyond a core's caches: a curve that begins inside them rises where they end.
SWEEPS = [
    Sweep("masked_attention", "T", "T^2", (128, 256, 512, 1024), {}),
    Sweep("masked_attention", "B", "B", (4, 8, 16, 32), {"T": 256}),
    Sweep("decode_attention", "T", "T", (512, 1024, 2048, 4096), {"B": 32}),
    Sweep("decode_attention", "B", "B", (16, 32, 64, 128), {"T": 1024}),
    Sweep("linear_cross_entropy", "V", "V", (2048, 4096, 8192, 16384), {}),
    Sweep("linear_cross_entropy", "B", "B", (2, 4, 8, 16), {}),
    Sweep("slot_contrast", "K", "pairs, K^2", (4, 8, 16, 32), {"B": 32, "D": 768}),
    Sweep("slot_contrast", "B", "keys x anchors, B^2", (32, 64, 128, 256), {"D": 768}),
    Sweep("feature_distance", "B", "B", (64, 128, 256, 512), {}),
    Sweep("add_rms_norm", "B", "B", (128, 256, 512, 1024), {}),
    Sweep("swiglu", "B", "B", (32, 64, 128, 256), {}),
    Sweep("ema_update", "D", "weights, D^2", (768, 1088, 1536, 2176), {"F": 2048}),
    Sweep("sample_tokens", "V", "V", (4096, 8192, 16384, 32768), {"B": 64}),
    Sweep("sample_tokens", "B", "B", (16, 32, 64, 128), {"V": 16384}),
]


def op_curve(sweep: Sweep, quick: bool) -> Curve:
    """Forward and backward where the op has gradients, on one thread."""
    module = importlib.import_module(f"star_fast.ops.{sweep.op}")
    subject = next(
        (subject for subject in ops.SUBJECTS if subject.file == sweep.op), ops.Subject(sweep.op, sweep.op, ())
    )
    sizes = sweep.sizes[:3] if quick else sweep.sizes
    # As training does: else what is larger than 32 MiB is mapped anew at each call, and what is smaller is not
    keep_freed_memory()
    candidates, work = {}, []
    for size in sizes:
        shapes.SHAPES["scaling"] = BASE._replace(**{**sweep.shape, sweep.over: size})
        call = module.inputs("scaling", torch.float32)
        if sweep.op == "sample_tokens":
            call |= {"top_k": 2000}
        candidates[str(size)] = ops.runner(getattr(module, subject.function), call, subject.gradients)
        work.append(float(module.cost(call).flops))
    del shapes.SHAPES["scaling"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = timing.compare(candidates, "cpu", seconds=0.15 if quick else 1.5, repeats=(3, 50))
    finally:
        torch.set_num_threads(threads)
    what = f"{sweep.op}, forward{' + backward' if subject.gradients else ''}"
    return Curve(what, sweep.over, sweep.law, list(sizes), [found[str(size)].median_ms for size in sizes], "ms", work)


STEPS: dict[str, tuple[str, tuple[int, ...]]] = {
    "B": ("B, and B^2 among keys", (8, 16, 32, 64)),
    "T": ("T, and T^2 in attention", (25, 49, 100, 196)),
    "V": ("V in the output matrix", (256, 1024, 4096, 16384)),
    "K": ("K in the projector, K^2 among pairs", (2, 4, 8, 16)),
}


def step_config(over: str = "B", size: int = 32) -> RunConfig:
    """The ST-AR step of preset tiny with one size changed."""
    config = training.run_config(True, "tiny")
    part, name = {
        "B": ("train", "images_per_step"),
        "T": ("model", "positions"),
        "V": ("model", "vocab"),
        "K": ("method", "contrast_positions"),
    }[over]
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **{name: size})})


def step_flops(config: RunConfig, ranks: int = 1) -> float:
    """Products of one rank's ST-AR step: student, teacher, projector, and each pair's logits against the keys of all
    ranks, forward and backward.
    """
    model, method, images = config.model, config.method, config.train.images_per_step
    slots, wide = method.views * method.contrast_positions, method.projector_width
    projector = 2 * model.width * wide + (method.projector_layers - 2) * wide**2
    pairs = slots * (method.contrast_positions - 1 + method.views - 1)
    return (
        sum(training.model_flops(config))
        + 6.0 * images * slots * projector
        + 4.0 * pairs * images * images * ranks * model.width
    )


def step_curve(over: str, quick: bool) -> Curve:
    """An ST-AR step of preset tiny, in a process of its own, one thread."""
    law, sizes = STEPS[over]
    sizes = sizes[:3] if quick else sizes
    costs = alone(_steps_ms, over, sizes, 3 if quick else 9)
    return Curve(
        "ST-AR step, preset tiny",
        over,
        law,
        list(sizes),
        costs,
        "ms",
        [step_flops(step_config(over, size)) for size in sizes],
    )


def _steps_ms(over: str, sizes: tuple[int, ...], repeats: int) -> list[float]:
    torch.set_num_threads(1)
    steps = [_stepper(step_config(over, size)) for size in sizes]
    found = timing.compare(
        {str(size): step for size, step in zip(sizes, steps, strict=True)},
        "cpu",
        seconds=0.0,
        repeats=(repeats, repeats),
    )
    return [found[str(size)].median_ms for size in sizes]


def _stepper(config: RunConfig) -> Callable[[], object]:
    """Steps over the same micro-batch."""
    from star_fast.training.engine import Engine, build_student
    from star_fast.training.ranks import start_ranks

    _, _, device = start_ranks()
    engine = Engine(config, build_student(config), device, config.train.images_per_step, 1)
    batches = [training.micro_batch(config, 0)]
    return lambda: engine.step(batches, 0, config.lr)


def rank_curves(quick: bool) -> list[Curve]:
    """Weak scaling on this machine's cores: each rank has as many images whatever their number, so its own work is the
    same but for the others' keys.

    Where there are more ranks than cores they share them: then the wall clock must grow, and a rank's CPU time, which
    need not, is what tells.
    """
    counts, steps = (1, 2) if quick else (1, 2, 4), 3 if quick else 12
    found = [_ranks_ms(count, steps) for count in counts]
    config = step_config("B", IMAGES_OF_A_RANK)
    work = [step_flops(config, count) for count in counts]
    what, cores = f"ST-AR step, preset tiny, {IMAGES_OF_A_RANK} images a rank", os.cpu_count() or 1
    shared = [work[i] * max(1, count / cores) for i, count in enumerate(counts)]
    return [
        Curve(
            f"{what}, a rank's CPU time",
            "ranks",
            "constant, and the others' keys",
            list(counts),
            [cpu for cpu, _ in found],
            "CPU ms",
            work,
        ),
        Curve(
            f"{what}, wall clock",
            "ranks",
            f"constant up to the {cores} cores, then ranks / cores",
            list(counts),
            [wall for _, wall in found],
            "ms",
            shared,
        ),
    ]


def _ranks_ms(ranks: int, steps: int) -> tuple[float, float]:
    """(mean CPU ms of a rank's step, median wall ms of a step), over gloo, one thread a rank."""
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    processes = [context.Process(target=_rank, args=(rank, ranks, steps, answers)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"a rank of {ranks} failed: see what it said above")
    found = [answers.get() for _ in processes]
    return statistics.mean(cpu for cpu, _ in found), statistics.median(wall for _, wall in found)


def _rank(rank: int, ranks: int, steps: int, answers: Any) -> None:
    torch.set_num_threads(1)
    # As DeepSpeed's launcher says that all are here
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), CROSS_SIZE="1")
    config = step_config("B", IMAGES_OF_A_RANK)
    everyone = dataclasses.replace(
        config, train=dataclasses.replace(config.train, images_per_step=IMAGES_OF_A_RANK * ranks)
    )
    from star_fast.training.engine import Engine, build_student
    from star_fast.training.ranks import start_ranks

    _, _, device = start_ranks()
    engine, batch = (
        Engine(everyone, build_student(everyone), device, IMAGES_OF_A_RANK, 1),
        [training.micro_batch(config, rank)],
    )
    for number in range(3):
        engine.step(batch, number, config.lr)
    walls, begin = [], time.process_time()
    for number in range(steps):
        start = time.perf_counter()
        engine.step(batch, number, config.lr)
        walls.append(1e3 * (time.perf_counter() - start))
    answers.put((1e3 * (time.process_time() - begin) / steps, statistics.median(walls)))


def sample_curves(quick: bool) -> list[Curve]:
    """`star-fast sample` of a small model, written at 256 pixels as it draws: its time is the images', its memory one
    batch's.
    """
    from benchmarks import sampling_whole

    sizes = (64, 128, 256) if quick else (128, 256, 512, 1024, 2048)
    with tempfile.TemporaryDirectory() as folder:
        sampling_whole.tiny_model(Path(folder))
        with mock.patch.dict(os.environ, TQDM_DISABLE="1"):
            found = [alone(_sampled, folder, images) for images in sizes]
    return [
        Curve(
            "star-fast sample, 256 pixels, time",
            "N",
            "N",
            list(sizes),
            [1e3 * seconds for seconds, _ in found],
            "ms",
            [float(n) for n in sizes],
        ),
        Curve(
            "star-fast sample, 256 pixels, peak memory",
            "N",
            "constant",
            list(sizes),
            [mib for _, mib in found],
            "MiB",
            [1.0] * len(sizes),
        ),
    ]


def _sampled(folder: str, images: int) -> tuple[float, float]:
    """(seconds of drawing and writing, peak MiB of the process)."""
    torch.set_num_threads(1)
    from star_fast.generation.sample import sample_images
    from star_fast.generation.sample_config import SampleConfig

    with contextlib.redirect_stdout(io.StringIO()):
        sample_images(
            SampleConfig(
                model=f"{folder}/model",
                out=f"{folder}/{images}.npz",
                images=images,
                pixels=256,
                grid=False,
                device="cpu",
            )
        )
    seconds = json.loads(Path(folder, f"{images}.json").read_text())["run"]["here_s"]
    Path(folder, f"{images}.npz").unlink()
    return seconds, memory.status_kib("VmHWM") / 1024


def all_curves(quick: bool) -> Iterator[tuple[str, Callable[[], list[Curve]]]]:
    """(name, what measures it), in the order of the table."""
    for sweep in SWEEPS:
        yield f"{sweep.op} over {sweep.over}", lambda sweep=sweep: [op_curve(sweep, quick)]
    for over in STEPS:
        yield f"step over {over}", lambda over=over: [step_curve(over, quick)]
    yield "ranks", lambda: rank_curves(quick)
    yield "samples", lambda: sample_curves(quick)

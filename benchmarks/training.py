"""One optimizer step, end to end: star_fast against the same objective composed in plain PyTorch, and plain training
against LlamaGen's way.

    python benchmarks/training.py [--quick] [--size B|L|XL] [--images N] [--profile] [--save] [--json FILE]

Preset B, 4 images x 2 views, 32 on a GPU (plain training: the same sequences), bf16, dropout 0.1. Each candidate lives
in a process of its own; they take turns step by step; medians. Memory is a process's peak from before the model is
built; "above state" leaves out weights, gradients' masters, optimizer and teacher.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import profiling, timing
from benchmarks.devices import DEVICES
from benchmarks.memory import Memory
from star_fast.config import RunConfig
from star_fast.method.batch import Batch, make_batch
from star_fast.presets import plain, preset

RESULTS = Path(__file__).resolve().parent / "results"
IMAGES, VIEWS = 32 if torch.cuda.is_available() else 4, 2
OURS, COMPOSED, OURS_PLAIN, LLAMAGEN = (
    "star_fast, ST-AR",
    "plain PyTorch, ST-AR",
    "star_fast, plain",
    "LlamaGen's way, plain",
)
# On the CPU, with star_fast's setting of the C library's allocator: what is left is ours
KEPT = "plain PyTorch, ST-AR, freed memory kept"
CANDIDATES = (OURS, COMPOSED, KEPT, OURS_PLAIN, LLAMAGEN)
WARM_UP_STEPS = 2


def run_config(star: bool, size: str = "B", images: int | None = None, **train: Any) -> RunConfig:
    """The benchmark's run: plain training keeps the views, so that both see as many sequences. tiny: as on the built-in
    digits, with its own images a step.
    """
    config = preset(size)
    if size == "tiny":
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, vocab=256, positions=49, num_classes=10)
        )
    if not star:
        config = plain(config)
        config = dataclasses.replace(config, method=dataclasses.replace(config.method, views=VIEWS))
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, images_per_step=images or images_of(config, size), **train)
    )


def images_of(config: RunConfig, size: str) -> int:
    """Images of a step."""
    return config.train.images_per_step if size == "tiny" else IMAGES


def micro_batch(config: RunConfig, step: int) -> Batch:
    """Random codes and labels with the masks and the position set that training would draw."""
    model, method, count = config.model, config.method, config.train.images_per_step
    images = np.arange(count) + count * step
    generator = torch.Generator().manual_seed(step)
    codes = torch.randint(0, model.vocab, (count, VIEWS, model.positions), generator=generator)
    labels = torch.randint(0, model.num_classes, (count,), generator=generator)
    return make_batch(
        codes,
        labels,
        images,
        method,
        model.num_classes,
        seed=0,
        epoch=0,
        step=step,
        images_seen=count * step,
        label_dropout=0.0,
    )


def build(
    name: str, device: torch.device, size: str = "B", images: int | None = None
) -> tuple[Callable[[int], float], Callable[[int], object] | None, Callable[[], int], RunConfig]:
    """One candidate: its step (number -> loss), its teacher's forward pass alone, the bytes of its lasting state, its
    config.
    """
    from star_fast.training.engine import Engine, build_student

    star = name in (OURS, COMPOSED, KEPT)
    config = run_config(star, size, images)
    student = build_student(config)
    torch.nn.init.normal_(student.transformer.output.weight, std=0.02, generator=torch.Generator().manual_seed(1))
    batches = [[micro_batch(config, step)] for step in range(4)]
    if name in (OURS, OURS_PLAIN):
        engine = Engine(config, student, device, config.train.images_per_step, 1)

        def step(number: int) -> float:
            return float(engine.step(batches[number % 4], number, config.lr)[0][0])

        def teacher(number: int) -> object:
            batch = batches[number % 4][0].to(device)
            return engine.teacher.features(batch.tokens, batch.label, batch.positions)

        return step, teacher if star else None, engine.state_bytes, config
    from benchmarks.llamagen_training import PlainTraining
    from star_fast.host_memory import keep_freed_memory

    if name == KEPT:
        keep_freed_memory()
    training = PlainTraining(
        config, student, device, torch.float32 if config.train.precision == "fp32" else torch.bfloat16
    )
    del student
    return lambda number: float(training.step(batches[number % 4], number)), None, training.state_bytes, config


def work(name: str, threads: int, pipe: Connection, size: str = "B", images: int | None = None) -> None:
    """A candidate's process: builds, then answers "step", "teacher", "memory" and "profile" until "end"."""
    torch.set_num_threads(threads)
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(variable, None)
    from star_fast.training.ranks import start_ranks

    _, _, device = start_ranks()
    memory = Memory(device)
    step, teacher, state_bytes, _ = build(name, device, size, images)
    losses = [step(number) for number in range(WARM_UP_STEPS)]
    pipe.send(losses)
    number = WARM_UP_STEPS
    while (order := pipe.recv()) != "end":
        if order == "memory":
            pipe.send((memory.peak_bytes(), state_bytes()))
        elif order == "profile":
            pipe.send(breakdown(functools.partial(step, number), device))
        else:
            call = teacher if order == "teacher" else step
            begin = time.perf_counter()
            call(number)  # a loss is read back: nothing is still running on a device
            if device.type == "cuda":
                torch.cuda.synchronize()
            pipe.send(1e3 * (time.perf_counter() - begin))
        number += 1


def difference(threads: int, pipe: Connection) -> None:
    """A process: how far the losses of both ST-AR candidates are apart over three steps of a small model, in float32
    without dropout.
    """
    torch.set_num_threads(threads)
    from benchmarks.llamagen_training import PlainTraining
    from star_fast.training.engine import Engine, build_student
    from star_fast.training.ranks import start_ranks

    _, _, device = start_ranks()
    config = run_config(True, precision="fp32", zero_stage=0)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, blocks=2, heads=4, width=128, vocab=512, dropout=0.0),
        method=dataclasses.replace(config.method, contrast_depth=1),
    )
    ours, composed = (
        Engine(config, build_student(config), device, IMAGES, 1),
        PlainTraining(config, build_student(config), device, torch.float32),
    )
    batches = [[micro_batch(config, step)] for step in range(3)]
    pipe.send(
        max(
            abs(float(ours.step(batch, step, config.lr)[0][0]) - float(composed.step(batch, step)))
            for step, batch in enumerate(batches)
        )
    )


def breakdown(call: Callable[[], object], device: torch.device, top: int = 16) -> list[tuple[str, float, float, int]]:
    """(operator, ms of its own, share, calls) of one step, largest first (torch's profiler)."""
    return profiling.largest(profiling.profiled(call, device.type), device.type, top)


def model_flops(config: RunConfig) -> tuple[float, float]:
    """FLOPs of a step's matrix products: (student, teacher). Causal attention counted as half of the square."""
    model, rows = config.model, config.train.images_per_step * VIEWS * config.model.positions
    weights = model.blocks * (4 * model.width**2 + 3 * model.width * model.feed_forward)
    # Scores and values, 2 * T/2 * D multiplications each a row
    attention = model.blocks * 2 * model.positions * model.width * rows
    forward = 2.0 * rows * weights + attention
    return 3 * (forward + 2.0 * rows * model.width * model.vocab), forward if config.method.has_teacher else 0.0


def bf16_peak(device_name: str) -> float | None:
    """FLOP/s of the data sheet for a GPU as torch names it; None for one that devices.py does not know."""
    return next((known.bf16_flops_per_s for known in DEVICES if known.name in device_name), None)


def measure(
    names: list[str], repeats: int, threads: int, with_profile: bool, size: str = "B", images: int | None = None
) -> dict[str, Any]:
    """Times in ms, peak and state bytes, first losses, the teacher's forward, and a profile of each candidate."""
    context, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    found: dict[str, Any] = {name: {} for name in names}
    for name in names:
        pipe, theirs = context.Pipe()
        process = context.Process(target=work, args=(name, threads, theirs, size, images), daemon=True)
        process.start()
        theirs.close()
        pipes[name] = pipe
        processes.append(process)
        found[name]["first_losses"] = pipe.recv()  # one builds at a time
    times: dict[str, list[float]] = {name: [] for name in names}
    teacher: list[float] = []
    for _ in range(repeats):
        for name, pipe in pipes.items():
            pipe.send("step")
            times[name].append(pipe.recv())
        if OURS in pipes:
            pipes[OURS].send("teacher")
            teacher.append(pipes[OURS].recv())
    for name, pipe in pipes.items():
        lower, median, upper = statistics.quantiles(times[name], n=4)
        pipe.send("memory")
        peak, state = pipe.recv()
        found[name] |= {
            "median_ms": median,
            "spread": (upper - lower) / median,
            "times_ms": times[name],
            "peak_bytes": peak,
            "state_bytes": state,
        }
        if with_profile:
            pipe.send("profile")
            found[name]["profile"] = pipe.recv()
        pipe.send("end")
    for process in processes:
        process.join()
    if teacher:
        found[OURS]["teacher_ms"] = statistics.median(teacher)
    return found


def text(found: dict[str, Any]) -> str:
    """The report as Markdown."""
    rows, gib, images = found["candidates"], 2**30, found["images"]
    where = ", ".join(f"{key} {value}" for key, value in found["environment"].items())
    lines = [
        "# A training step",
        "",
        where + (" (quick: not to publish)" if found["quick"] else ""),
        "",
        f"GPT-{found['size']}, 256 px, {images} images x {VIEWS} views, bf16, dropout 0.1. Candidates in processes of "
        f"their own take turns; medians of {found['repeats']}. Before: both compute one objective (float32, dropout 0, "
        "losses equal to "
        f"{found['apart']:.0e}).",
        "",
        "| | ms a step | images/s | spread | peak GiB | above state GiB | share of the product ceiling | MFU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        student, teacher = model_flops(run_config(name in (OURS, COMPOSED, KEPT), found["size"], images))
        rate = 1e3 * (student + teacher) / row["median_ms"]
        mfu = "" if found["bf16_peak"] is None else f"{rate / found['bf16_peak']:.1%}"
        lines.append(
            f"| {name} | {row['median_ms']:.0f} | {1e3 * images / row['median_ms']:.1f} | {row['spread']:.0%} | "
            f"{row['peak_bytes'] / gib:.2f} | "
            f"{(row['peak_bytes'] - row['state_bytes']) / gib:.2f} | {rate / 1e9 / found['bf16_gflop_per_s']:.0%} "
            f"| {mfu} |"
        )
    lines.append("")
    for mine, base in ((OURS, COMPOSED), (OURS, KEPT), (OURS_PLAIN, LLAMAGEN)):
        if mine in rows and base in rows:
            a, b = rows[mine], rows[base]
            above = (a["peak_bytes"] - a["state_bytes"]) / (b["peak_bytes"] - b["state_bytes"])
            lines.append(
                f"- {mine}: **{b['median_ms'] / a['median_ms']:.2f} x** as fast as {base}; peak memory "
                f"{a['peak_bytes'] / b['peak_bytes']:.2f} of its, above state {above:.2f} of its."
            )
    if OURS in rows and OURS_PLAIN in rows:
        a, b = rows[OURS], rows[OURS_PLAIN]
        lines.append(
            f"- ST-AR costs {a['median_ms'] / b['median_ms'] - 1:+.0%} over plain training at equal views; the "
            "teacher's forward alone is "
            f"{a['teacher_ms'] / b['median_ms']:+.0%} ({a['teacher_ms']:.0f} ms)."
        )
    lines.append(
        f"- Product ceiling of this machine in this run: {found['bf16_gflop_per_s']:.0f} GFLOP/s in bf16 (2048 cubed)."
    )
    if found["bf16_peak"] is not None:
        lines.append(
            "- MFU: products of student and teacher over the data sheet's dense bf16 peak, "
            f"{found['bf16_peak'] / 1e12:.0f} TFLOP/s."
        )
    for name, row in rows.items():
        if "profile" in row:
            lines += [
                "",
                f"One step of {name}, by torch's profiler:",
                "",
                "| operator | ms | share | calls |",
                "|---|---|---|---|",
            ]
            lines += [f"| {key} | {ms:.0f} | {share:.1%} | {count} |" for key, ms, share, count in row["profile"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and with --save keep."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument(
        "--quick", action="store_true", help="three repeats: a check that all runs, not a measurement to publish"
    )
    parser.add_argument("--size", choices=("B", "L", "XL"), default="B", help="the preset")
    parser.add_argument("--images", type=int, default=IMAGES, help="images a step, two views each")
    parser.add_argument("--profile", action="store_true", help="also where each candidate's time goes")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/training.{json,md}")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--repeats", type=int, default=9, help="steps of each candidate")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    everywhere = [number for number, name in enumerate(CANDIDATES) if name != KEPT or not torch.cuda.is_available()]
    parser.add_argument("--only", type=int, nargs="*", default=everywhere, help="numbers of the candidates, from 0")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    repeats = 3 if arguments.quick else arguments.repeats
    bf16 = timing.ceilings(device, arguments.quick).bf16_gflop_per_s
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    checking = context.Process(target=difference, args=(arguments.threads, theirs))
    checking.start()
    theirs.close()  # else one that fails would be waited for without end
    apart = pipe.recv()
    checking.join()
    if not apart < 1e-4:
        sys.exit(f"the candidates do not compute the same: losses are {apart:.1e} apart")
    names = [CANDIDATES[index] for index in arguments.only]
    candidates = measure(names, repeats, arguments.threads, arguments.profile, arguments.size, arguments.images)
    peak = bf16_peak(torch.cuda.get_device_name()) if device == "cuda" else None
    found = {
        "environment": timing.environment(device),
        "quick": arguments.quick,
        "size": arguments.size,
        "images": arguments.images,
        "repeats": repeats,
        "bf16_gflop_per_s": bf16,
        "apart": apart,
        "bf16_peak": peak,
        "candidates": candidates,
    }
    print(text(found))
    if arguments.save:
        (RESULTS / "training.json").write_text(json.dumps(found, indent=1) + "\n")
        (RESULTS / "training.md").write_text(text(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

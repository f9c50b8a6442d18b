"""What the user of `star-fast sample` waits for: labels in, .npz out, pixels included, each candidate a process of its
own; and where that time goes.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import timing
from star_fast.config import ModelConfig, TokenizerConfig
from star_fast.generation import job, sample
from star_fast.generation.npz_stream import NpzStream
from star_fast.generation.render import Renderer
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.transformer import Transformer
from star_fast.model.weights import save_model

ROOT = Path(__file__).resolve().parents[1]
DRAW = ["--guidance", "2", "--top-k", "2000", "--no-grid"]
LLAMAGEN, OURS, BEFORE = "LlamaGen style", "star-fast sample", "before"
OPTIONS: dict[str, list[str]] = {
    OURS: [],
    f"{OURS}, int8": ["--products", "int8", "--cache", "int8"],
    f"{OURS}, fp32": ["--precision", "fp32"],
}
GPU_OPTIONS: dict[str, list[str]] = {OURS: [], f"{OURS}, int8 cache": ["--cache", "int8"]}
# Operators by what they are for; what no group claims is "other". On CUDA the kernels' own names are not sorted: the
# breakdown is one of the CPU.
GROUPS = {
    "products": (
        "mkldnn::_linear_pointwise",
        "aten::addmm",
        "aten::mm",
        "aten::linear",
        "aten::_int_mm",
        "onednn::",
        "star_fast::int8",
    ),
    "attention": ("star_fast::decode_attention",),
    "draw": ("star_fast::sample_tokens",),
    "norms and gates": ("star_fast::add_rms_norm", "star_fast::swiglu"),
}
PIXELS, DISK = "pixels", "disk"


GPU_IMAGES = 128  # of one batch: a GPU with fewer waits for its weights


def random_model(folder: Path, size: tuple[int, int, int]) -> Path:
    """A model folder with random weights of (blocks, heads, width), for 256 pixels, and VQ-16's shape for its
    tokenizer.
    """
    blocks, heads, width = size
    model = Transformer(
        ModelConfig(blocks=blocks, heads=heads, width=width, vocab=16384, positions=256, num_classes=1000)
    )
    model.init_weights(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(model.output.weight, std=0.02, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    save_model(
        folder / "model", model, class_names=[str(i) for i in range(1000)], tokenizer=VQTokenizer(TokenizerConfig())
    )
    return folder / "model"


def tiny_model(folder: Path) -> None:
    """FOLDER/model: random weights that draw in no time, for what the images' number costs."""
    model = Transformer(ModelConfig(blocks=2, heads=2, width=32, vocab=32, positions=16, num_classes=10))
    model.init_weights(torch.Generator().manual_seed(0))
    tokenizer = VQTokenizer(
        TokenizerConfig(
            base_channels=16,
            multipliers=(1, 2, 2),
            residual_blocks=1,
            z_channels=16,
            code_channels=4,
            codebook=32,
            image_size=16,
        )
    )
    save_model(folder / "model", model, class_names=[str(i) for i in range(10)], tokenizer=tokenizer)


def whole_jobs(model: Path, images: int, turns: int, before: Path | None) -> dict[str, dict[str, float]]:
    """{candidate: medians over turns of process_s (start to end), draw_s (model loaded to file closed)}; `before`: a
    checkout of an earlier commit, built.
    """
    commands = {
        LLAMAGEN: [sys.executable, ROOT / "benchmarks/llamagen_style.py", model, "OUT", "--images", str(images)]
    }
    commands |= {
        name: _sample(model, images, options)
        for name, options in (GPU_OPTIONS if torch.cuda.is_available() else OPTIONS).items()
    }
    if before:
        commands[BEFORE] = _sample(model, images, [])
    seconds: dict[str, dict[str, list[float]]] = {name: {"process_s": [], "draw_s": []} for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(turns):
            for number, (name, command) in enumerate(commands.items()):
                out, root = Path(folder, f"{turn}-{number}.npz"), before if name == BEFORE else ROOT
                start = time.perf_counter()
                done = subprocess.run(
                    [out if word == "OUT" else word for word in command],
                    check=False,
                    capture_output=True,
                    text=True,
                    cwd=folder,
                    env={**os.environ, "PYTHONPATH": timing.on_path(root), "TQDM_DISABLE": "1"},
                )
                if done.returncode:
                    why = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                    raise RuntimeError(f"{name}: {why[-1]}")
                seconds[name]["process_s"].append(time.perf_counter() - start)
                drawn = (
                    json.loads(done.stdout)["all_s"]
                    if name == LLAMAGEN
                    else json.loads(out.with_suffix(".json").read_text())["run"]["here_s"]
                )
                seconds[name]["draw_s"].append(drawn)
                out.unlink()
    return {
        name: {clock: statistics.median(values) for clock, values in found.items()} for name, found in seconds.items()
    }


def quickstart_s(run: Path, before: Path | None, turns: int) -> dict[str, dict[str, float]]:
    """{stage: {commit: median seconds of the process}} of the quickstart's sampling (100 digits) and report, each on a
    copy of the run, which has no report.
    """
    seconds: dict[str, dict[str, list[float]]] = {"star-fast sample, 100 digits": {}, "star-fast report": {}}
    for _ in range(turns):
        for name, root in ((BEFORE, before), (OURS, ROOT)):
            if root is None:
                continue
            with tempfile.TemporaryDirectory() as folder:
                copy = shutil.copytree(
                    run,
                    Path(folder, "run"),
                    ignore=shutil.ignore_patterns("checkpoints", "report*", "classifier", "probe*", "samples*"),
                )
                commands = (
                    ["sample", "--model", copy / "model", "--out", copy / "samples.npz", "--images", "100"],
                    ["report", "--run", copy],
                )
                for stage, words in zip(seconds, commands, strict=True):
                    start = time.perf_counter()
                    subprocess.run(
                        [sys.executable, "-m", "star_fast.cli", *words],
                        check=True,
                        capture_output=True,
                        cwd=folder,
                        env={**os.environ, "PYTHONPATH": timing.on_path(root), "TQDM_DISABLE": "1"},
                    )
                    seconds[stage].setdefault(name, []).append(time.perf_counter() - start)
    return {
        stage: {name: statistics.median(values) for name, values in found.items()} for stage, found in seconds.items()
    }


def _sample(model: Path, images: int, options: list[str]) -> list[Any]:
    return [
        sys.executable,
        "-m",
        "star_fast.cli",
        "sample",
        "--model",
        model,
        "--out",
        "OUT",
        "--images",
        str(images),
        "--batch-images",
        str(images),
        *DRAW,
        *options,
    ]


def shares(model: Path, images: int, options: dict[str, Any]) -> dict[str, float]:
    """{part: share of the wall time of drawing one batch and writing it}, by torch's profiler: what the calling thread
    spends in each, largest first.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = sample.SampleConfig(
            model=str(model), out=f"{folder}/out.npz", images=images, top_k=2000, grid=False, **options
        )
        with (
            _marked(),
            mock.patch.dict(os.environ, TQDM_DISABLE="1"),
            profile(activities=[ProfilerActivity.CPU]) as profiler,
            record_function("all"),
        ):
            sample.sample_images(config)
        return _sorted(profiler.events())


@contextmanager
def _marked() -> Iterator[None]:
    """The places that pixels and the disk take, named for the profiler, and the whole run without loading the model."""

    def named(name: str, call: Any) -> Any:
        def run(*arguments: Any, **named_arguments: Any) -> Any:
            with record_function(name):
                return call(*arguments, **named_arguments)

        return run

    with (
        mock.patch.object(Renderer, "start", named(PIXELS, Renderer.start)),
        mock.patch.object(job, "write_part", named(DISK, job.write_part)),
        mock.patch.object(NpzStream, "append", named(DISK, NpzStream.append)),
        mock.patch.object(NpzStream, "finish", named(DISK, NpzStream.finish)),
        mock.patch.object(job.Job, "do", named("job", job.Job.do)),
    ):
        yield


def _sorted(events: EventList) -> dict[str, float]:
    """Shares of the event "job": of named places as a whole, of operators outside them by their own time."""
    (whole,) = (event for event in events if event.name == "job")
    places = [event for event in events if event.name in (PIXELS, DISK)]
    spans = [(event.time_range.start, event.time_range.end) for event in places]
    times = {PIXELS: 0.0, DISK: 0.0, **dict.fromkeys(GROUPS, 0.0)}
    for event in places:
        times[event.name] += event.cpu_time_total
    for event in events:
        begin = event.time_range.start
        if not whole.time_range.start <= begin <= whole.time_range.end or any(
            start <= begin <= end for start, end in spans
        ):
            continue
        for group, names in GROUPS.items():
            if event.name.startswith(names):
                times[group] += event.self_cpu_time_total
    times["other"] = whole.cpu_time_total - sum(times.values())
    return {name: value / whole.cpu_time_total for name, value in sorted(times.items(), key=lambda item: -item[1])}


def lines(found: dict[str, Any]) -> list[str]:
    """The page's first part, as Markdown."""
    jobs, images = found["jobs"], found["images"]
    base = jobs[LLAMAGEN]["draw_s"]
    told = [
        "## Labels in, .npz out",
        "",
        f"{images} images, pixels included, one batch; a process each, candidates take turns, medians of "
        f"{found['turns']}. Drawing counts from the loaded "
        "model to the closed file; the process from its start, Python's and torch's included.",
        "",
        f"| | images/s | s an image | x {LLAMAGEN} | "
        + (f"x {BEFORE} | " if BEFORE in jobs else "")
        + "whole process, s |",
        "|---" * (5 + (BEFORE in jobs)) + "|",
    ]
    for name, row in jobs.items():
        earlier = f"{jobs[BEFORE]['draw_s'] / row['draw_s']:.2f} | " if BEFORE in jobs else ""
        told.append(
            f"| {name} | {images / row['draw_s']:.2f} | {row['draw_s'] / images:.3f} | {base / row['draw_s']:.2f} "
            f"| {earlier}{row['process_s']:.1f} |"
        )
    told += ["", "Where the time of drawing goes (calling thread, torch's profiler):", ""]
    told += [
        f"- {name}: " + ", ".join(f"{part} {share:.1%}" for part, share in parts.items())
        for name, parts in found["shares"].items()
    ]
    for stage, row in found["quickstart"].items():
        told += [
            "",
            f"The quickstart's {stage}, Python's start included: "
            + ", ".join(f"{name if name == BEFORE else 'now'} {seconds:.1f} s" for name, seconds in row.items())
            + ".",
        ]
    if found["before"]:
        told += ["", f"{BEFORE}: `star-fast sample` of commit {found['before']}."]
    return told


def measure(size: tuple[int, int, int], quick: bool, before: Path | None, digits: Path | None = None) -> dict[str, Any]:
    """Everything here."""
    images, turns = (4, 1) if quick else (32, 3)
    if torch.cuda.is_available() and not quick:
        images = GPU_IMAGES
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder), size)
        found = {
            "images": images,
            "turns": turns,
            "before": before and timing.commit_of(before),
            "jobs": whole_jobs(model, images, turns, before),
        }
        if not torch.cuda.is_available():
            found["shares"] = {
                OURS: shares(model, images, {}),
                f"{OURS}, int8": shares(model, images, {"products": "int8", "cache": "int8"}),
            }
    return {"shares": {}, **found, "quickstart": quickstart_s(digits, before, turns) if digits else {}}

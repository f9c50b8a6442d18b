"""Where a call's time goes: torch's profiler, as a trace and as a table of operators (kernels on CUDA)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.alone import alone
from benchmarks.rows import Given, NotHere

TOP = 40


def profiled(call: Callable[[], object], device: str) -> profile:
    """One call under the profiler."""
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]) as profiler:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    return profiler


def largest(profiler: profile, device: str, top: int = TOP) -> list[tuple[str, float, float, int]]:
    """(operator, ms of its own, share, calls), largest first."""
    times = {
        row.key: (row.self_device_time_total if device == "cuda" else row.self_cpu_time_total, row.count)
        for row in profiler.key_averages()
    }
    total = sum(time for time, _ in times.values())
    return [
        (key, time / 1e3, time / total, count)
        for key, (time, count) in sorted(times.items(), key=lambda item: -item[1][0])[:top]
    ]


def write(subject: str, module: str, folder: Path, given: Given) -> str:
    """Profile a subject's main call in a process of its own: FOLDER/SUBJECT.json (open in chrome://tracing or Perfetto)
    and SUBJECT.md; returns a line.
    """
    return alone(_write, subject, module, folder, given, torch.get_num_threads())


def _write(subject: str, module: str, folder: Path, given: Given, threads: int) -> str:
    torch.set_num_threads(threads)
    found = importlib.import_module(module)
    try:
        call = found.main_call(given)
    except NotHere as reason:
        return f"{subject}: skipped: {reason}"
    call()  # libraries load, kernels compile
    profiler = profiled(call, given.device)
    profiler.export_chrome_trace(str(folder / f"{subject}.json"))
    rows = largest(profiler, given.device)
    title = " ".join((found.main_call.__doc__ or "").replace("For --profile", subject).split())
    lines = [
        f"# {title}",
        "",
        "Time of its own, what it calls left out; by torch's profiler, whose own cost is in it.",
        "",
        f"| {'kernel or operator' if given.device == 'cuda' else 'operator'} | ms | share | calls |",
        "|---|--:|--:|--:|",
        *(f"| {key} | {ms:.3f} | {share:.1%} | {count} |" for key, ms, share, count in rows),
    ]
    (folder / f"{subject}.md").write_text("\n".join(lines) + "\n")
    return f"{subject}: {folder / subject}.json and .md; most: {rows[0][0]}, {rows[0][2]:.0%}"

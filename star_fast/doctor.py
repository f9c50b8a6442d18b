"""`star-fast doctor`: what this machine has, what each stage needs, and how to get what is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterable

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def examine() -> None:
    """Print one table: every optional part, found or not, and what goes without it."""
    table = Table(title="star-fast doctor", title_justify="left")
    for column in ("part", "found", "used for; without it"):
        table.add_column(column, overflow="fold")
    for name, found, use in rows():
        table.add_row(name, escape(found), escape(use))
    Console().print(table)


def show_self_test(checks: Iterable[tuple[str, str, str, bool | None, str, float]]) -> bool:
    """Print a line for each call as it is checked, (op, backend, dtype and so on, passed, what was seen, seconds); whether none failed.

    What a backend cannot do here (passed: None) is told once.
    """
    console, failed, said = Console(), 0, set()
    for op, backend, call, passed, told, seconds in checks:
        if passed is None and (op, backend, told) in said:
            continue
        said.add((op, backend, told))
        verdict = "[green]passed[/]" if passed else "not here" if passed is None else "[red]FAILED[/]"
        failed += passed is False
        console.print(f"{verdict:18} {op} \\[{backend}, {call}], {seconds:.1f} s: {escape(told)}", soft_wrap=True, highlight=False)
    return not failed


def rows() -> list[tuple[str, str, str]]:
    """(part, what was found, what it is for and what goes without it)."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    free_gib = shutil.disk_usage(".").free / 2**30
    return [
        ("machine", f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {free_gib:.0f} GiB free here", ""),
        ("torch", torch.__version__, "everything"),
        ("GPU", ", ".join(devices) or "none", "training at scale; a CPU runs the same code on the reference ops"),
        ("triton", _version("triton"), "fused kernels on a GPU; else plain torch"),
        ("star_fast._C", _extension(), "fast token sampling; else plain torch, same tokens, slower. Build: pip install --no-build-isolation -e ."),
        ("deepspeed", _version("deepspeed"), "training. Install: pip install --no-build-isolation 'star_fast[train]'"),
        ("tensorboard", _version("tensorboard"), "curves in TensorBoard; metrics.jsonl is written without it"),
        ("flash-attn", _compiled("flash_attn", "flash_attn_2_cuda"), "attention without mask and rotary, for callers of the op; models take our kernels"),
        ("apex", _compiled("apex.optimizers", "amp_C"), "fused AdamW on a GPU; else torch's fused AdamW. From source: github.com/NVIDIA/apex"),
        ("DALI", _version("nvidia-dali-cuda130", "nvidia-dali-cuda120"), "image decoding, on a GPU too; else Pillow. Install: pip install 'star_fast[data]'"),
        ("torch-fidelity", _version("torch-fidelity"), "Inception features for FID"),
    ]


def _version(*names: str) -> str:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def _compiled(package: str, module: str) -> str:
    """A package counts as present only with its compiled module: other projects use some of these names on PyPI."""
    try:
        importlib.import_module(module)
        importlib.import_module(package)
    except ImportError:
        return "not installed"
    return "installed, with its compiled module"


def _extension() -> str:
    try:
        module = importlib.import_module("star_fast._C")
    except ImportError as error:
        return f"not built ({error})" if "No module named" not in str(error) else "not built"
    return f"built, {'with' if getattr(module, 'has_cuda', False) else 'without'} CUDA"

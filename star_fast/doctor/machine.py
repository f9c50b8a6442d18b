"""The machine and what torch makes of it: Python, torch, CUDA and Triton and whether they fit each other, GPUs,
threads, disk.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

from star_fast.doctor.findings import MISSING, OK, WITHOUT, Finding
from star_fast.threads import threads_here

OLDEST_PYTHON, OLDEST_TORCH = (3, 11), (2, 11)  # pyproject.toml
# Of disk: below the first a released model and its samples do not fit, below the second nothing does
LITTLE_GIB, LEAST_GIB = 20.0, 1.0


def machine(folder: Path = Path(".")) -> list[Finding]:
    """All of it; `folder`: whose disk counts."""
    return [_python(), _torch(), _gpus(), *_triton(), _threads(), disk(folder)]


def has_gpu() -> bool:
    """Whether torch can use one."""
    return torch.cuda.is_available()


def _python() -> Finding:
    told = f"{platform.python_version()} on {platform.machine()}"
    if sys.version_info >= OLDEST_PYTHON:
        return Finding(OK, "Python", told)
    return Finding(
        MISSING,
        "Python",
        f"{told}: {'.'.join(map(str, OLDEST_PYTHON))} or newer is needed",
        "make an environment with a newer Python",
    )


def _torch() -> Finding:
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs"
    if version >= OLDEST_TORCH:
        return Finding(OK, "torch", f"{torch.__version__}, built {built}")
    return Finding(
        MISSING,
        "torch",
        f"{torch.__version__}: {'.'.join(map(str, OLDEST_TORCH))} or newer is needed",
        "pip install --upgrade torch torchvision",
    )


def _gpus() -> Finding:
    if has_gpu():
        return gpus_fit(
            [
                (torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))
                for index in range(torch.cuda.device_count())
            ],
            torch.cuda.get_arch_list(),
        )
    if not Path("/dev/nvidiactl").exists():
        return Finding(
            WITHOUT,
            "GPU",
            "none: a CPU runs the same code on its own operations; training beyond small models wants a GPU",
        )
    if torch.version.cuda is None:
        return Finding(
            MISSING,
            "GPU",
            "NVIDIA's driver is here, but this torch is built for CPUs",
            "pip install --force-reinstall torch torchvision   (then build star_fast again)",
        )
    return Finding(
        MISSING,
        "GPU",
        f"NVIDIA's driver is here, but torch, built for CUDA {torch.version.cuda}, cannot use it: the driver is "
        "older than that, "
        "or the devices are hidden (CUDA_VISIBLE_DEVICES)",
        "nvidia-smi   (shows the driver and the newest CUDA that it knows)",
    )


def gpus_fit(devices: list[tuple[str, tuple[int, int]]], built_for: list[str]) -> Finding:
    """Whether torch has code for every GPU.

    Args:
        devices: (name, compute capability) of each. built_for: torch.cuda.get_arch_list(): sm_90 runs on 9.x,
            compute_90 is compiled anew for what is newer.
    """
    kinds = sorted({f"{name} ({major}.{minor})" for name, (major, minor) in devices})
    told = f"{len(devices)} x {', '.join(kinds)}"
    native = {int(arch.removeprefix("sm_").rstrip("af")) for arch in built_for if arch.startswith("sm_")}
    portable = {int(arch.removeprefix("compute_").rstrip("af")) for arch in built_for if arch.startswith("compute_")}
    for name, (major, minor) in devices:
        capability = 10 * major + minor
        if not any(arch // 10 == major and arch <= capability for arch in native) and not any(
            arch <= capability for arch in portable
        ):
            return Finding(
                MISSING,
                "GPU",
                f"{told}: this torch has no code for {name}, only for {' '.join(built_for)}",
                "pip install --upgrade torch torchvision   (or an older torch for an older GPU: "
                "pytorch.org/get-started/previous-versions)",
            )
    return Finding(OK, "GPU", told)


def _triton() -> list[Finding]:
    """Triton's version beside the one that torch was built with, and on a GPU what Triton compiles
    its launchers with.
    """
    wanted = next(
        (
            found[1]
            for line in importlib.metadata.requires("torch") or []
            if (found := re.match(r"triton\s*([=~]=\s*[\w.]+)", line))
        ),
        "",
    )
    pair = triton_fits(version("triton"), wanted, has_gpu())
    if not has_gpu() or pair.mark == MISSING:
        return [pair]
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CC", "cc"), "gcc", "clang")):
        return [
            pair,
            Finding(
                MISSING,
                "C compiler",
                "none: Triton compiles a launcher for each kernel",
                "apt-get install gcc   (or set CC)",
            ),
        ]
    if not header.exists():
        return [
            pair,
            Finding(
                MISSING,
                "Python.h",
                f"{header} is not there: Triton compiles a launcher for each kernel",
                f"apt-get install python{sys.version_info[0]}.{sys.version_info[1]}-dev",
            ),
        ]
    return [pair]


def triton_fits(found: str, wanted: str, gpu: bool) -> Finding:
    """Whether torch and Triton are a pair.

    Args:
        found: Triton's version, "" where there is none. wanted: what torch's package asks for, "==3.6.0" or "~=3.8.0"
            (any 3.8); "" where it asks for none (a build of one's own).
    """
    fix, mark = f"pip install 'triton{wanted}'", MISSING if gpu else WITHOUT
    if not found:
        return Finding(
            mark,
            "Triton",
            f"not installed: the fused kernels need it{'' if gpu else ', on a GPU; here plain torch and C++ run'}",
            fix,
        )
    numbers, asked = found.split("+")[0].split("."), wanted[2:].strip().split(".")
    if wanted.startswith("~="):  # all but the last number
        asked = asked[:-1]
    if wanted and numbers[: len(asked)] != asked:
        return Finding(mark, "Triton", f"{found}, but this torch was built with {'.'.join(asked)}", fix)
    return Finding(OK, "Triton", f"{found}, {'as torch wants it' if wanted else 'torch does not say which it wants'}")


def _threads() -> Finding:
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    told, best = torch.get_num_threads(), threads_here()
    if told > best:
        return Finding(
            WITHOUT,
            "threads",
            f"torch takes {told}, where {best} have a core of their own and this process's share of time: they "
            "wait for each "
            "other",
            "unset OMP_NUM_THREADS   (star-fast then sets it)",
        )
    return Finding(OK, "threads", f"{told} of torch, {processors} processors for this process")


def disk(folder: Path) -> Finding:
    """Free space where things are written."""
    free_gib = shutil.disk_usage(folder).free / 2**30
    told = f"{free_gib:,.1f} GiB free in {folder.resolve()}"
    if free_gib < LEAST_GIB:
        return Finding(MISSING, "disk", f"{told}: no checkpoint fits", "free some, or work in another folder")
    if free_gib < LITTLE_GIB:
        return Finding(
            WITHOUT,
            "disk",
            f"{told}: little for ImageNet's codes (13 GB), 50 000 pictures (10 GB) or checkpoints of XL (13 GB each)",
        )
    return Finding(OK, "disk", told)


def version(*names: str) -> str:
    """Of the first of these packages that is installed; "" where none is."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""

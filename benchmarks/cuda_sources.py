"""The CUDA sources of csrc/ in the kernel resource table: nvcc makes PTX, its ptxas assembles it; neither asks for a
driver.
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from star_fast.ops.shapes import SHAPES

CSRC = Path(__file__).resolve().parents[1] / "csrc"


class Source(NamedTuple):
    """One .cu file: the op whose `cost` counts its bytes, its kernel's name, threads of a block."""

    file: str
    op: str
    kernel: str
    threads: int


SOURCES = [Source("sample_cuda.cu", "sample_tokens", "sample_tokens_kernel", 1024)]
_DTYPES = {"float": "float32", "Bfloat16": "bfloat16", "Float16": "float16"}


def compile_all(capabilities: tuple[int, ...], only: str) -> list[tuple]:
    """Arguments of kernel_resources.row for every kernel instance and architecture, under the shape "all": the sizes
    that matter (V) are the same.
    """
    found = []
    for source in SOURCES:
        if (CSRC / source.file).exists() and only in source.op:
            for capability in capabilities:
                for kernel, dtype, log, ptx in _instances(source, capability):
                    shared = sum(int(n) for n in re.findall(r"(\d+) bytes smem", log))
                    found.append(
                        (kernel, "all", capability, log, ptx, shared, source.threads // 32, _cost(source.op, dtype))
                    )
    return found


def _instances(source: Source, capability: int) -> list[tuple[str, str, str, str]]:
    """(name in the table, dtype, assembler's log, PTX) of each instance of the kernel template."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError(
            f"nvcc is needed to compile csrc/{source.file} and is not on PATH: install the CUDA toolkit or add "
            "its bin folder to PATH"
        )
    with tempfile.TemporaryDirectory() as folder:
        ptx_file = Path(folder) / "kernel.ptx"
        _run(
            [
                nvcc,
                "-ptx",
                "-std=c++17",
                "-O3",
                f"-arch=compute_{capability}",
                "-o",
                str(ptx_file),
                str(CSRC / source.file),
            ]
        )
        beside = Path(nvcc).resolve().with_name("ptxas")  # nvcc on PATH may be a wrapper elsewhere
        ptxas = str(beside) if beside.exists() else shutil.which("ptxas")
        log = _run(
            [ptxas or "ptxas", "-v", f"-arch=sm_{capability}", "-o", str(Path(folder) / "kernel.cubin"), str(ptx_file)]
        )
        ptx = ptx_file.read_text()
    logs = dict(
        re.findall(r"Compiling entry function '(\w+)'.*?\n(.*?)(?=ptxas info\s+: Compiling|\Z)", log, re.DOTALL)
    )
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)\n}", ptx, re.DOTALL))
    found = []
    for mangled, body in bodies.items():
        instance = re.search(rf"{source.kernel}<([^>]*)>", _run(["c++filt", mangled]))
        if instance:
            dtype, *rest = [part.split("::")[-1].strip() for part in instance[1].split(",")]
            variant = ", ".join(re.sub(r"^\((?:int|bool)\)", "", part) for part in rest)
            found.append((f"{source.op} <{_DTYPES[dtype]}, {variant}>", _DTYPES[dtype], logs[mangled], body))
    if not found:
        raise ValueError(f"csrc/{source.file} holds no instance of {source.kernel}")
    return sorted(found)


def _cost(op: str, dtype: str) -> tuple[int, int]:
    sizes = SHAPES["XL"]
    call = {"logits": torch.empty(sizes.B, sizes.V, dtype=getattr(torch, dtype), device="meta")}
    return tuple(importlib.import_module(f"star_fast.ops.{op}").cost(call))


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed on {command[-1]}: {done.stderr.strip()}")
    return done.stdout + done.stderr

"""Builds star_fast._C: token sampling in C++ and, where nvcc and a CUDA build of PyTorch are present, CUDA. Nothing is
downloaded.

Environment:
    STAR_FAST_NO_EXT=1       no extension at all: the package runs on its plain-torch references
    STAR_FAST_NO_CUDA=1      C++ only
    TORCH_CUDA_ARCH_LIST     GPU architectures, default "8.0;9.0;10.0+PTX"
    MAX_JOBS                 compilers at once, default: from cores and free memory

Needs PyTorch at build time: install with `pip install --no-build-isolation -e .`, or build in place with `python
setup.py build_ext --inplace`.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from setuptools import setup

GIB_PER_COMPILER = 3  # g++ and nvcc on PyTorch's headers


def switched_on(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def jobs() -> int:
    """Compilers to run at once: one a core, while each has its memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free_gib = (
            next(
                int(line.split()[1])
                for line in Path("/proc/meminfo").read_text().splitlines()
                if line.startswith("MemAvailable")
            )
            / 2**20
        )
    except (OSError, StopIteration):
        return cores
    return max(1, min(cores, int(free_gib / GIB_PER_COMPILER)))


def find_cuda() -> bool:
    """Whether nvcc and a CUDA build of PyTorch are here; CUDA_HOME is set from nvcc where it was not."""
    import torch

    home = os.environ.get("CUDA_HOME")
    nvcc = Path(home, "bin", "nvcc") if home else shutil.which("nvcc")
    if switched_on("STAR_FAST_NO_CUDA") or torch.version.cuda is None or nvcc is None or not Path(nvcc).exists():
        return False
    if home is None and not Path(nvcc).resolve().parent.parent.joinpath("include", "cuda_runtime.h").exists():
        # A wrapper on the PATH: look where CUDA is usually installed.
        if not Path("/usr/local/cuda/bin/nvcc").exists():
            return False
        os.environ["CUDA_HOME"] = "/usr/local/cuda"
    return True


def extension() -> dict:
    """setup()'s arguments for the extension; none if it was switched off."""
    if switched_on("STAR_FAST_NO_EXT"):
        return {}
    cuda = find_cuda()  # sets CUDA_HOME, which cpp_extension reads when it is imported
    os.environ.setdefault("MAX_JOBS", str(jobs()))
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    # Every backend gives the same bits: no fused multiply-add that the source does not ask for. Without
    # -fno-trapping-math (which changes no result) g++ takes a choice between two floats for a branch, and vectorises no
    # loop that has one.
    compile_args = {
        "cxx": ["-O3", "-g0", "-fopenmp", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"],
        "nvcc": ["-O3", "--fmad=false"],
    }
    cpu = ("schema", "sample_cpu", "decode_attention_cpu", "large_pages", "between_cpu", "group_norm_cpu", "int8_cpu")
    sources = [f"csrc/{name}.cpp" for name in cpu]
    macros: list[tuple[str, str | None]] = []
    if cuda:
        sources += ["csrc/sample_cuda.cu", "csrc/sample_cuda_binding.cpp"]
        archs = os.environ["TORCH_CUDA_ARCH_LIST"]
        macros = [("STAR_FAST_CUDA", None), ("STAR_FAST_ARCHS", f'"{archs}"')]
    kind = CUDAExtension if cuda else CppExtension
    module = kind(
        "star_fast._C",
        sources,
        define_macros=macros,
        extra_compile_args=compile_args,
        extra_link_args=["-fopenmp"],
        depends=[str(path) for path in Path("csrc").glob("*.h")],
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None)},
    }


setup(**extension())

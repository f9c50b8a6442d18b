"""csrc/sample_cuda.cu compiled, no driver needed: nothing spills, nothing is fused, rows are read
16 bytes at a time.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent.parent / "csrc" / "sample_cuda.cu"
ARCHS = (100,)  # the one with the fewest registers left; benchmarks/kernel_resources.py tells of the others

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """What ptxas says of all kernels on all generations, and the PTX."""
    folder = tmp_path_factory.mktemp("sample_cuda")
    # Without --fmad=false, unlike setup.py: the source alone must keep the compiler from fusing.
    nvcc = ["nvcc", "-O3", "-std=c++17", str(SOURCE)]
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    compiling = subprocess.Popen(
        [*nvcc, *targets, "-Xptxas", "-v", "-c", "-o", "a.o"], cwd=folder, stderr=subprocess.PIPE, text=True
    )
    ptx = subprocess.run(
        [*nvcc, f"-arch=compute_{ARCHS[0]}", "-ptx", "-o", "a.ptx"], cwd=folder, capture_output=True, text=True
    )
    report = compiling.communicate(timeout=600)[1]
    assert compiling.returncode == 0 and ptx.returncode == 0, report + ptx.stderr
    return report, (folder / "a.ptx").read_text()


def test_registers_and_spills(compiled: tuple[str, str]) -> None:
    pattern = re.compile(
        r"Compiling entry function '(\S*sample_tokens_kernel\S*)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) "
        r"bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers.*?(\d+) bytes smem",
        re.DOTALL,
    )
    kernels = pattern.findall(compiled[0])
    assert len(kernels) == 6 * len(ARCHS)  # three dtypes, rows in registers or read again
    for name, arch, stack, stores, loads, registers, shared in kernels:
        what = (
            f"{name} for sm_{arch}: {stack} bytes stack, {stores} + {loads} spilled, {registers} registers, {shared} "
            "bytes shared"
        )
        assert int(stack) == int(stores) == int(loads) == 0 and int(registers) <= 64 and int(shared) <= 24 * 1024, what


def test_instructions(compiled: tuple[str, str]) -> None:
    ptx = compiled[1]
    assert "mul.rn.f32" in ptx and "add.rn.f32" in ptx
    assert not re.search(r"\bfma\.\S*f32", ptx) and not re.search(r"\.f64\b", ptx) and ".ftz" not in ptx
    assert "ld.global.v4" in ptx  # four float32 logits at once
    assert "atom.shared.cas" not in ptx and "atom.shared.add.u64" not in ptx  # which would be a loop

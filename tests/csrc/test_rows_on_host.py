"""csrc/attend_row.h, between_rows.h and group_norm_rows.h without torch, under AddressSanitizer and UBSan, on odd sizes
in buffers without a spare byte.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
# Instruction set -> the compiler's options; what PyTorch found here says which of them can run.
SETS = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def build(folder: Path, options: list[str]) -> Path:
    """The program, as setup.py compiles these files but for the sanitizers."""
    program = folder / "rows_on_host"
    subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-O1",
            "-g",
            "-ffp-contract=off",
            "-fno-trapping-math",
            "-fno-math-errno",
            "-fsanitize=address,undefined",
            "-fno-sanitize-recover=all",
            "-Wno-psabi",
            *options,
            f"-I{CSRC}",
            str(HERE / "rows_on_host.cpp"),
            "-o",
            str(program),
        ],
        check=True,
    )
    return program


@pytest.mark.parametrize("instruction_set", SETS)
def test_rows_equal_plain_loops_and_stay_in_their_buffers(instruction_set: str, tmp_path: Path) -> None:
    here = torch.backends.cpu.get_cpu_capability()
    if here not in SETS or list(SETS).index(instruction_set) > list(SETS).index(here):
        pytest.skip(f"this CPU has {here}")
    program = build(tmp_path, SETS[instruction_set])
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    if instruction_set == "DEFAULT":  # the proof that an access past the end would be found
        for name in ("keys", "values", "scales", "row", "pixels"):
            done = subprocess.run([program, name], capture_output=True, text=True, timeout=300)
            assert done.returncode != 0 and "ERROR: AddressSanitizer" in done.stderr, f"{name}: {done.stderr[-2000:]}"

"""csrc/int8_*.h on their own under AddressSanitizer and UBSan: every instruction set that this processor has, odd
sizes, the loops' bits.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from star_fast.ops.int8_linear import Int8Weight
from tests.ops.test_int8_linear import SIZES, by_loops, code_row, made, rotated_row

HERE = Path(__file__).parent
# Number, flags that it needs
SETS = {
    "baseline": (0, set()),
    "avx2": (1, {"avx2", "fma"}),
    "avx512": (2, {"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
    "vnni": (3, {"avx512_vnni", "avx512bw", "avx512dq", "avx512vl"}),
    "amx": (4, {"amx_tile", "amx_int8"}),
}
DTYPES = (torch.float32, torch.bfloat16)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def flags() -> set[str]:
    """What this processor has, as Linux names it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def build(source: Path, binary: Path, *more: str) -> Path:
    """The program, with everything that a sanitizer reports an error."""
    subprocess.run(
        [
            "g++",
            "-std=c++20",
            "-O1",
            "-g",
            "-ffp-contract=off",
            "-fno-trapping-math",
            "-fsanitize=address,undefined",
            "-fno-sanitize-recover=all",
            *more,
            str(source),
            "-o",
            str(binary),
        ],
        check=True,
    )
    return binary


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(HERE / "int8_on_host.cpp", tmp_path_factory.mktemp("int8_on_host") / "program")


def packed(number: int, x: Tensor, weight: Tensor) -> bytes:
    """A call as int8_on_host.cpp reads it."""
    ready = Int8Weight(weight)
    header = struct.pack("5q", number, x.dtype == torch.bfloat16, len(x), len(weight), x.shape[1])
    return header + b"".join(
        t.contiguous().view(torch.uint8).numpy().tobytes() for t in (x, ready.packed, ready.scale, ready.correction)
    )


def run(program: Path, call: bytes, into: Path) -> subprocess.CompletedProcess[str]:
    (into / "in").write_bytes(call)
    return subprocess.run(
        [program, into / "in", into / "out"], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("name", SETS)
def test_odd_sizes_touch_nothing_else_and_give_the_loops_bits(program: Path, name: str, tmp_path: Path) -> None:
    number, needed = SETS[name]
    if not needed <= flags():
        pytest.skip(f"this processor has no {', '.join(sorted(needed - flags()))}")
    calls = [made(*size, dtype) for size in SIZES for dtype in DTYPES]
    bad, weight = made(7, 20, 70, torch.bfloat16)
    bad[3, 69], bad[4, 0], bad[5] = torch.nan, -torch.inf, 0
    done = run(program, b"".join(packed(number, *call) for call in [*calls, (bad, weight)]), tmp_path)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-4000:]}"
    answer = bytearray((tmp_path / "out").read_bytes())
    for x, weight in calls:
        scale, product, answer = taken(answer, x, weight)
        assert torch.equal(scale, torch.tensor([float(code_row(rotated_row(row))[1]) for row in x.float().numpy()]))
        assert torch.equal(product, by_loops(x, weight)), (name, x.shape, weight.shape, x.dtype)
    scale, product, answer = taken(answer, bad, made(7, 20, 70, torch.bfloat16)[1])
    assert not answer
    assert (
        bool(product[3:5].isnan().all())
        and bool((product[5] == 0).all())
        and bool(product[[0, 1, 2, 6]].isfinite().all())
    )
    assert bool(scale[3:5].isnan().all()) and scale[5] == 0


def taken(answer: bytearray, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, bytearray]:
    """Scales and product of one call, and what is left."""
    rows, end = len(x), len(x) * (4 + len(weight) * x.element_size())
    scale = torch.frombuffer(answer[: 4 * rows], dtype=torch.float32)
    return scale, torch.frombuffer(answer[4 * rows : end], dtype=x.dtype).view(rows, -1), answer[end:]


def test_the_sanitizer_sees_a_step_too_far(tmp_path: Path) -> None:
    """The proof that one would be found: the same loops without the care for the last columns."""
    csrc = tmp_path / "csrc"
    shutil.copytree(HERE.parent.parent / "csrc", csrc, ignore=shutil.ignore_patterns("*.cpp", "*.cu"))
    careful = "    if (count == kLanes) {"
    rows = (csrc / "int8_rows.h").read_text()
    assert rows.count(careful) == 1
    (csrc / "int8_rows.h").write_text(rows.replace(careful, "    if (count <= kLanes) {"))
    careless = tmp_path / "careless.cpp"
    careless.write_text((HERE / "int8_on_host.cpp").read_text().replace("../../csrc", "csrc"))
    done = run(build(careless, tmp_path / "careless", "-DBASELINE_ALONE"), packed(0, *made(3, 37, 33)), tmp_path)
    assert done.returncode != 0 and "AddressSanitizer" in done.stderr and "int8_rows.h" in done.stderr

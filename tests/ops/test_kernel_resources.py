"""The kernel resource table is complete, and a fresh compilation of a part of it shows no fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from star_fast.ops.triton.described import described

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks" / "results" / "kernel_resources.json"
SHAPES, ARCHS = ("B", "L", "XL"), ("sm_80", "sm_90", "sm_100")


def rows() -> list[dict]:
    return json.loads(TABLE.read_text())["rows"]


def described_kernels(shape: str) -> set[str]:
    """Titles of the kernels that a training and a decoding step launch."""
    return {kernel.title for kernel in described(shape)}


def test_table_holds_every_kernel_at_every_shape_on_every_architecture() -> None:
    held = {(row["kernel"], row["shape"], row["arch"]) for row in rows()}
    expected = {(kernel, shape, arch) for shape in SHAPES for kernel in described_kernels(shape) for arch in ARCHS}
    assert expected <= held, f"missing: {sorted(expected - held)}; run benchmarks/kernel_resources.py"
    triton_rows = {row for row in held if row[1] != "all"}
    assert triton_rows <= expected, f"no longer in the code: {sorted(triton_rows - expected)}; run benchmarks/kernel_resources.py"
    if (ROOT / "csrc" / "sample_cuda.cu").exists():
        assert {arch for kernel, shape, arch in held if kernel.startswith("sample_tokens")} == set(ARCHS)


def test_table_for_people_has_the_same_rows() -> None:
    text = TABLE.with_suffix(".md").read_text()
    for row in rows():
        assert f"| {row['kernel']} | {row['shape']} | {row['arch']} | {row['registers']} | {row['spill_bytes']} | {row['shared_bytes']} |" in text


def test_no_spill_and_tensor_cores_where_they_belong() -> None:
    for row in rows():
        assert row["spill_bytes"] == 0, row
        multiplies = row["kernel"].startswith("masked_attention") and not row["kernel"].endswith("prepare")
        if multiplies or row["kernel"] == "slot_contrast forward":
            assert row["tensor_cores"] == {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}[row["arch"]], row


def check(*arguments: str, program: str = "kernel_resources.py") -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks" / program), "--check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_fresh_compilation_has_no_fault() -> None:
    done = check("--arch", "90", "--shape", "XL", "--triton-only", "--workers", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no fault" in done.stdout and f" of {len(described_kernels('XL'))} kernels" in done.stdout


def test_attention_loop_within_its_bars() -> None:
    """480 SASS instructions a tile of keys at E = 64 on sm_90 (676 with rotary in the loop), one load of the mask."""
    done = check(program="attention_loops.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no fault" in done.stdout

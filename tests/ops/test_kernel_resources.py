"""The kernel resource table is complete, and a fresh compilation of a part of it shows no fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from star_fast.ops.triton.described import PROVED, Part, described
from star_fast.ops.triton.tiles import SWIGLU

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks" / "results" / "kernel_resources.json"
ARCHS = ("sm_80", "sm_90", "sm_100")


def rows() -> list[dict]:
    return json.loads(TABLE.read_text())["rows"]


def expected_rows(part: Part) -> set[tuple[str, str, str, str]]:
    """(kernel, shape, dtype, arch) of the kernels that the calls of a part launch, on each architecture that has what
    they need.
    """
    return {
        (kernel.title, part.shape, str(part.dtype).removeprefix("torch."), arch)
        for kernel in described(*part)
        for arch in ARCHS
        if int(arch[3:]) >= kernel.capability
    }


def test_table_holds_every_kernel_at_every_shape_on_every_architecture() -> None:
    held = {(row["kernel"], row["shape"], row["dtype"], row["arch"]) for row in rows()}
    expected = set().union(*map(expected_rows, PROVED))
    assert expected <= held, f"missing: {sorted(expected - held)}; run benchmarks/kernel_resources.py"
    triton_rows = {row for row in held if row[1] != "all"}
    assert triton_rows <= expected, (
        f"no longer in the code: {sorted(triton_rows - expected)}; run benchmarks/kernel_resources.py"
    )
    if (ROOT / "csrc" / "sample_cuda.cu").exists():
        assert {arch for kernel, _, _, arch in held if kernel.startswith("sample_tokens")} == set(ARCHS)


def test_table_covers_what_runs() -> None:
    """Every head size, a longer image, the caches, no mask, a position of the host; an fp8 cache only where the
    hardware has fp8.
    """
    held = rows()
    assert {row["shape"] for row in held} == {"B", "L", "XL", "XL-384", "E96", "3B", "all"}
    assert {row["dtype"] for row in held if row["shape"] == "B"} == {"bfloat16", "float32"}
    archs = {
        note: {row["arch"] for row in held if row["kernel"].endswith(note)}
        for note in (
            ", no mask",
            ", no mask, no gradient",
            ", position of the host",
            ", int8 cache",
            ", float8_e4m3fn cache",
        )
    }
    assert archs.pop(", float8_e4m3fn cache") == {"sm_90", "sm_100"}
    assert all(found == set(ARCHS) for found in archs.values()), archs


def test_the_gate_reads_each_input_once() -> None:
    """No loop in it: the loads in its text, a thread's, are those it makes. Forward two inputs, backward three, of
    SWIGLU.block numbers a program.
    """
    for row in rows():
        inputs = {"swiglu forward": 2, "swiglu backward": 3}.get(row["kernel"])
        if inputs:
            size = 4 if row["dtype"] == "float32" else 2
            assert row["load_bytes"] * 32 * row["warps"] == inputs * SWIGLU.block[0] * size, row


def test_pictures_are_normalised_where_they_were_loaded() -> None:
    """The tile goes through no shared memory, which it does in some layouts of the compiler's choice; the moments leave
    there what warps add up for each other, a float32 a warp and channel.
    """
    shared = {"group_norm_silu scaled": 0, "group_norm_silu moments": 8 * 128 * 4}
    held = [row for row in rows() if row["kernel"].split(",")[0] in shared]
    assert len({row["kernel"] for row in held}) == 6
    assert all(row["shared_bytes"] <= shared[row["kernel"].split(",")[0]] for row in held)


def test_table_for_people_has_the_same_rows() -> None:
    text = TABLE.with_suffix(".md").read_text()
    for row in rows():
        numbers = f"| {row['registers']} | {row['spill_bytes']} | {row['shared_bytes']} |"
        assert f"| {row['kernel']} | {row['shape']} | {row['dtype']} | {row['arch']} {numbers}" in text


def test_no_spill_and_tensor_cores_where_they_belong() -> None:
    for row in rows():
        assert row["spill_bytes"] == 0, row
        multiplies = row["kernel"].startswith("masked_attention") and "prepare" not in row["kernel"]
        if row["dtype"] != "float32" and (multiplies or row["kernel"] == "slot_contrast forward"):
            assert row["tensor_cores"] == {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}[row["arch"]], row


def check(*arguments: str, program: str = "kernel_resources.py") -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks" / program), "--check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_fresh_compilation_has_no_fault() -> None:
    done = check("--arch", "90", "--shape", "XL", "--triton-only", "--workers", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    (part,) = (part for part in PROVED if part.shape == "XL")
    assert "no fault" in done.stdout and f" of {len(described(*part))} kernels" in done.stdout


def test_attention_loop_within_its_bars() -> None:
    """480 SASS instructions a tile of keys at E = 64 on sm_90 (676 with rotary in the loop), one load of the mask."""
    done = check(program="attention_loops.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no fault" in done.stdout

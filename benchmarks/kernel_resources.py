"""Compile every kernel for sm_80, sm_90 and sm_100 without a GPU; write, or check, the table of what each takes.

    python benchmarks/kernel_resources.py                    writes results/kernel_resources.md and .json (minutes)
    python benchmarks/kernel_resources.py --check --arch 90 --shape XL    recompiles a part and compares: exit
                                                             code 1 and one line a fault

Triton kernels come from the launches that the ops themselves make (star_fast/ops/triton/described.py, whose PROVED says
which calls at which shapes and dtypes); launches that Triton's own cache would not tell apart are compiled once. CUDA
sources come from csrc/. A fault is: a spill; a kernel above the arithmetic units' reach without a tensor-core
instruction; a memory-bound kernel whose widest global load or store is under 16 bytes; more registers or shared memory
than the committed table; a kernel that the table does not hold. Another version of Triton than the table's is held to
the instructions and the limits alone, SPILLS_OF_ANOTHER among them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # where there is a GPU the same is compiled, from the same descriptions

from benchmarks import cuda_sources
from benchmarks.devices import DEVICES, MULTIPROCESSORS, floor_us, memory_bound, occupancy
from star_fast.ops.triton.described import PROVED, Described, described

RESULTS = Path(__file__).resolve().parent / "results"
SHAPES = tuple(dict.fromkeys(part.shape for part in PROVED))
CAPABILITIES = (80, 90, 100)
REGISTER_SLACK = 8  # a new assembler may move registers by one allocation step without a change of ours
SPILLS_OF_ANOTHER = 64  # bytes, of another Triton: a few words beside hundreds of registers
# Narrower accesses that are accepted: (start of the kernel's name, shape, "" for all, "load" or "store") and why.
ACCEPTED_NARROW = {
    ("sample_tokens", "", "store"): "one code a row of logits",
    (
        "sample_tokens <bfloat16",
        "",
        "load",
    ): "a thread's four logits; sampling reads float32 logits, these only when a caller brings them",
    ("sample_tokens <float16", "", "load"): "as bfloat16",
    (
        "decode_attention",
        "",
        "store",
    ): "one row of k, v and out a head, against a whole cache read: 1 % of the bytes at 256 positions",
    ("decode_attention", "3B", "load"): "rows of 100 numbers start at multiples of 8 bytes, of 4 in an 8-bit cache",
    ("add_rms_norm weight", "", "store"): "one row, against 512 read",
    ("group_norm_silu moments", "", "store"): "two float32 rows for the 16 to 128 rows that are read",
    ("group_norm_silu merge", "", "store"): "two numbers a channel, against two of every part",
}


class Job(NamedTuple):
    """One compilation: a kernel of a part of PROVED, for an architecture."""

    title: str
    part: int
    capability: int


@functools.cache
def kernels(part: int) -> dict[str, Described]:
    """The kernels of a part of PROVED by their titles."""
    return {kernel.title: kernel for kernel in described(*PROVED[part])}


def jobs_of(shapes: tuple[str, ...], capabilities: tuple[int, ...], only: str) -> dict[Job, Job]:
    """Every row of the table, and the one that is compiled for it: the first of the same key."""
    first: dict[tuple[int, str], Job] = {}
    found = {}
    for number, part in enumerate(PROVED):
        for title, kernel in kernels(number).items() if part.shape in shapes else ():
            for capability in capabilities:
                if only in title and capability >= kernel.capability:
                    job = Job(title, number, capability)
                    found[job] = first.setdefault((capability, kernel.call.compilation(capability).key), job)
    return found


def compile_one(job: Job) -> dict[str, Any]:
    """One row of the table. Runs in a process of its own kind: kernels are not interpreted there, and no driver is
    asked for.
    """
    import triton

    triton.knobs.compilation.always_compile = True  # a cached kernel would leave no assembler log
    triton.knobs.nvidia.dump_ptxas_log = True
    kernel, log = kernels(job.part)[job.title], io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = kernel.call.compilation(job.capability).compile()
    part = PROVED[job.part]
    return row(
        kernel.title,
        part.shape,
        job.capability,
        log.getvalue(),
        compiled.asm["ptx"],
        compiled.metadata.shared,
        compiled.metadata.num_warps,
        kernel.cost(),
        str(part.dtype).removeprefix("torch."),
    )


def row(
    kernel: str,
    shape: str,
    capability: int,
    log: str,
    ptx: str,
    shared_bytes: int,
    num_warps: int,
    cost: tuple[int, int],
    dtype: str,
) -> dict[str, Any]:
    """A row from the assembler's log (registers, spills) and the PTX (instructions)."""
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", log))
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    loads, stores = accesses(ptx, "ld"), accesses(ptx, "st")
    return {
        "kernel": kernel,
        "shape": shape,
        "dtype": dtype,
        "arch": f"sm_{capability}",
        "registers": registers,
        "spill_bytes": spills,
        "shared_bytes": shared_bytes,
        "warps": num_warps,
        "occupancy": round(occupancy(capability, registers, shared_bytes, num_warps), 4),
        "tensor_cores": tensor_cores(ptx),
        "widest_load": max(loads),
        "widest_store": max(stores),
        "load_bytes": sum(loads),
        "bytes": int(cost[0]),
        "flops": int(cost[1]),
    }


def tensor_cores(ptx: str) -> str:
    """The kind of matrix instruction, or "-"."""
    return (
        next((kind for kind in ("tcgen05.mma", "wgmma.mma", "mma.sync") if kind in ptx), "-")
        .split(".mma")[0]
        .split(".sync")[0]
    )


def accesses(ptx: str, direction: str) -> list[int]:
    """Bytes of each global load or store ("ld", "st") in the text; the bulk copy engine counts as 16, its smallest
    piece.
    """
    sizes = [
        int(count or 1) * int(bits) // 8
        for count, bits in re.findall(rf"\b{direction}\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
    ]
    if direction == "ld":
        sizes += [
            int(size, 0)
            for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[\w.:]* \[[^\]]*\], \[[^\]]*\], (\w+)", ptx)
        ]
    bulk = (
        r"cp\.async\.bulk\.(?:tensor\.\dd\.)?shared"
        if direction == "ld"
        else r"cp\.async\.bulk\.(?:tensor\.\dd\.)?global"
    )
    return [0, *sizes, *(16 for _ in re.findall(bulk, ptx))]


def named(row: dict[str, Any]) -> tuple[str, str, str, str]:
    """What tells a row from the others."""
    return row["kernel"], row["shape"], row["dtype"], row["arch"]


def faults(row: dict[str, Any], committed: dict[str, Any] | None, same_compiler: bool = True) -> list[str]:
    """What is wrong with a row, each in one line. Another Triton allocates otherwise: what it takes is held to the
    device's limits, not to the table's numbers, and a few spilled words are its own.
    """
    name, found = f"{row['kernel']}, {row['dtype']} at {row['shape']} on {row['arch']}", []
    if row["spill_bytes"] > (0 if same_compiler else SPILLS_OF_ANOTHER):
        found.append(f"{name}: spills {row['spill_bytes']} bytes of registers; use smaller tiles or more warps")
    limit = MULTIPROCESSORS[int(row["arch"][3:])].shared_bytes_a_program
    if row["shared_bytes"] > limit:
        found.append(f"{name}: takes {row['shared_bytes']} bytes of shared memory, the device has {limit}")
    if memory_bound(row["bytes"], row["flops"]):
        for kind in ("load", "store"):
            accepted = any(
                row["kernel"].startswith(start) and shape in ("", row["shape"]) and kind == which
                for start, shape, which in ACCEPTED_NARROW
            )
            if row[f"widest_{kind}"] < 16 and not accepted:
                found.append(
                    f"{name}: memory-bound, yet its widest global {kind} is of {row[f'widest_{kind}']} bytes; 16 "
                    "expected"
                )
    elif row["tensor_cores"] == "-" and row["dtype"] != "float32":  # whose products are whole
        found.append(
            f"{name}: {row['flops'] / row['bytes']:.0f} FLOPs a byte need tensor cores, no such instruction found"
        )
    if committed is None:
        found.append(
            f"{name}: not in the committed table; run benchmarks/kernel_resources.py and commit what it writes"
        )
    else:
        if same_compiler and row["registers"] > committed["registers"] + REGISTER_SLACK:
            found.append(f"{name}: {row['registers']} registers, committed {committed['registers']}")
        if same_compiler and row["shared_bytes"] > committed["shared_bytes"]:
            found.append(f"{name}: {row['shared_bytes']} bytes of shared memory, committed {committed['shared_bytes']}")
        if row["tensor_cores"] != committed["tensor_cores"]:
            found.append(f"{name}: matrix instruction {row['tensor_cores']}, committed {committed['tensor_cores']}")
    return found


def compile_all(
    shapes: tuple[str, ...], capabilities: tuple[int, ...], only: str, workers: int, triton_only: bool
) -> list[dict[str, Any]]:
    """All rows, in the order of PROVED, by kernel and architecture."""
    jobs = jobs_of(shapes, capabilities, only)
    compiled = sorted(set(jobs.values()), key=lambda job: job.part)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        made = dict(zip(compiled, pool.map(compile_one, compiled), strict=True))
    rows = []
    for job, source in jobs.items():
        cost = kernels(job.part)[job.title].cost()
        rows.append(
            {
                **made[source],
                "kernel": job.title,
                "shape": PROVED[job.part].shape,
                "bytes": int(cost[0]),
                "flops": int(cost[1]),
            }
        )
    # A CUDA source is compiled once for all shapes: only V enters, and that is the same.
    return (
        rows
        if triton_only
        else rows
        + [row(*found, re.search(r"<(\w+)", found[0])[1]) for found in cuda_sources.compile_all(capabilities, only)]
    )


def markdown(rows: list[dict[str, Any]], versions: dict[str, str]) -> str:
    """The table for people: resources of each kernel, then time floors."""
    lines = [
        "# What each kernel takes",
        "",
        "Made by `python benchmarks/kernel_resources.py`, without a GPU: shapes of `star_fast/ops/shapes.py`, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
        "Occupancy is predicted from registers, shared memory and warps. Load and store: bytes of one thread's "
        "widest global access.",
        "",
        "| kernel | shape | dtype | arch | registers | spilled bytes | shared bytes | warps | occupancy | tensor "
        "cores | load | store |",
        "|---|---|---|---|--:|--:|--:|--:|--:|---|--:|--:|",
    ]
    lines += [
        f"| {r['kernel']} | {r['shape']} | {r['dtype']} | {r['arch']} | {r['registers']} | {r['spill_bytes']} | "
        f"{r['shared_bytes']} | {r['warps']} | "
        f"{r['occupancy']:.0%} | {r['tensor_cores']} | {r['widest_load']} | {r['widest_store']} |"
        for r in rows
    ]
    lines += [
        "",
        "## Time floors",
        "",
        "Least bytes (each input once, each output once) and FLOPs by the op's `cost`, and the time that each GPU "
        "needs for them at its published",
        "peak rates (`benchmarks/devices.py` names the sources): a bound, not a measurement. Kernels without a "
        "tensor-core instruction are held",
        "against the float32 rate.",
        "",
        "| kernel | shape | dtype | MB | GFLOP | " + " | ".join(f"{device.name}, µs" for device in DEVICES) + " |",
        "|---|---|---|--:|--:|" + "--:|" * len(DEVICES),
    ]
    by_kernel = {(r["kernel"], r["shape"], r["dtype"]): r for r in rows}
    for (kernel, shape, dtype), r in by_kernel.items():
        floors = [floor_us(device, r["bytes"], r["flops"], r["tensor_cores"] != "-") for device in DEVICES]
        lines.append(
            f"| {kernel} | {shape} | {dtype} | {r['bytes'] / 1e6:.1f} | {r['flops'] / 1e9:.2f} | "
            + " | ".join(f"{floor:.1f}" for floor in floors)
            + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the table, or with --check hold fresh compilations against it."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--check", action="store_true", help="compare with the committed table instead of writing it")
    parser.add_argument(
        "--arch", type=int, nargs="+", default=CAPABILITIES, choices=CAPABILITIES, help="compute capabilities"
    )
    parser.add_argument("--shape", nargs="+", default=SHAPES, choices=SHAPES, help="presets")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this (with --check)")
    parser.add_argument(
        "--triton-only", action="store_true", help="leave the sources in csrc/ out, which need nvcc (with --check)"
    )
    parser.add_argument(
        "--workers", type=int, default=min(8, len(os.sched_getaffinity(0))), help="processes that compile at once"
    )
    arguments = parser.parse_args()
    partial = (
        bool(arguments.kernel)
        or arguments.triton_only
        or tuple(arguments.arch) != CAPABILITIES
        or tuple(arguments.shape) != SHAPES
    )
    if partial and not arguments.check:
        parser.error(
            "the table is written whole: leave out --arch, --shape, --kernel and --triton-only, or add --check"
        )
    rows = compile_all(
        tuple(arguments.shape), tuple(arguments.arch), arguments.kernel, arguments.workers, arguments.triton_only
    )
    import torch
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "ptxas": triton.knobs.nvidia.ptxas.version}
    table = RESULTS / "kernel_resources.json"
    if arguments.check:
        held = json.loads(table.read_text())
    else:
        held = {"versions": versions, "rows": rows}
        table.write_text(json.dumps(held, indent=1) + "\n")
        table.with_suffix(".md").write_text(markdown(rows, versions))
    committed = {named(r): r for r in held["rows"]}
    made_by = held["versions"]["triton"]
    if made_by != versions["triton"]:
        print(
            f"The table is Triton {made_by}'s, here is {versions['triton']}: held to the device's limits and to the "
            "table's instructions, not to its numbers of registers and shared bytes."
        )
    found = [fault for r in rows for fault in faults(r, committed.get(named(r)), made_by == versions["triton"])]
    print("\n".join(found) or f"{len(rows)} rows of {len({named(r)[:3] for r in rows})} kernels: no fault")
    return 1 if found else 0


if __name__ == "__main__":
    if os.environ.pop("TRITON_INTERPRET", None):  # it would replace the kernels by their interpreted form
        os.execv(sys.executable, [sys.executable, *sys.argv])
    sys.exit(main())

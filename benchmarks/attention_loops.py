"""Count what attention's kernels do for each tile that they stream: SASS instructions of the loop, without a GPU.

    python benchmarks/attention_loops.py              writes results/attention_loops.md (a minute)
    python benchmarks/attention_loops.py --check      the bars: at E = 64 on sm_90 at most 480 instructions forward
                                                      and one load of the mask a tile

A loop is what lies between a backward branch and its target in nvdisasm's listing, the causal branch included, which
only tiles on the diagonal take. On sm_100 the matrix unit is waited for in loops of their own, so nothing is counted
there.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.devices import occupancy

RESULTS = Path(__file__).resolve().parent / "results"
MOST_FORWARD, MOST_MASK_LOADS = 480, 1
# The same count for commit f0c1d9c, with rotary and a byte a key in the loop: (kernel, E, capability) -> instructions.
BEFORE = {
    ("forward", 64, 80): 1328,
    ("backward, queries", 64, 80): 748,
    ("backward, keys", 64, 80): 832,
    ("forward", 64, 90): 676,
    ("backward, queries", 64, 90): 347,
    ("backward, keys", 64, 90): 330,
    ("forward", 100, 80): 994,
    ("backward, queries", 100, 80): 824,
    ("backward, keys", 100, 80): 947,
    ("forward", 100, 90): 571,
    ("backward, queries", 100, 90): 434,
    ("backward, keys", 100, 90): 424,
}
# Tiles and warps then, where they differ from now: scores of a tile and warps.
BEFORE_TILES = {
    ("forward", 100): (64 * 32, 4),
    ("backward, queries", 100): (64 * 32, 8),
    ("backward, keys", 100): (64 * 32, 8),
}


class Loop(NamedTuple):
    """One kernel's loop on one architecture."""

    kernel: str
    size: int  # E
    capability: int
    instructions: int
    global_loads: int
    tile: tuple[int, int]
    warps: int
    registers: int
    occupancy: float

    @property
    def a_score(self) -> float:
        """Instructions of a thread for each score of the tile."""
        return self.instructions * 32 * self.warps / (self.tile[0] * self.tile[1])


def longest_loop(sass: str) -> list[str]:
    """The instructions of the longest loop of a listing, without padding."""
    at, instructions, found = {}, [], []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            at[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);?\s*$", line):
            instructions.append(instruction[1])
    for end, instruction in enumerate(instructions):
        target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction)
        if target and at.get(target[1], end + 1) <= end:
            found.append([x for x in instructions[at[target[1]] : end + 1] if not x.startswith("NOP")])
    return max(found, key=len)


def count(call: Any, size: int, capability: int) -> Loop:
    """Compile a launch and count its loop."""
    import triton

    compiled = call.compilation(capability).compile()
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass, resources = (
            subprocess.run([str(tools / tool), option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))
        )
    loop, registers = longest_loop(sass), int(re.search(r"REG:(\d+)", resources)[1])
    return Loop(
        call.kernel.title.removeprefix("masked_attention "),
        size,
        capability,
        len(loop),
        sum(bool(re.search(r"\bLDG(STS)?\.", x)) for x in loop),
        (call.constants["BLOCK_M"], call.constants["BLOCK_N"]),
        call.num_warps,
        registers,
        occupancy(capability, registers, compiled.metadata.shared, call.num_warps),
    )


def calls(size: int, *, masked: bool = True) -> list[Any]:
    """The launches of the three kernels with a loop, bfloat16, at XL's shape or at that of 3B (E = 100), as a training
    step makes them.
    """
    from star_fast.ops.triton.described import CASES, described

    case = next(case for case in CASES if case.op == "masked_attention")
    if not masked:
        case = case._replace(change=lambda call, dtype: {**call, "keep": None})
    return [
        kernel.call
        for kernel in described("XL" if size == 64 else "3B", cases=[case])
        if not kernel.title.endswith("prepare")
    ]


def faults() -> list[str]:
    """The bars, each a line where it is missed."""
    masked, open_ = (
        count(next(call for call in calls(64, masked=masked) if call.kernel.title.endswith("forward")), 64, 90)
        for masked in (True, False)
    )
    where, mask_loads = "attention forward, E 64, sm_90", masked.global_loads - open_.global_loads
    found = []
    if masked.instructions > MOST_FORWARD:
        found.append(f"{where}: {masked.instructions} instructions a tile of keys, {MOST_FORWARD} are allowed")
    if mask_loads > MOST_MASK_LOADS:
        found.append(f"{where}: {mask_loads} loads of the mask a tile of keys, {MOST_MASK_LOADS} is allowed")
    return found or [
        f"{where}: {masked.instructions} instructions a tile of keys, {mask_loads} load of the mask: no fault"
    ]


def markdown(loops: list[Loop]) -> str:
    """Before and after beside each other."""
    lines = [
        "# Attention's loops",
        "",
        "Made by `python benchmarks/attention_loops.py`, without a GPU: bfloat16, key mask and rotary on.",
        "SASS instructions between the loop's first and its branch back, and the same a thread and score; before: "
        "commit f0c1d9c, which turned keys in",
        "the loop and read a byte of the mask for each (at E = 100 its tiles were 64 x 32, backward on 8 warps). "
        "Occupancy is predicted from registers,",
        "shared memory and warps.",
        "",
        "| kernel | E | arch | tile | warps | before | after | a score, before | after | global loads | registers "
        "| occupancy |",
        "|---|--:|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for loop in loops:
        before = BEFORE[loop.kernel, loop.size, loop.capability]
        scores, warps = BEFORE_TILES.get((loop.kernel, loop.size), (loop.tile[0] * loop.tile[1], loop.warps))
        once = before * 32 * warps / scores
        lines.append(
            f"| {loop.kernel} | {loop.size} | sm_{loop.capability} | {loop.tile[0]} x {loop.tile[1]} | "
            f"{loop.warps} | {before} | "
            f"{loop.instructions} | {once:.1f} | {loop.a_score:.1f} | {loop.global_loads} | {loop.registers} | "
            f"{loop.occupancy:.0%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the table, or with --check hold the bars."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--check", action="store_true", help="hold the bars instead of writing the table")
    if parser.parse_args().check:
        found = faults()
        print("\n".join(found))
        return 0 if found[0].endswith("no fault") else 1
    loops = [count(call, size, capability) for size in (64, 100) for call in calls(size) for capability in (80, 90)]
    (RESULTS / "attention_loops.md").write_text(markdown(loops))
    return 0


if __name__ == "__main__":
    if os.environ.pop("TRITON_INTERPRET", None):  # it would replace the kernels by their interpreted form
        os.execv(sys.executable, [sys.executable, *sys.argv])
    sys.exit(main())

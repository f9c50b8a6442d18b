"""All that the doctor looks at, grouped by what a user wants to do, and whether the stages that must work can."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape

from star_fast.doctor.findings import MISSING, OK, WITHOUT, Finding, shown
from star_fast.doctor.machine import has_gpu, machine
from star_fast.doctor.operations import choices, operations
from star_fast.doctor.packages import extension, for_evaluating, for_preparing, for_showing, for_training
from star_fast.doctor.weight_files import weight_files

Stage = Literal["prepare", "train", "sample", "evaluate", "demo"]
_STAGES: dict[str, tuple[str, Callable[[], list[Finding]]]] = {
    "prepare": ("To turn images into codes (star-fast prepare)", for_preparing),
    "train": ("To train (star-fast train, deepspeed star_fast/train.py)", for_training),
    "sample": ("To draw images (star-fast sample)", lambda: [extension()]),
    "evaluate": ("To score images (star-fast evaluate)", for_evaluating),
    "demo": ("To draw in the browser (star-fast demo)", for_showing),
}


def examine(needed: Sequence[str], weights: str = "", show: Callable[[str], None] = print) -> list[str]:
    """Look at everything and show it.

    Args:
        needed: stages that must work here, of Stage. weights: a folder of weights files to look at; "": none.

    Returns:
        What is missing for them: "stage: part" each; the machine itself counts for every stage.

    Raises:
        UserError: `weights` is no folder.
    """
    missing: list[str] = []

    def group(title: str, name: str, findings: list[Finding]) -> None:
        show(f"{shown(title, findings)}\n")
        missing.extend(
            f"{name}: {finding.name}"
            for finding in findings
            if finding.mark == MISSING and (name in needed or name not in _STAGES)
        )

    group("This machine", "machine", machine())
    for name, (title, look) in _STAGES.items():
        group(title, name, look())
    device = "cuda" if has_gpu() else "cpu"
    group(
        f"What runs each operation on {'the GPU' if device == 'cuda' else 'this CPU'}, and why not the others",
        "operations",
        operations(choices(device)),
    )
    if weights:
        group(f"Weights in {weights}", "weights", weight_files(Path(weights)))
    show(f"{OK}: found   {WITHOUT}: done without   {MISSING}: missing or broken, its stage cannot run")
    return missing


def show_self_test(checks: Iterable[tuple[str, str, str, bool | None, str, float]]) -> bool:
    """Print a line for each call as it is checked, (op, backend, dtype and so on, passed, what was seen, seconds);
    whether none failed.

    What a backend cannot do here (passed: None) is told once.
    """
    console, failed, said = Console(), 0, set()
    for op, backend, call, passed, told, seconds in checks:
        if passed is None and (op, backend, told) in said:
            continue
        said.add((op, backend, told))
        verdict = "[green]passed[/]" if passed else "not here" if passed is None else "[red]FAILED[/]"
        failed += passed is False
        console.print(
            f"{verdict:18} {op} \\[{backend}, {call}], {seconds:.1f} s: {escape(told)}", soft_wrap=True, highlight=False
        )
    return not failed

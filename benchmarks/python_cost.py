"""What the Python of an op's call costs the host: everything but the kernel, which is not launched.

    python benchmarks/python_cost.py [--quick] [--json FILE] [--before FILE --save]

Real tensors on the CPU, the choice of backend as on CUDA, autograd as it is; the one line that hands a kernel to Triton
does nothing. Small shapes, so that torch's own operators beside the kernels (a mean, a sum, a product) cost what
calling them costs. Time is CPU time of this thread: blocks of calls, candidates take turns.

Beside each call stands its floor: an autograd.Function of as many inputs and outputs that only allocates them. Last
comes the part of a launch that is Triton's own (binding arguments, finding the compiled kernel) with a driver that does
nothing. On a GPU it is paid once a launch; a CUDA graph's replay pays none of all this.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import timing
from benchmarks.ops import SUBJECTS, Subject
from benchmarks.rows import Given, Piece, Row
from star_fast.host_memory import keep_freed_memory
from star_fast.ops import dispatch
from star_fast.ops.triton import launching

RESULTS = Path(__file__).resolve().parent / "results"
PRESET, DTYPE = "unit", torch.float32
LAUNCH = ("launching swiglu's kernel", "Triton's own part")


class Cost(NamedTuple):
    """Microseconds of this thread's CPU time: median and least of the blocks' means, and the least of the floor (None
    where there is none).
    """

    median_us: float
    least_us: float
    floor_us: float | None


class _Nothing(torch.autograd.Function):
    """An op that computes nothing: allocates its outputs, saves an input, allocates a gradient for each."""

    @staticmethod
    def forward(ctx, outs: tuple[Tensor, ...], *inputs: Tensor) -> Any:
        ctx.save_for_backward(*inputs)
        made = tuple(torch.empty_like(out) for out in outs)
        return made if len(made) > 1 else made[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *douts: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(torch.empty_like(x) for x in ctx.saved_tensors))


def _no_start(*arguments: object) -> None:
    pass


def _yes() -> bool:
    return True


@contextlib.contextmanager
def no_launches() -> Iterator[None]:
    """Within the block kernels are not launched, and CPU tensors are served as CUDA's: by the same backends in the same
    order, their values not looked at.
    """
    with contextlib.ExitStack() as patches:
        # A Mock would take its own ten microseconds
        for name, stand_in in (("start", _no_start), ("interpreting", _yes)):
            patches.enter_context(mock.patch.object(launching, name, stand_in))
        for subject in SUBJECTS:
            op = importlib.import_module(f"star_fast.ops.{subject.file}")
            patches.enter_context(mock.patch.dict(dispatch._OPS[subject.function].order, cpu=("triton",)))
            if hasattr(op, "FakeTensor"):  # values are read on the CPU only, and never a FakeTensor's
                patches.enter_context(mock.patch.object(op, "FakeTensor", Tensor))
        yield


def calls(subject: Subject) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """How an op is called -> (the call, its floor)."""
    public = getattr(importlib.import_module(f"star_fast.ops.{subject.file}"), subject.function)
    given = importlib.import_module(f"star_fast.ops.{subject.file}").inputs(PRESET, DTYPE)
    out = public(**given)
    cotangents = tuple(torch.ones_like(o) for o in (out if isinstance(out, tuple) else () if out is None else (out,)))

    def forward() -> object:
        return public(**given)

    if not subject.gradients:
        return {"forward": (torch.no_grad()(forward), lambda: [torch.empty_like(c) for c in cotangents])}
    leaves = {name: given[name].clone().requires_grad_() for name in subject.gradients}
    asked, wanted = {**given, **leaves}, tuple(leaves.values())
    return {
        "forward, no gradient": (forward, lambda: [torch.empty_like(c) for c in cotangents]),
        "forward": (lambda: public(**asked), lambda: _Nothing.apply(cotangents, *wanted)),
        "forward + backward": (
            lambda: torch.autograd.grad(public(**asked), wanted, cotangents),
            lambda: torch.autograd.grad(_Nothing.apply(cotangents, *wanted), wanted, cotangents),
        ),
    }


@contextlib.contextmanager
def triton_without_gpu() -> Iterator[Callable[[], object]]:
    """Within the block, the launch of a kernel as Triton makes it, up to the driver's call, which does nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from star_fast.ops import swiglu

    x = torch.ones(8, 64)
    with no_launches(), dispatch.note_launches() as noted:
        swiglu(x)
    call = noted[0].call
    compiled = SimpleNamespace(
        launch_metadata=lambda *_: None, run=lambda *_: None, function=None, packed_metadata=None
    )

    def compile_nothing(self: JITFunction, key: str, signature: Any, device: int, *_: Any) -> object:
        self.device_caches[device][0][key] = compiled
        return compiled

    options = {
        **call.constants,
        "num_warps": call.num_warps,
        "num_stages": call.num_stages,
        "enable_fp_fusion": launching.FP_FUSION,
    }
    target = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    before = driver._active
    call.kernel.function.device_caches.clear()  # of a GPU that launched it before in this process
    driver.set_active(target)
    try:
        with mock.patch.object(JITFunction, "_do_compile", compile_nothing):
            yield lambda: launching.start(call.kernel.function, call.grid, call.arguments, options)
    finally:
        driver._active = before
        call.kernel.function.device_caches.clear()


def blocks_us(candidates: dict[Any, Callable[[], object]], quick: bool) -> dict[Any, list[float]]:
    """Microseconds a call of each block of calls; the candidates take turns."""
    size, blocks = (20, 5) if quick else (100, 40)
    found: dict[Any, list[float]] = {key: [] for key in candidates}
    for call in candidates.values():
        for _ in range(20):
            call()
    for _ in range(blocks):
        for key, call in candidates.items():
            start = time.thread_time()
            for _ in range(size):
                call()
            found[key].append(1e6 * (time.thread_time() - start) / size)
    return found


def costs(quick: bool) -> dict[tuple[str, str], Cost]:
    """(op, call) -> what it takes; Triton's part of a launch last."""
    keep_freed_memory()  # as training does: else each call's memory goes back to the system
    candidates: dict[tuple[str, str, str], Callable[[], object]] = {}
    with no_launches():
        for subject in SUBJECTS:
            for name, (call, floor) in calls(subject).items():
                candidates |= {(subject.file, name, "call"): call, (subject.file, name, "floor"): floor}
        found = blocks_us(candidates, quick)
    with triton_without_gpu() as launch:
        found |= blocks_us({(*LAUNCH, "call"): launch}, quick)
    return {
        key[:2]: Cost(
            statistics.median(values),
            min(values),
            min(found[(*key[:2], "floor")]) if (*key[:2], "floor") in found else None,
        )
        for key, values in found.items()
        if key[2] == "call"
    }


def pieces(given: Given) -> list[Piece]:
    """Rows for throughput.py, in milliseconds as all others; its ceiling is the floor. All calls take turns, so they
    are one piece.
    """

    def rows() -> list[Row]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # others would be woken for torch's small operators
        try:
            found_by_call = costs(given.quick)
        finally:
            torch.set_num_threads(threads)
        return [
            Row(
                f"Python of {op}, {call}",
                "launch stubbed",
                found.median_us / 1e3,
                found.median_us / found.least_us - 1,
                None,
                None if found.floor_us is None else found.floor_us / found.least_us,
                ceiling="" if found.floor_us is None else "torch's floor",
            )
            for (op, call), found in found_by_call.items()
        ]

    return [Piece("Python of the ops' calls", rows)]


def main_call(given: Given) -> Callable[[], object]:
    """For --profile: each op's fullest call once, no kernel launched."""
    with no_launches():
        runs = [list(calls(subject).values())[-1][0] for subject in SUBJECTS]

    def call() -> None:
        with no_launches():
            for run in runs:
                run()

    return call


def table(now: dict[str, Cost], before: dict[str, Cost]) -> str:
    """Markdown: before and after beside each other, microseconds."""
    lines = [
        "| call | before: median | least | after: median | least | torch's floor | after, above it |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, found in now.items():
        old, floor = before.get(name), found.floor_us
        columns = ["", ""] if old is None else [f"{old.median_us:.1f}", f"{old.least_us:.1f}"]
        columns += [
            f"{found.median_us:.1f}",
            f"{found.least_us:.1f}",
            *(["", ""] if floor is None else [f"{floor:.1f}", f"{found.least_us - floor:.1f}"]),
        ]
        lines.append(f"| {name} | {' | '.join(columns)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print; with --save keep it beside an earlier measurement."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--quick", action="store_true", help="few repeats: a check that all runs")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument(
        "--before",
        type=Path,
        nargs="*",
        default=[],
        help="such files of the code before: of each call the least counts",
    )
    parser.add_argument("--after", type=Path, nargs="*", default=[], help="such files of this code, beside this run")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/python_cost.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    now = {f"{op}, {call}": found for (op, call), found in costs(arguments.quick).items()}
    if arguments.json:
        arguments.json.write_text(json.dumps({name: found._asdict() for name, found in now.items()}, indent=1) + "\n")
    report = table(merged([*arguments.after], now), merged(arguments.before, {}))
    print(report)
    if arguments.save:
        where = ", ".join(f"{key} {value}" for key, value in timing.environment("cpu").items())
        (RESULTS / "python_cost.md").write_text(
            f"# Python of an op's call\n\n{where}. Microseconds of thread CPU time.\n\n{report}\n"
        )


def merged(files: list[Path], found: dict[str, Cost]) -> dict[str, Cost]:
    """The least of each figure over several runs: a neighbour on the same core only ever adds."""
    for path in files:
        for name, row in json.loads(path.read_text()).items():
            least = [
                [x for x in pair if x is not None]
                for pair in zip(Cost(**row), found.get(name, Cost(**row)), strict=True)
            ]
            found[name] = Cost(*(min(values) if values else None for values in least))
    return found


if __name__ == "__main__":
    main()

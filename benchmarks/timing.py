"""The only clock: how long a call takes, and what the machine's memory and arithmetic can do, measured the same way.

Candidates of one comparison take turns, call by call, so that a disturbance of the machine meets them alike. CPU calls
are timed by perf_counter with warm caches. CUDA calls are captured once and timed as replays of a CUDA graph, since the
Python of one call takes longer than most kernels; by a pair of events, with the L2 cache overwritten before each. A
call that waits for the device cannot be captured: it is launched from Python, and its Timing says so.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

_FLUSH_BYTES = 2**28  # larger than any L2 cache
REPLAYED = "replay of a CUDA graph"


class Timing(NamedTuple):
    """Median time of a call; spread: the middle half of the times, as a share of the median."""

    median_ms: float
    spread: float
    repeats: int
    how: str = ""  # on CUDA: REPLAYED, or why the call was launched from Python instead


class Metered:
    """A call, with the CPU time of this process that each turn took: what a busy machine does not stretch."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call, self.times_ms = call, []

    def __call__(self) -> None:
        start = time.process_time()
        self.call()
        self.times_ms.append(1e3 * (time.process_time() - start))

    @property
    def cpu_ms(self) -> float:
        """Median of the turns."""
        return statistics.median(self.times_ms)


class Ceilings(NamedTuple):
    """What this machine did at best in this run."""

    read_gb_per_s: float  # bytes read, a sum over float32
    copy_gb_per_s: float  # bytes read and written
    fp32_gflop_per_s: float  # matrix product, 2048 cubed (8192 on CUDA)
    bf16_gflop_per_s: float
    # 8-bit factors, 32-bit sums; None: this build of torch has no such product here
    int8_gop_per_s: float | None = None

    def named(self, bytes_moved: int, flops: int, dtype: torch.dtype) -> str:
        """Which of them bounds so much work."""
        return (
            "memory"
            if bytes_moved and self.least_ms(bytes_moved, 0, dtype) >= self.least_ms(0, flops, dtype)
            else f"products, {str(dtype)[6:]}"
        )

    def least_ms(self, bytes_moved: int, flops: int, dtype: torch.dtype) -> float:
        """Time that these ceilings allow for so much memory traffic and arithmetic at once; arithmetic in 8 bits at the
        rate of bfloat16 where torch has no such product.
        """
        rates = {torch.float32: self.fp32_gflop_per_s, torch.int8: self.int8_gop_per_s}
        flops_per_s = 1e9 * (rates.get(dtype) or self.bf16_gflop_per_s)
        return 1e3 * max(bytes_moved / (1e9 * max(self.read_gb_per_s, self.copy_gb_per_s)), flops / flops_per_s)


class Spent(NamedTuple):
    """What a process took, its children included."""

    wall_s: float
    cpu_s: float  # of all its threads: what it would take of one core that others leave alone


def compare(
    candidates: dict[str, Callable[[], object]],
    device: str,
    seconds: float = 2.0,
    repeats: tuple[int, int] = (5, 100),
    *,
    replay: bool = True,
) -> dict[str, Timing]:
    """Times of all candidates: one warm-up turn, then turns until `seconds` a candidate are spent, between repeats[0]
    and repeats[1] of them.

    `replay` False launches every call from Python on CUDA too: for whole loops that make graphs of their own.
    """
    clock = _cuda_ms if device == "cuda" else _cpu_ms
    how = dict.fromkeys(candidates, "")
    if device == "cuda":
        turns = {
            name: replayed(call) if replay else (call, "launched from Python") for name, call in candidates.items()
        }
        candidates, how = ({name: turn[i] for name, turn in turns.items()} for i in (0, 1))
    for call in candidates.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    deadline = time.perf_counter() + seconds * len(candidates)
    for turn in range(repeats[1]):
        if turn >= repeats[0] and time.perf_counter() > deadline:
            break
        for name, call in candidates.items():
            times[name].append(clock(call))
    return {name: _timing(values, how[name]) for name, values in times.items()}


def _timing(times_ms: list[float], how: str) -> Timing:
    median = statistics.median(times_ms)
    lower, _, upper = statistics.quantiles(times_ms, n=4)
    return Timing(median, (upper - lower) / median, len(times_ms), how)


def replayed(call: Callable[[], object]) -> tuple[Callable[[], object], str]:
    """(replay of a CUDA graph of `call`, REPLAYED); (`call` itself, the reason) where it cannot be captured.

    The call must do the same each time, on the current device. Whether it waits for the device is tried before, outside
    a capture: one that fails half-way leaves torch's allocator unusable.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    before = torch.cuda.get_sync_debug_mode()
    try:
        # The capture's: autograd remembers where a leaf was first used, and the default stream cannot be captured
        with torch.cuda.stream(aside):
            call()  # compiles kernels, fills tables
            torch.cuda.set_sync_debug_mode("error")
            call()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return call, "launched from Python: it waits for the device"
    finally:
        torch.cuda.set_sync_debug_mode(before)
        torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=aside):
            call()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return call, f"launched from Python: {str(error).splitlines()[0]}"
    return graph.replay, REPLAYED


def _cpu_ms(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _cuda_ms(call: Callable[[], object]) -> float:
    torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def process(command: list[str], environment: dict[str, str] | None = None) -> Spent:
    """Run a command to its end. Raises CalledProcessError where it fails. Its output goes where ours goes."""
    before, start = os.times(), time.perf_counter()
    subprocess.run(command, check=True, env=environment)
    after = os.times()
    return Spent(
        time.perf_counter() - start,
        after.children_user - before.children_user + after.children_system - before.children_system,
    )


def ceilings(device: str, quick: bool = False) -> Ceilings:
    """Measured here and now: the best of several calls each."""
    edge, numbers = (8192, 2**28) if device == "cuda" else (1024 if quick else 2048, 2**25 if quick else 2**26)
    clock, tries = (_cuda_ms if device == "cuda" else _cpu_ms), 3 if quick else 7
    source, target = torch.ones(numbers, device=device), torch.empty(numbers, device=device)

    def best_s(call: Callable[[], object]) -> float:
        call()
        return min(clock(call) for _ in range(tries)) / 1e3

    read_s, copy_s = best_s(source.sum), best_s(lambda: target.copy_(source))
    products = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, edge, edge, device=device).to(dtype)
        products[dtype] = 2e-9 * edge**3 / best_s(lambda a=a, b=b: a @ b)
    int8 = None
    for call in _int8_products(device, edge):
        with contextlib.suppress(RuntimeError, NotImplementedError):
            int8 = max(int8 or 0.0, 2e-9 * edge**3 / best_s(call))
    return Ceilings(
        4e-9 * numbers / read_s, 8e-9 * numbers / copy_s, products[torch.float32], products[torch.bfloat16], int8
    )


def _int8_products(device: str, edge: int) -> Iterator[Callable[[], object]]:
    """Torch's ways to multiply 8-bit numbers; one that is missing here raises at its call."""
    a, b = torch.randint(-127, 128, (2, edge, edge), dtype=torch.int8, device=device)
    yield lambda: torch._int_mm(a, b.t())
    if device == "cpu":
        rows, scales, zeros, packed = (
            (a.int() + 127).to(torch.uint8),
            torch.ones(edge),
            torch.zeros(edge, dtype=torch.int64),
            [],
        )

        def by_onednn() -> None:
            if not packed:
                packed.append(torch.ops.onednn.qlinear_prepack(b, [edge, edge]))
            torch.ops.onednn.qlinear_pointwise(
                rows, 1.0, 127, packed[0], scales, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
            )

        yield by_onednn


def environment(device: str) -> dict[str, str | int]:
    """What a published number must carry: device, threads, versions, commit."""
    found: dict[str, str | int] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit_of(Path(__file__).parent),
    }
    if device == "cuda":
        import triton

        found |= {"triton": triton.__version__, "cuda": str(torch.version.cuda)}
    return found


def commit_of(checkout: Path) -> str:
    """As git describes it; "unknown" where there is no git, or no repository, as on a machine that got a copy."""
    command = ["git", "describe", "--always", "--dirty"]
    with contextlib.suppress(FileNotFoundError):
        done = subprocess.run(command, capture_output=True, text=True, cwd=checkout, check=False)
        return done.stdout.strip() or "unknown"
    return "unknown"


def on_path(checkout: Path) -> str:
    """PYTHONPATH of a process that takes its package from this checkout, and all others from where this one does."""
    return os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH"))))


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")

"""How much memory a call takes at most: of torch's allocator, exactly, or of a process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

ALLOCATOR, PROCESS = "torch's allocator", "the process"


def allocated_mib(call: Callable[[], object], device: str) -> float:
    """Most MiB that torch's tensors take during `call` beyond those that were there: results count, what C++ allocates
    by itself does not.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        del kept
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        kept = call()
    del kept
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most / 2**20


def status_kib(field: str) -> int:
    """A line of this process's status (Linux): VmRSS now, VmHWM at most. Not getrusage's ru_maxrss: a child starts with
    its parent's.
    """
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(field + ":")))


class Memory:
    """Peak bytes since this was made: of the process on the CPU, of torch's allocator on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at the present size
            self._before_kib = status_kib("VmRSS")

    def peak_bytes(self) -> int:
        """So far."""
        return (
            torch.cuda.max_memory_allocated()
            if self.device.type == "cuda"
            else 1024 * (status_kib("VmHWM") - self._before_kib)
        )

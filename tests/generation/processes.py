"""Sampling jobs in processes of their own: several ranks at once, or killed on the way."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from star_fast.generation.sample import sample_images
from star_fast.generation.sample_config import SampleConfig

# Children come from a server that has imported everything once (torch._dynamo is what building a module on the meta
# device imports).
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.generation.processes", "torch._dynamo"])
_PATIENCE_S = 120


def child(config: SampleConfig, rank: int, ranks: int) -> None:
    """One rank of a job."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    sample_images(config)


def run_ranks(config: SampleConfig, ranks: int) -> None:
    """The job on so many ranks, to its end."""
    processes = [PROCESSES.Process(target=child, args=(config, rank, ranks)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_PATIENCE_S)
    assert [process.exitcode for process in processes] == [0] * ranks


def kill_after_progress(config: SampleConfig, delay_s: float) -> None:
    """Start the job, wait until it has brought something new to the disk, then kill it (SIGKILL) `delay_s` later."""
    before = progress(config)
    process = PROCESSES.Process(target=child, args=(config, 0, 1))
    process.start()
    _wait_for(lambda: progress(config) > before or not process.is_alive())
    time.sleep(delay_s)
    process.kill()
    process.join()
    assert process.exitcode in (-9, 0), process.exitcode  # killed, or done before


def progress(config: SampleConfig) -> int:
    """Bytes of the unfinished file, 10^9 once it is finished; 0 before it exists."""
    out = Path(config.out)
    if out.exists():
        return 10**9
    try:
        return (out.with_name(out.name + ".parts") / "unfinished.npz").stat().st_size
    except FileNotFoundError:
        return 0


def _wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "the sampling process made no progress"
        time.sleep(0.001)

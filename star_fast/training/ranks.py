"""Joining the ranks of one job, and agreeing on what went wrong: an error of one rank ends all of
them with its words.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import os
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from star_fast.errors import AgreedError, UserError
from star_fast.storage import atomic_write_bytes

Result = TypeVar("Result")
_PATIENCE_S = 300  # of a rank for rank 0's port
_RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def import_deepspeed() -> Any:
    """DeepSpeed, loaded at use. Raises UserError naming the extra if it is missing."""
    try:
        # A CUDA toolkit without a GPU is no news here
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its accelerator search
            import deepspeed
    except ImportError as error:
        raise UserError(
            f"Training needs DeepSpeed, which cannot be imported ({error}): install it with "
            "pip install --no-build-isolation 'star_fast[train]'"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # The names that came instead do not exist in all versions of torch that are supported.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    return deepspeed


def start_ranks() -> tuple[int, int, torch.device]:
    """Join the process group the launcher describes, or make one of a single rank: (rank, ranks, device).

    Where all ranks run on this machine rank 0 takes any free port and tells the others: two jobs started at once do not
    meet on the launcher's default one.

    Raises:
        UserError: the launcher's environment does not make sense, or rank 0 does not appear.
    """
    rank, ranks, local_rank = _environment()
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks > 1:  # ranks that compile the same kernel at once would write one file, often over a network
        os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache" / f"rank-{local_rank}"))
    if not dist.is_initialized():
        deepspeed = import_deepspeed()
        backend = "nccl" if device.type == "cuda" else "gloo"
        if ranks == 1 or _all_ranks_are_here():
            dist.init_process_group(backend, store=_local_store(rank, ranks), rank=rank, world_size=ranks)
        # An op for inference that training never calls: compiling it takes a minute in silence, and a start that is
        # killed meanwhile leaves a lock file on which every later one waits for good.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        with contextlib.redirect_stdout(io.StringIO()):
            deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
        # Not earlier: DeepSpeed keeps groups for good, so a process that trains twice keeps its ranks
        atexit.register(_leave)
    return dist.get_rank(), dist.get_world_size(), device


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def end(status: int) -> None:
    """End the process of a rank among several, with this exit status; returns in one that is alone.

    Python's own end runs beside gloo's and torch's threads, and was seen to abort (SIGABRT) a rank whose work was done:
    its launcher then takes the whole job for a failed one.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    try:
        _leave()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)  # as it was told, whatever becomes of the others and of the pipes


def agree(problem: str | None) -> None:
    """A collective: if any rank names a problem all raise AgreedError with the first such rank's words."""
    problems = [problem]
    if dist.is_initialized() and dist.get_world_size() > 1:
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    for rank, one in enumerate(problems):
        if one is not None:
            raise AgreedError(one if rank == 0 else f"rank {rank}: {one}")


def together(job: Callable[[], Result]) -> Result:
    """A collective: run `job` here, and if it failed on any rank raise that error on all. `job` itself must not be a
    collective.
    """
    problem = None
    try:
        result = job()
    except UserError as error:
        problem = str(error)
    agree(problem)  # raises where `job` did, here or elsewhere
    return result


def _environment() -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK; without a launcher this is the only rank."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    try:
        rank, ranks, local_rank = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        )
        if not 0 <= rank < ranks or local_rank < 0:
            raise ValueError
    except ValueError as error:
        told = ", ".join(f"{name}={os.environ.get(name, 'unset')}" for name in _RENDEZVOUS)
        raise UserError(
            f"environment: expected 0 <= RANK < WORLD_SIZE and LOCAL_RANK as a launcher sets them, got {told}; "
            "start with deepspeed, torchrun or srun, or unset them"
        ) from error
    return rank, ranks, local_rank


def _all_ranks_are_here() -> bool:
    """Whether DeepSpeed's launcher started all ranks on this one machine. torchrun's agent keeps a store of its own:
    nothing to mend there.
    """
    return os.environ.get("CROSS_SIZE") == "1" and "TORCHELASTIC_RUN_ID" not in os.environ


def _local_store(rank: int, ranks: int) -> dist.Store:
    """A store on a port that was free: rank 0 opens it, the others learn its number from a file that the launcher's
    process id names.
    """
    note = _private_folder() / f"{os.getppid()}-{_start_time(os.getppid())}.port" if ranks > 1 else None
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, ranks, is_master=True, wait_for_workers=False)
        port = store.port
        if note is not None:
            atomic_write_bytes(note, str(port).encode())
    else:
        assert note is not None, "there are several ranks"
        port = _wait_for_port(note)
        store = dist.TCPStore("127.0.0.1", port, ranks, is_master=False)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    store.set(f"rank {rank} is here", "yes")
    if rank == 0 and note is not None:
        store.wait([f"rank {other} is here" for other in range(ranks)])
        note.unlink(missing_ok=True)
    return store


def _wait_for_port(note: Path) -> int:
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError):
            return int(note.read_bytes())
        time.sleep(0.05)
    raise UserError(
        f"rank {os.environ['RANK']}: rank 0 of this job has not appeared for {_PATIENCE_S} s; see what it said, "
        "then start again"
    )


def _private_folder() -> Path:
    """A folder for this user's notes in the place for temporary files, which others may write to: it must be ours
    alone.
    """
    folder = Path(tempfile.gettempdir()) / f"star_fast-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UserError(f"{folder}: expected a folder that only this user may write to; remove it, or set TMPDIR")
    return folder


def _start_time(process: int) -> str:
    """When a process began, in the kernel's ticks: with its number it names one process for good."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return "0"

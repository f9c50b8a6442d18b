"""One writer a folder: a lock that the kernel takes back when its holder dies, and that all ranks of one job hold
together.

The lock is `flock` on a small file that says who holds it. The holders share it; to take it first one must have it
alone for a moment. So a dead job never blocks, whatever its file says, and a second job is told whom it would disturb.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from star_fast.errors import UserError
from star_fast.storage import explain_write_errors, parse_json

LOCK_FILE = ".lock"
_PATIENCE_S = 20.0  # another process may have the file alone for the moment that writing a line takes
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}

log = logging.getLogger(__name__)


class Busy(UserError):
    """Another job is writing there."""


@contextlib.contextmanager
def only_writer(folder: str | Path, job: str, name: str = LOCK_FILE) -> Iterator[None]:
    """Hold `folder` for writing within the block; the other ranks of the same job may hold it too. Makes the folder.

    Args:
        folder: what will be written to.
        job: what is being done, for whoever comes second ("training", "sampling" ...).
        name: of the lock file: jobs that do not disturb each other in one folder use several.

    Raises:
        Busy: another job holds it; the line says which, on which machine, since when. StorageError: the folder cannot
            be written.
    """
    file = _take(Path(folder) / name, job)
    try:
        yield
    finally:
        if file is not None:
            file.close()  # which gives the lock back


def job_identity() -> str:
    """What all ranks of one job, and only they, have in common: the launcher's rendezvous; of a
    single process its id.
    """
    host, environment = socket.gethostname(), os.environ
    if environment.get("WORLD_SIZE", "1") == "1":
        return f"process {os.getpid()} on {host}"
    # srun started the ranks, not a launcher inside a step
    if "SLURM_STEP_ID" in environment and "TORCHELASTIC_RUN_ID" not in environment:
        return f"Slurm step {environment.get('SLURM_JOB_ID', '')}.{environment['SLURM_STEP_ID']}"
    address = environment.get("MASTER_ADDR", "localhost")
    if address not in ("localhost", "127.0.0.1", "::1"):
        port, run = environment.get("MASTER_PORT", ""), environment.get("TORCHELASTIC_RUN_ID", "")
        return f"job at {address}:{port} {run}".rstrip()
    return f"ranks of process {os.getppid()} on {host}"  # one launcher process started them all


def _take(path: Path, job: str) -> IO[str] | None:
    """The locked file, to be kept open; None where the file system knows no locks."""
    mine, end = job_identity(), time.monotonic() + _PATIENCE_S
    while True:
        with explain_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                file = open(path, "a+")  # noqa: SIM115 (the holder closes it)
            except FileNotFoundError:  # a job that was done removed the folder this very moment
                if time.monotonic() > end:
                    raise
                continue
        try:
            if _locked(file, fcntl.LOCK_EX):
                file.truncate(0)
                file.write(
                    json.dumps(
                        {"job": job, "holder": mine, "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
                    )
                )
                file.flush()
            if _locked(file, fcntl.LOCK_SH):
                holder = _read(file)
                if holder.get("holder") == mine and _is_at(file, path):
                    return file
                if holder.get("holder") != mine:
                    raise Busy(
                        f"{path.parent}: {holder.get('job', 'another job')} is writing there "
                        f"({holder.get('holder', 'unknown')}, since "
                        f"{holder.get('since', 'unknown')}); wait for it, stop it, or choose another folder"
                    )
        except OSError as error:
            file.close()
            if error.errno not in _UNSUPPORTED:
                raise
            log.warning("%s: this file system knows no locks; see to it that only one job writes there", path.parent)
            return None
        except BaseException:
            file.close()
            raise
        file.close()
        if time.monotonic() > end:
            raise Busy(f"{path.parent}: other jobs keep taking {path.name}; wait for them, or choose another folder")
        time.sleep(0.01)


def _locked(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _read(file: IO[str]) -> dict[str, object]:
    file.seek(0)
    try:
        value = parse_json(file.read(4096))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether the open file still is the one at `path`: a finished job may have removed its folder in between."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False

"""Where inputs run: forked workers, one after the other, so that a crash, a hang or a leak ends with the worker and is
blamed on one input.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from scripts.fuzzing.trial import PACKAGE, TRIES, Outcome, Subject, Watch, attempt, forget_parent, longest_s

_ADDRESS_SPACE = 8 * 2**30  # over what a worker begins with: no input takes the machine down
_FILE_BYTES = 2**30  # most that a reader may make a file grow to
_START_S = 60  # a worker's first input may wait so long for what its subject sets up


def copy_of(goods: Path, scratch: Path) -> Path:
    """A folder for one worker: the good files, and once more under .good to put them back from."""
    place = Path(tempfile.mkdtemp(dir=scratch))
    for target in (place, place / ".good"):
        shutil.copytree(goods, target, symlinks=True, dirs_exist_ok=True)
    (place / "odd").mkdir(exist_ok=True)
    os.mkfifo(place / "odd/pipe")
    (place / "odd/loop").symlink_to("loop")
    return place


def run(
    subjects: Sequence[Subject], jobs: Sequence[tuple[int, int]], seed: int, goods: Path, scratch: Path
) -> Iterator[Outcome]:
    """The outcome of each job, a pair of a subject's place in `subjects` and an input's number, in order. Workers are
    forked one after the other.
    """
    done = 0
    while done < len(jobs):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        traces = scratch / "traces"
        worker = multiprocessing.get_context("fork").Process(
            target=_work, args=(subjects, jobs[done:], seed, goods, scratch, sender, traces)
        )
        worker.start()
        sender.close()
        try:
            alive = True
            while alive and done < len(jobs):
                outcome, alive = _next(receiver, worker, subjects[jobs[done][0]], jobs[done][1], seed, goods, traces)
                done += 1
                yield outcome
        finally:
            worker.kill()
            worker.join()
            receiver.close()


def _next(
    receiver: Connection, worker: Any, subject: Subject, number: int, seed: int, goods: Path, traces: Path
) -> tuple[Outcome, bool]:
    """The worker's next outcome, and whether it lives on."""
    try:
        # The alarm inside the worker comes first, unless it is stuck where no Python runs.
        if receiver.poll(TRIES * longest_s() + _START_S):
            return receiver.recv(), True
        os.kill(worker.pid, signal.SIGUSR1)
        time.sleep(0.5)
        return _lost(subject, number, seed, goods, "hung", traces.read_text(errors="replace")), False
    except EOFError:
        worker.join()
        return _lost(
            subject,
            number,
            seed,
            goods,
            "crashed",
            f"exit code {worker.exitcode}\n{traces.read_text(errors='replace')}",
        ), False


def _lost(subject: Subject, number: int, seed: int, goods: Path, failure: str, told: str) -> Outcome:
    """The outcome of an input that took its worker along."""
    where = next((line.strip() for line in told.splitlines() if f"/{PACKAGE}/" in line), "")
    return Outcome(
        subject.name,
        number,
        failure,
        [failure],
        kind=failure,
        where=where,
        told=told[:6000],
        case=subject.make(rng(seed, subject, number), goods),
    )


def rng(seed: int, subject: Subject, number: int) -> Random:
    """The random stream of one input: any of them can be made again alone."""
    return Random(f"{seed} {subject.name} {number}")


def _work(
    subjects: Sequence[Subject],
    jobs: Sequence[tuple[int, int]],
    seed: int,
    goods: Path,
    scratch: Path,
    sender: Connection,
    traces: Path,
) -> None:
    place = copy_of(goods, scratch)
    forget_parent()
    watch, started = prepare_worker(scratch, place, traces), set()
    for index, number in jobs:
        subject = subjects[index]
        if subject.start is not None and index not in started:
            started.add(index)
            subject.start()
        case = subject.make(rng(seed, subject, number), place / ".good")
        sender.send(attempt(subject, number, case, place, watch))
    os._exit(0)


def prepare_worker(scratch: Path, place: Path, traces: Path) -> Watch:
    """Limits and watches of a process that is about to read what it should not trust."""
    canaries = scratch / "canaries"
    canaries.mkdir(exist_ok=True)
    os.chdir(place)
    sys.path.append(str(place))  # where the module lies that no pickle may import
    os.environ.update(FUZZ_CANARIES=str(canaries), STAR_FAST_DEBUG="1", TQDM_DISABLE="1")
    log = open(traces, "w")  # noqa: SIM115 (open as long as the process lives)
    faulthandler.enable(log)
    faulthandler.register(signal.SIGUSR1, log)
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):  # image libraries write there
        os.dup2(null, descriptor)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    for kind, most in (
        (resource.RLIMIT_AS, pages * resource.getpagesize() + _ADDRESS_SPACE),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
    return Watch(canaries)

"""Kill a job again and again, start it again, and compare all that it leaves with an unbroken run's, byte by byte.

    python scripts/kill_and_resume.py --kills 50 --ranks 2      SIGKILL at random moments, of all ranks
    python scripts/kill_and_resume.py --subject training --kills 30 --ranks 2 --one-rank    of a random rank
    python scripts/kill_and_resume.py --every-sync --ranks 2    SIGKILL at every fsync, rename and removal of a file,
                                                                one after the other

Exit status 0: after every kill that landed the job ended with equal files, and none besides.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.kill_subjects import SUBJECTS  # noqa: E402 (needs the path above)

os.environ.update(OMP_NUM_THREADS="1", TQDM_DISABLE="1")  # of all processes
# Of os: what is on the disk changes at each of them
STRUCK = ("fsync", "replace", "rename", "unlink", "remove", "rmdir")
KILLS_IN_A_ROW = 10  # at most, before the job may end and is looked at
LATEST = 0.7  # of an unbroken run's time: the last moment of a random kill
_PATIENCE_S = 300
_LAUNCHER_S = 20  # after so long a launcher kills what is left of a job
PROCESSES = multiprocessing.get_context("forkserver")


def process_main(
    subject: str, given: Path, work: Path, small: bool, environment: dict[str, str], strike: int | None
) -> None:
    """One rank. With `strike` it kills itself instead of making the call of STRUCK with that number, counted from 0."""
    os.environ.update(environment)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    tqdm.set_lock(threading.RLock())  # its own one is shared between processes, and a killed process leaves it behind
    if strike is not None:
        _patch(strike)
    SUBJECTS[subject].run(given, work, small)


def _patch(strike: int) -> None:
    calls = itertools.count()

    def struck(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **settings: Any) -> Any:
            if next(calls) == strike:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **settings)

        return wrapper

    for name in STRUCK:
        setattr(os, name, struck(getattr(os, name)))


class Killer:
    """One subject on so many ranks: runs it, kills it, compares what it leaves.

    Args:
        small: which of the subject's jobs.
        folder: an empty one, for everything.
        seed: of the random moments.
    """

    def __init__(self, name: str, ranks: int, small: bool, folder: Path, seed: int) -> None:
        self.name, self.subject, self.ranks, self.small, self.folder = name, SUBJECTS[name], ranks, small, folder
        self.random = random.Random(seed)
        self.given = folder / "given"
        self.given.mkdir()
        self.kills = self.compared = 0
        self.faults: list[str] = []
        PROCESSES.set_forkserver_preload(list(self.subject.preload))
        self.subject.prepare(self.given)
        first, self.expected = self._unbroken(), self._unbroken()  # the first also starts the server and warms caches
        if first != self.expected:
            self.faults.append(f"two unbroken runs differ: {self._difference(first, self.expected)}")

    def kill_at_random(self, kills: int, one_rank: bool = False) -> None:
        """Kill all ranks or a random one at random moments, up to KILLS_IN_A_ROW times on the way to one result, until
        `kills` have landed.
        """
        while self.kills < kills and not self.faults:
            self.work = self._new_work()
            for _ in range(self.random.randint(1, KILLS_IN_A_ROW)):
                self._start()
                time.sleep(self.random.random() * LATEST * self.whole_s)
                landed = self._kill_one() if one_rank else self._kill_all()
                self.kills += landed
                if not landed or self.kills == kills:  # it had ended already
                    break
            self._finish_and_compare(f"after {self.kills} kills")

    def kill_at_every_sync(self) -> None:
        """Kill each rank at each of its calls of STRUCK; the other ranks are killed with it."""
        for rank in range(self.ranks):
            strike = 0
            while not self.faults:
                self.work = self._new_work()
                self._start({rank: strike})
                self._join(self.job[rank])
                ended = self.job[rank].exitcode == 0  # it makes fewer calls
                self._kill_all()
                if ended:
                    break
                self.kills += 1
                self._finish_and_compare(f"rank {rank} killed at call {strike}")
                strike += 1
            print(f"{self.name}: rank {rank} of {self.ranks} killed at each of {strike} calls", flush=True)

    def _unbroken(self) -> dict[str, bytes]:
        started = time.perf_counter()
        self.work = self._new_work()
        self._start()
        self._end()
        self.whole_s = time.perf_counter() - started
        return self._result()

    def _new_work(self) -> Path:
        work = self.folder / "work"  # always the same name: it may be written into files
        if work.exists():
            shutil.rmtree(work)
        work.mkdir()
        return work

    def _start(self, strikes: dict[int, int] | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.job = []
        for rank in range(self.ranks):
            environment = {
                "RANK": str(rank),
                "WORLD_SIZE": str(self.ranks),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            self.job.append(
                PROCESSES.Process(
                    target=process_main,
                    args=(self.name, self.given, self.work, self.small, environment, (strikes or {}).get(rank)),
                )
            )
            self.job[-1].start()

    def _end(self) -> None:
        """Wait for all ranks to end well."""
        for rank, process in enumerate(self.job):
            self._join(process)
            if process.exitcode != 0:
                self.faults.append(f"rank {rank} ended with status {process.exitcode}")

    def _join(self, process: multiprocessing.Process) -> None:
        process.join(_PATIENCE_S)
        if process.is_alive():
            self.faults.append(f"a process did not end in {_PATIENCE_S} s")
            process.kill()
            process.join()

    def _kill_one(self) -> bool:
        """Kill a random rank; the others end by themselves, or, where they have not met yet, as a launcher ends them.
        Whether it was still at work.
        """
        chosen = self.random.choice(self.job)
        chosen.kill()
        chosen.join()
        for process in self.job:
            process.join(_LAUNCHER_S)
        return self._kill_all()

    def _kill_all(self) -> bool:
        """Whether any rank was still at work. One that ended by itself must have ended well."""
        for process in self.random.sample(self.job, len(self.job)):
            process.kill()
            process.join()
        expected = (0, -signal.SIGKILL, *((1,) if self.subject.peers_notice and self.ranks > 1 else ()))
        strange = [process.exitcode for process in self.job if process.exitcode not in expected]
        if strange:
            self.faults.append(f"a process ended with status {strange[0]}")
        return any(process.exitcode == -signal.SIGKILL for process in self.job)

    def _finish_and_compare(self, what: str) -> None:
        self._start()
        self._end()
        result = self._result()
        self.compared += 1
        if result != self.expected:
            self.faults.append(f"{what}: {self._difference(self.expected, result)}")

    def _result(self) -> dict[str, bytes]:
        files = {
            str(file.relative_to(self.work)): file
            for file in sorted(self.work.rglob("*"))
            if file.name not in self.subject.ignored
        }
        return {name: self.subject.canonical(file) if file.is_file() else b"" for name, file in files.items()}

    @staticmethod
    def _difference(expected: dict[str, bytes], found: dict[str, bytes]) -> str:
        differing = [name for name in sorted(expected.keys() & found.keys()) if expected[name] != found[name]]
        return (
            f"differing {differing}, missing {sorted(expected.keys() - found.keys())}, left over "
            f"{sorted(found.keys() - expected.keys())}"
        )


def main() -> int:
    """0 if nothing differed."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--subject", choices=sorted(SUBJECTS), default="sampling")
    parser.add_argument("--kills", type=int, default=20, help="at random moments")
    parser.add_argument("--every-sync", action="store_true", help="instead, at every fsync, rename and removal")
    parser.add_argument("--ranks", type=int, default=1, help="processes of the job; the unbroken run has as many")
    parser.add_argument(
        "--one-rank", action="store_true", help="kill a random rank only, as a machine that is lost would"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    arguments = parser.parse_args()
    if SUBJECTS[arguments.subject].single and arguments.ranks > 1:
        parser.error(f"{arguments.subject} is a job of one process")
    started = time.perf_counter()
    # A killed process loses nothing of what it wrote, synced or not: no disk is needed
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="kill-and-resume-", dir=memory) as folder:
        killer = Killer(arguments.subject, arguments.ranks, arguments.every_sync, Path(folder), arguments.seed)
        killer.kill_at_every_sync() if arguments.every_sync else killer.kill_at_random(
            arguments.kills, arguments.one_rank
        )
    how = "at every fsync, rename and removal" if arguments.every_sync else f"at random moments (seed {arguments.seed})"
    how = f"of a random rank {how}" if arguments.one_rank else how
    print(
        f"{arguments.subject} on {arguments.ranks} ranks: {killer.kills} kills {how}, {killer.compared} results "
        "compared, "
        f"{'all equal' if not killer.faults else 'NOT EQUAL'}, {time.perf_counter() - started:.0f} s"
    )
    print("\n".join(killer.faults), end="\n" if killer.faults else "")
    return 1 if killer.faults or not killer.kills else 0


if __name__ == "__main__":
    sys.exit(main())

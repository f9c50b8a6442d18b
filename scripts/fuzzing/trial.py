"""One damaged input, one reader, one verdict: what it did, how long it took, what it held in memory.

Watched from inside the process that reads (workers.py forks it): an audit hook for anything that starts a
program, connects, or looks up a class for a pickle; the canary folder, where every malicious payload would leave a
file; the peak of its memory; its time without the time it waited for a core (so that busy neighbours make no input
slow).
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import resource
import shutil
import signal
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from star_fast.errors import UserError

PACKAGE = "star_fast"
LIMIT_S, LIMIT_S_PER_KIB = 1.0, 0.010  # an input may take this long
LIMIT_BYTES = 300 * 2**20  # over what the process held before
_GRACE_S = 4.0  # beyond the limit, before an input counts as hung; as much again before its worker is killed
TRIES = 3  # an input is slow if it is slow as often
_EXECUTES = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
    "subprocess.Popen",
    "socket.connect",
    "socket.bind",
    "urllib.Request",
    "webbrowser.open",
    "pickle.find_class",
    "ctypes.dlopen",
)
FAILURES = ("traceback", "slow", "fat", "executed", "hung", "crashed", "garbled")


@dataclass(frozen=True)
class Case:
    """One input: a file of a subject with other content, or a command line."""

    change: str  # what was done to the good one
    file: str = ""  # relative to the subject's folder
    content: bytes | None = None
    irregular: str = ""  # what lies in the file's place instead: see IRREGULAR
    repairs: tuple[str, ...] = ()  # files whose checksums are made to fit, so that what lies behind them is reached
    arguments: tuple[str, ...] = ()  # of a command line
    environment: tuple[str, ...] = ()  # its variables, NAME=VALUE

    @property
    def size(self) -> int:
        """Bytes of the input."""
        return (
            len(self.content or b"") + HOLES.get(self.irregular, 0) + sum(len(argument) for argument in self.arguments)
        )


@dataclass(frozen=True)
class Subject:
    """A kind of file, or a command, and what the command line reads it with."""

    name: str
    about: str  # which reader
    make: Callable[[Random, Path], Case]  # an input, from a folder with good files
    read: Callable[[Path, Case], object]  # as the command line reads it; the folder then holds the input
    share: float = 1.0  # of all inputs, relative to other subjects
    start: Callable[[], object] | None = None  # once a worker, before the first input, in its folder
    clean: tuple[str, ...] = ()  # what reading writes to, files or folders: put back after every input
    repair: Callable[[Path], None] | None = None  # makes the checksums in the file's folder fit
    expected: tuple[str, ...] = ()  # audit events that are no news here


@dataclass
class Outcome:
    """What came of one input."""

    subject: str
    number: int
    verdict: str  # accepted, refused, or one of FAILURES
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    extra_bytes: int = 0
    kind: str = ""  # of the exception, or of the event
    where: str = ""  # innermost line of the package
    told: str = ""  # message or traceback
    case: Case | None = None  # only of failures


class Hung(BaseException):
    """An input is taking too long."""


def _make_sparse(path: Path, size: int) -> None:
    path.touch()
    os.truncate(path, size)


HOLES = {"250 MB of nothing": 250 * 10**6, "900 MB of nothing": 900 * 10**6}  # sparse files
IRREGULAR: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "empty device": lambda path: path.symlink_to("/dev/null"),
    "folder": lambda path: path.mkdir(),
    "missing": lambda path: None,
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to its folder": lambda path: path.symlink_to("."),
    **{name: functools.partial(_make_sparse, size=size) for name, size in HOLES.items()},
}


class Watch:
    """What runs on behalf of an input: events of the interpreter, files in the canary folder. One a process: audit
    hooks stay.
    """

    def __init__(self, canaries: Path) -> None:
        self.canaries, self.armed, self.expected, self.events = canaries, False, (), []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        # torch looks for GPUs; no name: this process itself, whose allocator is told something
        harmless = event == "ctypes.dlopen" and (arguments[0] is None or str(arguments[0]).startswith("libnvidia-ml"))
        if self.armed and event in _EXECUTES and event not in self.expected and not harmless:
            self.armed = False  # what follows from this event is no news
            stack = "".join(traceback.format_stack(limit=12)[:-1])
            self.events.append(
                (
                    f"{event} {str(arguments)[:200]}",
                    _innermost(traceback.walk_stack(sys._getframe(1)), reverse=True),
                    stack,
                )
            )

    @contextlib.contextmanager
    def on(self, expected: tuple[str, ...]) -> Iterator[None]:
        """Watch within the block."""
        self.events, self.expected, self.armed = [], expected, True
        try:
            yield
        finally:
            self.armed = False

    def found(self) -> list[tuple[str, str, str]]:
        """(event, where, stack) of what ran; canaries are removed."""
        events = list(self.events)
        with os.scandir(self.canaries) as entries:
            for entry in list(entries):
                events.append((f"canary {entry.name}", "", ""))
                shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
        return events


def attempt(subject: Subject, number: int, case: Case, place: Path, watch: Watch) -> Outcome:
    """Put the input in place, let it be read, see what happened, put everything back."""
    limit = LIMIT_S + LIMIT_S_PER_KIB * case.size / 1024
    seconds = []
    for _ in range(TRIES):
        outcome = _once(subject, case, place, watch, limit)
        seconds.append(outcome.seconds)
        # The alarm came, but only because neighbours had the cores
        starved = "hung" in outcome.failures and outcome.seconds <= limit
        if not starved and (outcome.seconds <= limit or outcome.failures):
            break
    outcome.number, outcome.seconds = number, min(seconds)
    if outcome.seconds > limit and "hung" not in outcome.failures:
        outcome.failures.append("slow")
        outcome.told += f"\n{outcome.seconds:.2f} s for {case.size} bytes"
    if outcome.failures:
        outcome.case, outcome.verdict = case, outcome.failures[0]
    return outcome


def _once(subject: Subject, case: Case, place: Path, watch: Watch, limit: float) -> Outcome:
    outcome, slow_at = Outcome(subject.name, 0, "accepted"), []
    original = put(subject, case, place)
    out, error = (
        io.TextIOWrapper(io.BytesIO(), "utf-8", newline=""),
        io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace", newline=""),
    )

    def alarm(_: int, frame: Any) -> None:
        slow_at.append(
            (_innermost(traceback.walk_stack(frame), reverse=True), "".join(traceback.format_stack(frame, limit=12)))
        )
        if len(slow_at) > 1:
            raise Hung

    signal.signal(signal.SIGALRM, alarm)
    _reset_peak()
    held, waited, began = _held_bytes(), _waited_s(), time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 1.05 * limit, _GRACE_S)
    try:
        with watch.on(subject.expected), contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            subject.read(place, case)
    except UserError as problem:
        outcome.verdict, outcome.told = "refused", str(problem)
    except Hung:
        outcome.failures.append("hung")
        outcome.told = slow_at[-1][1]
    except BaseException as problem:  # whatever it is, it is a finding
        outcome.failures.append("traceback")
        outcome.kind, outcome.where = type(problem).__name__, _innermost(traceback.walk_tb(problem.__traceback__))
        outcome.told = _middle_out("".join(traceback.format_exception(problem, limit=-16)))
        del problem
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    outcome.seconds = time.monotonic() - began - (_waited_s() - waited)
    outcome.extra_bytes = max(0, _peak_bytes() - held)
    if slow_at and not outcome.where:
        outcome.where = slow_at[0][0]
    if outcome.extra_bytes > LIMIT_BYTES:
        outcome.failures.append("fat")
        outcome.told += f"\n{outcome.extra_bytes / 2**20:.0f} MiB more than before"
    for event, where, stack in watch.found():
        outcome.failures.insert(0, "executed")
        outcome.kind, outcome.where, outcome.told = (
            event.split()[0],
            where or outcome.where,
            f"{event}\n{stack}{outcome.told}",
        )
    shown = (_shown(out) + _shown(error)).replace("\x1b[A", "")  # how nested progress bars go up a line
    shown += outcome.told if outcome.verdict == "refused" else ""
    if not case.arguments and (
        bad := next(
            (line for line in shown.replace("\r", "\n").replace("\t", " ").split("\n") if not line.isprintable()), None
        )
    ):
        outcome.failures.append("garbled")
        outcome.told += f"\nprinted as it is: {bad[:300]!r}"
    logging.getLogger().handlers.clear()  # command lines set them up with the streams of their time
    put_back(subject, case, place, original)
    return outcome


def put(subject: Subject, case: Case, place: Path) -> bytes | None:
    """Write the input over the good file; returns the good one's content."""
    if not case.file:
        return None
    path = place / case.file
    try:
        original = path.read_bytes()
    except OSError:
        original = None
        path.parent.mkdir(parents=True, exist_ok=True)
    _remove(path)
    if case.irregular:
        IRREGULAR[case.irregular](path)
    else:
        path.write_bytes(case.content or b"")
    if case.repairs and subject.repair is not None:
        with contextlib.suppress(Exception):  # not everything that was damaged can be made to fit
            subject.repair(path.parent)
    return original


def put_back(subject: Subject, case: Case, place: Path, original: bytes | None) -> None:
    """Undo what `put` and the reader did."""
    for name in (*subject.clean, *case.repairs):
        _remove(place / name)
        good = place / ".good" / name
        if good.is_dir():
            shutil.copytree(good, place / name, symlinks=True)
        elif good.exists():
            shutil.copyfile(good, place / name)
    if case.file and not any(case.file == name or case.file.startswith(f"{name}/") for name in subject.clean):
        path = place / case.file
        _remove(path)
        if original is not None:
            path.write_bytes(original)


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
        else:
            path.unlink()


def _innermost(frames: Iterator[tuple[Any, int]], reverse: bool = False) -> str:
    """The innermost line of the package among frames, outermost first (or, with `reverse`, innermost first)."""
    found = ""
    for frame, line in frames:
        path = frame.f_code.co_filename
        if f"/{PACKAGE}/" in path and "/scripts/" not in path:
            found = f"{path[path.rindex(f'/{PACKAGE}/') + 1 :]}:{line} {frame.f_code.co_name}"
            if reverse:
                break
    return found


def _shown(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode("utf-8", "replace") if not stream.closed else ""


def _middle_out(text: str, most: int = 6000) -> str:
    """The start and the end of a long text: a message may be longer than the traceback before it."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def longest_s() -> float:
    """What one try of an input may take before the alarm ends it, with some more to spare."""
    return LIMIT_S + 2 * _GRACE_S


def forget_parent() -> None:
    """To be called first in a forked process: what its parent knew of itself is not true of it."""
    _proc.cache_clear()


def _reset_peak() -> None:
    os.pwrite(_proc("clear_refs", os.O_WRONLY), b"5", 0)


def _peak_bytes() -> int:
    text = os.pread(_proc("status"), 4096, 0)
    return 1024 * int(text[text.index(b"VmHWM:") + 6 :].split(None, 1)[0])


def _held_bytes() -> int:
    return int(os.pread(_proc("statm"), 200, 0).split()[1]) * resource.getpagesize()


def _waited_s() -> float:
    """Seconds that this process's main thread was ready to run without a core to run on."""
    return int(os.pread(_proc("schedstat"), 200, 0).split()[1]) / 1e9


@functools.cache
def _proc(name: str, flags: int = os.O_RDONLY) -> int:
    """What the kernel tells of this process; opened once."""
    return os.open(f"/proc/self/{name}", flags)

"""A hang is said, not endless: a rank without progress tells where it stands, and ends, so that the launcher ends the
others.
"""

from __future__ import annotations

import os
import sys
import threading
import time

HANG_STATUS = 75  # EX_TEMPFAIL: starting again may help


class Watchdog:
    """Within a `with` block `at` says what begins; if nothing else begins for `minutes`, the process ends.

    A collective waits in compiled code for ranks that may never come, with Python's lock released: another thread
    watches. Each rank says its own line, so the rank that stands elsewhere than the others is the one that they wait
    for.
    """

    def __init__(self, rank: int, minutes: float) -> None:
        self.rank, self.patience_s = rank, 60.0 * minutes
        self.step, self.what, self.since = 0, "starting", time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, step: int, what: str) -> None:
        """`what` of optimizer step `step` (counted from 1) begins."""
        self.step, self.what, self.since = step, what, time.monotonic()

    def __enter__(self) -> Watchdog:
        self.since = time.monotonic()
        if self.patience_s:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self.patience_s / 4)):
            if time.monotonic() - self.since > self.patience_s:
                print(
                    f"\nrank {self.rank}: no progress for {(time.monotonic() - self.since) / 60:.1f} minutes "
                    f"(train.hang_minutes) in step {self.step}: "
                    f"{self.what}. Ranks that stand elsewhere are the ones to look at; what this one was doing:",
                    file=sys.stderr,
                    flush=True,
                )
                _main_stack()
                print(
                    f"rank {self.rank}: ends; start again with --resume to go on from the newest checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(HANG_STATUS)


def _main_stack() -> None:
    """The main thread's innermost frames, one line each."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    lines: list[str] = []
    while frame is not None and len(lines) < 8:
        lines.append(f"  {frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}")
        frame = frame.f_back
    print("\n".join(lines), file=sys.stderr, flush=True)

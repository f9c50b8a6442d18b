"""Readers with a bug each, under the eyes of scripts/fuzzing: prints what was made of each, as JSON. A process of its
own, since workers are forked.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts.fuzzing import trial, workers  # noqa: E402 (needs the path above)
from scripts.fuzzing.payloads import string  # noqa: E402
from scripts.fuzzing.trial import Case, Subject  # noqa: E402
from star_fast.errors import UserError  # noqa: E402

TOUCH = b"\x80\x02cposix\nsystem\n(" + string('touch "$FUZZ_CANARIES/x"') + b"tR."


def refuses(content: bytes) -> None:
    """As every reader should."""
    raise UserError(f"input: expected something else than {len(content)} bytes; give another")


def unpickles(content: bytes) -> None:
    """Runs what the file says."""
    pickle.loads(TOUCH)


def is_made_to_run_a_program(content: bytes) -> None:
    """Leaves no canary: only the audit hook sees it."""
    subprocess.run(["true"], check=False)


def raises_key_error(content: bytes) -> None:
    """Shows a traceback."""
    {}["missing"]


def allocates_a_gigabyte(content: bytes) -> None:
    """Believes a length field, and refuses afterwards."""
    size = len(b"x" * 10**9)
    raise UserError(f"{size} bytes are too many")


def sleeps(content: bytes) -> None:
    """Takes too long, but ends."""
    time.sleep(0.5)


def waits_for_good(content: bytes) -> None:
    """As on a pipe that nobody writes to."""
    os.read(os.pipe()[0], 1)


def takes_the_process_down(content: bytes) -> None:
    """As a bug in a C library."""
    os.kill(os.getpid(), signal.SIGSEGV)


def prints_what_it_read(content: bytes) -> None:
    """Hands the terminal to the file."""
    print(content.decode())


def leaves_the_input_damaged(content: bytes) -> None:
    """What it changes must be gone for the next input."""
    Path("input").write_bytes(b"changed")


def accepts(content: bytes) -> None:
    """Sees its own input, whatever ran before it."""
    if content != b"\x1b[31m" or Path("input").read_bytes() != content:
        raise AssertionError(content)


READERS = (
    refuses,
    unpickles,
    is_made_to_run_a_program,
    raises_key_error,
    allocates_a_gigabyte,
    sleeps,
    waits_for_good,
    takes_the_process_down,
    prints_what_it_read,
    leaves_the_input_damaged,
    accepts,
)


def subject(read: Callable[[bytes], None]) -> Subject:
    """One whose inputs are all alike."""
    return Subject(
        read.__name__,
        "",
        lambda random, good: Case("always the same", "input", b"\x1b[31m"),
        lambda place, case: read(case.content),
    )


def main() -> None:
    """Print {reader: [verdict, exception or event, failures]}."""
    trial.LIMIT_S, trial._GRACE_S = 0.2, 0.3
    with tempfile.TemporaryDirectory() as folder:
        goods = Path(folder, "goods")
        goods.mkdir()
        (goods / "input").write_bytes(b"good")
        subjects = [subject(read) for read in READERS]
        outcomes = list(workers.run(subjects, [(place, 0) for place in range(len(subjects))], 0, goods, Path(folder)))
    print(json.dumps({one.subject: [one.verdict, one.kind, one.failures] for one in outcomes}))


if __name__ == "__main__":
    main()

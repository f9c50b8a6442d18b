"""The last line of defence of both command lines: whatever ends a command becomes one line on stderr and an exit
status.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from star_fast.errors import UserError, printable

DEBUG = "STAR_FAST_DEBUG"  # set to 1: exceptions pass, with their traceback
INTERRUPTED = 130  # 128 + SIGINT, as shells say it
_OUT_OF_MEMORY = "out of memory; give the machine more, or ask for smaller sizes"


def guarded(job: Callable[[], None]) -> int:
    """Run `job`.

    Returns:
        The exit status: 0 done; 2 the user can mend it (one line that says how); 130 interrupted; 70 a bug of ours (one
        line that names the file with the traceback).
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows only ASCII shows the rest as escapes
    try:
        job()
        sys.stdout.flush()
    except UserError as error:
        if error.of_one_rank or _is_first_rank():  # one line, not one a rank
            print(f"{_who()}error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt as interrupt:
        if _is_first_rank():
            print(f"interrupted{f': {printable(interrupt)}' if str(interrupt) else ''}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has gone: star-fast presets | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MemoryError as error:
        return _unexpected(error, _OUT_OF_MEMORY)
    except OSError as error:
        return _unexpected(
            error, f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        )
    except Exception as error:
        return _unexpected(error, _OUT_OF_MEMORY if _is_out_of_memory(error) else None)
    return 0


def _is_out_of_memory(error: Exception) -> bool:
    """torch says it by a RuntimeError, on the CPU without a class of its own."""
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in str(error) or type(error).__name__ == "OutOfMemoryError"
    )


def _unexpected(error: BaseException, meaning: str | None) -> int:
    """Say what nobody foresaw in one line; the traceback goes to a file for whoever mends it."""
    if os.environ.get(DEBUG) == "1":
        raise error
    report = Path(tempfile.gettempdir()) / f"star_fast-error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    try:
        report.write_text("".join(traceback.format_exception(error)), errors="backslashreplace")
        where = f"traceback in {report}"
    except OSError:
        where = f"{DEBUG}=1 shows the traceback"
    what = (
        meaning
        if meaning is not None
        else f"unexpected {type(error).__name__}: {error}: a bug in star_fast, please report it"
    )
    print(f"{_who()}error: {printable(what)} ({where})", file=sys.stderr, flush=True)
    return 2 if meaning is not None else 70


def _is_first_rank() -> bool:
    rank = os.environ.get("RANK", "0")
    # One that is no number is nobody's: the error is about it
    return rank == "0" or not (rank.isascii() and rank.isdecimal())


def _who() -> str:
    return "" if _is_first_rank() else f"rank {os.environ['RANK']}: "

"""What a subject of throughput.py gives: pieces of work, and of each some rows of the one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.timing import Ceilings


class NotHere(Exception):
    """Why something has no figures on this machine: an absent package or device. No fault."""


class Given(NamedTuple):
    """What every subject is told."""

    device: str  # cpu or cuda
    quick: bool
    ceilings: Ceilings


class Row(NamedTuple):
    """One line of the table; None where a figure does not exist or was not measured. The first six are positional
    everywhere.
    """

    name: str
    backend: str
    median_ms: float | None
    spread: float | None  # the middle half of the times, as a share of the median
    ratio: float | None  # the baseline's time (or memory) over this one's: above 1 is better
    share: float | None  # of the speed that the ceiling allows
    megabytes: float = 0.0  # least that must be moved
    gigaflops: float = 0.0
    how: str = ""  # on CUDA: a graph's replay, or why not; why there are no figures
    error: str = ""  # what failed: there is no figure, the run goes on and exits with 1
    ceiling: str = ""  # what the share is of
    peak_mib: float | None = None  # most memory beyond what was there before the call
    memory_of: str = ""  # what peak_mib counts: torch's allocator, or a process


class Piece(NamedTuple):
    """A part of a subject that runs, and may fail, alone."""

    name: str
    run: Callable[[], list[Row]]


def without_figures(name: str, backend: str = "", *, how: str = "", error: str = "") -> Row:
    """A row that only says why."""
    return Row(name, backend, None, None, None, None, how=how, error=error)


def measured(piece: Piece) -> list[Row]:
    """A piece's rows. What it raises becomes a row: the other pieces must not pay for it. A package that is not
    installed is no error.
    """
    try:
        return piece.run()
    except NotHere as reason:
        return [without_figures(piece.name, how=f"skipped: {reason}")]
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] not in (
            "",
            "star_fast",
            "benchmarks",
        ):
            return [without_figures(piece.name, how=f"skipped: {error.name} is not installed")]
        return [without_figures(piece.name, error=told(error))]


def told(error: BaseException) -> str:
    """An error in one line."""
    first = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first[0]}"

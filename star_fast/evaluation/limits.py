"""What settings may ask for: ranges that give one clear line, and memory that is asked for before it is taken."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from star_fast.errors import UserError
from star_fast.host_memory import physical_bytes
from star_fast.records import require

MOST_SEED = 2**63 - 1
MOST_COUNT = 2**40  # of what only takes time


def require_ranges(record: Any, ranges: Mapping[str, tuple[float, float]], section: str = "") -> None:
    """Raise ConfigError, naming the option as it is typed, unless each field of the dataclass `record` lies in its
    range, ends included; NaN lies in none.
    """
    for name, (least, most) in ranges.items():
        value = getattr(record, name)
        require(least <= value <= most, option(name, section), value, f"{_shown(least)} ... {_shown(most)}")


def option(name: str, section: str = "") -> str:
    """The command-line option of a field: "max_images" of section "classifier" is --classifier.max-images."""
    return f"--{section}{'.' if section else ''}{name}".replace("_", "-")


def require_memory(needed_bytes: int, what: str, remedy: str) -> None:
    """Raise UserError if this machine has not even that much memory."""
    there = physical_bytes()
    if needed_bytes > there:
        raise UserError(
            f"{what} take {needed_bytes / 2**30:,.1f} GiB of memory, this machine has {there / 2**30:,.1f} GiB; "
            f"{remedy}"
        )


@contextlib.contextmanager
def explain_out_of_memory(remedy: str) -> Iterator[None]:
    """Turn a refused allocation, of the host or of a GPU, met inside, into a UserError."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise UserError(f"out of memory: {_first_line(error)}; {remedy}") from error
    except RuntimeError as error:
        # torch on the host has no exception of its own
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        raise UserError(f"out of memory: {_first_line(error)}; {remedy}") from error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _shown(limit: float) -> str:
    if isinstance(limit, int) and limit > 10**9:  # powers of two, or one less
        power = limit.bit_length()
        return f"2^{power} - 1" if limit == 2**power - 1 else f"2^{power - 1}"
    return f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"

"""A function in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Its result, or what it raised. The process starts from nothing and ends in order, so that it leaves no lock of
    its own behind.
    """
    pool = multiprocessing.get_context("spawn").Pool(1)
    try:
        return pool.apply(function, arguments)
    finally:
        pool.close()
        pool.join()

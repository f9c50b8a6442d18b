"""Training steps as rows of throughput.py: the candidates of training.py, beside the products' ceiling."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch

from benchmarks import memory, training
from benchmarks.rows import Given, NotHere, Piece, Row
from benchmarks.training import COMPOSED, KEPT, LLAMAGEN, OURS, OURS_PLAIN

STAR, PLAIN = (OURS, COMPOSED, KEPT), (OURS_PLAIN, LLAMAGEN)


def size_of(given: Given) -> str:
    """Which model."""
    return "tiny" if given.quick else "B"


def pieces(given: Given) -> list[Piece]:
    """ST-AR steps, then plain ones; candidates in processes of their own take turns."""
    where = (
        f"{size_of(given)}, {training.images_of(training.run_config(True, size_of(given)), size_of(given))} images x "
        f"{training.VIEWS} views"
    )
    star = tuple(name for name in STAR if name != KEPT or given.device == "cpu")
    return [
        Piece(name, functools.partial(_rows, name, candidates, base, given))
        for name, candidates, base in (
            (f"training step, ST-AR, {where}", star, COMPOSED),
            (f"training step, plain, {where}", PLAIN, LLAMAGEN),
        )
    ]


def _rows(name: str, candidates: tuple[str, ...], base: str, given: Given) -> list[Row]:
    if importlib.util.find_spec("deepspeed") is None:
        raise NotHere("deepspeed is not installed")
    found = training.measure(list(candidates), 3 if given.quick else 9, torch.get_num_threads(), False, size_of(given))
    rows = []
    for candidate, figures in found.items():
        config = training.run_config(candidate in STAR, size_of(given))
        flops, dtype = (
            sum(training.model_flops(config)),
            torch.float32 if config.train.precision == "fp32" else torch.bfloat16,
        )
        median_ms = figures["median_ms"]
        least_ms = given.ceilings.least_ms(0, flops, dtype)
        rows.append(
            Row(
                name,
                candidate,
                median_ms,
                figures["spread"],
                found[base]["median_ms"] / median_ms,
                least_ms / median_ms,
                gigaflops=flops / 1e9,
                how="" if given.device == "cpu" else "whole steps",
                ceiling=given.ceilings.named(0, flops, dtype),
                peak_mib=figures["peak_bytes"] / 2**20,
                memory_of=memory.PROCESS if given.device == "cpu" else memory.ALLOCATOR,
            )
        )
    return rows


def main_call(given: Given) -> Callable[[], object]:
    """For --profile, in a process of its own: a whole ST-AR step."""
    if importlib.util.find_spec("deepspeed") is None:
        raise NotHere("deepspeed is not installed")
    from star_fast.training.ranks import start_ranks

    _, _, device = start_ranks()
    step, *_ = training.build(OURS, device, size_of(given))
    for number in range(training.WARM_UP_STEPS):
        step(number)
    return functools.partial(step, training.WARM_UP_STEPS)

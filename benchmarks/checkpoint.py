"""Saving and loading a training state, beside torch.save and torch.load of the same tensors and beside the disk alone.

Rows of throughput.py. `checkpoint.save` writes masters, moments, teacher and a model folder, hashes every byte, flushes
all to disk and renames; the disk alone writes as many bytes and flushes them. `checkpoint.load` checks every hash
before it reads. Before each turn of loading its files are dropped from the system's cache, everyone's alike (a file
system in memory keeps them).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import loading_store, memory, timing
from benchmarks.alone import alone
from benchmarks.rows import Given, NotHere, Piece, Row
from benchmarks.timing import Timing
from star_fast.data.codes import CodeStore
from star_fast.host_memory import give_back
from star_fast.presets import preset
from star_fast.training.batches import Batches, resolve

DISK, OURS, TORCH, FLUSHED, READ = "the disk alone", "star_fast", "torch.save", "torch.save, flushed", "torch.load"
_BLOCK_BYTES = 2**24


class State:
    """A state after one optimizer step, saved once: what every candidate writes and reads."""

    def __init__(self, place: Path, size: str) -> None:
        from star_fast.training import checkpoint
        from star_fast.training.engine import Engine, build_student
        from star_fast.training.ranks import start_ranks

        _, _, device = start_ranks()
        (place / "codes").mkdir()
        loading_store.write_store(place / "codes", 1000)
        self.store, self.run, self.checkpoint = CodeStore.open(place / "codes"), place / "run", checkpoint
        config = resolve(preset(size), self.store)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, images_per_step=1))
        self.engine = Engine(config, build_student(config), device, 1, 1)
        # AdamW's moments exist from the first step on
        self.engine.step(Batches(self.store, config).step(0), 0, config.lr)
        self.numbers = itertools.count(1)
        self.save()
        files = sorted(path for path in checkpoint.latest(self.run).rglob("*") if path.is_file())
        self.bytes = sum(path.stat().st_size for path in files)
        self.tensors: dict[str, Tensor] = {
            f"{path.parent.name}/{path.stem}/{name}": tensor
            for path in files
            if path.suffix == ".safetensors"
            for name, tensor in load_file(path).items()
        }
        self.by_torch, self.plain = place / "by_torch.pt", place / "plain"

    def save(self) -> None:
        """A checkpoint; the one before is removed, as in a run."""
        self.checkpoint.save(self.engine, self.store, self.run, next(self.numbers), keep=1)

    def load(self) -> None:
        """The checkpoint, checked, back into engine and teacher."""
        folder = self.checkpoint.latest(self.run)
        forget(*(path for path in folder.rglob("*") if path.is_file()))
        self.checkpoint.load(self.engine, self.store, folder)

    def save_by_torch(self, flush: bool) -> None:
        """All tensors of the checkpoint in one file."""
        with open(self.by_torch, "wb") as file:
            torch.save(self.tensors, file)
            if flush:
                _flush(file.fileno())

    def load_by_torch(self) -> None:
        """Into memory; putting them back is not counted."""
        forget(self.by_torch)
        torch.load(self.by_torch, weights_only=True)

    def write(self) -> None:
        """As many bytes as a checkpoint has, flushed: the ceiling."""
        block = memoryview(os.urandom(_BLOCK_BYTES))
        with open(self.plain, "wb", buffering=0) as file:
            for begin in range(0, self.bytes, _BLOCK_BYTES):
                file.write(block[: self.bytes - begin])
            _flush(file.fileno())

    def read(self) -> None:
        """The same bytes into one buffer of a block: the ceiling."""
        forget(self.plain)
        block = bytearray(_BLOCK_BYTES)
        with open(self.plain, "rb", buffering=0) as file:
            while file.readinto(block):
                pass


def forget(*paths: Path) -> None:
    """Ask the system to drop its copies of flushed files."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # what is not on the disk yet cannot be dropped
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _flush(number: int) -> None:
    os.fsync(number)


def pieces(given: Given) -> list[Piece]:
    """Save and load."""
    size = "tiny" if given.quick else "B"
    return [Piece(f"checkpoint, state of {size}", functools.partial(_in_a_process, size, given))]


def _in_a_process(size: str, given: Given) -> list[Row]:
    """A training state needs ranks, which a process keeps for good."""
    if importlib.util.find_spec("deepspeed") is None:
        raise NotHere("deepspeed is not installed")
    return alone(_rows, size, given, torch.get_num_threads())


def _rows(size: str, given: Given, threads: int) -> list[Row]:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as place:
        state = State(Path(place), size)
        seconds, repeats = (0.5, (3, 5)) if given.quick else (10.0, (3, 9))
        saving: dict[str, Callable[[], object]] = {
            OURS: state.save,
            TORCH: lambda: state.save_by_torch(False),
            FLUSHED: lambda: state.save_by_torch(True),
            DISK: state.write,
        }
        loading: dict[str, Callable[[], object]] = {OURS: state.load, READ: state.load_by_torch, DISK: state.read}
        saved = timing.compare(saving, "cpu", seconds, repeats)
        loaded = timing.compare(loading, "cpu", seconds, repeats)
        peaks = {
            verb: {name: _peak_mib(call) for name, call in calls.items()}
            for verb, calls in (("save", saving), ("load", loading))
        }
        return [
            *_of("save", TORCH, saved, size, state.bytes, peaks),
            *_of("load", READ, loaded, size, state.bytes, peaks),
        ]


def _peak_mib(call: Callable[[], object]) -> float:
    call()
    give_back()  # what was freed and kept would serve the next call unseen
    before = memory.Memory(torch.device("cpu"))
    call()
    return before.peak_bytes() / 2**20


def _of(
    verb: str, base: str, times: dict[str, Timing], size: str, held: int, peaks: dict[str, dict[str, float]]
) -> list[Row]:
    name = f"checkpoint {verb}, state of {size}, {held / 1e6:.0f} MB"
    ceiling = "the disk, flushed" if verb == "save" else "the disk"
    return [
        Row(
            name,
            who,
            found.median_ms,
            found.spread,
            None if who == DISK else times[base].median_ms / found.median_ms,
            times[DISK].median_ms / found.median_ms,
            held / 1e6,
            ceiling=ceiling,
            peak_mib=peaks[verb][who],
            memory_of=memory.PROCESS,
        )
        for who, found in times.items()
    ]


def main_call(given: Given) -> Callable[[], object]:
    """For --profile, in a process of its own: a save and a load, each under its name."""
    if importlib.util.find_spec("deepspeed") is None:
        raise NotHere("deepspeed is not installed")
    place = tempfile.TemporaryDirectory()
    state = State(Path(place.name), "tiny" if given.quick else "B")

    def call(place: tempfile.TemporaryDirectory = place) -> None:  # which lives as long as the call
        for name, part in (("checkpoint.save", state.save), ("checkpoint.load", state.load)):
            with torch.profiler.record_function(name):
                part()

    return call

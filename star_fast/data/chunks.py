"""Consecutive images of a source, decoded and cut into views, while the caller encodes the ones before; and a chunk's
codes in a file of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from star_fast.data.manifest import SkippedSoFarRecord
from star_fast.data.sources import UnreadableImage
from star_fast.data.view_reading import ViewReader
from star_fast.data.views import ImageViews
from star_fast.storage import StorageError, atomic_write_bytes, parse_json, read_bytes, sha256_of_bytes, to_record


class Chunk(NamedTuple):
    """Consecutive images of a source, decoded and cut into views."""

    views: list[np.ndarray]  # of each readable image: (A, C, H, W) uint8
    labels: list[int]
    keys: list[str]
    skipped: list[dict[str, Any]]  # {"index", "key", "reason"}
    start: int  # the source index of the first image
    end: int  # the source index after the chunk


def read_chunks(reader: ViewReader, spans: Sequence[tuple[int, int]]) -> Iterator[Chunk]:
    """The chunks of source images `spans` [(start, end)], in order; the next one is made in the background while the
    caller uses the present one.
    """
    with ThreadPoolExecutor(1) as ahead:

        def chunk(start: int, end: int) -> Chunk:
            return _as_chunk(reader(range(start, end)), start, end)

        pending = ahead.submit(chunk, *spans[0]) if spans else None
        for following in [*spans[1:], None]:
            if pending is not None:
                done = pending.result()
                pending = ahead.submit(chunk, *following) if following else None
                yield done


def _as_chunk(results: Sequence[ImageViews | UnreadableImage], start: int, end: int) -> Chunk:
    good = [result for result in results if not isinstance(result, UnreadableImage)]
    bad = [
        {"index": start + i, "key": result.key, "reason": result.reason}
        for i, result in enumerate(results)
        if isinstance(result, UnreadableImage)
    ]
    return Chunk(
        [views for views, _, _ in good], [label for _, label, _ in good], [key for _, _, key in good], bad, start, end
    )


class EncodedChunk(NamedTuple):
    """What a chunk becomes."""

    codes: np.ndarray  # (n, A, T) whole numbers
    labels: list[int]
    keys: list[str]
    skipped: list[dict[str, Any]]
    start: int
    end: int


@dataclass(frozen=True)
class _PartRecord:
    """What a part says about its codes."""

    job_sha256: str
    labels: list[int]
    keys: list[str]
    start: int
    end: int
    skipped: list[SkippedSoFarRecord] = field(default_factory=list)


def write_part(path: Path, chunk: EncodedChunk, job: str) -> None:
    """Write a chunk to a file of its own, whole or not at all: a sha256 of all that follows, a line of JSON, the codes
    as uint16.

    Raises:
        StorageError: the disk is full or the place cannot be written.
    """
    about = {
        "job_sha256": job,
        "labels": chunk.labels,
        "keys": chunk.keys,
        "start": chunk.start,
        "end": chunk.end,
        "skipped": chunk.skipped,
    }
    content = json.dumps(about).encode() + b"\n" + chunk.codes.astype("<u2").tobytes()
    atomic_write_bytes(path, sha256_of_bytes(content).encode() + b"\n" + content)


def read_part(path: Path, job: str, views: int, positions: int) -> EncodedChunk | None:
    """The chunk that `write_part` wrote for this job; None where there is none, or what is there is another job's or
    damaged: then it is made again.
    """
    try:
        digest, _, content = read_bytes(path, "expected the codes of a chunk").partition(b"\n")
        if sha256_of_bytes(content).encode() != digest:
            return None
        line, _, codes = content.partition(b"\n")
        record = to_record(parse_json(line), path, _PartRecord, "it is made again")
    except (StorageError, ValueError):
        return None
    if (
        record.job_sha256 != job
        or len(record.labels) != len(record.keys)
        or len(codes) != 2 * len(record.labels) * views * positions
    ):
        return None
    array = np.frombuffer(codes, dtype="<u2").reshape(-1, views, positions).astype(np.int64)
    return EncodedChunk(
        array, record.labels, record.keys, [vars(entry) for entry in record.skipped], record.start, record.end
    )

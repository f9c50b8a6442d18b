"""The plan of turning images into codes: files read, JPEGs decoded and cropped on CPU cores, crops encoded on GPUs,
codes written. Predicted, not measured.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from star_fast.config import DataConfig, TokenizerConfig
from star_fast.planning.assumptions import PreparationAssumptions
from star_fast.planning.gpus import COUNTS, GIB, GPUS, Gpu
from star_fast.planning.plan import RESERVED_GIB
from star_fast.planning.tokenizer_work import Half, encoder, live_bytes, search_bytes
from star_fast.records import require

CHUNK_IMAGES = 64  # dealt to a process at once: data/prepare.py
# One core of a 2023 Xeon, Pillow in threads (benchmarks/results/loading.md): 4.2 ms an image for ten crops, 7.0 for
# twenty.
DECODE_MS, RANGE_MS = 1.4, 2.8
CODE_BYTES = 2
_MOST = 2**20  # views encoded at once: where the search ends


class OneGpu(NamedTuple):
    """What one GPU of a kind encodes."""

    gpu: Gpu
    fits: bool  # the views asked for
    largest_views: int  # encoded at once; 0: none
    fp32_per_s: float  # images, all their views
    bf16_per_s: float


class Duration(NamedTuple):
    """Seconds of the whole job on `gpus` of a kind."""

    gpus: int
    encoding_s: float  # of the GPU that has the most chunks
    cpu_s: float  # of its cores
    storage_s: float  # files read, codes written
    total_s: float  # with the start; the three run beside each other
    bound: str


class PreparationPlan(NamedTuple):
    """All that `star-fast plan prepare` says."""

    tokenizer: TokenizerConfig
    images: int
    views: int
    precision: str
    batch_views: int
    gpus: int
    gpu: Gpu
    assumed: PreparationAssumptions
    cpu_ms: float  # an image
    view_flops: int
    memory_bytes: int  # of one GPU in this precision, CUDA's own not counted
    read_bytes: int
    code_bytes: int
    kinds: list[OneGpu]
    durations: dict[str, list[Duration]]


def views_of(data: DataConfig) -> int:
    """Views that are encoded of an image."""
    return 10 * len(data.crop_ranges) if data.views == "ten-crop" else data.affine_views


def make_preparation_plan(
    tokenizer: TokenizerConfig,
    data: DataConfig,
    images: int,
    gpus: int,
    gpu: Gpu,
    assumed: PreparationAssumptions,
    *,
    precision: str = "fp32",
    batch_views: int = 64,
) -> PreparationPlan:
    """Plan encoding all views of `images`.

    Args:
        batch_views: encoded at once. gpus, gpu: what the closing line is about; the tables show every kind and COUNTS
            as well.

    Raises:
        ConfigError: a number out of range.
    """
    for name, value, most in (("images", images, 2**53), ("batch_views", batch_views, _MOST), ("gpus", gpus, 2**20)):
        require(1 <= value <= most, f"--{name.replace('_', '-')}", value, f"1 ... {most}")
    require(precision in ("fp32", "bf16"), "--precision", precision, "fp32 or bf16")
    views, half = views_of(data), encoder(tokenizer)
    cpu_ms = assumed.cpu_ms_per_image or DECODE_MS + RANGE_MS * (
        len(data.crop_ranges) if data.views == "ten-crop" else 1
    )
    read, codes = int(images * 1e3 * assumed.file_kb), images * views * tokenizer.positions * CODE_BYTES
    kinds = []
    for kind in GPUS.values():
        largest = _largest(tokenizer, half, precision, kind)
        kinds.append(
            OneGpu(
                kind,
                batch_views <= largest,
                largest,
                assumed.fp32_share * kind.fp32_flops_per_s / (views * half.flops),
                assumed.convolution_share * kind.bf16_flops_per_s / (views * half.flops),
            )
        )
    durations = {
        kind.gpu.name: [
            _duration(kind, count, images, precision, cpu_ms, read, codes, assumed) for count in sorted({*COUNTS, gpus})
        ]
        for kind in kinds
    }
    return PreparationPlan(
        tokenizer,
        images,
        views,
        precision,
        batch_views,
        gpus,
        gpu,
        assumed,
        cpu_ms,
        half.flops,
        memory_bytes(tokenizer, half, precision, batch_views),
        read,
        codes,
        kinds,
        durations,
    )


def memory_bytes(tokenizer: TokenizerConfig, half: Half, precision: str, views: int) -> int:
    """Of encoding `views` at once: the tokenizer twice (the job's own in float32, the encoder's copy), the tensors
    alive, the search, the views themselves.
    """
    size = 2 if precision == "bf16" else 4
    pictures = views * tokenizer.image_channels * tokenizer.image_size**2 * (1 + 4)  # bytes and float32
    return (4 + size) * half.weights + live_bytes(half, views, size) + search_bytes(tokenizer, views) + pictures


def _largest(tokenizer: TokenizerConfig, half: Half, precision: str, kind: Gpu) -> int:
    fits, too_many = 0, _MOST
    while fits + 1 < too_many:
        middle = (fits + too_many) // 2
        if memory_bytes(tokenizer, half, precision, middle) <= (kind.memory_gib - RESERVED_GIB) * GIB:
            fits = middle
        else:
            too_many = middle
    return fits


def _duration(
    kind: OneGpu,
    gpus: int,
    images: int,
    precision: str,
    cpu_ms: float,
    read: int,
    codes: int,
    assumed: PreparationAssumptions,
) -> Duration:
    """Chunks are dealt whole. Every process but the first hands its codes over in files, which the first one reads and
    writes again into the store.
    """
    share = min(math.ceil(math.ceil(images / CHUNK_IMAGES) / gpus) * CHUNK_IMAGES, images)
    encoding_s = share / (kind.fp32_per_s if precision == "fp32" else kind.bf16_per_s)
    cpu_s = share * cpu_ms / 1e3 / assumed.cores_per_gpu
    storage_s = (read + codes + 2 * codes * (gpus - 1) / gpus) / (1e9 * assumed.storage_gb_per_s)
    parts = {"encoder": encoding_s, "CPU": cpu_s, "storage": storage_s, "starting": assumed.start_s}
    return Duration(
        gpus,
        encoding_s,
        cpu_s,
        storage_s,
        assumed.start_s + max(encoding_s, cpu_s, storage_s),
        max(parts, key=parts.__getitem__),
    )

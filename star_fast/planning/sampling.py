"""The plan of drawing and scoring images: memory of a batch, images a second, time on any number of GPUs. Predicted,
not measured.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from star_fast.config import ModelConfig, RunConfig, TokenizerConfig
from star_fast.errors import ConfigError
from star_fast.planning import decoding
from star_fast.planning.assumptions import SamplingAssumptions
from star_fast.planning.gpus import COUNTS, GIB, GPUS, Gpu
from star_fast.planning.plan import RESERVED_GIB
from star_fast.planning.sizes import parameters
from star_fast.planning.tokenizer_work import Half, decoder, live_bytes
from star_fast.records import require

PIECE_IMAGES = 16  # decoded to pixels at once: CUDA_PIECE_IMAGES of generation/render.py
INCEPTION_FLOPS = 11_426_464_960  # of one image in torch-fidelity's network
SHOWN_BATCHES = (1, 8, 64, 256)
_MOST = 2**20  # images of a batch: where the search ends


class Memory(NamedTuple):
    """Bytes on one GPU while it draws a batch."""

    weights: int  # transformer and tokenizer
    cache: int
    decoding: int  # logits and a row's activations
    pixels: int  # a piece in the VQ decoder, the batch's pictures

    @property
    def total(self) -> int:
        """All at once: codes of the next batch are drawn while the last one's pixels are made."""
        return sum(self)


class Speed(NamedTuple):
    """Of one GPU at one batch."""

    batch_images: int
    step_s: float
    codes_per_s: float  # images, their codes alone
    images_per_s: float  # with pixels


class OneGpu(NamedTuple):
    """What one GPU of a kind does."""

    gpu: Gpu
    fits: bool  # the batch asked for
    largest_images: int  # of a batch that fits; 0: none
    speeds: list[Speed]  # at SHOWN_BATCHES, the batch asked for and the largest
    chosen: Speed
    pixels_per_s: float  # images, their pixels alone
    features_per_s: float  # images, Inception alone


class Duration(NamedTuple):
    """Seconds of the whole job on `gpus` of a kind."""

    gpus: int
    drawing_s: float  # of the GPU that has the most batches
    storage_s: float  # files written and read, beside it
    features_s: float  # of one GPU: `star-fast evaluate` is one process
    total_s: float  # with both starts
    bound: str  # what takes the longest


class SamplingPlan(NamedTuple):
    """All that `star-fast plan sample` says."""

    config: RunConfig
    images: int
    batch_images: int
    guided: bool
    cache: str
    gpus: int
    gpu: Gpu
    assumed: SamplingAssumptions
    memory: Memory
    pixel_flops: int  # of an image in the VQ decoder
    traffic: decoding.Traffic
    file_bytes: int  # of the images' file
    kinds: list[OneGpu]
    durations: dict[str, list[Duration]]  # by the GPU's name


def make_sampling_plan(
    config: RunConfig,
    images: int,
    batch_images: int,
    gpus: int,
    gpu: Gpu,
    assumed: SamplingAssumptions,
    *,
    guided: bool = True,
    cache: str = "model",
) -> SamplingPlan:
    """Plan `images` of a model whose sizes are set.

    Args:
        batch_images: drawn together. gpus, gpu: what the closing line is about; the tables show every kind and COUNTS
            as well.

    Raises:
        ConfigError: a number out of range, or a model whose codes an image are no square.
    """
    for name, value, most in (("images", images, 2**53), ("batch_images", batch_images, _MOST), ("gpus", gpus, 2**20)):
        require(1 <= value <= most, f"--{name.replace('_', '-')}", value, f"1 ... {most}")
    require(cache in decoding.CACHES, "--cache", cache, " or ".join(decoding.CACHES))
    if math.isqrt(config.model.positions) ** 2 != config.model.positions:
        raise ConfigError(
            f"model.positions: {config.model.positions} codes an image fill no square, and no image can be made of them"
        )
    pixels = decoder(tokenizer_at(config))
    file_bytes = images * _picture_bytes(config)
    kinds = [_one_gpu(kind, config, batch_images, pixels, assumed, guided, cache) for kind in GPUS.values()]
    counts = sorted({*COUNTS, gpus})
    durations = {
        kind.gpu.name: [_duration(kind, count, images, file_bytes, assumed) for count in counts] for kind in kinds
    }
    return SamplingPlan(
        config,
        images,
        batch_images,
        guided,
        cache,
        gpus,
        gpu,
        assumed,
        memory(config, batch_images, pixels, guided, cache),
        pixels.flops,
        decoding.step_traffic(config.model, batch_images, guided=guided, cache=cache),
        file_bytes,
        kinds,
        durations,
    )


def memory(config: RunConfig, images: int, pixels: Half, guided: bool, cache: str) -> Memory:
    """Of a batch of `images` in bf16. A step holds two streams, the packed products of one block and float32 logits."""
    model, rows = config.model, decoding.rows_of(images, guided)
    step = 2 * rows * (8 * model.width + 3 * model.feed_forward) + images * model.vocab * (2 + 4)
    picture = live_bytes(pixels, min(images, PIECE_IMAGES), 2) + images * _picture_bytes(config)
    return Memory(
        2 * (parameters(config).transformer + pixels.weights),
        decoding.held_cache_bytes(model, rows, cache),
        step,
        picture,
    )


def tokenizer_at(config: RunConfig) -> TokenizerConfig:
    """The tokenizer at the size that the model's codes make: a model of more positions draws larger images with the
    same one.
    """
    side = math.isqrt(config.model.positions) * config.tokenizer.downsampling
    return replace(config.tokenizer, image_size=side, codebook=config.model.vocab)


def _picture_bytes(config: RunConfig) -> int:
    return 3 * tokenizer_at(config).image_size ** 2


def _one_gpu(
    kind: Gpu,
    config: RunConfig,
    batch_images: int,
    pixels: Half,
    assumed: SamplingAssumptions,
    guided: bool,
    cache: str,
) -> OneGpu:
    limit = (kind.memory_gib - RESERVED_GIB) * GIB
    fits, too_many = 0, _MOST
    while fits + 1 < too_many:  # memory only grows with them
        middle = (fits + too_many) // 2
        if memory(config, middle, pixels, guided, cache).total <= limit:
            fits = middle
        else:
            too_many = middle
    pixels_per_s = assumed.convolution_share * kind.bf16_flops_per_s / pixels.flops
    reached = decoding.rates(kind, assumed.read_share, assumed.product_share, assumed.launch_us)
    batches = sorted({*SHOWN_BATCHES, batch_images, *([fits] if fits else [])})
    speeds = [_speed(config.model, images, reached, pixels_per_s, guided, cache) for images in batches]
    chosen = next(speed for speed in speeds if speed.batch_images == batch_images)
    return OneGpu(
        kind,
        batch_images <= fits,
        fits,
        speeds,
        chosen,
        pixels_per_s,
        assumed.fp32_share * kind.fp32_flops_per_s / INCEPTION_FLOPS,
    )


def _speed(
    model: ModelConfig, images: int, reached: decoding.Rates, pixels_per_s: float, guided: bool, cache: str
) -> Speed:
    """Codes, then pixels: on the GPU they run beside each other, which may hide some of one behind the other; none of
    it is assumed to.
    """
    step_s = decoding.step_s(model, images, reached, guided=guided, cache=cache)
    codes_per_s = images / (model.positions * step_s)
    return Speed(images, step_s, codes_per_s, 1 / (1 / codes_per_s + 1 / pixels_per_s))


def _duration(kind: OneGpu, gpus: int, images: int, file_bytes: int, assumed: SamplingAssumptions) -> Duration:
    """Batches are dealt whole. Every process but the first hands its batches over in files, which the first one reads
    and writes again into the one.
    """
    batches = math.ceil(images / kind.chosen.batch_images)
    drawing_s = min(math.ceil(batches / gpus) * kind.chosen.batch_images, images) / kind.chosen.images_per_s
    handed_over = file_bytes * (gpus - 1) / gpus
    storage_s = (file_bytes + 2 * handed_over) / (1e9 * assumed.storage_gb_per_s)
    features_s = images / kind.features_per_s
    parts = {"drawing": drawing_s, "storage": storage_s, "features": features_s, "starting": 2 * assumed.start_s}
    total_s = 2 * assumed.start_s + max(drawing_s, storage_s) + features_s
    return Duration(gpus, drawing_s, storage_s, features_s, total_s, max(parts, key=parts.__getitem__))

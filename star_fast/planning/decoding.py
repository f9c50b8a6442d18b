"""One step of cached decoding: what it reads, computes and launches, and how long a GPU takes for it at the shares that
are assumed.

Weights are read once a step whatever the batch; keys and values of every row up to its length. Both together are what
`benchmarks/sampling.py` divides by the bandwidth for its ceilings. Guidance is applied to hidden states, so the output
matrix runs on images, everything else on rows.
"""

from __future__ import annotations

from typing import NamedTuple

from star_fast.config import ModelConfig
from star_fast.planning.gpus import Gpu
from star_fast.planning.sizes import block_weights

CACHES = ("model", "int8", "fp8")
SCALE_BYTES = 4  # of an 8-bit cache: a float32 for each key and value of each head
# Kernels of a step on CUDA, as generation/launch_count.py traces them: a block's products, its attention, and its two
# norms and gate; and outside.
PRODUCTS_A_BLOCK, ATTENTION_A_BLOCK, OTHERS_A_BLOCK, OUTSIDE = 4, 1, 3, 9


class Traffic(NamedTuple):
    """Bytes that one step reads, averaged over the positions of an image."""

    weights: int  # of all blocks and the output matrix
    cache: float  # keys and values, and their scales


class Rates(NamedTuple):
    """What a GPU is assumed to reach while it decodes."""

    bytes_per_s: float
    flops_per_s: float
    launch_s: float  # the least that a kernel of a captured step takes


def matrix_weights(model: ModelConfig) -> int:
    """Numbers that a step multiplies by: blocks and output matrix."""
    return model.blocks * block_weights(model) + model.vocab * model.width


def rows_of(images: int, guided: bool) -> int:
    """Cache rows of a batch: an image with guidance takes one with its class and one without."""
    return images * (2 if guided else 1)


def held_cache_bytes(model: ModelConfig, rows: int, cache: str, number_bytes: int = 2) -> int:
    """Of `rows` whole images: keys and values of every block, 8-bit ones (`cache` int8 or fp8) with their scales."""
    return int(2 * model.blocks * rows * model.positions * _cached_bytes(model, cache, number_bytes))


def step_traffic(
    model: ModelConfig, images: int, *, guided: bool = True, cache: str = "model", number_bytes: int = 2
) -> Traffic:
    """Bytes of one step of `images`; a step at position t reads t + 1 of T cached positions, (T + 1) / 2 on average."""
    seen = (model.positions + 1) / 2
    cached = 2 * model.blocks * rows_of(images, guided) * seen * _cached_bytes(model, cache, number_bytes)
    return Traffic(number_bytes * matrix_weights(model), cached)


def step_flops(model: ModelConfig, images: int, *, guided: bool = True) -> int:
    """FLOPs of one step at the average length: blocks and attention of every row, the output matrix of every image."""
    rows = rows_of(images, guided)
    attention = 4 * model.blocks * rows * model.width * (model.positions + 1) // 2
    return 2 * rows * model.blocks * block_weights(model) + attention + 2 * images * model.vocab * model.width


def step_s(
    model: ModelConfig, images: int, rates: Rates, *, guided: bool = True, cache: str = "model", number_bytes: int = 2
) -> float:
    """Seconds of one step: each part takes the longest of its reads, its arithmetic and its launches."""
    rows, traffic = (
        rows_of(images, guided),
        step_traffic(model, images, guided=guided, cache=cache, number_bytes=number_bytes),
    )
    weights = block_weights(model)
    products = _longest(rates, number_bytes * weights, 2 * rows * weights, PRODUCTS_A_BLOCK)
    attention = _longest(
        rates, traffic.cache / model.blocks, 2 * rows * model.width * (model.positions + 1), ATTENTION_A_BLOCK
    )
    head = model.vocab * model.width
    outside = _longest(rates, number_bytes * head, 2 * images * head, 1) + (OUTSIDE - 1) * rates.launch_s
    return model.blocks * (products + attention + OTHERS_A_BLOCK * rates.launch_s) + outside


def rates(gpu: Gpu, read_share: float, product_share: float, launch_us: float) -> Rates:
    """A GPU's published peaks times the shares assumed of them."""
    return Rates(read_share * gpu.bytes_per_s, product_share * gpu.bf16_flops_per_s, 1e-6 * launch_us)


def _cached_bytes(model: ModelConfig, cache: str, number_bytes: int) -> int:
    """Of one key or value of all heads."""
    return model.width * number_bytes if cache == "model" else model.width + SCALE_BYTES * model.heads


def _longest(rates: Rates, bytes_read: float, flops: float, launches: int) -> float:
    return max(bytes_read / rates.bytes_per_s, flops / rates.flops_per_s, launches * rates.launch_s)

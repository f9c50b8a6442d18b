"""Sampling as rows of throughput.py: labels in, pictures out, and single decoding steps, beside what products and
memory allow.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import sampling_steps, sampling_whole, timing
from benchmarks.rows import Given, Piece, Row
from star_fast.config import ModelConfig, TokenizerConfig
from star_fast.model.tokenizer import VQTokenizer

QUICK_SIZE = (2, 4, 128)  # blocks, heads, width
POSITIONS, VOCAB = 256, 16384


class Work:
    """What guided decoding of some images has to do at least."""

    def __init__(self, size: tuple[int, int, int], images: int) -> None:
        self.blocks, _, self.width = size
        self.images = images
        feed_forward = ModelConfig(blocks=size[0], heads=size[1], width=size[2]).feed_forward
        self.block_weights = self.blocks * (4 * self.width**2 + 3 * self.width * feed_forward)
        self.head_weights = self.width * VOCAB

    def step_ms(self, ceilings: timing.Ceilings, position: float, weight: str, cache: str) -> float:
        """Of one step with `position` positions cached: weights and caches are read once and multiplied at the rate of
        their kind (fp32, bf16, int8).
        """
        size = {"fp32": 4, "bf16": 2, "int8": 1}
        rate = {
            "fp32": ceilings.fp32_gflop_per_s,
            "bf16": ceilings.bf16_gflop_per_s,
            "int8": ceilings.int8_gop_per_s or ceilings.bf16_gflop_per_s,
        }[weight]
        moved = (self.block_weights + self.head_weights) * size[
            weight
        ] + 2 * self.images * self.blocks * 2 * self.width * (position + 1) * size[cache]
        flops = 2 * (2 * self.images * self.block_weights + self.images * self.head_weights)
        return 1e3 * max(moved / (1e9 * ceilings.read_gb_per_s), flops / (1e9 * rate))

    def whole_ms(self, ceilings: timing.Ceilings, weight: str, cache: str, pixels: str) -> float:
        """All positions, then the tokenizer's decoder at the rate of `pixels`."""
        rate = ceilings.fp32_gflop_per_s if pixels == "fp32" else ceilings.bf16_gflop_per_s
        return (
            sum(self.step_ms(ceilings, position, weight, cache) for position in range(POSITIONS))
            + 1e-6 * self.images * decoder_flops() / rate
        )


@functools.cache
def decoder_flops() -> int:
    """Of VQ-16's decoder for one image of 256 pixels: its products and convolutions, counted on a tensor without
    memory.
    """
    with torch.device("meta"):
        tokenizer = VQTokenizer(TokenizerConfig())
        latents = torch.zeros(1, tokenizer.config.z_channels, 16, 16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tokenizer.decoder(latents)
    return counter.get_total_flops()


def pieces(given: Given) -> list[Piece]:
    """Whole jobs, then steps."""
    size, images = (QUICK_SIZE, 2) if given.quick else (sampling_steps.SIZES["B"], sampling_steps.IMAGES)
    what = f"{size[0]} blocks of width {size[2]}" if given.quick else "B"
    return [
        Piece(
            f"sampling with pixels, {what}, {images} images",
            lambda: _whole(f"sampling with pixels, {what}, {images} images", size, images, given),
        ),
        Piece("decoding step", lambda: _steps(given)),
    ]


def _kinds(candidate: str) -> tuple[str, str]:
    """(weights, cache) of a candidate, by its name: the options are those that it names."""
    if candidate.endswith("fp32"):
        return "fp32", "fp32"
    weights = "int8" if "int8" in candidate.replace("int8 cache", "") else "bf16"
    return weights, "int8" if "int8 cache" in candidate or candidate == f"{sampling_whole.OURS}, int8" else "bf16"


def _whole(name: str, size: tuple[int, int, int], images: int, given: Given) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        model = sampling_whole.random_model(Path(folder), size)
        turns = [sampling_whole.whole_jobs(model, images, 1, None) for _ in range(1 if given.quick else 3)]
    times = {candidate: [1e3 * turn[candidate]["draw_s"] for turn in turns] for candidate in turns[0]}
    medians = {candidate: statistics.median(values) for candidate, values in times.items()}
    work, rows = Work(size, images), []
    for candidate, median_ms in medians.items():
        # Pixels may be decoded in float32; the ceiling is what this machine could do in bf16, but for the candidate
        # that asks for float32.
        least_ms = work.whole_ms(given.ceilings, *_kinds(candidate), "fp32" if candidate.endswith("fp32") else "bf16")
        values = times[candidate]
        spread = None if len(values) < 3 else (max(values) - min(values)) / median_ms / 2
        rows.append(
            Row(
                name,
                candidate,
                median_ms,
                spread,
                medians[sampling_whole.LLAMAGEN] / median_ms,
                least_ms / median_ms,
                how="" if given.device == "cpu" else "whole jobs",
                ceiling="products and reads",
            )
        )
    return rows


def _steps(given: Given) -> list[Row]:
    options = sampling_steps.GPU_OPTIONS if given.device == "cuda" else sampling_steps.OPTIONS
    steps = sampling_steps.Steps(sampling_steps.gpt("B", torch.bfloat16, given.device), options)
    times = sampling_steps.step_times(steps, given.device, given.quick)
    work, base = Work(sampling_steps.SIZES["B"], sampling_steps.IMAGES), times["LlamaGen style"]
    rows = []
    for candidate, found in times.items():
        if "products" not in candidate:
            least_ms = work.step_ms(given.ceilings, POSITIONS / 2, *_kinds(candidate))
            rows.append(
                Row(
                    f"decoding step, B, {work.images} images guided, bf16",
                    candidate,
                    found.median_ms,
                    found.spread,
                    base.median_ms / found.median_ms,
                    least_ms / found.median_ms,
                    how=found.how,
                    ceiling="products or reads",
                )
            )
    return rows


def main_call(given: Given) -> Callable[[], object]:
    """For --profile: a decoding step at the middle of an image, by the fastest exact products."""
    name = "plain" if given.device == "cuda" else "packed"
    options = (sampling_steps.GPU_OPTIONS if given.device == "cuda" else sampling_steps.OPTIONS)[name]
    steps = sampling_steps.Steps(sampling_steps.gpt("B", torch.bfloat16, given.device), {name: options})
    return lambda: steps.ours(
        name, POSITIONS // 2 if given.device == "cpu" else torch.tensor(POSITIONS // 2, device=given.device)
    )

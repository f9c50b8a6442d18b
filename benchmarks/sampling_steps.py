"""A decoding step and its parts: codes only, candidates in turns, beside what the same operators and the memory reach
alone.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.llamagen_style import LlamaGenStyle
from star_fast.config import ModelConfig
from star_fast.generation import Decoder
from star_fast.generation.sampling import Sampling, draw
from star_fast.model.transformer import Transformer
from star_fast.ops.decode_attention import cost, decode_attention
from star_fast.ops.kv_cache import KVCache

IMAGES = 32
SAMPLING = Sampling(guidance=2.0, top_k=2000)
SIZES = {"B": (12, 12, 768), "L": (24, 16, 1024), "XL": (36, 20, 1280)}  # blocks, heads, width
# name -> (products, cache dtype): the options of a Decoder on the CPU. The first two give the same numbers.
OPTIONS: dict[str, tuple[Any, torch.dtype | None]] = {
    "packed": ("packed", None),
    "plain": ("plain", None),
    "packed, int8 cache": ("packed", torch.int8),
    "int8": ("int8", None),
    "int8, int8 cache": ("int8", torch.int8),
}
GPU_OPTIONS: dict[str, tuple[Any, torch.dtype | None]] = {
    "plain": ("plain", None),
    "plain, int8 cache": ("plain", torch.int8),
}
OPERATOR = "8-bit operator alone"
ATTENDED = (16, 64, 128, 224)  # positions at which attention alone is timed


def gpt(size: str, dtype: torch.dtype, device: str) -> Transformer:
    """A model of this size with random weights, the output matrix included."""
    blocks, heads, width = SIZES[size]
    model = Transformer(
        ModelConfig(blocks=blocks, heads=heads, width=width, vocab=16384, positions=256, num_classes=1000)
    )
    model.init_weights(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(model.output.weight, std=0.02, generator=torch.Generator().manual_seed(1))
    return model.to(device, dtype).eval()


class Steps:
    """Single decoding steps at any position, on caches that hold random keys and values."""

    def __init__(self, model: Transformer, options: dict[str, tuple[Any, torch.dtype | None]]) -> None:
        self.model, device = model, model.output.weight.device
        self.baseline = LlamaGenStyle(model, IMAGES)
        self.decoders = {
            name: Decoder(model, 2 * IMAGES, cache, products=products) for name, (products, cache) in options.items()
        }
        generator = torch.Generator().manual_seed(2)
        for cache in (cache for decoder in self.decoders.values() for cache in decoder.caches):
            _fill(cache, torch.Generator().manual_seed(2))
        self.tokens = torch.randint(0, model.config.vocab, (IMAGES,), generator=generator).to(device)
        self.index, self.out = (
            torch.arange(IMAGES, device=device),
            torch.empty(IMAGES, dtype=torch.int64, device=device),
        )
        self.rows = {
            width: torch.randn(2 * IMAGES, width, generator=generator).to(device, model.output.weight.dtype)
            for width in (model.config.width, model.config.feed_forward)
        }
        self.qkv = torch.randn(2 * IMAGES, 3, model.config.heads, model.config.head_size, generator=generator).to(
            device, model.output.weight.dtype
        )

    @torch.no_grad()
    def ours(self, name: str, position: int | Tensor) -> None:
        """Embed, decode, combine, draw."""
        decoder = self.decoders[name]
        logits = decoder.logits(decoder.embed_tokens(self.tokens, True), position, SAMPLING.guidance)
        draw(logits, SAMPLING, 0, self.index, position, self.out)

    @torch.no_grad()
    def llamagen_style(self, position: int) -> None:
        """The baseline's step."""
        rows = self.model.tok_embeddings(torch.cat([self.tokens, self.tokens]))
        self.baseline.step(rows, position, SAMPLING.guidance, 1.0, SAMPLING.top_k)

    @torch.no_grad()
    def plain_products(self, head_rows: int) -> None:
        """The matrix products of a step and nothing else, weights as they are: blocks on 2B rows, output matrix on
        `head_rows`.
        """
        for linear, rows in self.products_of(self.model, head_rows):
            F.linear(rows, linear.weight)

    @torch.no_grad()
    def own_products(self, name: str) -> None:
        """The same by the modules that this decoder multiplies with, whatever they do around the product included."""
        for linear, rows in self.products_of(self.decoders[name].model, IMAGES):
            linear(rows)

    def products_of(self, model: Transformer, head_rows: int) -> list[tuple[nn.Module, Tensor]]:
        """(module, rows that it multiplies) of a step, in order."""
        narrow, wide = self.rows[model.config.width], self.rows[model.config.feed_forward]
        blocks = [
            pair
            for block in model.layers
            for pair in (
                (block.attention.wqkv, narrow),
                (block.attention.wo, narrow),
                (block.feed_forward.w13, narrow),
                (block.feed_forward.w2, wide),
            )
        ]
        return [*blocks, (model.output, narrow[:head_rows])]

    @torch.no_grad()
    def attend(self, name: str, position: int) -> None:
        """Attention of all blocks at a position: every cache is read from memory, as 12 of them fit no processor's."""
        decoder = self.decoders[name]
        for cache in decoder.caches:
            decode_attention(self.qkv, cache, position, rotary=self.model.rotary)


def _fill(cache: KVCache, generator: torch.Generator) -> None:
    """Random contents in whatever layout: the padding of a head size of 64 is empty."""
    for part, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        if scale is None:
            part.copy_(torch.randn(part.shape, generator=generator))
        else:
            part.copy_(torch.randint(-127, 128, part.shape, generator=generator))
            scale.fill_(1 / 40)


class OperatorAlone:
    """oneDNN's 8-bit product with the weights of a model, inputs in 8 bits already and nothing done to what comes out:
    the ceiling of ours.
    """

    def __init__(self, steps: Steps) -> None:
        self.calls = []
        for linear, rows in steps.products_of(steps.model, IMAGES):
            outputs, inputs = linear.weight.shape
            weight = (
                (linear.weight.float() / linear.weight.float().abs().amax(1, keepdim=True) * 127).round().to(torch.int8)
            )
            packed = torch.ops.onednn.qlinear_prepack(weight, [len(rows), inputs])
            self.calls.append(
                (
                    torch.full((len(rows), inputs), 130, dtype=torch.uint8),
                    packed,
                    torch.ones(outputs),
                    torch.zeros(outputs, dtype=torch.int64),
                )
            )

    def __call__(self) -> None:
        """The products of a step."""
        for rows, packed, scales, zeros in self.calls:
            torch.ops.onednn.qlinear_pointwise(
                rows, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
            )


def product_times(steps: Steps, quick: bool) -> dict[str, float]:
    """Milliseconds of a step's products on the CPU: plain, packed, 8 bits with all that is around them, and the 8-bit
    operator alone.
    """
    candidates = {
        "plain": lambda: steps.plain_products(IMAGES),
        "packed": lambda: steps.own_products("packed"),
        "int8": lambda: steps.own_products("int8"),
        OPERATOR: OperatorAlone(steps),
    }
    return {
        name: found.median_ms
        for name, found in timing.compare(candidates, "cpu", seconds=1.0 if quick else 4.0, repeats=(3, 200)).items()
    }


def attention_rates(steps: Steps, quick: bool) -> dict[str, dict[int, tuple[float, float]]]:
    """{cache: {position: (ms of a step's attention, GB/s of cache and rows)}} on the CPU."""
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for position in ATTENDED:
        candidates = {
            name: lambda name=name, at=position: steps.attend(name, at) for name in ("packed", "packed, int8 cache")
        }
        for name, time in timing.compare(candidates, "cpu", seconds=0.5 if quick else 2.0, repeats=(3, 100)).items():
            caches = steps.decoders[name].caches
            moved = (
                len(caches)
                * cost(
                    {"qkv": steps.qkv, "cache": caches[0], "position": position, "rotary": steps.model.rotary}
                ).bytes_moved
            )
            found.setdefault("int8" if "int8" in name else "bf16", {})[position] = (
                time.median_ms,
                moved / time.median_ms / 1e6,
            )
    return found


def step_times(steps: Steps, device: str, quick: bool) -> dict[str, timing.Timing]:
    """A step of each candidate: medians at each of some positions, averaged over the positions of an image, and the
    spreads at them, weighted by the medians; a step grows with its position, which is no spread.
    """
    positions = range(16, 256, 64) if quick else range(4, 256, 8)
    at_positions: dict[str, list[timing.Timing]] = {}
    for position in positions:
        # Where the decoder's own graph has it
        at = torch.tensor(position, device=device) if device == "cuda" else position
        candidates: dict[str, Any] = {
            "LlamaGen style": lambda p=position: steps.llamagen_style(p),
            "its products": lambda: steps.plain_products(2 * IMAGES),
            "our products": lambda: steps.plain_products(IMAGES),
        }
        candidates |= {name: lambda p=at, name=name: steps.ours(name, p) for name in steps.decoders}
        for name, found in timing.compare(candidates, device, seconds=0.0, repeats=(3 if quick else 7, 7)).items():
            at_positions.setdefault(name, []).append(found)
    return {name: _averaged(timings) for name, timings in at_positions.items()}


def _averaged(timings: list[timing.Timing]) -> timing.Timing:
    total_ms = sum(found.median_ms for found in timings)
    return timing.Timing(
        total_ms / len(timings),
        sum(found.spread * found.median_ms for found in timings) / total_ms,
        sum(found.repeats for found in timings),
        timings[-1].how,
    )


def end_to_end(steps: Steps, device: str) -> dict[str, float]:
    """Images per second of whole batches, three turns each."""
    label = torch.arange(IMAGES, device=device)
    settings = {"guidance": SAMPLING.guidance, "top_k": SAMPLING.top_k}
    candidates: dict[str, Any] = {
        "LlamaGen style": lambda: steps.baseline.generate(label, SAMPLING.guidance, 1.0, SAMPLING.top_k)
    }
    candidates |= {name: lambda d=decoder: d.generate(label, **settings) for name, decoder in steps.decoders.items()}
    return {
        name: 1e3 * IMAGES / found.median_ms
        for name, found in timing.compare(candidates, device, seconds=0.0, repeats=(3, 3), replay=False).items()
    }


@torch.no_grad()
def option_errors(
    size: str, options: dict[str, tuple[Any, torch.dtype | None]], device: str, quick: bool
) -> dict[str, float]:
    """Relative error (norm) of the guided logits at the last of 32 forced positions, against the float32 model: mean
    over four sets of codes.
    """
    sets, images, positions = 1 if quick else 4, 4, 4 if quick else 32
    label = torch.arange(images, device=device)

    def last_logits(model: Transformer, products: Any, cache: torch.dtype | None) -> list[Tensor]:
        decoder, found = Decoder(model, 2 * images, cache, products), []
        for seed in range(3, 3 + sets):
            codes = torch.randint(0, 16384, (images, positions), generator=torch.Generator().manual_seed(seed)).to(
                device
            )
            for position in range(positions):
                rows = (
                    decoder.embed_tokens(codes[:, position - 1], True) if position else decoder.embed_label(label, True)
                )
                logits = decoder.logits(rows, position, SAMPLING.guidance)
            found.append(logits)
        return found

    exact, model = last_logits(gpt(size, torch.float32, device), "plain", None), gpt(size, torch.bfloat16, device)
    return {
        name: statistics.mean(
            float((mine - right).norm() / right.norm())
            for mine, right in zip(last_logits(model, *option), exact, strict=True)
        )
        for name, option in options.items()
    }


def by_threads(steps: Steps, quick: bool) -> dict[int, dict[str, float]]:
    """{threads: ms of a step (packed, position 128) and of its products and attention, GB/s of plain reads}, of one
    thread and of all, on the CPU.
    """
    threads, found = torch.get_num_threads(), {}
    try:
        for count in dict.fromkeys((1, threads)):
            torch.set_num_threads(count)
            candidates = {
                "step": lambda: steps.ours("packed", 128),
                "products": lambda: steps.own_products("packed"),
                "attention": lambda: steps.attend("packed", 128),
                "step, int8": lambda: steps.ours("int8, int8 cache", 128),
            }
            times = timing.compare(candidates, "cpu", seconds=0.5 if quick else 2.0, repeats=(3, 100))
            found[count] = {
                "read_gb_per_s": timing.ceilings("cpu", quick).read_gb_per_s,
                **{name: time.median_ms for name, time in times.items()},
            }
    finally:
        torch.set_num_threads(threads)
    return found


# Codes of whole batches by any commit's package, as a process of its own: prints images/s.
_CODES = """
import sys, time, torch
from star_fast.config import ModelConfig
from star_fast.generation import Decoder
from star_fast.model.transformer import Transformer
products, cache = sys.argv[1:3]
images, threads, blocks, heads, width = map(int, sys.argv[3:])
torch.set_num_threads(threads)
model = Transformer(ModelConfig(blocks=blocks, heads=heads, width=width, vocab=16384, positions=256, num_classes=1000))
model.init_weights(torch.Generator().manual_seed(0))
torch.nn.init.normal_(model.output.weight, std=0.02, generator=torch.Generator().manual_seed(1))
decoder = Decoder(model.bfloat16().eval(), 2 * images, torch.int8 if cache == "int8" else None, products)
def drawn():
    start = time.perf_counter()
    decoder.generate(torch.arange(images), guidance=2.0, top_k=2000)
    return images / (time.perf_counter() - start)
print(max(drawn(), drawn()))
"""


def codes_against(size: str, before: Path, quick: bool) -> dict[str, tuple[float, float]]:
    """{option: (images/s of the code before, of today's)}: a process each, in turns, the better of two batches; medians
    of three turns.
    """
    found = {}
    for name in ("packed", "packed, int8 cache", "int8, int8 cache"):
        products, cache = OPTIONS[name]
        rates: tuple[list[float], list[float]] = ([], [])
        for _ in range(1 if quick else 3):
            for kept, root in zip(rates, (before, Path(__file__).resolve().parents[1]), strict=True):
                command = [
                    sys.executable,
                    "-c",
                    _CODES,
                    products,
                    "int8" if cache else "model",
                    "4" if quick else str(IMAGES),
                    str(torch.get_num_threads()),
                    *map(str, SIZES[size]),
                ]
                # Where it is run it imports
                kept.append(float(subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout))
        found[name] = (statistics.median(rates[0]), statistics.median(rates[1]))
    return found

"""Sampling, end to end: against LlamaGen's way, against its own matrix products, and what memory, launches and ceilings say.

    python benchmarks/sampling.py [--quick] [--save]

GPT-B, 256 pixels (256 codes), random weights, guidance 2.0, top-k 2000, 32 images, bf16. Candidates take turns step by step; medians.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import sample_op, timing
from benchmarks.devices import DEVICES
from benchmarks.llamagen_style import LlamaGenStyle
from star_fast.config import ModelConfig, TokenizerConfig
from star_fast.generation import Decoder
from star_fast.generation.launch_count import step_launches
from star_fast.generation.sample import SampleConfig, sample_images
from star_fast.generation.sampling import Sampling, draw
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.transformer import Transformer
from star_fast.model.weights import save_model

RESULTS = Path(__file__).resolve().parent / "results"
IMAGES = 32
SAMPLING = Sampling(guidance=2.0, top_k=2000)
SIZES = {"B": (12, 12, 768), "L": (24, 16, 1024), "XL": (36, 20, 1280)}  # blocks, heads, width
# name -> (products, cache dtype): the options of a Decoder on the CPU. The first two give the same numbers.
OPTIONS: dict[str, tuple[Any, torch.dtype | None]] = {
    "packed": ("packed", None), "plain": ("plain", None), "packed, int8 cache": ("packed", torch.int8), "int8": ("int8", None),
    "int8, int8 cache": ("int8", torch.int8),
}
GPU_OPTIONS: dict[str, tuple[Any, torch.dtype | None]] = {"plain": ("plain", None), "plain, int8 cache": ("plain", torch.int8)}


def gpt(size: str, dtype: torch.dtype, device: str) -> Transformer:
    """A model of this size with random weights, the output matrix included."""
    blocks, heads, width = SIZES[size]
    model = Transformer(ModelConfig(blocks=blocks, heads=heads, width=width, vocab=16384, positions=256, num_classes=1000))
    model.init_weights(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(model.output.weight, std=0.02, generator=torch.Generator().manual_seed(1))
    return model.to(device, dtype).eval()


class Steps:
    """Single decoding steps at any position, on caches that hold random keys and values."""

    def __init__(self, model: Transformer, options: dict[str, tuple[Any, torch.dtype | None]]) -> None:
        self.model, device = model, model.output.weight.device
        self.baseline = LlamaGenStyle(model, IMAGES)
        self.decoders = {name: Decoder(model, 2 * IMAGES, cache, products=products) for name, (products, cache) in options.items()}
        generator = torch.Generator().manual_seed(2)
        self.tokens = torch.randint(0, model.config.vocab, (IMAGES,), generator=generator).to(device)
        self.index, self.out = torch.arange(IMAGES, device=device), torch.empty(IMAGES, dtype=torch.int64, device=device)
        self.rows = {width: torch.randn(2 * IMAGES, width, generator=generator).to(device, model.output.weight.dtype)
                     for width in (model.config.width, model.config.feed_forward)}

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
    def products(self, head_rows: int) -> None:
        """The matrix products of a step and nothing else, weights as they are: blocks on 2B rows, output matrix on `head_rows`."""
        narrow, wide = self.rows[self.model.config.width], self.rows[self.model.config.feed_forward]
        for block in self.model.layers:
            F.linear(narrow, block.attention.wqkv.weight)
            F.linear(narrow, block.attention.wo.weight)
            F.linear(narrow, block.feed_forward.w13.weight)
            F.linear(wide, block.feed_forward.w2.weight)
        F.linear(narrow[:head_rows], self.model.output.weight)


def step_times(steps: Steps, device: str, quick: bool) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds of a step by candidate: medians at each of some positions, averaged over the positions of an image; and on CUDA how each was timed."""
    positions = range(16, 256, 64) if quick else range(4, 256, 8)
    sums: dict[str, float] = {}
    how: dict[str, str] = {}
    for position in positions:
        at = torch.tensor(position, device=device) if device == "cuda" else position  # where the decoder's own graph has it
        candidates: dict[str, Any] = {"LlamaGen style": lambda p=position: steps.llamagen_style(p), "its products": lambda: steps.products(2 * IMAGES),
                                      "our products": lambda: steps.products(IMAGES)}
        candidates |= {name: lambda p=at, name=name: steps.ours(name, p) for name in steps.decoders}
        for name, found in timing.compare(candidates, device, seconds=0.0, repeats=(3 if quick else 7, 7)).items():
            sums[name] = sums.get(name, 0.0) + found.median_ms / len(positions)
            how[name] = found.how
    return sums, how


def end_to_end(steps: Steps, device: str) -> dict[str, float]:
    """Images per second of whole batches, three turns each."""
    label = torch.arange(IMAGES, device=device)
    settings = {"guidance": SAMPLING.guidance, "top_k": SAMPLING.top_k}
    candidates: dict[str, Any] = {"LlamaGen style": lambda: steps.baseline.generate(label, SAMPLING.guidance, 1.0, SAMPLING.top_k)}
    candidates |= {name: lambda d=decoder: d.generate(label, **settings) for name, decoder in steps.decoders.items()}
    return {name: 1e3 * IMAGES / found.median_ms for name, found in timing.compare(candidates, device, seconds=0.0, repeats=(3, 3), replay=False).items()}


def breakdown(steps: Steps, device: str, top: int = 9) -> list[tuple[str, float]]:
    """Where our step's time goes: share of each operator's own time, largest first (torch's profiler)."""
    from torch.profiler import ProfilerActivity, profile

    name = next(iter(steps.decoders))
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiler:
        for position in range(16, 256, 32):
            steps.ours(name, position)
    attribute = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    times = {row.key: getattr(row, attribute) for row in profiler.key_averages()}
    total = sum(times.values())
    ordered = sorted(times.items(), key=lambda item: -item[1])[:top]
    return [(key, time / total) for key, time in ordered]


@torch.no_grad()
def option_errors(options: dict[str, tuple[Any, torch.dtype | None]], device: str, quick: bool) -> dict[str, float]:
    """Relative error (norm) of the guided logits at the last of 32 forced positions, against the float32 model."""
    images, positions = 4, 4 if quick else 32
    codes = torch.randint(0, 16384, (images, positions), generator=torch.Generator().manual_seed(3)).to(device)
    label = torch.arange(images, device=device)

    def last_logits(model: Transformer, products: Any, cache: torch.dtype | None) -> Tensor:
        decoder = Decoder(model, 2 * images, cache, products)
        for position in range(positions):
            rows = decoder.embed_tokens(codes[:, position - 1], True) if position else decoder.embed_label(label, True)
            logits = decoder.logits(rows, position, SAMPLING.guidance)
        return logits

    exact, model = last_logits(gpt("B", torch.float32, device), "plain", None), gpt("B", torch.bfloat16, device)
    return {name: float((last_logits(model, *option) - exact).norm() / exact.norm()) for name, option in options.items()}


def batch_dependence(quick: bool) -> dict[str, str]:
    """How many images of a small random model differ between batches of 1 and of 64, and how many codes in all."""
    images = 64 if quick else 256
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = Transformer(ModelConfig(blocks=6, heads=4, width=128, vocab=256, positions=49, num_classes=10))
        model.init_weights(torch.Generator().manual_seed(0))
        torch.nn.init.normal_(model.output.weight, std=0.1, generator=torch.Generator().manual_seed(1))
        model = model.to(dtype).eval()
        label, index = torch.arange(images) % 10, torch.arange(images)
        by_batch = []
        for batch in (1, 64):
            decoder = Decoder(model, 2 * batch)
            by_batch.append(torch.cat([decoder.generate(label[i : i + batch], guidance=2.0, seed=0, image_index=index[i : i + batch])
                                       for i in range(0, images, batch)]))
        differing = by_batch[0] != by_batch[1]
        found[str(dtype).removeprefix("torch.")] = f"{int(differing.any(1).sum())} of {images} images, {int(differing.sum())} of {differing.numel()} codes"
    return found


def ceilings(size: str) -> list[tuple[int, float, float]]:
    """Images per second that memory bandwidth allows an H100, guided: (images in a batch, bf16 cache, int8 cache). Weights once a step, the cache to the
    real length, averaged over an image's positions."""
    blocks, heads, width = SIZES[size]
    config = ModelConfig(blocks=blocks, heads=heads, width=width)
    weights = blocks * (4 * width * width + 3 * width * config.feed_forward) + 16384 * width
    bytes_per_s = next(device.bytes_per_s for device in DEVICES if device.name == "H100")
    rows = []
    for batch in (1, 8, 32, 64, 128, 256):
        cached = 2 * batch * blocks * 2 * width * 128.5  # 2B rows, keys and values, (T + 1) / 2 positions on average
        scales = 2 * batch * blocks * 2 * heads * 128.5 * 4
        rows.append((batch, *(batch * bytes_per_s / (256 * (2 * weights + cache_bytes)) for cache_bytes in (2 * cached, cached + scales))))
    return rows


def streaming_memory(quick: bool) -> dict[str, float]:
    """Peak resident MiB (Linux) of a process that samples one batch of 64 images of 256 pixels, and of one that samples 2000."""
    many = 256 if quick else 2000
    with tempfile.TemporaryDirectory() as folder:
        model = Transformer(ModelConfig(blocks=2, heads=2, width=32, vocab=32, positions=16, num_classes=10))
        model.init_weights(torch.Generator().manual_seed(0))
        tokenizer = VQTokenizer(TokenizerConfig(base_channels=16, multipliers=(1, 2, 2), residual_blocks=1, z_channels=16, code_channels=4, codebook=32,
                                                image_size=16))
        save_model(Path(folder) / "model", model, class_names=[str(i) for i in range(10)], tokenizer=tokenizer)
        peaks = []
        for images in (64, many):
            config = SampleConfig(model=f"{folder}/model", out=f"{folder}/{images}.npz", images=images, pixels=256, grid=False, device="cpu")
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peaks.append(pool.apply(_peak_mib, (config,)))
    batch_mib = 64 * 256 * 256 * 3 / 2**20
    return {"one batch, MiB": peaks[0], f"{many} images, MiB": peaks[1], "difference, in batches": (peaks[1] - peaks[0]) / batch_mib,
            f"{many} images in memory would be, MiB": many / 64 * batch_mib}


def _peak_mib(config: SampleConfig) -> float:
    os.environ["TQDM_DISABLE"] = "1"
    sample_images(config)
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent from before the process was its own
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024


def measure(device: str, quick: bool) -> dict[str, Any]:
    """All of it."""
    options = GPU_OPTIONS if device == "cuda" else OPTIONS
    steps = Steps(gpt("B", torch.bfloat16, device), options)
    step_ms, how = step_times(steps, device, quick)
    launches = step_launches(ModelConfig(blocks=36, heads=20, width=1280, vocab=16384, positions=256, num_classes=1000))
    return {
        "environment": timing.environment(device), "quick": quick, "step_ms": step_ms, "how": how,
        "images_per_s": {} if quick else end_to_end(steps, device), "breakdown": breakdown(steps, device), "errors": option_errors(options, device, quick),
        "batch_1_against_64": batch_dependence(quick), "streaming_memory": streaming_memory(quick),
        "launches_xl": {"per_block": launches.per_block, "outside": launches.outside, "total": launches.total, "by_kernel": launches.by_kernel},
        "h100_ceilings": {size: ceilings(size) for size in SIZES},
    }


def text(found: dict[str, Any]) -> str:
    """The report as Markdown."""
    step, rate = found["step_ms"], found["images_per_s"]
    where = ", ".join(f"{key} {value}" for key, value in found["environment"].items())
    lines = ["# Sampling", "", where + (" (quick: not to publish)" if found["quick"] else ""),
             "", f"GPT-B, 256 px, random weights, guidance 2.0, top-k 2000, {IMAGES} images, bf16. Candidates take turns; medians.", "",
             "| | ms a step | images/s | x LlamaGen style | x its step's products, F.linear | error of logits |", "|---|---|---|---|---|---|"]
    for name, ms in step.items():
        if "products" in name:
            continue
        products = step["its products" if name == "LlamaGen style" else "our products"]
        per_s = rate.get(name, 1e3 * IMAGES / (256 * ms))
        base_per_s = rate.get("LlamaGen style", 1e3 * IMAGES / (256 * step["LlamaGen style"]))
        error = f"{found['errors'][name]:.2%}" if name in found["errors"] else ""
        lines.append(f"| {name} | {ms:.1f} | {per_s:.2f} | {per_s / base_per_s:.2f} | {ms / products:.2f} | {error} |")
    for name, clock in found["how"].items():
        if clock and clock != timing.REPLAYED:
            lines += ["", f"{name}: {clock}."]
    lines += ["", f"Products alone: {step['our products']:.1f} ms a step (blocks on {2 * IMAGES} rows, output matrix on {IMAGES}); the baseline's "
              f"{step['its products']:.1f} ms (output matrix on {2 * IMAGES}). Images/s of {'whole batches' if rate else 'single steps over positions'}.",
              "Errors: relative, against the float32 model; bf16 rounding itself is the row \"plain\".", "", "Where our step's time goes:", ""]
    lines += [f"- {share:.1%} {key}" for key, share in found["breakdown"]]
    dependence = "; ".join(f"{dtype}: {what} differ" for dtype, what in found["batch_1_against_64"].items())
    lines += ["", f"Batches of 1 against batches of 64: {dependence}.", ""]
    lines += ["Streaming: " + ", ".join(f"{key} {value:.1f}" for key, value in found["streaming_memory"].items()) + ".", ""]
    launches = found["launches_xl"]
    lines += [f"CUDA launches of one step, XL, traced on fake tensors: {launches['per_block']} a block, {launches['outside']} outside the blocks, "
              f"{launches['total']} in all, one CUDA graph.", "",
              "What bandwidth allows an H100 (3.35 TB/s; weights and cache read once a step), guided, images/s; not measured:", "",
              "| images in a batch | " + " | ".join(f"{size}, bf16 cache | {size}, int8 cache" for size in SIZES) + " |", "|---" * (1 + 2 * len(SIZES)) + "|"]
    for rows in zip(*found["h100_ceilings"].values(), strict=True):
        lines.append(f"| {rows[0][0]} | " + " | ".join(f"{row[1]:.0f} | {row[2]:.0f}" for row in rows) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and with --save keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few positions and repeats: a check that all runs, not a measurement to publish")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/sampling.{json,md}")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = measure(device, arguments.quick)
    print(text(found))
    sampler = sample_op.measure(device, arguments.quick, timing.ceilings(device, arguments.quick))
    found["sampler_op"] = [row._asdict() for row in sampler]
    for row in sampler:
        print(f"{row.name:62} {row.backend:10} {row.median_ms:10.3f} ms {row.ratio:8.1f} x naive")
    if arguments.save:
        (RESULTS / "sampling.json").write_text(json.dumps(found, indent=1) + "\n")
        (RESULTS / "sampling.md").write_text(text(found))


if __name__ == "__main__":
    main()

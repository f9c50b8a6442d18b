"""Sampling: what a user waits for, labels in and pictures out; then its codes, its products and its attention, each
beside its ceiling.

    python benchmarks/sampling.py [--quick] [--size B|L|XL] [--save] [--json FILE] [--before CHECKOUT] [--digits RUN]

CHECKOUT: an earlier commit, its extension built in place. RUN: of the digits, as scripts/quickstart.sh makes it.

GPT-B (SIZE), 256 pixels (256 codes), VQ-16, random weights, guidance 2.0, top-k 2000, 32 images, bf16. Candidates take
turns; medians.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import sample_op, sampling_steps, sampling_whole, timing
from benchmarks.sampling_steps import GPU_OPTIONS, IMAGES, OPERATOR, OPTIONS, SIZES, Steps, gpt
from star_fast.config import ModelConfig
from star_fast.generation import Decoder
from star_fast.generation.launch_count import step_launches
from star_fast.generation.sample import sample_images
from star_fast.generation.sample_config import SampleConfig
from star_fast.model.transformer import Transformer
from star_fast.planning import decoding
from star_fast.planning.gpus import gpu

RESULTS = Path(__file__).resolve().parent / "results"


def batch_dependence(device: str, quick: bool) -> dict[str, str]:
    """How many images of a small random model differ between batches of 1 and of 64, and how many codes in all."""
    images = 64 if quick else 256
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = Transformer(ModelConfig(blocks=6, heads=4, width=128, vocab=256, positions=49, num_classes=10))
        model.init_weights(torch.Generator().manual_seed(0))
        torch.nn.init.normal_(model.output.weight, std=0.1, generator=torch.Generator().manual_seed(1))
        model = model.to(device, dtype).eval()
        index = torch.arange(images, device=device)
        label = index % 10
        by_batch = []
        for batch in (1, 64):
            decoder = Decoder(model, 2 * batch)
            by_batch.append(
                torch.cat(
                    [
                        decoder.generate(label[i : i + batch], guidance=2.0, seed=0, image_index=index[i : i + batch])
                        for i in range(0, images, batch)
                    ]
                )
            )
        differing = by_batch[0] != by_batch[1]
        found[str(dtype).removeprefix("torch.")] = (
            f"{int(differing.any(1).sum())} of {images} images, {int(differing.sum())} of {differing.numel()} codes"
        )
    return found


def ceilings(size: str) -> list[tuple[int, float, float]]:
    """Images per second that memory bandwidth allows an H100, guided: (images in a batch, bf16 cache, int8 cache).
    Weights once a step, the cache to the real length, averaged over an image's positions; arithmetic and launches are
    free.
    """
    blocks, heads, width = SIZES[size]
    model = ModelConfig(blocks=blocks, heads=heads, width=width, vocab=16384, positions=256, num_classes=1000)
    reads_alone = decoding.Rates(gpu("h100").bytes_per_s, flops_per_s=math.inf, launch_s=0.0)

    def images_per_s(batch: int, cache: str) -> float:
        return batch / (model.positions * decoding.step_s(model, batch, reads_alone, cache=cache))

    return [(batch, images_per_s(batch, "model"), images_per_s(batch, "int8")) for batch in (1, 8, 32, 64, 128, 256)]


def streaming_memory(quick: bool) -> dict[str, float]:
    """Peak resident MiB (Linux) of a process that samples one batch of 64 images of 256 pixels, and of one that samples
    2000.
    """
    many = 256 if quick else 2000
    with tempfile.TemporaryDirectory() as folder:
        sampling_whole.tiny_model(Path(folder))
        peaks = []
        for images in (64, many):
            config = SampleConfig(
                model=f"{folder}/model",
                out=f"{folder}/{images}.npz",
                images=images,
                pixels=256,
                grid=False,
                device="cpu",
            )
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peaks.append(pool.apply(_peak_mib, (config,)))
    batch_mib = 64 * 256 * 256 * 3 / 2**20
    return {
        "one batch, MiB": peaks[0],
        f"{many} images, MiB": peaks[1],
        "difference, in batches": (peaks[1] - peaks[0]) / batch_mib,
        f"{many} images in memory would be, MiB": many / 64 * batch_mib,
    }


def _peak_mib(config: SampleConfig) -> float:
    os.environ["TQDM_DISABLE"] = "1"
    sample_images(config)
    # getrusage would count the parent from before the process was its own
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024


def measure(device: str, size: str, quick: bool, before: Path | None, digits: Path | None) -> dict[str, Any]:
    """All of it, what must not be disturbed by the rest's memory first."""
    whole = sampling_whole.measure(SIZES[size], quick, before, digits)
    codes_before = sampling_steps.codes_against(size, before, quick) if before else {}
    options = GPU_OPTIONS if device == "cuda" else OPTIONS
    ceilings_here = timing.ceilings(device, quick)
    steps = Steps(gpt(size, torch.bfloat16, device), options)
    step = sampling_steps.step_times(steps, device, quick)
    launches = step_launches(ModelConfig(blocks=36, heads=20, width=1280, vocab=16384, positions=256, num_classes=1000))
    return {
        "environment": timing.environment(device),
        "quick": quick,
        "size": size,
        "whole": whole,
        "codes_before": codes_before,
        "read_gb_per_s": ceilings_here.read_gb_per_s,
        "step_ms": {name: timed.median_ms for name, timed in step.items()},
        "step_spread": {name: timed.spread for name, timed in step.items()},
        "how": {name: timed.how for name, timed in step.items()},
        "images_per_s": {} if quick else sampling_steps.end_to_end(steps, device),
        "product_ms": {} if device == "cuda" else sampling_steps.product_times(steps, quick),
        "attention": {} if device == "cuda" else sampling_steps.attention_rates(steps, quick),
        "by_threads": {} if device == "cuda" else sampling_steps.by_threads(steps, quick),
        "errors": sampling_steps.option_errors(size, options, device, quick),
        "batch_1_against_64": batch_dependence(device, quick),
        "streaming_memory": {} if device == "cuda" else streaming_memory(quick),
        "launches_xl": {
            "per_block": launches.per_block,
            "outside": launches.outside,
            "total": launches.total,
            "by_kernel": launches.by_kernel,
            "backends": launches.backends,
        },
        "h100_ceilings": {size: ceilings(size) for size in SIZES},
    }


def text(found: dict[str, Any]) -> str:
    """The report as Markdown."""
    where = ", ".join(f"{key} {value}" for key, value in found["environment"].items())
    lines = [
        "# Sampling",
        "",
        where + (" (quick: not to publish)" if found["quick"] else ""),
        "",
        f"GPT-{found['size']}, 256 px, VQ-16, random weights, guidance 2.0, top-k 2000, {IMAGES} images, bf16.",
        "",
        *sampling_whole.lines(found["whole"]),
        "",
        *_codes(found),
        "",
        *_parts(found),
        "",
        *_elsewhere(found),
    ]
    return "\n".join(lines) + "\n"


def _codes(found: dict[str, Any]) -> list[str]:
    step, rate, before = found["step_ms"], found["images_per_s"], found["codes_before"]
    lines = [
        "## Codes alone",
        "",
        "| | ms a step | spread | images/s | x LlamaGen style | "
        + ("x before | " if before else "")
        + "x its step's products, F.linear | error of logits |",
        "|---" * (7 + bool(before)) + "|",
    ]
    for name, ms in step.items():
        if "products" in name:
            continue
        products = step["its products" if name == "LlamaGen style" else "our products"]
        per_s = rate.get(name, 1e3 * IMAGES / (256 * ms))
        base_per_s = rate.get("LlamaGen style", 1e3 * IMAGES / (256 * step["LlamaGen style"]))
        error = f"{found['errors'][name]:.2%}" if name in found["errors"] else ""
        earlier = (f"{before[name][1] / before[name][0]:.2f} | " if name in before else " | ") if before else ""
        lines.append(
            f"| {name} | {ms:.1f} | {found['step_spread'][name]:.0%} | {per_s:.2f} | {per_s / base_per_s:.2f} | "
            f"{earlier}{ms / products:.2f} | {error} |"
        )
    lines += [f"\n{name}: {clock}." for name, clock in found["how"].items() if clock and clock != timing.REPLAYED]
    dependence = "; ".join(f"{dtype}: {what} differ" for dtype, what in found["batch_1_against_64"].items())
    if before:
        lines += [
            "",
            "Before: whole batches, a process each, in turns. In bf16 a step waits for memory: the layout of the "
            "cache speeds up "
            "attention alone, a third of it, to the rate of plain reads (below); the weights' bytes stay.",
        ]
    return [
        *lines,
        "",
        f"Images/s of {'whole batches' if rate else 'single steps over positions'}. Spread: the middle half of the "
        "times at a position, over their median, averaged over positions. Errors: relative, against the "
        "float32 model; bf16 rounding "
        'itself is the row "plain".',
        "",
        f"Batches of 1 against batches of 64: {dependence}.",
    ]


def _parts(found: dict[str, Any]) -> list[str]:
    product, read = found["product_ms"], found["read_gb_per_s"]
    if not product:
        return []
    lines = [
        "## A step's parts beside what bounds them",
        "",
        f"Products of a step, all weights from memory (blocks on {2 * IMAGES} rows, output matrix on {IMAGES}):",
        "",
        "| | ms | x packed | share of the operator alone |",
        "|---|---|---|---|",
    ]
    for name, ms in product.items():
        lines.append(
            f"| {name} | {ms:.1f} | {product['packed'] / ms:.2f} | "
            f"{f'{product[OPERATOR] / ms:.0%}' if name == 'int8' else ''} |"
        )
    lines += [
        "",
        f"Attention of a step, all caches from memory; plain reads reach {read:.1f} GB/s in this run:",
        "",
        "| position | bf16 cache, ms | GB/s | share of reads | int8 cache, ms | GB/s | share of reads | int8 over "
        "bf16 |",
        "|---" * 8 + "|",
    ]
    for position, (ms, rate) in found["attention"]["bf16"].items():
        ms_8, rate_8 = found["attention"]["int8"][position]
        lines.append(
            f"| {position} | {ms:.1f} | {rate:.1f} | {rate / read:.0%} | {ms_8:.1f} | {rate_8:.1f} | "
            f"{rate_8 / read:.0%} | {ms / ms_8:.2f} |"
        )
    columns = ["step", "products", "attention", "step, int8", "read_gb_per_s"]
    lines += [
        "",
        "One thread and all, ms at position 128:",
        "",
        "| threads | step, packed | its products | its attention | step, int8 and int8 cache | reads, GB/s |",
        "|---" * 6 + "|",
    ]
    lines += [
        f"| {threads} | " + " | ".join(f"{row[column]:.1f}" for column in columns) + " |"
        for threads, row in found["by_threads"].items()
    ]
    return lines


def _elsewhere(found: dict[str, Any]) -> list[str]:
    launches = found["launches_xl"]
    lines = [
        "## Memory, launches, ceilings of a GPU",
        "",
        *_streaming(found["streaming_memory"]),
        f"CUDA launches of one step, XL, traced on fake tensors: {launches['per_block']} a block, "
        f"{launches['outside']} outside the blocks, "
        f"{launches['total']} in all, one CUDA graph"
        + (
            " (built without CUDA: the draw is counted as plain torch's)."
            if launches["backends"]["sample_tokens"] == "reference"
            else "."
        ),
        "",
        "What bandwidth allows an H100 (3.35 TB/s; weights and cache read once a step), guided, images/s; not "
        "measured:",
        "",
        "| images in a batch | " + " | ".join(f"{size}, bf16 cache | {size}, int8 cache" for size in SIZES) + " |",
        "|---" * (1 + 2 * len(SIZES)) + "|",
    ]
    for rows in zip(*found["h100_ceilings"].values(), strict=True):
        lines.append(f"| {rows[0][0]} | " + " | ".join(f"{row[1]:.0f} | {row[2]:.0f}" for row in rows) + " |")
    return lines


def _streaming(found: dict[str, float]) -> list[str]:
    """Nothing on a GPU, where it is not measured: the process that streams is the CPU's."""
    return ["Streaming: " + ", ".join(f"{key} {value:.1f}" for key, value in found.items()) + ".", ""] if found else []


def main() -> None:
    """Measure, print, and with --save keep."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few positions and repeats: a check that all runs, not a measurement to publish",
    )
    parser.add_argument("--size", choices=list(SIZES), default="B", help="of the model that is drawn from")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/sampling.{json,md}")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument(
        "--before",
        type=Path,
        help="a checkout of an earlier commit, its extension built in place: measured in turns with this one",
    )
    parser.add_argument(
        "--digits", type=Path, help="a run of the digits: the quickstart's sampling and report are timed"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of single steps")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = measure(
        device,
        arguments.size,
        arguments.quick,
        arguments.before and arguments.before.resolve(),
        arguments.digits and arguments.digits.resolve(),
    )
    print(text(found))
    sampler = sample_op.measure(device, arguments.quick, timing.ceilings(device, arguments.quick))
    found["sampler_op"] = [row._asdict() for row in sampler]
    for row in sampler:
        print(f"{row.name:62} {row.backend:10} {row.median_ms:10.3f} ms {row.ratio:8.1f} x naive")
    if arguments.save:
        (RESULTS / "sampling.json").write_text(json.dumps(found, indent=1) + "\n")
        (RESULTS / "sampling.md").write_text(text(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Why a row is under half of its ceiling, or slower than its baseline: one line each, by the row's name. What no line
covers is listed as not explained.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

HALF = 0.5
NOT_EXPLAINED = "not explained"


class Reason(NamedTuple):
    """Patterns of a row (whole name, whole backend, device; searched, not matched whole), and why."""

    name: str
    backend: str
    device: str
    why: str


# The first that fits counts: baselines, then what --quick makes small, then op by op. Measured on CPUs: on CUDA little
# here applies, so that what falls short there is listed as not explained until someone has looked.
REASONS = [
    Reason(
        "",
        "^(naive|LlamaGen style|LlamaGen's way, plain|plain PyTorch, ST-AR.*|DataLoader.*)$",
        "",
        "A baseline, as others write it: each operator is a pass of its own, and what lies between them goes "
        "through memory.",
    ),
    Reason(
        "^sample_tokens",
        "^read once$",
        "cpu",
        "A ceiling of its own, torch's amax: 4 MiB of logits are read in about the time that its threads need to "
        "start.",
    ),
    Reason(
        ", tiny float32$",
        "^reference$",
        "cpu",
        "Shapes of tiny (--quick): the formula in torch's operators, each of microseconds, in which starting it "
        "weighs as much as the work.",
    ),
    Reason(
        "^add_rms_norm.*, tiny float32$",
        "^cpp$",
        "cpu",
        "So few rows (--quick) take one thread 0.4 ms and two threads 0.9: waking the other and moving its lines "
        "of cache costs more than its half.",
    ),
    Reason(
        "^training step.*, tiny,",
        "",
        "cpu",
        "Products of width 96 and 256 are too small for the ceiling's rate, and it counts products alone: norms, "
        "attention and AdamW come on top.",
    ),
    # References: the formula in torch's operators
    Reason(
        "^masked_attention",
        "^reference$",
        "cpu",
        "The ceiling counts visible pairs, 3/8 of the square under this mask, and no exponentials; torch's "
        "attention computes the whole square.",
    ),
    Reason(
        "^linear_cross_entropy forward,",
        "^reference$",
        "cpu",
        "Without gradients its chunks of logits, in an eighth of naive's memory, cost their loop; with gradients "
        "it is the faster one.",
    ),
    Reason(
        "^feature_distance",
        "^reference$",
        "cpu",
        "Torch's operators on blocks of rows that stay in cache: each is a pass over the block, where the ceiling "
        "counts one pass over memory.",
    ),
    Reason(
        "^slot_contrast",
        "^reference$",
        "cpu",
        "32 products of 32 x 32 x 768 in a millisecond or two: as much again goes into gathering the rows of each "
        "pair, where naive takes views.",
    ),
    Reason(
        "^add_rms_norm",
        "^reference$",
        "cpu",
        "The formula in torch's operators, with the dropout mask that every backend draws: each step of its hash "
        "is an integer operator.",
    ),
    Reason(
        "^swiglu", "^reference$", "cpu", "The same operators as naive: the gate's own temporary goes through memory."
    ),
    Reason(
        "^decode_attention",
        "^reference$",
        "cpu",
        "Two batched products of one query row each, scores and weights through memory between them; naive is torch's "
        "fused attention on the same cache.",
    ),
    Reason(
        "^linear_cross_entropy",
        "^reference$",
        "cpu",
        "Three products a chunk of rows, and between them the softmax of its logits through memory; the ceiling counts "
        "the products.",
    ),
    Reason(
        "^ema_update",
        "^reference$",
        "cpu",
        "Two of torch's operators, the average and the copy: the second reads again what the first wrote.",
    ),
    Reason(
        "^group_norm_silu",
        "^reference$",
        "cpu",
        "The same operators as naive: what the norm wrote goes through memory to the gate.",
    ),
    Reason(
        "^int8_linear",
        "^reference$",
        "cpu",
        "The formula, its sums in float64, which holds them exactly: it decides what is right and is not meant to be "
        "fast.",
    ),
    Reason(
        "^sample_tokens.*temperature 0$",
        "^reference$",
        "",
        "The formula: it compares every logit with the largest, and takes the least place of those that equal it.",
    ),
    Reason(
        "^sample_tokens",
        "^reference$",
        "",
        "The formula, by sorting, with exact integer weights: it decides what is right and is not meant to be fast.",
    ),
    # Kernels
    Reason(
        "^decode_attention",
        "^cpp$",
        "cpu",
        "One query row meets every cached row: a product and a sum for each number read, and an exponential a "
        "position, take about as long as the read.",
    ),
    Reason(
        "^add_rms_norm",
        "^cpp$",
        "cpu",
        "The dropout mask is hashed for every entry, integer work that the ceiling, bytes alone, does not count.",
    ),
    Reason(
        "^swiglu",
        "^cpp$",
        "cpu",
        "An exponential and a division an entry, which the ceiling, bytes alone, does not count.",
    ),
    Reason(
        "^group_norm_silu",
        "^cpp$",
        "cpu",
        "Every number is read twice, for the sums and for the result, and takes an exponential and a division; the "
        "ceiling counts one read and one write.",
    ),
    Reason(
        "^int8_linear",
        "^cpp$",
        "cpu",
        "64 rows: a weight that was read serves few products, where the ceiling's serves as many rows as it has "
        "columns; rotating and rounding x come before.",
    ),
    Reason(
        "^sample_tokens",
        "^cpp$",
        "cpu",
        "For each logit an exponential and an exact integer weight, for top-k and top-p a search over them; the "
        "ceiling counts one read from memory.",
    ),
    # Whole steps and jobs
    Reason(
        "^training step",
        "",
        "cpu",
        "By the profile (benchmarks/results/training.md) products are half of a step, at two thirds of the rate "
        "of 2048 cubed, which is the ceiling; "
        "attention, norms, gates, AdamW and the teacher's update are the rest.",
    ),
    Reason(
        "^sampling with pixels",
        "",
        "cpu",
        "The tokenizer's decoder is a large part of a job: its convolutions are no large products, and the "
        "ceiling gives them the bf16 rate.",
    ),
    Reason(
        "^decoding step",
        "",
        "cpu",
        "The ceiling lets reads and products overlap and gives 64 rows the rate of large products; a step "
        "multiplies, then reads caches, by turns.",
    ),
    # Data and disk
    Reason(
        "views of an image",
        r"\(ours\)",
        "",
        "Decoding alone is the ceiling; the centre crop (halving, bicubic) and the ten crops cost more than that.",
    ),
    Reason(
        "CodeStore.codes",
        "",
        "",
        "Views are gathered from random places, 512 bytes each, and widened from 16 to 64 bits; the ceiling is "
        "one long copy.",
    ),
    Reason(
        "Batches.step",
        "",
        "",
        "Masks, dropped labels and the choice of views are hashed for every image: most of a batch's time, and "
        "none of it copies codes.",
    ),
    Reason(
        "^checkpoint save",
        "^star_fast$",
        "",
        "Every byte is hashed, all weights are checked for NaN, a model folder is made beside the state, and each "
        "file and folder is flushed, one by one.",
    ),
    Reason(
        "^checkpoint save",
        "^torch.save, flushed$",
        "",
        "Plain torch.save leaves its bytes in the system's cache, where a power cut loses them; this waits for "
        "the disk.",
    ),
    Reason(
        "^checkpoint load",
        "^star_fast$",
        "",
        "Every byte is hashed before it is trusted, then copied into place and checked for NaN; torch.load does "
        "none of it.",
    ),
    Reason(
        "^checkpoint load",
        "^torch.load$",
        "",
        "It copies what it reads into new tensors, whose pages the system maps and clears first.",
    ),
    Reason(
        "^Python of (ema_update|decode_attention|.*no gradient)",
        "",
        "",
        "The floor only allocates results; a call also checks shapes and dtypes, chooses the backend and works "
        "out its launch.",
    ),
    Reason(
        "^Python of",
        "",
        "",
        "The floor is an empty autograd.Function; checks, the choice of the backend and the arguments of each "
        "launch come on top.",
    ),
]


def shortfall(row: dict[str, Any]) -> str:
    """What a row falls short of, in words; empty: nothing."""
    found = []
    if row["share"] is not None and row["share"] < HALF:
        found.append(f"{row['share']:.1%} of the ceiling")
    if row["ratio"] is not None and round(row["ratio"], 2) < 1:
        found.append(f"{row['ratio']:.2f} x the baseline")
    return ", ".join(found)


def reason_for(row: dict[str, Any], device: str, reasons: list[Reason] | None = None) -> str:
    """The first reason whose patterns are found in the row."""
    for reason in REASONS if reasons is None else reasons:
        if (
            re.search(reason.name, row["name"])
            and re.search(reason.backend, row["backend"])
            and re.search(reason.device, device)
        ):
            return reason.why
    return NOT_EXPLAINED


def explain(rows: list[dict[str, Any]], device: str) -> None:
    """Give each row that falls short `short` and `reason`."""
    for row in rows:
        short = shortfall(row)
        if short:
            row |= {"short": short, "reason": reason_for(row, device)}


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: each reason once, the rows that it is about below it; those not explained last."""
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        if "reason" in row:
            by_reason.setdefault(row["reason"], []).append(f"  - {row['name']}, {row['backend']}: {row['short']}")
    order = sorted(by_reason, key=lambda reason: reason == NOT_EXPLAINED)
    return (
        [
            "Under half of the ceiling, or slower than the baseline:",
            "",
            *(line for reason in order for line in (f"- {reason}", *by_reason[reason])),
        ]
        if by_reason
        else []
    )

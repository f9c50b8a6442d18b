"""What 8 bits do to pictures: a trained run sampled with every way of multiplying and caching, judged by a classifier,
against float32 on the same seeds.

    python benchmarks/eight_bits.py RUN [--codes CODES] [--save]      RUN: of the digits, by scripts/quickstart.sh

Each seed draws the same images by every option: the same uniform numbers, so that options differ by rounding alone.
"Draws changed": float32's codes are forced, and at each position it is asked whether the option would have drawn
another code than float32. "Codes changed": each option goes its own way, and one other code changes all that follow.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks import timing  # noqa: E402 (needs the path above)
from star_fast.evaluation.classifier import ClassifierConfig, train_classifier  # noqa: E402
from star_fast.evaluation.frechet import frechet_distance_of_features  # noqa: E402
from star_fast.evaluation.real_images import open_real_images  # noqa: E402
from star_fast.evaluation.runs import open_run  # noqa: E402
from star_fast.evaluation.samples import decode  # noqa: E402
from star_fast.generation import Decoder  # noqa: E402
from star_fast.generation.sampling import Sampling, draw  # noqa: E402
from star_fast.model.llamagen import load_tokenizer  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
EXACT = "float32"
# name -> (dtype of the model, products, dtype of the cache)
OPTIONS: dict[str, tuple[torch.dtype, Any, torch.dtype | None]] = {
    EXACT: (torch.float32, "plain", None),
    "bf16": (torch.bfloat16, "auto", None),
    "bf16, int8 cache": (torch.bfloat16, "auto", torch.int8),
    "int8": (torch.bfloat16, "int8", None),
    "int8, int8 cache": (torch.bfloat16, "int8", torch.int8),
}
SEEDS, PER_CLASS, BATCH = 5, 100, 100
GUIDANCES = (1.0, 2.0)


def draws_changed(decoder: Decoder, codes: Tensor, label: Tensor, index: Tensor, sampling: Sampling) -> int:
    """How many codes this decoder would have drawn differently, each after float32's own (B, T)."""
    changed, drawn = 0, torch.empty(len(label), dtype=torch.int64)
    with torch.no_grad():
        for position in range(codes.shape[1]):
            rows = (
                decoder.embed_tokens(codes[:, position - 1], sampling.guided)
                if position
                else decoder.embed_label(label, sampling.guided)
            )
            draw(decoder.logits(rows, position, sampling.guidance), sampling, sampling.seed, index, position, drawn)
            changed += int((drawn != codes[:, position]).sum())
    return changed


def measure(folder: str, codes_folder: str, seeds: int, per_class: int) -> dict[str, Any]:
    """{guidance: {option: {figure: [one a seed]}}}, and what the classifier says of held-out real images."""
    run = open_run(folder, codes=codes_folder)
    tokenizer, classes = load_tokenizer(run.model.tokenizer_folder), len(run.store.class_names)
    source = open_real_images(run.store, "")
    train, held = run.store.train_indices, run.store.held_out_indices
    classifier = train_classifier(
        source.read(train), run.store.labels[train], classes, ClassifierConfig(), mirror=False
    )
    real = classifier.judge(source.read(held))
    label = torch.arange(classes).repeat_interleave(per_class)
    found: dict[str, Any] = {
        "real_accuracy": real.accuracy(run.store.labels[held]),
        "images": len(label),
        "seeds": seeds,
    }
    decoders = {}
    for name, (dtype, products, cache) in OPTIONS.items():
        model = open_run(folder, codes=codes_folder).model.transformer.to(dtype).eval()
        decoders[name] = Decoder(model, 2 * BATCH, cache, products)
    for guidance in GUIDANCES:
        figures: dict[str, dict[str, list[float]]] = {
            name: {"agreement": [], "frechet": [], "codes_changed": [], "draws_changed": []} for name in OPTIONS
        }
        for seed in tqdm(range(seeds), desc=f"guidance {guidance:g}"):
            sampling, exact = Sampling(guidance=guidance, seed=seed), None
            for name, decoder in decoders.items():
                parts = torch.arange(len(label)).split(BATCH)
                codes = torch.cat(
                    [decoder.generate(label[part], guidance=guidance, seed=seed, image_index=part) for part in parts]
                )
                exact = codes if exact is None else exact
                verdict = classifier.judge(decode(tokenizer, codes))
                row = figures[name]
                row["agreement"].append(verdict.accuracy(label))
                row["frechet"].append(frechet_distance_of_features(verdict.features, real.features))
                row["codes_changed"].append(float((codes != exact).float().mean()))
                row["draws_changed"].append(
                    sum(draws_changed(decoder, exact[part], label[part], part, sampling) for part in parts)
                    / exact.numel()
                )
        found[f"guidance {guidance:g}"] = figures
    return found


def text(found: dict[str, Any]) -> str:
    """The page as Markdown."""
    where = ", ".join(f"{key} {value}" for key, value in found["environment"].items())
    lines = [
        "# What 8 bits do to pictures",
        "",
        where,
        "",
        f"The digits' model of `--preset tiny`, {found['images']} images a seed, {found['seeds']} seeds: mean +- "
        "standard deviation over seeds.",
        f"The classifier is right on {found['real_accuracy']:.1%} of held-out real digits. Every option draws "
        "with the same uniform numbers; the standard",
        "deviation of float32 itself says what another seed does.",
        "",
    ]
    for guidance in GUIDANCES:
        figures = found[f"guidance {guidance:g}"]
        lines += [
            f"Guidance {guidance:g}:",
            "",
            "| | of the class asked for | classifier Fréchet distance | less float32's, same seed | draws changed | "
            "codes changed |",
            "|---|---|---|---|---|---|",
        ]
        for name, row in figures.items():
            apart = [a - b for a, b in zip(row["frechet"], figures[EXACT]["frechet"], strict=True)]
            difference = _spread(apart, "+.3f") if name != EXACT else ""
            lines.append(
                f"| {name} | {_spread(row['agreement'], '.2%')} | {_spread(row['frechet'], '.3f')} | {difference} | "
                f"{statistics.mean(row['draws_changed']):.2%} | {statistics.mean(row['codes_changed']):.1%} |"
            )
        lines.append("")
    return "\n".join(lines)


def _spread(values: list[float], form: str) -> str:
    return (
        f"{statistics.mean(values):{form}} +- {statistics.stdev(values):{form.lstrip('+')}}"
        if len(values) > 1
        else f"{values[0]:{form}}"
    )


def main() -> None:
    """Measure, print, and with --save keep."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("run", help="a run folder of the digits")
    parser.add_argument("--codes", default="", help="its code store, where the run's settings name none that is there")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--per-class", type=int, default=PER_CLASS)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/eight_bits.{json,md}")
    arguments = parser.parse_args()
    found = {
        "environment": timing.environment("cpu"),
        **measure(arguments.run, arguments.codes, arguments.seeds, arguments.per_class),
    }
    print(text(found))
    if arguments.save:
        (RESULTS / "eight_bits.json").write_text(json.dumps(found, indent=1) + "\n")
        (RESULTS / "eight_bits.md").write_text(text(found))


if __name__ == "__main__":
    main()

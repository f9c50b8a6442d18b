"""The paper's Table 3 and Figure 7 in small: the built-in digits, the preset `tiny`, every combination of losses; what
the paper leaves open, one seed each.

    python benchmarks/small_study.py     the core: baseline (one and two views), the four rows of Table 3, three seeds
    ... --runs core alone open           each loss alone, too; what the paper does not say
    ... --report                         only write the tables and figures from the rows that are there

Runs go two at a time, one thread each. A run that is finished is one line of benchmarks/results/small_study.jsonl and
is not made again; one that was killed goes on. The page, results/small_study.md, says what came out, the claims that
did not hold among it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "benchmarks/results/small_study.jsonl"
SEEDS = (0, 1, 2)


class Variant(NamedTuple):
    """A way to train."""

    options: str
    about: str


CORE = {
    "baseline": Variant("--plain", "next tokens, one view"),
    "MIM": Variant("--method.contrast-weight 0", "+ masked features"),
    "MIM+step": Variant("--method.view-contrast False", "+ masked features, between steps"),
    "MIM+view": Variant("--method.step-contrast False", "+ masked features, between views"),
    "all": Variant("", "+ all three (ST-AR)"),
    "baseline, 2 views": Variant("--plain --method.views 2", "next tokens, two views: as many tokens a step as ST-AR"),
}
_NO_MASK = "--method.mask-ratio 0 --method.mim-weight 0"
ALONE = {
    "step": Variant(f"{_NO_MASK} --method.view-contrast False", "between steps alone, nothing hidden"),
    "view": Variant(f"{_NO_MASK} --method.step-contrast False", "between views alone, nothing hidden"),
}
OPEN = {
    "r 0.15": Variant("--method.mask-ratio 0.15", "mask ratio"),
    "r 0.35": Variant("--method.mask-ratio 0.35", "mask ratio"),
    "r 0.45": Variant("--method.mask-ratio 0.45", "mask ratio"),
    "depth 2": Variant("--method.contrast-depth 2", "contrast after block 2 of 6"),
    "depth 6": Variant("--method.contrast-depth 6", "after the last block"),
    "K 2": Variant("--method.contrast-positions 2", "positions contrasted"),
    "K 8": Variant("--method.contrast-positions 8", "positions contrasted"),
    "tau 0.1": Variant("--method.temperature 0.1", "temperature"),
    "tau 0.5": Variant("--method.temperature 0.5", "temperature"),
    "hidden": Variant("--method.mim-positions hidden", "masked features at hidden positions only"),
    "all slots": Variant("--method.negatives all_slots", "negatives from all slots"),
    "batch norm": Variant("--method.projector-norm batch", "batch norm in the projector"),
    "kept label": Variant("--method.teacher-label kept", "the teacher keeps dropped labels"),
}
GROUPS = {
    "core": [(name, seed) for seed in SEEDS for name in CORE],
    "alone": [(name, 0) for name in ALONE],
    "open": [(name, 0) for name in OPEN],
}
VARIANTS = CORE | ALONE | OPEN


def rows() -> dict[tuple[str, int], dict[str, Any]]:
    """The finished runs."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {(row["name"], row["seed"]): row for row in map(json.loads, lines)}


def make(name: str, seed: int, folder: Path, steps: int) -> None:
    """Train one run, or go on with it, in a process of one thread; then measure it in another."""
    run = folder / f"{name.replace(' ', '_').replace(',', '')}-{seed}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)}
    resume = ["--resume"] if any((run / "checkpoints").glob("step-*")) else []
    train = [
        "-m",
        "star_fast.cli",
        "train",
        "--preset",
        "tiny",
        *VARIANTS[name].options.split(),
        "--data.codes",
        str(folder / "digits"),
        "--run",
        str(run),
        "--train.seed",
        str(seed),
        "--train.max-steps",
        str(steps),
        "--train.tensorboard",
        "False",
        *resume,
    ]
    for arguments in (
        train,
        [__file__, "--measure", name, "--seed", str(seed), "--folder", str(folder), "--steps", str(steps)],
    ):
        with (folder / f"{run.name}.log").open("a") as log:
            subprocess.run([sys.executable, *arguments], env=environment, stdout=log, stderr=log, check=True)
    shutil.rmtree(run / "checkpoints")
    print(f"{name}, seed {seed}: done", flush=True)


def measure(name: str, seed: int, folder: Path, steps: int) -> None:
    """Append one run's row to the results."""
    import torch

    from star_fast.data.codes import CodeStore
    from star_fast.evaluation.attention_maps import attention_by_block
    from star_fast.evaluation.both_weights import next_token_loss
    from star_fast.evaluation.classifier import Classifier
    from star_fast.evaluation.frechet import frechet_distance_of_features
    from star_fast.evaluation.probe import ProbeConfig, probe
    from star_fast.evaluation.real_images import open_real_images
    from star_fast.evaluation.runs import codes_of, read_metrics
    from star_fast.evaluation.samples import distinct_sequences, draw_samples
    from star_fast.model.tokenizer import VQTokenizer
    from star_fast.model.weights import load_model

    torch.set_num_threads(1)
    run = folder / f"{name.replace(' ', '_').replace(',', '')}-{seed}"
    store, classifier = CodeStore.open(folder / "digits"), Classifier.load(folder / "classifier")
    tokenizer = VQTokenizer.load(folder / "digits/tokenizer")
    held = store.held_out_indices
    real = classifier.judge(open_real_images(store, "").read(held)).features
    training, validation = read_metrics(run)
    row: dict[str, Any] = {
        "name": name,
        "seed": seed,
        "steps": steps,
        "options": VARIANTS[name].options,
        "val_ar": [each["val_ar"] for each in validation],
        "training_s": training[-1]["time_s"],
        "views_seen": training[-1]["images"] * (1 if name == "baseline" else 2),
    }
    for weights in ("student", "teacher") if (run / "model/teacher.safetensors").exists() else ("student",):
        model = load_model(run / "model", weights=weights).transformer.eval()
        probed = probe(model, store, model.config.blocks // 2, ProbeConfig(run=run, device="cpu", knn=0, seed=seed))
        codes, labels = codes_of(store, held, store.plain_view), store.labels[held]
        blocks = attention_by_block(model, codes[:64], labels[:64])
        found: dict[str, Any] = {
            "positions": probed.positions,
            "probe": probed.held_out,
            "loss": next_token_loss(model, codes, labels),
            "attention": [
                {"distance": block.shares.mean_distance, "entropy": block.entropy, "class": block.shares.to_class}
                for block in blocks
            ],
        }
        for guidance in (1.0, 2.0):
            samples = draw_samples(model, tokenizer, range(10), 50, guidance=guidance, seed=seed)
            verdict = classifier.judge(samples.images)
            found[f"guidance {guidance:g}"] = {
                "agreement": verdict.accuracy(samples.labels),
                "frechet": frechet_distance_of_features(verdict.features, real),
                "distinct": min(distinct_sequences(samples).values()),
            }
        row[weights] = found
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def prepare(folder: Path) -> None:
    """The codes, and the classifier that judges all runs, once."""
    from star_fast import cli
    from star_fast.data.codes import CodeStore
    from star_fast.evaluation.classifier import ClassifierConfig, train_classifier
    from star_fast.evaluation.real_images import open_real_images

    folder.mkdir(parents=True, exist_ok=True)
    if cli.main(["prepare", "digits", "--out", str(folder / "digits")]):
        raise SystemExit(1)
    if not (folder / "classifier").exists():
        store = CodeStore.open(folder / "digits")
        images = open_real_images(store, "").read(store.train_indices)
        train_classifier(images, store.labels[store.train_indices], 10, ClassifierConfig()).save(folder / "classifier")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=list(GROUPS), default=["core"])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/small_study", help="of codes, runs and logs")
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--report", action="store_true", help="only write the page")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.seed, arguments.folder, arguments.steps)
        return
    if not arguments.report:
        prepare(arguments.folder)
        missing = [key for group in arguments.runs for key in GROUPS[group] if key not in rows()]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for done in [pool.submit(make, name, seed, arguments.folder, arguments.steps) for name, seed in missing]:
                done.result()
    from benchmarks.small_study_page import write_page

    groups = {"core": CORE, "alone": ALONE, "open": OPEN}
    write_page(
        rows(),
        {group: {name: variant.about for name, variant in variants.items()} for group, variants in groups.items()},
        RESULTS.parent,
    )


if __name__ == "__main__":
    main()

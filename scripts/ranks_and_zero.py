"""Does training compute the same on 1, 2 and 4 ranks and under ZeRO 0 to 3? Measures it, and writes the table.

    python scripts/ranks_and_zero.py [--save]        about four minutes on two cores; --save writes
                                                     benchmarks/results/ranks_and_zero.{md,png}

Float32 without dropout: losses of 20 steps, gradients of the first, teacher after the last, against one rank without
ZeRO; accumulation against a hand-written loop. bf16: the teacher against the closed-form float32 average of the
masters; the loss curve against float32 weights under autocast (LlamaGen's way). And a run that goes from 2 ranks to 4
to 1: its held-out loss before and after each conversion.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from star_fast.config import MethodConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig  # noqa: E402
from star_fast.data.codes import CodeStore  # noqa: E402

RANKS, STAGES, STEPS, CURVE_STEPS = (1, 2, 4), (0, 1, 2, 3), 20, 200
RESULTS = ROOT / "benchmarks/results"
PROCESSES = multiprocessing.get_context("spawn")


def settings(
    store: CodeStore, *, precision: str = "fp32", stage: int = 0, micro: int = 0, steps: int = STEPS, **optim: Any
) -> RunConfig:
    """Eight images a step, two views."""
    from star_fast.training.batches import resolve

    return resolve(
        RunConfig(
            ModelConfig(2, 2, 32, dropout=0.0),
            MethodConfig(contrast_positions=3, projector_width=24, ema_decay=0.9),
            OptimConfig(**{"lr_per_256_images": 0.03, **optim}),
            TrainConfig(
                images_per_step=8,
                micro_batch_images=micro,
                max_steps=steps,
                precision=precision,
                zero_stage=stage,
                seed=4,
                gradient_precision="bf16" if (precision, stage) == ("bf16", 0) else "fp32",
            ),
        ),
        store,
    )


def start(config: RunConfig, store: CodeStore, device: torch.device) -> tuple[Any, Any]:
    """A fresh engine and its batches."""
    from star_fast.training.batches import Batches
    from star_fast.training.engine import Engine, build_student

    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    batches = Batches(store, config, rank, ranks)
    return Engine(config, build_student(config), device, batches.micro_images, batches.accumulation), batches


def whole(engine: Any, masters: list[Tensor]) -> dict[str, Tensor]:
    """Gathered from the ranks."""
    return {name: value.clone() for name, value in engine.masters.gather(masters)}


def train(config: RunConfig, store: CodeStore, device: torch.device, closed_form: bool = False) -> dict[str, Any]:
    """Losses of all ranks by step, the last student and teacher; with `closed_form` how far the teacher is from the
    average of the masters, relatively.
    """
    engine, batches = start(config, store, device)
    expected = {name: value.double() for name, value in whole(engine, engine.masters.tensors()).items()}
    losses = []
    for step, micro in batches.steps(0, config.train.max_steps):
        found, _ = engine.step(micro, step, config.lr)
        torch.distributed.all_reduce(found)
        losses.append(found / engine.ranks)
        if closed_form:
            decay = min(config.method.ema_decay, (1 + step) / (10 + step))
            for name, value in whole(engine, engine.masters.tensors()).items():
                expected[name] = decay * expected[name] + (1 - decay) * value.double()
    student, teacher = whole(engine, engine.masters.tensors()), whole(engine, engine.teacher.masters)
    off = (
        max(
            float((teacher[name] - value).abs().max() / value.abs().max().clamp(min=1e-6))
            for name, value in expected.items()
        )
        if closed_form
        else 0.0
    )
    return {"losses": torch.stack(losses), "student": student, "teacher": teacher, "off": off}


def gradients(config: RunConfig, store: CodeStore, device: torch.device) -> dict[str, Tensor]:
    """Of the first step, wherever ZeRO keeps them: with beta1 0 and no clipping AdamW's first
    moment is the gradient.
    """
    from safetensors.torch import load_file

    from star_fast.training import shards

    engine, batches = start(config, store, device)
    engine.step(batches.step(0), 0, config.lr)
    folder = Path(os.environ["RESULT"]).parent / f"state-{engine.ranks}-{config.train.zero_stage}"
    folder.mkdir(exist_ok=True)
    shards.save(engine, folder)
    torch.distributed.barrier()
    if engine.rank == 0:
        shards.put_together(folder, folder)
    torch.distributed.barrier()
    return load_file(folder / "exp_avg.safetensors")


def agreement(folder: Path) -> dict[str, Any]:
    """All jobs of one number of ranks."""
    from star_fast.training.ranks import start_ranks

    store = CodeStore.open(folder / "codes")
    _, ranks, device = start_ranks()
    seen: dict[str, Any] = {}
    for stage in STAGES:
        seen["fp32", stage] = train(settings(store, stage=stage), store, device)
        seen["accumulated", stage] = train(settings(store, stage=stage, micro=4 // ranks, steps=6), store, device)
        seen["gradients", stage] = gradients(settings(store, stage=stage, beta1=0.0, clip_norm=0.0), store, device)
        seen["bf16", stage] = train(settings(store, precision="bf16", stage=stage), store, device, closed_form=True)
    return seen


def moves(folder: Path) -> dict[str, Any]:
    """One part of the run that changes its ranks: load what is there, evaluate, go on, evaluate, save."""
    from star_fast.training import checkpoint
    from star_fast.training.ranks import start_ranks
    from star_fast.training.validation import held_out_batches

    store = CodeStore.open(folder / "codes")
    _, ranks, device = start_ranks()
    config = settings(store, precision="bf16", stage={1: 1, 2: 2, 4: 3}[ranks])
    engine, batches = start(config, store, device)
    run, first = folder / f"on-{ranks}", 0
    held_out = held_out_batches(store, config, engine.rank, engine.ranks)
    seen: dict[str, Any] = {}
    if (newest := checkpoint.latest(run)) is not None:
        first = checkpoint.load(engine, store, newest).step
        seen["before"] = engine.evaluate(held_out)
    for step, micro in batches.steps(first, first + 6):
        engine.step(micro, step, config.lr)
    seen["after"] = engine.evaluate(held_out)
    checkpoint.save(engine, store, run, first + 6, 2)
    return seen


def _rank(job: Callable[[Path], dict[str, Any]], folder: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    torch.save(job(folder), os.environ["RESULT"])


def launch(job: Callable[[Path], dict[str, Any]], folder: Path, ranks: int) -> dict[str, Any]:
    """What rank 0 saw."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "RESULT": str(folder / f"{job.__name__}-{ranks}-{rank}.pt"),
        }
        processes.append(PROCESSES.Process(target=_rank, args=(job, folder, environment)))
        processes[-1].start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit(f"{job.__name__} on {ranks} ranks failed: exit statuses {[process.exitcode for process in processes]}")
    return torch.load(folder / f"{job.__name__}-{ranks}-0.pt", weights_only=True)


def by_hand(folder: Path) -> Tensor:
    """Losses of six steps with accumulation, by the trainer that the tests write out."""
    from star_fast.training.engine import build_student
    from tests.training.plain_trainer import PlainTrainer

    store = CodeStore.open(folder / "codes")
    config = settings(store, micro=4, steps=6)
    trainer = PlainTrainer(config, store, build_student(config), 6)
    return torch.stack([trainer.step(step)[0] for step in range(6)])


def curves(folder: Path) -> dict[str, list[float]]:
    """Next-token and contrastive losses together, 200 steps in bf16: ours, and LlamaGen's way."""
    from benchmarks.llamagen_training import PlainTraining
    from star_fast.training.batches import Batches
    from star_fast.training.engine import build_student
    from star_fast.training.ranks import start_ranks

    store = CodeStore.open(folder / "codes")
    _, _, device = start_ranks()
    found: dict[str, list[float]] = {
        "bf16 weights, float32 gradients (ZeRO-1)": [],
        "float32 weights under autocast (LlamaGen's way)": [],
    }
    ours, theirs = found
    config = settings(store, precision="bf16", stage=1, steps=CURVE_STEPS)
    engine, batches = start(config, store, device)
    plain = PlainTraining(config, build_student(config), device)
    for step, micro in Batches(store, config).steps(0, CURVE_STEPS):
        found[ours].append(float(engine.step(micro, step, config.lr)[0][0]))
        found[theirs].append(float(plain.step(micro, step)))
    return found


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest error of a tensor's norm relative to the norm."""
    return max(
        float((found[name] - value).norm() / value.norm().clamp(min=1e-12))
        for name, value in expected.items()
        if name != "step"
    )


def picture(found: dict[str, list[float]], file: Path) -> None:
    """Both curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for (name, values), style in zip(found.items(), ("-", "--"), strict=True):
        axes.plot(range(1, len(values) + 1), values, style, label=name, linewidth=1.6)
    axes.set(xlabel="optimizer step", ylabel="total loss", title="bf16 training, two ways")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


def text(
    found: dict[int, dict[str, Any]],
    hand: Tensor,
    moved: list[tuple[int, dict[str, Any]]],
    curve: dict[str, list[float]],
) -> tuple[str, bool]:
    """The report, and whether all bounds hold."""
    plain, lines, good = found[1], [], True
    lines += [
        "# Ranks and ZeRO stages",
        "",
        "    python scripts/ranks_and_zero.py --save",
        "",
        f"torch {torch.__version__}, CPU, gloo. A model of 2 blocks and width 32, 8 images x 2 views a step, "
        "teacher's decay 0.9 with warm-up.",
        "",
        "Float32, dropout 0, against one rank without ZeRO. Bounds: gradients 1e-6, losses 1e-5. Accumulation: "
        "two micro-batches of 4 images over all "
        "ranks, against the loop written out by hand in tests/training/plain_trainer.py.",
        "",
        f"| ranks | ZeRO | gradients of step 1, relative | losses of {STEPS} steps | accumulation, losses of 6 "
        f"steps | teacher after {STEPS} steps, "
        "relative | bf16: teacher off its closed form, relative |",
        "|---|---|---|---|---|---|---|",
    ]
    for ranks, seen in found.items():
        for stage in STAGES:
            gradient = relative(seen["gradients", stage], plain["gradients", 0])
            loss = float((seen["fp32", stage]["losses"] - plain["fp32", 0]["losses"]).abs().max())
            hands = float((seen["accumulated", stage]["losses"] - hand).abs().max())
            teacher, closed = (
                relative(seen["fp32", stage]["teacher"], plain["fp32", 0]["teacher"]),
                seen["bf16", stage]["off"],
            )
            good &= gradient <= 1e-6 and loss <= 1e-5 and hands <= 2e-5 and closed <= STEPS * 2.0**-23
            lines.append(
                f"| {ranks} | {stage} | {gradient:.1e} | {loss:.1e} | {hands:.1e} | {teacher:.1e} | {closed:.1e} |"
            )
    lines += [
        "",
        "A run that goes from 2 ranks (ZeRO-2) to 4 (ZeRO-3) to 1 (ZeRO-1) in bf16, by `star-fast convert`: "
        "held-out loss before and after the move.",
        "",
        "| move | before | after |",
        "|---|---|---|",
    ]
    for (old, a), (new, b) in itertools.pairwise(moved):
        good &= abs(a["after"] - b["before"]) <= 1e-6
        lines.append(f"| {old} -> {new} ranks | {a['after']:.7f} | {b['before']:.7f} |")
    ours, theirs = (torch.tensor(values) for values in curve.values())
    apart = float((ours - theirs).abs().mean())
    lines += [
        "",
        f"bf16, {CURVE_STEPS} steps, {' against '.join(curve)}: last 20 steps {ours[-20:].mean():.4f} against "
        f"{theirs[-20:].mean():.4f}; apart by "
        f"{apart:.4f} a step on average.",
        "",
        "![both loss curves](ranks_and_zero.png)",
        "",
        "All bounds hold." if good else "**A bound is exceeded.**",
    ]
    return "\n".join(lines) + "\n", good


def main() -> int:
    """Measure, print, and with --save keep."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/ranks_and_zero.{md,png}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    from star_fast.training.conversion import ConvertCommand, convert
    from tests.training.store import write_store

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_store(folder / "codes")
        found = {ranks: launch(agreement, folder, ranks) for ranks in RANKS}
        moved = []
        for ranks, source in ((2, None), (4, 2), (1, 4)):
            if source is not None:
                convert(ConvertCommand(str(folder / f"on-{source}"), str(folder / f"on-{ranks}")))
            moved.append((ranks, launch(moves, folder, ranks)))
        curve = launch(curves, folder, 1)
        report, good = text(found, by_hand(folder), moved, curve)
    print(report)
    if arguments.save:
        RESULTS.joinpath("ranks_and_zero.md").write_text(report)
        picture(curve, RESULTS / "ranks_and_zero.png")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

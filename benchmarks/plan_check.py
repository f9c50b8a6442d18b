"""Memory that `star-fast plan` predicts against the peak of a real training step, each configuration in a process of
its own.

    python benchmarks/plan_check.py                 writes results/plan_check.md, on a GPU plan_check_gpu.md
                                                    (some minutes)

The peak is that of resident memory in the second step (VmHWM, reset through /proc/self/clear_refs) less what the
process held before anything was built, after a tiny training step that loads every library. glibc gives freed memory
back at once (MALLOC_ variables). The ops run by their plain torch references, so the prediction is theirs
(`fused=False`); of DeepSpeed's reduction buffer only the part that is touched is memory. Where there is a GPU the peak
is what torch allocated on it, and the prediction that of the kernels.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from star_fast.config import MethodConfig, ModelConfig, RunConfig, TrainConfig
from star_fast.presets import preset

RESULTS = Path(__file__).resolve().parent / "results"
MIB = 2**20
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    "STAR_FAST_BACKEND": "reference",
}


class Case(NamedTuple):
    """One configuration: T 256, V 4096, two views, one rank; or a preset at its real size, with so many images."""

    blocks: int
    heads: int
    width: int
    images: int  # of a micro-batch
    precision: str
    stage: int
    gradients: str = "fp32"
    recompute: bool = False
    accumulation: int = 1
    preset: str = ""

    def config(self) -> RunConfig:
        """The same as settings."""
        if self.preset:
            named = preset(self.preset)
            return dataclasses.replace(
                named,
                train=dataclasses.replace(named.train, images_per_step=self.images, micro_batch_images=self.images),
            )
        return RunConfig(
            ModelConfig(self.blocks, self.heads, self.width, vocab=4096, positions=256, num_classes=100),
            MethodConfig(projector_width=512),
            train=TrainConfig(
                images_per_step=self.images * self.accumulation,
                micro_batch_images=self.images,
                precision=self.precision,
                gradient_precision=self.gradients,
                zero_stage=self.stage,
                block_checkpointing=self.recompute,
            ),
        )


CASES = [
    Case(8, 8, 512, 4, "bf16", 1),
    Case(8, 8, 512, 4, "bf16", 1, recompute=True),
    Case(8, 8, 512, 12, "bf16", 1),
    Case(4, 12, 768, 2, "bf16", 1, accumulation=2),
    Case(8, 8, 512, 4, "bf16", 1, "bf16"),
    Case(4, 12, 768, 4, "bf16", 2),
    Case(4, 12, 768, 4, "bf16", 3),
    Case(8, 8, 512, 4, "bf16", 0, "bf16"),
    Case(6, 8, 384, 6, "fp32", 0),
    Case(24, 16, 1024, 1, "bf16", 1, preset="L"),
    Case(36, 20, 1280, 1, "bf16", 1, preset="XL"),  # needs 21 GiB
]


def resident(name: str = "VmRSS") -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since the last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def measure(case: Case) -> dict[str, Any]:
    """One case, in a process of its own."""
    import torch

    from star_fast.method.batch import Batch
    from star_fast.planning.activations import activations
    from star_fast.planning.plan import peak_bytes
    from star_fast.planning.sizes import micro, parameters
    from star_fast.planning.states import states
    from star_fast.training import engine as training
    from star_fast.training.engine import Engine, build_student
    from star_fast.training.ranks import start_ranks

    # Else the process keeps what one phase has freed when the next comes: fragments, not tensors
    training.keep_freed_memory = lambda: True
    torch.manual_seed(0)
    _, _, device = start_ranks()
    config = case.config()

    def batches(settings: RunConfig, count: int) -> list[Batch]:
        model, rows = settings.model, settings.train.micro_batch_images * settings.method.views
        targets = torch.randint(model.vocab, (rows, model.positions))
        keep = torch.rand(rows, model.positions) >= settings.method.mask_ratio
        keep[:, 0] = True
        return [
            Batch(targets[:, :-1].contiguous(), torch.zeros(rows, dtype=torch.int64), targets, keep, torch.arange(4), 0)
        ] * count

    tiny = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, blocks=1, heads=2, width=32, vocab=64),
        method=dataclasses.replace(config.method, contrast_depth=1),
    )
    warm = Engine(tiny, build_student(tiny), device, case.images, 1)
    warm.step(batches(tiny, 1), 0, 1e-4)
    del warm
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else resident()
    engine = Engine(config, build_student(config), device, case.images, case.accumulation)
    given = batches(config, case.accumulation)
    engine.step(given, 0, 1e-4)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    losses = engine.step(given, 1, 1e-4)[0].tolist()
    measured = (torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")) - before
    found, held = parameters(config), states(config, case.stage, 1, touched_only=not on_gpu)
    work = activations(config, micro(config, case.images, 1), fused=on_gpu)
    return {
        "finite": all(map(math.isfinite, losses)),
        "parameters": found.student,
        "measured": measured,
        "predicted": peak_bytes(held, work, accumulating=case.accumulation > 1),
        "states": held.weights + held.gradients + held.optimizer + held.teacher,
        "activations": work.total,
        "at_step": held.at_step,
    }


def row(case: Case, on_gpu: bool) -> str:
    """One line of the table."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(case._asdict())],
        env={**os.environ, **({} if on_gpu else ENVIRONMENT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    predicted, measured = found["predicted"], found["measured"]
    if not found["finite"]:
        raise SystemExit(f"{case}: losses are not finite")
    size = (
        f"{f'{case.preset}: ' if case.preset else ''}{case.blocks} x {case.width} ({found['parameters'] / 1e6:.0f} M)"
    )
    cells = [
        size,
        f"{case.images}{f' x {case.accumulation}' if case.accumulation > 1 else ''}",
        f"{case.precision}{', bf16 gradients' if case.gradients == 'bf16' else ''}",
        str(case.stage),
        "yes" if case.recompute else "no",
        *(f"{found[name] / MIB:.0f}" for name in ("states", "activations", "at_step", "predicted", "measured")),
        f"{predicted / measured - 1:+.0%}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure all cases and write the table."""
    import torch

    from benchmarks.timing import environment

    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = environment(device)
    lines = [
        "# Planned and measured memory",
        "",
        f"device {about['device']}, torch {about['torch']}, commit {about['commit']}; MiB of one process",
        "",
        "| blocks x width | images | precision | ZeRO | blocks recomputed | states | activations | at the step | "
        "predicted peak | measured peak | error |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    # Each process counts its own bytes: on a GPU, where all fit at once, most of the time is their starting
    with ThreadPoolExecutor(4 if device == "cuda" else 1) as pool:
        for line in pool.map(lambda case: row(case, device == "cuda"), CASES):
            lines.append(line)
            print(line, flush=True)
    lines += [
        "",
        " ".join((__doc__ or "").split("\n\n")[-1].split()),
        "",
        "States: weights, gradients, optimizer, teacher. Predicted: their sum and the larger of a micro-batch's "
        "activations and what the optimizer "
        "step takes; gradients that do not outlast the step are not there when backward begins.",
    ]
    if device == "cpu":
        lines[-1] += (
            " On a GPU the kernels save less (planning/activations.py): tests/test_plan.py holds their saved "
            "bytes to the formulas; a GPU's peak is "
            "not measured here."
        )
    (RESULTS / f"plan_check{'_gpu' if device == 'cuda' else ''}.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(Case(**json.loads(sys.argv[2])))))
    else:
        main()

"""How long a training step should take on a GPU, kernel by kernel: predicted, not measured.

    python benchmarks/step_model.py     B, L and XL on A100, H100 and B200; writes results/step_model.md and .json
    python benchmarks/step_model.py --preset XL --device H100 --images 48     prints one

The step is made by the training code itself, forward and backward, on tensors without data that claim to be on a GPU;
every kernel is noted with the least bytes and FLOPs that it needs. A kernel takes the longest of: its bytes at an
assumed share of the memory's rate, its FLOPs at an assumed share of the arithmetic's, and the gap between two launches.
The shares are assumptions, stated in the table; `scripts/gpu_acceptance.sh` measures what is true.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.devices import DEVICES, Device
from star_fast.config import RunConfig
from star_fast.method.student import Projector, Student
from star_fast.method.teacher import Teacher
from star_fast.model import transformer
from star_fast.ops import dispatch
from star_fast.ops.ema_update import ema_update
from star_fast.ops.linear_cross_entropy import linear_cross_entropy
from star_fast.ops.triton import linear_cross_entropy as cross_entropy_kernels
from star_fast.planning.work import sent_bytes, step_flops
from star_fast.presets import preset

RESULTS = Path(__file__).resolve().parent / "results"
GPUS = 8  # of the run, all in one machine
GAP_US = 2.0  # between the starts of two kernels, at least: what a GPU takes to begin and end one
# Bytes a second that one GPU sends to the others, each way (NVLink 3, 4 and 5), from NVIDIA's data sheets; a collective
# reaches SENT_SHARE of it.
NVLINK = {"A100": 300e9, "H100": 450e9, "H200": 450e9, "B200": 900e9}
SENT_SHARE = 0.7


class Group(NamedTuple):
    """Kernels that count together, and the shares of the machine's peaks that they are assumed to reach."""

    name: str
    memory_share: float
    arithmetic_share: float
    why: str


MATRIX = Group("matrix products", 0.8, 0.7, "cuBLAS in bfloat16 at these sizes")
GROUPS = {
    "attention_prepare": Group("attention, keys turned and mask packed", 0.8, 1.0, "one pass over the keys"),
    "attention_forward": Group(
        "attention, forward", 0.7, 0.5, "T 256: two tiles of keys a query tile leave little to overlap"
    ),
    "attention_backward": Group("attention, backward", 0.7, 0.45, "five products, dq and dk/dv in two kernels"),
    "add_rms_norm": Group("norms", 0.7, 1.0, "one pass over the rows, as FlashAttention's fused norm reaches"),
    "swiglu": Group("gates", 0.8, 1.0, "elementwise, 16-byte accesses"),
    "cross_entropy": Group("cross-entropy, softmax", 0.7, 1.0, "logits of a chunk, from the L2 cache at best"),
    "feature_distance": Group("masked-feature loss", 0.7, 1.0, "one pass over student and teacher"),
    "slot_contrast": Group("contrastive losses", 0.5, 0.2, "few and small"),
    "ema": Group("teacher's average", 0.8, 1.0, "elementwise"),
}
ADAMW = Group("AdamW", 0.8, 1.0, "one fused kernel")
SUMS = Group("gradients into float32", 0.8, 1.0, "each micro-batch's, bfloat16, added to a float32 sum")
OTHER = Group("torch's own elementwise", 0.75, 1.0, "copies, casts, sums, embedding")


class Work(NamedTuple):
    """One kernel."""

    group: Group
    bytes_moved: int
    flops: int


class Counter(TorchDispatchMode):
    """Notes every kernel that torch itself would launch. Views and allocations launch none."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Work] = []
        self.paused = False

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple = (), more: dict[str, Any] | None = None
    ) -> Any:
        out = function(*arguments, **(more or {}))
        packet, name = function._overloadpacket, function._schema.name
        makes_view = any(
            result.alias_info is not None and not result.alias_info.is_write for result in function._schema.returns
        )
        given = [leaf for leaf in tree_leaves((arguments, more)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if (
            self.paused
            or makes_view
            or "empty" in name
            or name in ("aten::_unsafe_view", "aten::detach", "aten::lift_fresh")
            or not made
        ):
            return out
        flops = flop_registry[packet](*arguments, **(more or {}), out_val=out) if packet in flop_registry else 0
        distinct = {id(tensor): tensor for tensor in (*given, *made)}.values()
        self.found.append(
            Work(MATRIX if flops else OTHER, sum(t.numel() * t.element_size() for t in distinct), int(flops))
        )
        return out


@contextmanager
def without_data(device: str) -> Iterator[None]:
    """Tensors are born without data, parameters in bfloat16."""
    seeds, default = transformer._dropout_seeds, torch.get_default_dtype()
    transformer._dropout_seeds = lambda count: list(range(count))  # drawn on the host, which is not fake in training
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
            yield
    finally:
        torch.set_default_dtype(default)
        transformer._dropout_seeds = seeds


def micro_step(config: RunConfig, images: int) -> list[Work]:
    """Every kernel of one micro-batch: teacher, student forward and backward.

    Autograd asks a "cuda" device for its driver, so the step is made on tensors of the "cpu" with the GPU's kernels
    asked for by name. The one part that goes by the device is linear_cross_entropy, which computes its gradients in its
    forward pass: it alone is made on "cuda".
    """
    model, method = config.model, config.method
    B, M, T, K, D = images, method.views, model.positions, method.contrast_positions, model.width
    run = cross_entropy_kernels.run

    def passed_over(*arguments: Any) -> Any:
        counter.paused, before = True, len(launches)
        try:
            return run(*arguments)
        finally:
            counter.paused = False
            del launches[before:]

    with (
        without_data("cpu"),
        dispatch.use_backend("triton"),
        dispatch.note_launches() as launches,
        Counter() as counter,
    ):
        student = Student(
            transformer.Transformer(model),
            Projector(D, method.projector_width, method.projector_layers),
            method,
            config.contrast_depth,
        ).train()
        student.transformer.block_checkpointing = config.train.block_checkpointing
        tokens, label = torch.empty(B * M, T - 1, dtype=torch.int64), torch.empty(B * M, dtype=torch.int64)
        targets, keep, positions = (
            torch.empty(B * M, T, dtype=torch.int64),
            torch.empty(B * M, T, dtype=torch.bool),
            torch.empty(K, dtype=torch.int64),
        )
        last, keys = None, None
        teacher = Teacher.__new__(Teacher)  # its copy would need a real model
        teacher.model, teacher.method, teacher.contrast_depth, teacher._arrivals = (
            transformer.Transformer(model).eval(),
            method,
            config.contrast_depth,
            [],
        )
        counter.found.clear()
        if method.has_teacher:
            last, keys = teacher.features(tokens, label, positions)
        cross_entropy_kernels.run = passed_over
        try:
            losses = student(
                tokens=tokens,
                label=label,
                targets=targets,
                keep=keep if method.has_teacher else None,
                teacher_last=last,
                keys=keys,
                positions=positions,
            )
            losses.total.backward()
        finally:
            cross_entropy_kernels.run = run
        found = counter.found + [_ours(launch) for launch in launches]
    with without_data("cuda"), dispatch.note_launches() as launches, Counter() as counter:
        hidden, weight = (torch.empty(rows, D).requires_grad_() for rows in (B * M * T, model.vocab))
        counter.found.clear()
        found.append(
            Work(
                SUMS,
                10 * sum(parameter.numel() for parameter in student.parameters()),
                sum(p.numel() for p in student.parameters()),
            )
        )
        linear_cross_entropy(hidden, weight, torch.empty(B * M * T, dtype=torch.int64))
        return found + counter.found + [_ours(launch) for launch in launches]


def update(config: RunConfig, gpus: int) -> list[Work]:
    """AdamW on this GPU's share of the weights (float32 master, two moments, gradient; read and written), and the
    teacher's average.
    """
    with without_data("cpu"), dispatch.use_backend("triton"), dispatch.note_launches() as launches:
        share = sum(parameter.numel() for parameter in transformer.Transformer(config.model).parameters()) // gpus
        if config.method.has_teacher:
            master, average = (torch.empty(share, dtype=torch.float32) for _ in range(2))
            ema_update([average], [master], 0.9999, copy_to=[torch.empty(share)])
        return [Work(ADAMW, 30 * share, 15 * share), *(_ours(launch) for launch in launches)]


def _ours(launch: dispatch.Launch) -> Work:
    group = next((group for start, group in GROUPS.items() if launch.kernel.startswith(start)), None)
    if group is None:
        raise SystemExit(f"step_model: kernel {launch.kernel} belongs to no group; add it to GROUPS")
    cost = launch.call.cost()
    return Work(group, cost.bytes_moved, cost.flops)


def microseconds(work: Work, device: Device) -> float:
    """What a kernel takes under the assumptions."""
    # Attention and contrast multiply on tensor cores; everything else of ours is bound by memory.
    rate = (
        device.bf16_flops_per_s if work.group is MATRIX or work.group.arithmetic_share < 1 else device.fp32_flops_per_s
    )
    return max(
        1e6 * work.bytes_moved / (device.bytes_per_s * work.group.memory_share),
        1e6 * work.flops / (rate * work.group.arithmetic_share),
        GAP_US,
    )


def least_us(work: Work, device: Device) -> float:
    """What its FLOPs alone take at the tensor cores' peak: everything above is not what MFU counts."""
    return (
        1e6 * work.flops / device.bf16_flops_per_s if work.group is MATRIX or work.group.arithmetic_share < 1 else 0.0
    )


def predict(
    config: RunConfig, images: int, device: Device, kernels: Iterable[Work], closing: Iterable[Work]
) -> dict[str, Any]:
    """Times by group for one optimizer step of one GPU, and what follows."""
    micro_batches = config.train.images_per_step // (GPUS * images)
    groups: dict[str, dict[str, float]] = defaultdict(
        lambda: {"launches": 0, "ms": 0.0, "over_peak_ms": 0.0, "gib": 0.0, "tflop": 0.0}
    )
    for times, works in ((micro_batches, kernels), (1, closing)):
        for work in works:
            row = groups[work.group.name]
            row["launches"] += times
            row["ms"] += times * microseconds(work, device) / 1e3
            row["over_peak_ms"] += times * (microseconds(work, device) - least_us(work, device)) / 1e3
            row["gib"] += times * work.bytes_moved / 2**30
            row["tflop"] += times * work.flops / 1e12
    sent_ms = 1e3 * sent_bytes(config, GPUS) / (NVLINK[device.name] * SENT_SHARE)
    groups["between GPUs"] = {
        "launches": 0,
        "ms": sent_ms,
        "over_peak_ms": sent_ms,
        "gib": sent_bytes(config, GPUS) / 2**30,
        "tflop": 0.0,
    }
    step_ms = sum(row["ms"] for row in groups.values())
    flops = step_flops(config, GPUS, images).total / GPUS
    wastes = sorted(groups, key=lambda name: -groups[name]["over_peak_ms"])[:3]
    return {
        "device": device.name,
        "micro_batch_images": images,
        "micro_batches": micro_batches,
        "step_ms": step_ms,
        "images_per_s_a_gpu": config.train.images_per_step / GPUS / step_ms * 1e3,
        "mfu": flops / (step_ms / 1e3) / device.bf16_flops_per_s,
        "launches": sum(row["launches"] for row in groups.values()),
        "largest_wastes": wastes,
        "groups": dict(groups),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["B", "L", "XL"])
    parser.add_argument(
        "--device", nargs="+", default=["A100", "H100", "B200"], choices=[device.name for device in DEVICES]
    )
    parser.add_argument("--images", type=int, default=32, help="of a micro-batch")
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    for name in arguments.preset:
        config = preset(name)
        kernels, closing = micro_step(config, arguments.images), update(config, GPUS)
        _require_planned(config, arguments.images, kernels)
        found[name] = [
            predict(config, arguments.images, device, kernels, closing)
            for device in DEVICES
            if device.name in arguments.device
        ]
        for row in found[name]:
            print(_line(name, row), flush=True)
    if not set(parser.get_default("preset")) - set(found) and arguments.images == 32 and len(arguments.device) == 3:
        (RESULTS / "step_model.json").write_text(json.dumps(found, indent=1) + "\n")
        (RESULTS / "step_model.md").write_text("\n".join(_page(found)) + "\n")


def _require_planned(config: RunConfig, images: int, kernels: Iterable[Work]) -> None:
    """The FLOPs counted must be those that planning computes from the sizes: neither is derived from the other. A
    quarter of the keys is hidden in ours.
    """
    counted = sum(work.flops for work in kernels if work.group is MATRIX or work.group.arithmetic_share < 1)
    planned = step_flops(config, GPUS, images).total / (config.train.images_per_step // images)
    if abs(counted / planned - 1) > 0.03:
        raise SystemExit(f"step_model: counted {counted / 1e12:.2f} TFLOP a micro-batch, planned {planned / 1e12:.2f}")


def _line(name: str, row: dict[str, Any]) -> str:
    wastes = ", ".join(f"{waste} {row['groups'][waste]['over_peak_ms']:.1f}" for waste in row["largest_wastes"])
    return (
        f"{name:3} {row['device']:5} step {row['step_ms']:7.1f} ms, {row['images_per_s_a_gpu']:6.1f} images/s a "
        f"GPU, MFU {100 * row['mfu']:4.1f} %, "
        f"{row['launches']:6,} launches; ms over the peak: {wastes}"
    )


def _page(found: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    yield "# A training step on a GPU, predicted"
    yield ""
    yield (
        f"`python benchmarks/step_model.py`: no GPU was used. {GPUS} GPUs, 256 images a step x 2 views, "
        "micro-batches of 32 images a GPU, bf16, ZeRO-1. "
        "Every kernel takes the longest of its bytes and its FLOPs at the assumed shares of the peaks below, and of "
        f"{GAP_US:g} µs; nothing overlaps, traffic between GPUs ({100 * SENT_SHARE:.0f} % of NVLink's rate) "
        "neither. MFU counts causal FLOPs, the teacher's "
        "among them. Peak: the board's dense bf16 rate."
    )
    yield ""
    yield "| preset | GPU | step, ms | images/s a GPU | MFU, % | launches | largest losses against the peak, ms |"
    yield "|---|---|--:|--:|--:|--:|---|"
    for name, rows in found.items():
        for row in rows:
            wastes = ", ".join(f"{waste} {row['groups'][waste]['over_peak_ms']:.1f}" for waste in row["largest_wastes"])
            yield (
                f"| {name} | {row['device']} | {row['step_ms']:.1f} | {row['images_per_s_a_gpu']:.0f} | "
                f"{100 * row['mfu']:.0f} | {row['launches']:,} | "
                f"{wastes} |"
            )
    shown = [(name, row) for name, rows in found.items() for row in rows if row["device"] == "H100"]
    assumed = {group.name: group for group in (MATRIX, *GROUPS.values(), ADAMW, SUMS, OTHER)}
    for name, row in shown:
        yield from ("", f"## {name} on H100, one step", "")
        yield "| kernels | launches | GiB | TFLOP | assumed share of memory's rate | of arithmetic's | ms |"
        yield "|---|--:|--:|--:|--:|--:|--:|"
        for group, values in sorted(row["groups"].items(), key=lambda item: -item[1]["ms"]):
            shares = (
                [f"{100 * share:.0f} %" for share in assumed[group][1:3]]
                if group in assumed
                else [f"{100 * SENT_SHARE:.0f} % of NVLink", ""]
            )
            yield (
                f"| {group} | {values['launches']:,} | {values['gib']:.2f} | {values['tflop']:.2f} | {shares[0]} "
                f"| {shares[1]} | {values['ms']:.2f} |"
            )
    yield from ("", "Why these shares:", "")
    yield from (f"- {group.name}: {group.why}." for group in (MATRIX, *GROUPS.values(), ADAMW, SUMS, OTHER))


if __name__ == "__main__":
    main()

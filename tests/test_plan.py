"""The plan's arithmetic: parameters, FLOPs and saved bytes are those of the model that trains; contradictions get one
line.
"""

from __future__ import annotations

import dataclasses
import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from star_fast import cli
from star_fast.config import MethodConfig, ModelConfig, RunConfig, TrainConfig
from star_fast.method.masking import key_mask
from star_fast.method.student import Projector, Student
from star_fast.method.teacher import Teacher
from star_fast.model.transformer import Transformer
from star_fast.ops import dispatch
from star_fast.ops.triton.tiles import LOGITS_CHUNK_BYTES as TRITON_CHUNK_BYTES
from star_fast.planning import activations, plan, sizes, states, work
from star_fast.planning.gpus import GIB, gpu
from star_fast.presets import PRESETS, plain, preset
from tests.method import plain_llamagen

SMALL = RunConfig(
    model=ModelConfig(3, 4, 128, vocab=256, positions=64, num_classes=10, dropout=0.1),
    method=MethodConfig(projector_width=96),
    train=TrainConfig(images_per_step=4, precision="bf16"),
)


def with_train(config: RunConfig, **changes) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def build(config: RunConfig) -> Student:
    transformer = Transformer(config.model)
    transformer.init_weights(torch.Generator().manual_seed(0))
    transformer.block_checkpointing, transformer.keep_attention = (
        config.train.block_checkpointing,
        config.train.keep_attention,
    )
    projector = None
    if config.method.contrasts:
        projector = Projector(
            config.model.width,
            config.method.projector_width,
            config.method.projector_layers,
            config.method.projector_norm,
        )
    return Student(transformer, projector, config.method, config.contrast_depth).to(
        torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    )


def batch(config: RunConfig, images: int) -> dict[str, Tensor]:
    model, method, rows = config.model, config.method, images * config.method.views
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(model.vocab, (rows, model.positions), generator=generator)
    keep = key_mask(0, 0, np.arange(images), method.views, model.positions, method.mask_ratio)
    return {
        "tokens": targets[:, :-1].contiguous(),
        "label": torch.randint(model.num_classes, (rows,), generator=generator),
        "targets": targets,
        "keep": None if keep is None else torch.from_numpy(keep).flatten(0, 1),
        "positions": torch.randperm(model.positions, generator=generator)[: method.contrast_positions],
    }


def saved_and_counted(config: RunConfig, backend: str, images: int) -> tuple[int, int]:
    """(bytes of all storages kept for backward at the end of the student's forward pass, weights not counted; FLOPs of
    one step as torch counts them).
    """
    student, given = build(config), batch(config, images)
    teacher = Teacher(student.transformer, config.method, config.contrast_depth)
    lasting = {tensor.untyped_storage().data_ptr() for tensor in (*student.parameters(), *student.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in lasting:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with dispatch.use_backend(backend):
        last, keys = teacher.features(given["tokens"], given["label"], given["positions"])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            student(**given, teacher_last=last, keys=keys)
        saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        if backend == "triton":
            return saved, 0
        # Attention by its plain products: torch counts neither the CPU's fused attention nor causality.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            last, keys = teacher.features(given["tokens"], given["label"], given["positions"])
            student(**given, teacher_last=last, keys=keys).total.backward()
    return saved, counter.get_total_flops()


@pytest.fixture(autouse=True)
def torchs_own_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine under ZeRO-3 leaves DeepSpeed's linear in torch.nn.functional for the rest of the process: recomputing,
    it takes one product more.
    """
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_the_modules(name: str) -> None:
    for config in (sizes.sized(preset(name))[0], plain(sizes.sized(preset(name))[0])):
        with torch.device("meta"):
            student = Transformer(config.model)
            projector = Projector(
                config.model.width,
                config.method.projector_width,
                config.method.projector_layers,
                config.method.projector_norm,
            )
        found = sizes.parameters(config)
        assert found.transformer == sum(parameter.numel() for parameter in student.parameters())
        assert found.projector == (
            sum(parameter.numel() for parameter in projector.parameters()) if config.method.contrasts else 0
        )
        assert found.largest >= max(parameter.numel() for parameter in student.parameters())


RECOMPUTE = {
    "none": {},
    "blocks": {"block_checkpointing": True},
    "all but attention": {"block_checkpointing": True, "keep_attention": True},
}


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_flops_are_those_that_torch_counts(recompute: str) -> None:
    """The whole step of student and teacher by the reference ops, whose products torch sees, those inside autograd
    functions too.

    Attention by its plain products: torch counts neither the CPU's fused attention nor causality, so `causal=False`.
    """
    config, images = with_train(SMALL, **RECOMPUTE[recompute]), 4
    student, given = build(config), batch(config, images)
    teacher = Teacher(student.transformer, config.method, config.contrast_depth)
    counters = {name: FlopCounterMode(display=False) for name in ("teacher", "forward", "backward")}
    with dispatch.use_backend("reference"), sdpa_kernel(SDPBackend.MATH):
        with counters["teacher"]:
            last, keys = teacher.features(given["tokens"], given["label"], given["positions"])
        with counters["forward"]:
            losses = student(**given, teacher_last=last, keys=keys)
        with counters["backward"]:
            losses.total.backward()
    counted = {name: counter.get_total_flops() for name, counter in counters.items()}
    predicted = work.step_flops(config, 1, images, causal=False)
    assert counted["teacher"] == pytest.approx(predicted.teacher, rel=0.01)
    assert counted["forward"] + counted["backward"] == pytest.approx(predicted.student + predicted.recomputed, rel=0.01)


def test_forward_flops_are_those_of_llamagen_by_hand() -> None:
    """An independent composition of plain products, one head at a time: no op of this package, so nothing can hide a
    product.
    """
    T = 16
    config = plain(
        dataclasses.replace(with_train(SMALL, precision="fp32"), model=dataclasses.replace(SMALL.model, positions=T))
    )
    student, tokens = build(config), batch(config, 2)["targets"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain_llamagen.loss(
            student.transformer.state_dict(),
            tokens,
            torch.zeros(len(tokens), dtype=torch.int64),
            blocks=3,
            heads=4,
            grid=4,
        )
    size = sizes.micro(config, 2, 1)
    assert sum(work.forward_flops(config, size, causal=False)) == pytest.approx(counter.get_total_flops(), rel=0.001)
    unseen = 3 * size.sequences * 4 * (T * T - T * (T + 1) // 2) * 128  # pairs above the diagonal, two products each
    assert sum(work.forward_flops(config, size)) == pytest.approx(counter.get_total_flops() - unseen, rel=0.001)


@pytest.mark.parametrize(
    ("backend", "precision", "recompute"),
    [
        *(("reference", precision, recompute) for precision in ("bf16", "fp32") for recompute in RECOMPUTE),
        *(("triton", "bf16", recompute) for recompute in RECOMPUTE),
    ],
)
def test_saved_bytes_are_those_that_autograd_keeps(backend: str, precision: str, recompute: str) -> None:
    """Bytes of all storages kept for backward at the end of the forward pass, weights not counted; the Triton kernels
    run in their interpreter.
    """
    config = with_train(SMALL, precision=precision, **RECOMPUTE[recompute])
    if backend == "triton":
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, positions=16, blocks=2))
    counted, _ = saved_and_counted(config, backend, 3)
    predicted = activations.activations(config, sizes.micro(config, 3, 1), fused=backend == "triton").saved
    assert predicted == pytest.approx(counted, rel=0.03 if backend == "triton" else 0.1)


@pytest.mark.parametrize(
    "choices",
    [
        {"negatives": "all_slots"},
        {"projector_norm": "batch"},
        {"mim_positions": "hidden"},
        {"mim_weight": 0.0},
        {"projector_layers": 1},
        {"projector_layers": 5, "projector_norm": "batch"},
    ],
)
def test_the_choices_of_the_method_count(choices: dict) -> None:
    """Settings that most runs leave alone: parameters, FLOPs and saved bytes with each."""
    config = dataclasses.replace(SMALL, method=dataclasses.replace(SMALL.method, contrast_positions=16, **choices))
    assert sizes.parameters(config).student == sum(parameter.numel() for parameter in build(config).parameters())
    kept, counted = saved_and_counted(config, "reference", 4)
    predicted = work.step_flops(config, 1, 4, causal=False)
    assert predicted.total == pytest.approx(counted, rel=0.01)
    assert activations.activations(config, sizes.micro(config, 4, 1), fused=False).saved == pytest.approx(kept, rel=0.1)


def test_chunk_of_logits_is_the_ops() -> None:
    assert activations.LOGITS_CHUNK_BYTES == TRITON_CHUNK_BYTES
    XL = preset("XL")
    found = activations.activations(XL, sizes.micro(XL, 32, 8))
    assert found.logits_chunk == TRITON_CHUNK_BYTES
    plain_op = import_module("star_fast.ops.linear_cross_entropy")
    assert (activations.PLAIN_CHUNK_BYTES, activations.PARTIAL_BYTES) == (
        plain_op._CHUNK_BYTES,
        plain_op._PARTIAL_BYTES,
    )
    assert activations.activations(XL, sizes.micro(XL, 64, 8)).saved == pytest.approx(2 * found.saved, rel=1e-3)


def test_states_of_the_zero_stages() -> None:
    """Bytes a parameter, by hand: bf16 weights 2, float32 gradients 4, masters and moments 12, teacher 2 + 4, each
    whole or shared by 8.
    """
    XL = preset("XL")
    found = sizes.parameters(XL)
    P, Q = found.student, found.transformer
    layouts = [states.states(XL, stage, 8) for stage in (0, 1, 2, 3)]
    assert [layout.weights for layout in layouts] == [2 * P, 2 * P, 2 * P, 2 * P // 8]
    assert [layout.gradients for layout in layouts] == [2 * P, 4 * P, 4 * P // 8, 4 * P // 8]
    assert [layout.optimizer for layout in layouts] == [12 * P, 12 * P // 8, 12 * P // 8, 12 * P // 8]
    assert [layout.teacher for layout in layouts] == [
        6 * Q,
        2 * Q + 4 * Q // 8,
        2 * Q + 4 * Q // 8,
        2 * Q // 8 + 4 * Q // 8,
    ]
    assert states.states(plain(XL), 1, 8).teacher == 0
    alone = states.states(with_train(XL, precision="fp32"), 0, 8)
    assert (alone.weights, alone.gradients, alone.optimizer, alone.teacher) == (4 * P, 4 * P, 8 * P, 4 * Q)


def test_largest_micro_batch_is_the_largest() -> None:
    XL = preset("XL")
    made = plan.make_plan(XL, 8, 80.0, gpu("h100"))
    limit = (80 - plan.RESERVED_GIB) * GIB
    for row in made.stages:
        assert (
            plan.gpu_bytes(XL, row.stage, 8, row.largest_images)
            <= limit
            < plan.gpu_bytes(XL, row.stage, 8, row.largest_images + 1)
        )
        assert row.largest_images_recomputed > row.largest_images
    assert (made.advice.stage, made.advice.micro_images, made.advice.accumulation) == (1, 32, 1)
    tight = plan.make_plan(XL, 8, 24.0, gpu("h100"))
    assert (
        tight.advice.micro_images * tight.advice.accumulation == 32
        and tight.advice.accumulation > tight.advice.recomputing_helps > 0
    )
    assert tight.advice.peak_bytes <= (24 - plan.RESERVED_GIB) * GIB


def test_offloaded_states_leave_the_gpu() -> None:
    XL = preset("XL")
    Q = sizes.parameters(XL).transformer
    for stage, weights in ((1, 2 * Q), (2, 2 * Q), (3, 2 * Q // 8)):
        held = states.states(with_train(XL, zero_stage=stage, offload_optimizer=True), stage, 8)
        assert (held.optimizer, held.teacher, held.at_step) == (0, weights, 0)


def test_the_command_prints_tables_and_writes_json(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    arguments = [
        "plan",
        "--preset",
        "XL",
        "--gpus",
        "8",
        "--gpu-memory-gib",
        "80",
        "--json",
        str(tmp_path / "plan.json"),
    ]
    assert cli.main([*arguments, "--train.images-per-step", "512"]) == 0
    printed = capfd.readouterr().out
    assert "Predicted, not measured: preset XL on 8 x H100" in printed
    assert all(
        part in printed
        for part in (
            "ZeRO-0",
            "ZeRO-3",
            "--train.micro-batch-images 64",
            "300 epochs, days",
            "40%",
            "60%",
            "512 images x 2 views",
        )
    )
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["predicted"] is True and record["measured"] is False
    assert record["config"]["train"]["images_per_step"] == 512
    assert len(record["stages"]) == 4
    fifty = record["speeds"][1]
    assert fifty["days_50_epochs"] == pytest.approx(
        50 * 1_281_167 / 512 * record["flops"]["total"] / (8 * 989e12 * 0.5) / 86400
    )
    for name in PRESETS:
        assert cli.main(["plan", f"--preset={name}"]) == 0
    assert cli.main(["plan", "--preset", "B", "--plain", "--gpu", "A100"]) == 0
    assert "no teacher" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--gpus", "0"], "--gpus: expected at least 1, got 0"),
        (["--gpus", "3"], "train.images_per_step: expected a multiple of the 3 GPUs, got 256"),
        (["--gpu-memory-gib", "-5"], "--gpu-memory-gib: expected more than the 2 GiB"),
        (["--gpu-memory-gib", "1e308"], "--gpu-memory-gib: expected at most 1048576"),
        (["--gpu-memory-gib", "nan"], "expected a finite number"),
        (["--gpu", "h50"], "--gpu: expected one of a100, h100, h200, b200, got 'h50'"),
        (["--gpu-memory-gib", "4"], "nothing fits: one image on each of 8 GPUs needs"),
        (
            ["--train.micro-batch-images", "64"],
            "train.micro_batch_images: 8 GPUs x 64 images must divide train.images_per_step = 256",
        ),
        (["--preset", "none"], "give one of them, once"),
        (["--train.images-per-step", "0"], "train.images_per_step"),
    ],
)
def test_contradictions_get_one_line(arguments: list[str], line: str, capfd: pytest.CaptureFixture) -> None:
    assert cli.main(["plan", "--preset", "XXL", *arguments]) == 2
    out, error = capfd.readouterr()
    assert out == ""
    assert error.count("\n") == 1 and error.startswith("error: ")
    assert line in error

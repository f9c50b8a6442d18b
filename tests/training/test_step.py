"""Engine, batches and schedule against training written out by hand: dropout, accumulation, warm-ups, clipping and
several epochs at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from star_fast.config import MethodConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from star_fast.data.codes import CodeStore
from star_fast.training.batches import Batches, resolve
from star_fast.training.deepspeed_settings import clips_outside, derived
from star_fast.training.engine import Engine, build_student
from star_fast.training.loop import learning_rate
from tests.training.plain_trainer import PlainTrainer, micro_batches
from tests.training.plain_trainer import learning_rate as plain_learning_rate
from tests.training.ranks_main import read
from tests.training.store import write_store

STEPS = 8
# A large eps keeps AdamW from blowing up the rounding of tiny gradients; the rest is set so that leaving anything out
# moves the weights visibly.
CONFIG = RunConfig(
    ModelConfig(4, 2, 16, dropout=0.3, label_dropout=0.4),
    MethodConfig(contrast_positions=3, projector_width=24, ema_decay=0.6, mim_weight=0.7),
    OptimConfig(3.0, weight_decay=0.3, eps=0.01, clip_norm=0.2, schedule="cosine", warmup_steps=3, final_lr_share=0.1),
    TrainConfig(images_per_step=24, micro_batch_images=8, precision="fp32", zero_stage=0, seed=4),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CodeStore:
    return write_store(tmp_path_factory.mktemp("codes"))


@pytest.fixture
def make_engine(one_rank: torch.device, store: CodeStore) -> Callable[..., tuple[Engine, Batches]]:
    """Engine and batches of CONFIG with some settings changed, each given as section__field."""

    def make(**changes: Any) -> tuple[Engine, Batches]:
        config = changed(CONFIG, store, **changes)
        batches = Batches(store, config)
        return Engine(config, build_student(config), one_rank, batches.micro_images, batches.accumulation), batches

    return make


def changed(config: RunConfig, store: CodeStore, **changes: Any) -> RunConfig:
    if changes.get("train__precision") == "bf16" and not changes.get("train__zero_stage", 0):
        changes = {"train__gradient_precision": "bf16", **changes}  # all that DeepSpeed has without ZeRO
    sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, field = name.split("__")
        sections.setdefault(section, {})[field] = value
    config = dataclasses.replace(
        config,
        **{section: dataclasses.replace(getattr(config, section), **fields) for section, fields in sections.items()},
    )
    return resolve(config, store)


def whole(engine: Engine, masters: list[Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.masters.gather(masters)}


def close(ours: Tensor, plain: Tensor, what: str, tolerance: float = 2e-5) -> None:
    error = float((ours.detach().double() - plain.detach().double()).abs().max())
    assert error <= tolerance * max(1.0, float(plain.detach().abs().max())), f"{what}: off by {error:.2e}"


# What is chosen otherwise than by default: all of it.
CHOICES = {
    "method__mim_positions": "hidden",
    "method__negatives": "all_slots",
    "method__projector_norm": "batch",
    "method__teacher_label": "kept",
}


@pytest.mark.parametrize(
    ("stage", "choices"),
    [(0, {}), (1, {}), (2, {}), (3, {}), (0, CHOICES), (1, CHOICES), (3, CHOICES)],
    ids=["0", "1", "2", "3", "0-choices", "1-choices", "3-choices"],
)
def test_steps_are_those_written_out_by_hand(
    make_engine: Callable, store: CodeStore, stage: int, choices: dict[str, str]
) -> None:
    engine, batches = make_engine(train__zero_stage=stage, **choices)
    plain = PlainTrainer(engine.config, store, build_student(engine.config), STEPS)
    clipped = 0
    # 72 images, 24 a step: into the third epoch. Batch norm makes a rounding of the weights grow to 4e-5 in step 5:
    # with it into the second one only.
    for step, micro in batches.steps(0, 4 if choices else STEPS):
        losses, norm = engine.step(micro, step, learning_rate(engine.config, step, STEPS))
        expected, expected_norm = plain.step(step)
        close(losses, expected, f"losses of step {step}")
        close(torch.as_tensor(float(norm)), torch.tensor(expected_norm), f"norm of step {step}")
        clipped += expected_norm > engine.config.optim.clip_norm
        student, teacher = whole(engine, engine.masters.tensors()), whole(engine, engine.teacher.masters)
        for (name, value), mean in zip(plain.student.named_parameters(), plain.teacher.parameters(), strict=True):
            close(student[name], value, f"student's {name} after step {step}")
            close(teacher[name], mean, f"teacher's {name} after step {step}")
    assert clipped >= 3, "the case does not clip: it shows nothing about clipping"
    for name, value in read(engine.student.projector.named_parameters()).items():
        close(value, plain.weights[f"projector.{name}"], f"projector's {name}")


@pytest.mark.parametrize("choice", CHOICES)
def test_each_choice_alone_changes_the_first_step(make_engine: Callable, store: CodeStore, choice: str) -> None:
    """And is the one written out by hand: what is wrong in one setting cannot hide behind another."""
    usual = PlainTrainer(changed(CONFIG, store), store, build_student(changed(CONFIG, store)), STEPS).step(0)[0]
    engine, batches = make_engine(**{choice: CHOICES[choice]})
    losses, norm = engine.step(batches.step(0), 0, learning_rate(engine.config, 0, STEPS))
    expected, expected_norm = PlainTrainer(engine.config, store, build_student(engine.config), STEPS).step(0)
    close(losses, expected, "losses")
    close(torch.as_tensor(float(norm)), torch.tensor(expected_norm), "norm")
    assert (losses - usual).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("precision", "stage"), [("fp32", 0), ("fp32", 1), ("bf16", 0), ("bf16", 1), ("bf16", 2), ("fp32", 3), ("bf16", 3)]
)
def test_a_gradient_too_long_is_cut_to_the_clipping_norm(make_engine: Callable, precision: str, stage: int) -> None:
    """With eps 1, no decay and no memory a step of AdamW is -lr g / (|g| + 1): about the clipped gradient itself."""
    moved = {}
    for clip in (0.0, 0.02):
        engine, batches = make_engine(
            train__precision=precision,
            train__zero_stage=stage,
            optim__clip_norm=clip,
            optim__eps=1.0,
            optim__weight_decay=0.0,
            model__dropout=0.0,
        )
        before = whole(engine, engine.masters.tensors())
        projector = read(engine.student.projector.named_parameters())
        norm = float(engine.step(batches.step(0), 0, 1.0)[1])
        after = whole(engine, engine.masters.tensors())
        parts = [after[name] - before[name] for name in before]
        if precision == "fp32":
            parts += [
                value - projector[name] for name, value in read(engine.student.projector.named_parameters()).items()
            ]
        moved[clip] = float(torch.cat([part.flatten() for part in parts]).norm())
        assert norm > 5 * 0.02, "not a gradient that must be clipped"
    assert moved[0.0] > 3 * 0.02
    assert moved[0.02] < 1.01 * 0.02
    if precision == "fp32":  # in bf16 the projector's masters are out of reach here
        assert moved[0.02] > 0.95 * 0.02


@pytest.mark.parametrize(
    ("precision", "stage", "clip"), [("fp32", 0, 0.0), ("fp32", 1, 0.2), ("bf16", 0, 0.2), ("bf16", 1, 0.2)]
)
def test_one_of_the_two_clips(store: CodeStore, precision: str, stage: int, clip: float) -> None:
    """Where the engine here takes the norm itself DeepSpeed must not cut the gradient once more."""
    config = changed(CONFIG, store, train__precision=precision, train__zero_stage=stage)
    assert clips_outside(config) == (clip == 0)
    assert derived(config, 8, 3)["gradient_clipping"] == clip


def test_micro_batches_add_up_in_bf16(make_engine: Callable) -> None:
    """Under ZeRO-1 in bf16 it is our code that adds gradients: three micro-batches have the gradient of one that holds
    all their images, where no loss compares images.
    """
    norms = {}
    for micro in (0, 8):
        engine, batches = make_engine(
            train__precision="bf16",
            train__zero_stage=1,
            train__micro_batch_images=micro,
            method__mim_weight=0.0,
            method__contrast_weight=0.0,
            model__dropout=0.0,
        )
        norms[micro] = float(engine.step(batches.step(0), 0, 0.0)[1])
    assert batches.accumulation == 3
    assert norms[8] == pytest.approx(norms[0], rel=0.01)


def test_dropout_is_renewed_with_every_batch_and_names_seed_and_images(make_engine: Callable) -> None:
    engine, batches = make_engine(train__micro_batch_images=0)
    engine.deepspeed.train()
    batch = batches.step(0)[0]

    def loss(seen: int, engine: Engine = engine) -> float:
        with torch.no_grad():
            return engine.losses(batch._replace(images_seen=seen)).mim.item()

    first = loss(0)
    torch.rand(5)  # what was drawn in between does not matter
    assert loss(0) == first
    assert len({loss(seen) for seen in (0, 24, 48, 72)}) == 4
    other, _ = make_engine(train__micro_batch_images=0)
    # The same weights, another seed
    other.config = dataclasses.replace(engine.config, train=dataclasses.replace(engine.config.train, seed=5))
    other.deepspeed.train()
    assert loss(0, other) != first
    micro = [batch.images_seen for step in range(4) for batch in make_engine()[1].step(step)]
    assert micro == list(range(0, 96, 8))  # no two forward passes of a run share their dropout


def test_the_teacher_is_in_no_way_random_or_trained(make_engine: Callable) -> None:
    engine, batches = make_engine(train__micro_batch_images=0)
    batch = batches.step(0)[0]
    engine.step([batch], 0, 0.01)
    last, slots = engine.teacher.features(batch.tokens, batch.label, batch.positions)
    again, slots_again = engine.teacher.features(batch.tokens, batch.label, batch.positions)
    assert torch.equal(last, again) and torch.equal(slots, slots_again)
    assert not last.requires_grad and not slots.requires_grad
    assert not any(value.requires_grad or value.grad is not None for value in engine.teacher.model.parameters())
    without = engine.teacher.features(
        batch.tokens, torch.full_like(batch.label, engine.config.model.num_classes), batch.positions
    )[0]
    assert not torch.equal(without, last)


def test_validation_leaves_the_model_training(make_engine: Callable) -> None:
    """The number is the same twice (no dropout in it), and a step after it drops again."""
    engine, batches = make_engine(train__micro_batch_images=0)
    batch = batches.step(0)[0]
    first = engine.evaluate([batch])
    assert engine.evaluate([batch]) == first
    with torch.no_grad():
        assert engine.losses(batch).mim != engine.losses(batch._replace(images_seen=5)).mim


def test_validation_weighs_tokens_not_batches(make_engine: Callable) -> None:
    engine, batches = make_engine(train__micro_batch_images=0)
    engine.step(batches.step(0), 0, 1.0)
    batch = batches.step(1)[0]
    parts = [
        batch._replace(tokens=batch.tokens[rows], label=batch.label[rows], targets=batch.targets[rows], keep=None)
        for rows in (slice(0, 40), slice(40, 48))
    ]
    assert engine.evaluate(parts) == pytest.approx(engine.evaluate([batch._replace(keep=None)]), abs=1e-6)
    alone = [engine.evaluate([part]) for part in parts]
    assert abs(alone[0] - alone[1]) > 1e-3


def test_students_start_alike_and_from_the_seed_alone(store: CodeStore) -> None:
    config = changed(CONFIG, store)
    torch.manual_seed(0)
    first = build_student(config).state_dict()
    torch.manual_seed(1)
    second = build_student(config).state_dict()
    other = build_student(changed(CONFIG, store, train__seed=5)).state_dict()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        if value.ndim == 2 and name != "transformer.output.weight":
            assert not torch.equal(value, other[name]), name
    wide = build_student(changed(CONFIG, store, model__width=64, method__projector_width=256)).projector
    for layer in (module for module in wide if isinstance(module, torch.nn.Linear)):
        # Features keep their scale
        assert layer.weight.std().item() == pytest.approx(layer.in_features**-0.5, rel=0.05)
        assert not layer.bias.any()


@pytest.mark.parametrize("recompute", [False, True])
def test_block_checkpointing_runs_each_block_twice(store: CodeStore, recompute: bool) -> None:
    config = changed(
        CONFIG,
        store,
        train__block_checkpointing=recompute,
        method__mim_weight=0.0,
        method__contrast_weight=0.0,
        method__views=1,
    )
    student, calls = build_student(config), []
    for layer in student.transformer.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    batch = Batches(store, config).step(0)[0]
    student(batch.tokens, batch.label, batch.targets, batch.keep).total.backward()
    assert len(calls) == 4 * (2 if recompute else 1)


@pytest.mark.parametrize(("ranks", "micro", "seed", "views"), [(1, 0, 0, 2), (1, 8, 3, 2), (2, 4, 3, 4), (3, 8, 1, 1)])
def test_batches_are_those_gathered_image_by_image(
    store: CodeStore, ranks: int, micro: int, seed: int, views: int
) -> None:
    kept = ranks == 2
    config = changed(
        CONFIG,
        store,
        train__micro_batch_images=micro,
        train__seed=seed,
        method__view_contrast=views > 1,
        method__views=views,
        method__teacher_label="kept" if kept else "same",
    )
    for rank in range(ranks):
        batches = Batches(store, config, rank, ranks)
        for step in (0, 2, 3, 7, 1):  # three epochs, and back
            made, expected = batches.step(step), micro_batches(store, config, step, rank, ranks)
            assert len(made) == len(expected)
            for ours, plain in zip(made, expected, strict=True):
                for name in ("tokens", "label", "targets", "keep"):
                    assert torch.equal(getattr(ours, name), plain[name]), f"{name} of step {step}, rank {rank}"
                assert torch.equal(ours.teacher_label, plain["true"]) if kept else ours.teacher_label is None
                assert ours.images_seen == plain["images_seen"]


@pytest.mark.parametrize(("schedule", "warmup"), [("constant", 0), ("constant", 4), ("cosine", 0), ("cosine", 4)])
def test_learning_rate_step_by_step(store: CodeStore, schedule: str, warmup: int) -> None:
    config = changed(CONFIG, store, optim__schedule=schedule, optim__warmup_steps=warmup)
    rates = [learning_rate(config, step, 12) for step in range(12)]
    assert rates == pytest.approx([plain_learning_rate(config, step, 12) for step in range(12)], rel=1e-12)
    peak = 3.0 * 24 / 256
    # The first step after the warm-up is at the peak
    assert max(rates) == pytest.approx(peak) and rates[warmup] == pytest.approx(peak)
    if warmup:
        assert rates[:5] == pytest.approx([peak / 4, peak / 2, 3 * peak / 4, peak, peak])
    if schedule == "cosine":
        # The cosine would be over just after the last step
        assert learning_rate(config, 12, 12) == pytest.approx(peak / 10)


def test_without_l_mim_the_teacher_stops_at_the_block_that_is_contrasted(make_engine: Callable) -> None:
    """And hands over the same features."""
    engine, batches = make_engine(method__mim_weight=0.0, method__contrast_depth=1, train__micro_batch_images=0)
    whole, _ = make_engine(method__contrast_depth=1, train__micro_batch_images=0)
    batch, ran = batches.step(0)[0], []
    for number, block in enumerate(engine.teacher.model.layers, 1):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    last, slots = engine.teacher.features(batch.tokens, batch.label, batch.positions)
    assert last is None and ran == [1]
    assert torch.equal(slots, whole.teacher.features(batch.tokens, batch.label, batch.positions)[1])

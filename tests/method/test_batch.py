"""method.batch: batches put together image by image and view by view, for a store that is not ours too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from star_fast.config import MethodConfig, ModelConfig, RunConfig, TrainConfig
from star_fast.method import Batch, Teacher, batches, make_batch, masking
from star_fast.training.batches import Batches, resolve
from tests.training.store import write_store

SEED, PER_STEP = 5, 6
METHOD = MethodConfig(views=3, contrast_positions=4, teacher_label="kept")


class InMemory:
    """Codes of 20 images, 4 views of each, of which the even rows are trained on: 10, so an epoch leaves 4 out."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.all = torch.randint(0, 50, (20, 4, 9), generator=generator)
        self.labels = torch.arange(20) % 3
        self.train_indices = torch.arange(0, 20, 2)
        self.class_names, self.views = ("a", "b", "c"), ("w", "x", "y", "z")

    def codes(self, image_indices: np.ndarray, views: np.ndarray) -> Tensor:
        return self.all[torch.from_numpy(image_indices)[:, None], torch.from_numpy(views)]


def by_hand(store: InMemory, step: int, drop: float) -> list[tuple[Tensor, int, int, Tensor]]:
    """Of each sequence of a step, one image and one view at a time: codes, label, true label, visible keys."""
    epoch, made = step, []  # ten images make one step of six
    order = masking.epoch_order(SEED, epoch, store.train_indices.numpy())
    for image in order[:PER_STEP].tolist():
        alone = np.array([image])
        chosen = masking.choose_views(SEED, epoch, alone, 3, 4)[0]
        keep = masking.key_mask(SEED, epoch, alone, 3, 9, 0.25)[0]
        dropped = masking.label_drop(SEED, epoch, alone, 3, drop)[0]
        for place in range(3):
            true = int(store.labels[image])
            codes = store.all[image, int(chosen[place])]
            made.append((codes, 3 if dropped[place] else true, true, torch.from_numpy(keep[place])))
    return made


def equal(a: Batch, b: Batch) -> bool:
    return all(
        torch.equal(one, other) if isinstance(one, Tensor) else one is other or one == other
        for one, other in zip(a, b, strict=True)
    )


def test_every_part_is_what_the_choices_say() -> None:
    store, dropped = InMemory(), 0
    for step, batch in batches(store, METHOD, PER_STEP, end=5, seed=SEED, label_dropout=0.5):
        codes, label, true, keep = zip(*by_hand(store, step, 0.5), strict=True)
        assert torch.equal(batch.targets, torch.stack(codes)) and torch.equal(batch.tokens, batch.targets[:, :8])
        assert batch.label.tolist() == list(label) and batch.teacher_label.tolist() == list(true)
        assert torch.equal(batch.keep, torch.stack(keep)) and batch.images_seen == PER_STEP * step
        assert batch.positions.tolist() == masking.position_set(SEED, step, 9, 4).tolist()
        dropped += sum(one == 3 for one in label)
    assert step == 4 and 20 < dropped < 70  # of 90


def test_started_in_the_middle_it_gives_the_same() -> None:
    store = InMemory()
    whole = dict(batches(store, METHOD, 3, end=11))
    rest = dict(batches(store, METHOD, 3, first=4, end=11))
    assert sorted(rest) == list(range(4, 11)) and all(equal(rest[step], whole[step]) for step in rest)
    assert not any(equal(whole[step], whole[step + 1]._replace(images_seen=3 * step)) for step in range(10))


def test_they_are_what_our_own_training_sees(tmp_path: Path) -> None:
    store = write_store(tmp_path / "codes")
    for changes in ({}, {"teacher_label": "kept"}, {"mask_ratio": 0.0}):
        method = MethodConfig(**changes)
        config = RunConfig(ModelConfig(2, 2, 32), method, train=TrainConfig(images_per_step=16, seed=3))
        ours = Batches(store, resolve(config, store))
        for step, batch in batches(store, method, 16, end=10, seed=3):
            assert equal(batch, ours.step(step)[0]), step


@pytest.mark.parametrize(("method", "told"), [(METHOD, "true"), (MethodConfig(views=3), "label")])
def test_the_teacher_is_told_what_the_method_says(method: MethodConfig, told: str) -> None:
    (_, batch), *_ = batches(InMemory(), method, PER_STEP, end=1, label_dropout=0.9)
    tokens, label, positions = batch.teacher_inputs
    assert tokens is batch.tokens and positions is batch.positions
    assert (label is batch.label) == (told == "label") and (batch.label == 3).any()
    assert (3 in label.tolist()) == (told == "label")


def test_without_a_loss_that_needs_it_the_teacher_computes_nothing() -> None:
    method = MethodConfig(mask_ratio=0.0, mim_weight=0.0, contrast_weight=0.0)
    (_, batch), *_ = batches(InMemory(), method, PER_STEP, end=1)
    assert batch.keep is None
    silent = torch.nn.Linear(1, 1)  # it has no `features`
    assert Teacher(silent, method, 1).features(*batch.teacher_inputs) == (None, None)


def test_moved_as_a_whole() -> None:
    for changes in ({}, {"mask_ratio": 0.0}):
        (_, batch), *_ = batches(InMemory(), MethodConfig(**changes), PER_STEP, first=7, end=8)
        moved = batch.to("meta")
        for before, after in zip(batch, moved, strict=True):
            if isinstance(before, Tensor):
                assert after.device.type == "meta" and (after.shape, after.dtype) == (before.shape, before.dtype)
            else:
                assert after == before
        assert moved.images_seen == 7 * PER_STEP and equal(batch.pinned(), batch)


def test_what_does_not_fit_names_the_function() -> None:
    store = InMemory()
    for images_per_step in (0, 11):
        with pytest.raises(
            ValueError, match=rf"^batches: images_per_step must be in 1 \.\.\. 10, got {images_per_step}$"
        ):
            next(batches(store, METHOD, images_per_step, end=1))
    with pytest.raises(ValueError, match=r"^choose_views: 5 different views"):
        next(batches(store, MethodConfig(views=5), 2, end=1))
    images, draw = np.arange(4), {"seed": 0, "epoch": 0, "step": 0}
    codes, labels = store.all[:4, :3], store.labels[:4]
    assert make_batch(codes, labels, images, METHOD, 3, **draw).targets.shape == (12, 9)
    for bad, says in (
        ((codes[:, :2], labels, images), r"3 views \(method\.views\) of each of images, got 2 views of 4"),
        ((codes, labels, images[:3]), r"for images of shape \(3,\)"),
        ((codes, labels[:3], images), r"labels must be \(B,\) with B = 4"),
    ):
        with pytest.raises(ValueError, match=f"^make_batch: .*{says}"):
            make_batch(*bad, METHOD, 3, **draw)
    with pytest.raises(TypeError, match=r"^make_batch: codes must be int64"):
        make_batch(codes.float(), labels, images, METHOD, 3, **draw)

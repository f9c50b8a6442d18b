"""training.batches: the same global batch for any number of ranks, epochs without repetition, clear contradictions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from star_fast.config import ConfigError, MethodConfig, ModelConfig, RunConfig, TrainConfig
from star_fast.training.batches import Batches, resolve
from tests.training.store import CLASSES, VOCAB, write_store


def run_config(**train: object) -> RunConfig:
    return RunConfig(
        ModelConfig(2, 2, 32), MethodConfig(contrast_positions=3), train=TrainConfig(images_per_step=8, **train)
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> object:
    return write_store(tmp_path_factory.mktemp("codes"))


def test_sizes_come_from_the_store_and_contradictions_name_the_field(store, tmp_path: Path) -> None:
    config = resolve(run_config(), store)
    assert (config.model.vocab, config.model.positions, config.model.num_classes) == (VOCAB, 16, len(CLASSES))
    wrong = dataclasses.replace(run_config(), model=ModelConfig(2, 2, 32, vocab=17))
    with pytest.raises(ConfigError, match=r"model\.vocab: expected 16 .* got 17"):
        resolve(wrong, store)
    with pytest.raises(ConfigError, match=r"method\.views: expected at most 4"):
        resolve(dataclasses.replace(run_config(), method=MethodConfig(views=5)), store)
    for images in (100, 80):  # 80 of 90 images, of which 72 are trained on
        with pytest.raises(ConfigError, match=r"train\.images_per_step: expected at most 72"):
            resolve(dataclasses.replace(run_config(), train=TrainConfig(images_per_step=images)), store)
    assert Batches(
        store,
        resolve(
            dataclasses.replace(run_config(), train=TrainConfig(images_per_step=72), method=MethodConfig(views=4)),
            store,
        ),
    ).step(1)


@pytest.mark.parametrize(
    ("given", "steps"),
    [({"epochs": 1.0}, 9), ({"epochs": 2.6}, 23), ({"epochs": 0.01}, 1), ({"epochs": 5.0, "max_steps": 7}, 7)],
)
def test_length_of_a_run(store, given: dict[str, float], steps: int) -> None:
    assert Batches(store, resolve(run_config(**given), store)).total_steps == steps


@pytest.mark.parametrize(("ranks", "micro"), [(2, 0), (4, 1), (1, 2)])
def test_ranks_and_micro_batches_split_the_same_global_batch(store, ranks: int, micro: int) -> None:
    config = resolve(run_config(), store)
    whole = Batches(store, config).step(11)[0]
    assert torch.equal(whole.tokens, whole.targets[:, :-1]), "the model sees the codes before the one that it predicts"
    split = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch_images=micro))
    parts = [Batches(store, split, rank, ranks) for rank in range(ranks)]
    pieces = [part.step(11) for part in parts]
    ordered = [pieces[rank][index] for index in range(parts[0].accumulation) for rank in range(ranks)]
    for name in ("tokens", "label", "targets", "keep"):
        assert torch.equal(torch.cat([getattr(piece, name) for piece in ordered]), getattr(whole, name)), name
    assert all(torch.equal(piece.positions, whole.positions) for piece in ordered)


def test_an_epoch_has_every_training_image_once_and_no_held_out_one(store) -> None:
    config = resolve(
        dataclasses.replace(
            run_config(),
            method=MethodConfig(views=1, mask_ratio=0, mim_weight=0, contrast_weight=0),
            model=ModelConfig(2, 2, 32, label_dropout=0.0),
        ),
        store,
    )
    batches = Batches(store, config)
    assert (batches.steps_per_epoch, batches.dropped_per_epoch) == (9, 0)
    seen = torch.cat([batches.step(step)[0].targets for step in range(9)])
    known = {row.numpy().tobytes(): image for image in range(len(store)) for row in store.codes([image], range(4))[0]}
    images = [known[row.numpy().tobytes()] for row in seen]
    assert sorted(images) == store.train_indices.tolist()
    again = torch.cat([batches.step(step)[0].targets for step in range(9, 18)])
    assert not torch.equal(seen, again)
    images_again = [known[row.numpy().tobytes()] for row in again]
    assert sorted(images_again) == sorted(images) and images_again != images


def test_labels_of_one_image_are_dropped_by_view_and_by_epoch(store) -> None:
    """Over two epochs with half of the labels dropped: views of an image differ among themselves and between epochs;
    what is kept is the image's own class.
    """
    config = resolve(dataclasses.replace(run_config(), model=ModelConfig(2, 2, 32, label_dropout=0.5)), store)
    batches = Batches(store, config)
    labels: dict[int, list[list[int]]] = {}
    for step in range(18):
        for image, label in zip(
            batches.images_of(step).ravel().tolist(), batches.step(step)[0].label.view(-1, 2).tolist(), strict=True
        ):
            labels.setdefault(image, []).append(label)
    assert sorted(labels) == store.train_indices.tolist()
    null = len(CLASSES)
    assert all(
        label in (null, int(store.labels[image]))
        for image, epochs in labels.items()
        for views in epochs
        for label in views
    )
    # (images, epochs, views)
    dropped = torch.tensor([[[label == null for label in views] for views in epochs] for epochs in labels.values()])
    assert 0.35 < dropped.float().mean() < 0.65
    for a, b in (
        (dropped[:, 0, 0], dropped[:, 0, 1]),
        (dropped[:, 0, 0], dropped[:, 1, 0]),
        (dropped[:, 0, 1], dropped[:, 1, 1]),
    ):
        assert 0.25 < (a != b).float().mean() < 0.75  # 72 images


def test_the_background_iterator_gives_what_step_gives(store) -> None:
    config = resolve(run_config(), store)
    for step, micro in Batches(store, config).steps(7, 12):
        expected = Batches(store, config).step(step)
        assert all(torch.equal(a, b) for a, b in zip(micro[0][:5], expected[0][:5], strict=True))


def test_ranks_that_do_not_divide_the_batch(store) -> None:
    config = resolve(run_config(), store)
    with pytest.raises(ConfigError, match="multiple of the 3 ranks, got 8"):
        Batches(store, config, 0, 3)

"""From the code store to micro-batches: which images, which views, which masks, in one fixed order for any number of
ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from torch import Tensor

from star_fast.config import ConfigError, RunConfig
from star_fast.data.codes import CodeStore
from star_fast.method import masking
from star_fast.method.batch import Batch, make_batch

Codes = Callable[[int, np.ndarray, int], Tensor]


def resolve(config: RunConfig, store: CodeStore) -> RunConfig:
    """`config` with the sizes that follow from the codes filled in.

    Raises:
        ConfigError: a size that is given contradicts the code store, or the store holds fewer views or images than a
            step needs.
    """
    found = {"vocab": store.codebook, "positions": store.positions, "num_classes": len(store.class_names)}
    for name, value in found.items():
        given = getattr(config.model, name)
        if given not in (0, value):
            raise ConfigError(
                f"model.{name}: expected {value} (the code store {store.path}), got {given}; leave it at 0 to "
                "take the store's"
            )
    if config.method.views > len(store.views) and not config.data.online:
        raise ConfigError(
            f"method.views: expected at most {len(store.views)}, the views that {store.path} holds of each image, "
            f"got {config.method.views}"
        )
    if config.train.images_per_step > len(store.train_indices):
        raise ConfigError(
            f"train.images_per_step: expected at most {len(store.train_indices)}, the training images of {store.path}, "
            f"got {config.train.images_per_step}"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **found))


class Batches:
    """The micro-batches of a run, addressed by optimizer step, so that a resumed run continues where it stopped.

    Args:
        codes: (epoch, rows (B,), M) -> (B, M, T) int64, codes of M views of each row in that epoch; None: different
            ones of the store's views.
    """

    def __init__(
        self, store: CodeStore, config: RunConfig, rank: int = 0, ranks: int = 1, codes: Codes | None = None
    ) -> None:
        train = config.train
        if train.images_per_step % ranks:
            raise ConfigError(
                f"train.images_per_step: expected a multiple of the {ranks} ranks, got {train.images_per_step}"
            )
        self.micro_images = train.micro_batch_images or train.images_per_step // ranks
        if train.images_per_step % (ranks * self.micro_images):
            raise ConfigError(
                f"train.micro_batch_images: {ranks} ranks x {self.micro_images} images must divide "
                "train.images_per_step = "
                f"{train.images_per_step}"
            )
        self.store, self.config, self.rank, self.ranks = store, config, rank, ranks
        self._codes = codes or self._stored_codes
        self.seconds: Mapping[str, float] = getattr(codes, "seconds", {})  # that making them has taken so far, by part
        self.accumulation = train.images_per_step // (ranks * self.micro_images)
        self.images = store.train_indices.numpy()
        self.steps_per_epoch = len(self.images) // train.images_per_step
        self.dropped_per_epoch = len(self.images) - self.steps_per_epoch * train.images_per_step
        self.total_steps = train.max_steps or max(1, round(train.epochs * self.steps_per_epoch))
        self._order: tuple[int, np.ndarray] | None = None

    def images_of(self, step: int) -> np.ndarray:
        """Rows of the store that optimizer step `step` (counted from 0) trains on: (micro-batches, ranks, images)
        int64.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        order = self._order
        if order is None or order[0] != epoch:
            self._order = order = epoch, masking.epoch_order(self.config.train.seed, epoch, self.images)
        start = within * self.config.train.images_per_step
        return order[1][start : start + self.config.train.images_per_step].reshape(
            self.accumulation, self.ranks, self.micro_images
        )

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of optimizer step `step` (counted from 0)."""
        config, seed = self.config, self.config.train.seed
        epoch, global_batch = step // self.steps_per_epoch, self.images_of(step)
        return [
            make_batch(
                self._codes(epoch, images, config.method.views),
                self.store.labels[images],
                images,
                config.method,
                config.model.num_classes,
                seed=seed,
                epoch=epoch,
                step=step,
                images_seen=step * config.train.images_per_step + index * self.ranks * self.micro_images,
                label_dropout=config.model.label_dropout,
            ).pinned()
            for index, images in enumerate(global_batch[:, self.rank])
        ]

    def _stored_codes(self, epoch: int, images: np.ndarray, views: int) -> Tensor:
        return self.store.codes(
            images, masking.choose_views(self.config.train.seed, epoch, images, views, len(self.store.views))
        )

    def steps(self, first: int, end: int) -> Iterator[tuple[int, list[Batch]]]:
        """(step, micro-batches) for first <= step < end; the next step's are made in the background."""
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            ahead = pool.submit(self.step, first) if first < end else None
            for step in range(first, end):
                assert ahead is not None, "there is a next step"
                batches = ahead.result()
                ahead = pool.submit(self.step, step + 1) if step + 1 < end else None
                yield step, batches

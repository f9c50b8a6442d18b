"""From codes to what Student and Teacher take: every view's masks, label and the step's positions, drawn as masking.py
draws them, for our own training (training/batches.py) and for anybody's loop.

    for step, batch in batches(store, method, 32, end=500):
        last, keys = teacher.features(*batch.teacher_inputs)
        losses = student(batch.tokens, batch.label, batch.targets, batch.keep, last, keys, batch.positions)

Letters: B images, M views, T positions, K sampled positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from star_fast.config import MethodConfig
from star_fast.method import masking
from star_fast.method.shape_checks import check_shapes


class Batch(NamedTuple):
    """One forward pass: B images with M views each; sequence b*M + m is view m of image b."""

    tokens: Tensor  # (B*M, T-1) int64, inputs
    label: Tensor  # (B*M,) int64, dropped ones are the null class
    targets: Tensor  # (B*M, T) int64
    keep: Tensor | None  # (B*M, T) bool, visible keys; None: all
    positions: Tensor  # (K,) int64, the position set of this step
    images_seen: int  # by all ranks, before this batch
    teacher_label: Tensor | None = None  # (B*M,) int64, what the teacher gets instead of `label`; None: the same

    @property
    def teacher_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """What Teacher.features takes: tokens, the labels that it is told, positions."""
        return self.tokens, self.label if self.teacher_label is None else self.teacher_label, self.positions

    def to(self, device: torch.device | str) -> Batch:
        """The same on `device`."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same in memory that a GPU copies from without waiting; without a GPU as it is."""
        return self._with_each(lambda tensor: tensor.pin_memory()) if torch.cuda.is_available() else self

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {
            name: change(value) for name, value in self._asdict().items() if isinstance(value, Tensor)
        }
        return self._replace(**changed)


def make_batch(
    codes: Tensor,
    labels: Tensor,
    images: np.ndarray,
    method: MethodConfig,
    no_class: int,
    *,
    seed: int,
    epoch: int,
    step: int,
    images_seen: int = 0,
    label_dropout: float = 0.1,
) -> Batch:
    """Mask and drop as `method` wants it for these images in this epoch and optimizer step.

    Args:
        codes: (B, M, T) int64, M = method.views. labels: (B,) int64 classes. Both on the CPU; `Batch.to` moves the
            result. images: array (B,) of whole numbers, each
            image's own: it gets the same masks in whatever batch it comes.
        no_class: the null class, which a dropped label becomes.
        seed: of all that is random. epoch: decides masks and dropped labels. step: of the optimizer, decides the
            sampled positions, the same for all ranks.
        images_seen: by all ranks before this batch, for the record alone.
        label_dropout: share of the views that train without their label.

    Raises:
        TypeError, ValueError: shapes or dtypes that do not fit, or more contrast positions than T.
    """
    sizes = check_shapes("make_batch", codes=(codes, "B M T", torch.int64), labels=(labels, "B", torch.int64))
    if sizes["M"] != method.views or np.shape(images) != labels.shape:
        raise ValueError(
            f"make_batch: codes must hold {method.views} views (method.views) of each of images, got "
            f"{sizes['M']} views of {sizes['B']} images for images of shape {np.shape(images)}"
        )
    targets = codes.flatten(0, 1)
    true = labels.repeat_interleave(method.views)
    dropped = masking.label_drop(seed, epoch, images, method.views, label_dropout)
    keep = masking.key_mask(seed, epoch, images, method.views, sizes["T"], method.mask_ratio)
    return Batch(
        targets[:, :-1].contiguous(),
        true.masked_fill(torch.from_numpy(dropped).flatten(), no_class),
        targets,
        None if keep is None else torch.from_numpy(keep).flatten(0, 1),
        torch.from_numpy(masking.position_set(seed, step, sizes["T"], method.contrast_positions)),
        images_seen,
        true if method.teacher_label == "kept" else None,
    )


class Store(Protocol):
    """What `batches` asks of stored codes; data.codes.CodeStore is one. Rows are images, 0 ... N-1."""

    labels: Tensor  # (N,) int64
    train_indices: Tensor  # int64, the rows that are trained on
    class_names: Sequence[str]
    views: Sequence[str]

    def codes(self, image_indices: np.ndarray, views: np.ndarray) -> Tensor:
        """(B, M, T) int64 codes of rows (B,), views (B, M) of each."""
        ...


def batches(
    store: Store,
    method: MethodConfig,
    images_per_step: int,
    *,
    end: int,
    first: int = 0,
    seed: int = 0,
    label_dropout: float = 0.1,
) -> Iterator[tuple[int, Batch]]:
    """(step, batch) of optimizer steps first ... end-1, one device: what star_fast's own training would see there.

    An epoch goes once through the training images, in an order of its own; those that fill no step are left out. A
    label that is dropped becomes the class after the store's last. Started at another `first` it gives the same.

    Raises:
        ValueError: fewer training images than a step needs, or fewer views than the method's.
    """
    rows = store.train_indices.numpy()
    if not 1 <= images_per_step <= len(rows):
        raise ValueError(f"batches: images_per_step must be in 1 ... {len(rows)}, got {images_per_step}")
    ordered = None
    for step in range(first, end):
        epoch, within = divmod(step, len(rows) // images_per_step)
        if epoch != ordered:
            order, ordered = masking.epoch_order(seed, epoch, rows), epoch
        images = order[within * images_per_step : (within + 1) * images_per_step]
        codes = store.codes(images, masking.choose_views(seed, epoch, images, method.views, len(store.views)))
        batch = make_batch(
            codes,
            store.labels[images],
            images,
            method,
            len(store.class_names),
            seed=seed,
            epoch=epoch,
            step=step,
            images_seen=step * images_per_step,
            label_dropout=label_dropout,
        )
        yield step, batch

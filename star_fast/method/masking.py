"""Every random choice of the method, as a pure function of (seed, epoch or step, global image index).

Nothing here depends on the rank, the batch size or the order of calls: the same image in the same epoch gets the same
views, mask and label drop on one laptop core as on a hundred GPUs. Choices come from SplitMix64, a counter-based hash,
vectorised over the batch.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


class Purpose(IntEnum):
    """What a random number is for: separates the streams."""

    ORDER = 1
    VIEWS = 2
    KEY_MASK = 3
    LABEL_DROP = 4
    POSITION_SET = 5
    DROPOUT = 6


def _mix(z: np.ndarray) -> np.ndarray:
    """The SplitMix64 finaliser (Steele, Lea, Flood 2014), on uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def random_words(seed: int, purpose: Purpose, *indices: np.ndarray | int) -> np.ndarray:
    """64 random bits for every combination of `indices` (broadcast against each other): uint64."""
    with np.errstate(over="ignore"):  # wrapping is the point
        state = _mix(np.asarray(seed % 2**64, dtype=np.uint64) + np.uint64(purpose) * _GAMMA)
        for index in indices:
            state = _mix(state ^ (_mix(np.asarray(index).astype(np.uint64) + _GAMMA)))
        return state


def _check_images(function: str, images: np.ndarray) -> None:
    if not isinstance(images, np.ndarray) or images.ndim != 1 or images.dtype.kind not in "iu":
        told = f"{images.dtype} of shape {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(f"{function}: images must be an array (B,) of whole numbers, got {told}")


def epoch_order(seed: int, epoch: int, images: np.ndarray) -> np.ndarray:
    """`images` (int64) shuffled for one epoch."""
    _check_images("epoch_order", images)
    return images[np.argsort(random_words(seed, Purpose.ORDER, epoch, images), kind="stable")]


def choose_views(seed: int, epoch: int, images: np.ndarray, views: int, available: int) -> np.ndarray:
    """`views` different crops out of `available` for each image: (B, M) int64. (M = 1 draws one at random.)"""
    _check_images("choose_views", images)
    if views > available:
        raise ValueError(f"choose_views: {views} different views asked for, the codes hold {available} an image")
    words = random_words(seed, Purpose.VIEWS, epoch, images[:, None], np.arange(available))
    return np.argsort(words, axis=1, kind="stable")[:, :views]


def hidden_count(positions: int, ratio: float) -> int:
    """How many of T positions the key mask hides in every view: floor(ratio * (T-1))."""
    return int(np.floor(ratio * (positions - 1)))


def key_mask(seed: int, epoch: int, images: np.ndarray, views: int, positions: int, ratio: float) -> np.ndarray | None:
    """Which positions are visible as attention keys: (B, M, T) bool, or None if nothing is hidden.

    For each view floor(ratio * (T-1)) of the image positions 1 ... T-1 are hidden, uniformly without replacement;
    position 0, the class, is always visible (docs/method.md section 2, Key mask).
    """
    _check_images("key_mask", images)
    if not 0 <= ratio < 1:
        raise ValueError(f"key_mask: ratio must be a share in [0, 1), got {ratio}")
    hidden = hidden_count(positions, ratio)
    if hidden == 0:
        return None
    words = random_words(
        seed, Purpose.KEY_MASK, epoch, images[:, None, None], np.arange(views)[:, None], np.arange(1, positions)
    )
    keep = np.ones((len(images), views, positions), dtype=bool)
    # That two words are equal has a chance of 1e-15 a mask
    last_hidden = np.partition(words, hidden - 1, axis=2)[..., hidden - 1, None]
    np.greater(words, last_hidden, out=keep[..., 1:])
    return keep


def label_drop(seed: int, epoch: int, images: np.ndarray, views: int, share: float) -> np.ndarray:
    """Which views train without their label: (B, M) bool, True with probability `share`."""
    _check_images("label_drop", images)
    words = random_words(seed, Purpose.LABEL_DROP, epoch, images[:, None], np.arange(views))
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53 < share


def position_set(seed: int, step: int, positions: int, count: int) -> np.ndarray:
    """I: `count` different positions of 0 ... T-1 for one optimizer step, ascending: (K,) int64."""
    if not 1 <= count <= positions:
        raise ValueError(f"position_set: count must be in 1 ... {positions}, the positions there are, got {count}")
    words = random_words(seed, Purpose.POSITION_SET, step, np.arange(positions))
    return np.sort(np.argsort(words, kind="stable")[:count])


def dropout_seed(seed: int, rank: int, images_seen: int) -> int:
    """Seed of torch's generator for one forward pass, so that a resumed run drops the same activations."""
    return int(random_words(seed, Purpose.DROPOUT, rank, images_seen) >> np.uint64(1))

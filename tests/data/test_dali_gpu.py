"""data.dali on a GPU: nvJPEG's pixels near libjpeg's, every kind of file accounted for. Run by
scripts/gpu_acceptance.sh.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali", reason="DALI is not installed (pip install 'star_fast[data]')")

from star_fast.data.augment import Augmentation
from star_fast.data.dali import DaliAugment, DaliSquares, DaliViews, Refused
from tests.data.test_dali import BY_DALI, BY_PILLOW, REFUSED, damaged, saved, speckled

pytestmark = pytest.mark.gpu
PHOTOGRAPHS = [
    saved(speckled(300 + 7 * seed, 290 + 5 * seed, seed), quality=92, subsampling=seed % 3) for seed in range(24)
]
# Upsampling of colour and the cosine transform are nvJPEG's own: single values at edges may lie far off
MEAN_LEVELS, MOST_LEVELS = 1.0, 48


def near(on_gpu: DaliViews, found: list[object], expected: list[object]) -> None:
    assert on_gpu.counts["dali"] == len(found)
    for views, exact in zip(found, expected, strict=True):
        for view, right in zip(views, exact, strict=True):
            assert view.device.type == "cuda" and view.dtype == torch.uint8 and tuple(view.shape) == right.shape
            difference = np.abs(view.cpu().numpy().astype(int) - right)
            assert difference.mean() < MEAN_LEVELS and difference.max() <= MOST_LEVELS


@pytest.mark.parametrize("channels", [1, 3])
def test_squares(channels: int) -> None:
    on_gpu = DaliSquares((281, 268), channels, device="mixed")
    near(on_gpu, on_gpu(PHOTOGRAPHS), DaliSquares((281, 268), channels)(PHOTOGRAPHS))


def test_augmentation() -> None:
    on_gpu, on_cpu = (DaliAugment(Augmentation(), 2, 256, 3, 7, device=device) for device in ("mixed", "cpu"))
    near(on_gpu, on_gpu(PHOTOGRAPHS, range(24), 3), on_cpu(PHOTOGRAPHS, range(24), 3))


@pytest.mark.filterwarnings("ignore")
def test_kinds_and_damage_are_refused_as_on_the_cpu() -> None:
    files = [*BY_DALI.values(), *BY_PILLOW.values(), *REFUSED.values(), *damaged(96)]
    on_gpu, on_cpu = (DaliSquares((35, 33), 3, device=device) for device in ("mixed", "cpu"))
    for found, expected in zip(on_gpu(files), on_cpu(files), strict=True):
        assert isinstance(found, Refused) == isinstance(expected, Refused)
        if isinstance(expected, Refused):
            assert found == expected
    assert on_gpu.counts["dali"] > 0 and on_gpu.counts["refused"] == on_cpu.counts["refused"]


def test_same_bits_again() -> None:
    squares = DaliSquares((281,), 3, device="mixed", batch_images=5)
    first, again = squares(PHOTOGRAPHS), squares(PHOTOGRAPHS)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))

"""data.augment: random crops as torchvision draws them, each a function of seed, epoch, image and view."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from star_fast.config import ConfigError
from star_fast.data.augment import Augmentation, augment, crop_box
from tests.data.pictures import picture

DRAWN = [
    crop_box(Augmentation(), 1, epoch, index, view, 500, 375)
    for epoch in range(5)
    for index in range(200)
    for view in range(2)
]


def test_areas_ratios_and_places_are_spread_as_they_should() -> None:
    boxes = np.array(DRAWN, dtype=float)
    left, top, width, height, mirrored = boxes.T
    assert (left >= 0).all() and (left + width <= 500).all() and (top >= 0).all() and (top + height <= 375).all()
    area, ratio = width * height / (500 * 375), width / height
    assert 0.07 < area.min() < 0.09 and area.max() > 0.9 and 0.74 < ratio.min() < 0.78 and 1.3 < ratio.max() < 1.35
    small = area < 0.35  # such cuts always fit, so they are spread evenly
    assert abs(np.mean((area[small] - 0.08) / 0.27) - 0.5) < 0.03
    assert abs(np.mean(np.log(ratio[small])) / math.log(4 / 3)) < 0.05
    assert (
        abs(np.mean(left[small] / (500 - width[small])) - 0.5) < 0.03
        and abs(np.mean(top[small] / (375 - height[small])) - 0.5) < 0.03
    )
    assert abs(mirrored.mean() - 0.5) < 0.04


def test_each_place_is_as_likely_as_the_others_the_last_too() -> None:
    quarter = Augmentation(area=(0.25, 0.25), aspect=(1.0, 1.0))
    boxes = [crop_box(quarter, 3, 0, index, 0, 8, 6) for index in range(2000)]
    assert {box[2:4] for box in boxes} == {(3, 3)}  # the root of 8 * 6 / 4, rounded
    for lefts_or_tops, places in (([box.left for box in boxes], 6), ([box.top for box in boxes], 4)):
        counts = np.bincount(lefts_or_tops)
        assert len(counts) == places
        assert abs(counts / 2000 - 1 / places).max() < 0.05  # four standard deviations and more


def test_every_argument_counts() -> None:
    assert len(set(DRAWN)) > 0.99 * len(DRAWN)
    base = {"seed": 1, "epoch": 2, "image_index": 3, "view": 4}
    boxes = [
        crop_box(Augmentation(), **{**base, name: value}, width=500, height=375)
        for name in base
        for value in (0, base[name], 77)
    ]
    assert len(set(boxes)) == 1 + 2 * len(base)
    assert (
        crop_box(Augmentation(mirror=False), **base, width=500, height=375)[:4]
        == crop_box(Augmentation(), **base, width=500, height=375)[:4]
    )
    assert not any(crop_box(Augmentation(mirror=False), 1, 0, index, 0, 500, 375).mirrored for index in range(20))


def test_what_no_try_fits() -> None:
    """torchvision's way out: the largest middle part of an allowed ratio."""
    assert crop_box(Augmentation(area=(0.9, 1.0)), 0, 0, 0, 0, 1000, 10)[:4] == ((1000 - 13) // 2, 0, 13, 10)
    assert crop_box(Augmentation(area=(0.9, 1.0)), 0, 0, 0, 0, 10, 1000)[:4] == (0, (1000 - 13) // 2, 10, 13)
    assert crop_box(Augmentation(area=(1.0, 1.0), aspect=(0.5, 0.5)), 0, 0, 0, 0, 40, 40)[:4] == (10, 0, 20, 40)
    assert crop_box(Augmentation(), 0, 0, 0, 0, 1, 1)[:4] == (0, 0, 1, 1)


def test_a_view_is_its_cut_resized_and_mirrored() -> None:
    image, settings = picture(60, 50, 2), Augmentation(area=(0.3, 0.9))
    for index in range(6):
        for view, found in enumerate(augment(image, settings, 2, 24, 3, seed=9, epoch=1, image_index=index)):
            left, top, width, height, mirrored = crop_box(settings, 9, 1, index, view, 60, 50)
            cut = np.asarray(image)[top : top + height, left : left + width]
            expected = np.asarray(Image.fromarray(cut).resize((24, 24), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
            assert found.shape == (3, 24, 24) and found.flags.c_contiguous
            assert np.array_equal(found, expected[:, :, ::-1] if mirrored else expected)


def test_a_cut_of_the_right_size_is_not_changed_at_all() -> None:
    image = picture(24, 24, 2)
    whole = Augmentation(area=(1.0, 1.0), aspect=(1.0, 1.0), mirror=False)
    assert np.array_equal(augment(image, whole, 1, 24, 3, 0, 0, 0)[0], np.asarray(image).transpose(2, 0, 1))
    assert np.array_equal(augment(image, whole, 1, 24, 1, 0, 0, 0)[0][0], np.asarray(image.convert("L")))


@pytest.mark.parametrize(
    "settings", [{"area": (0.0, 1.0)}, {"area": (0.5, 0.4)}, {"area": (0.5, 1.1)}, {"aspect": (2.0, 1.0)}]
)
def test_settings_that_make_no_sense(settings: dict[str, tuple[float, float]]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(settings))}: "):
        Augmentation(**settings)

"""data.views: the ten crops and their order, ADM's resize against its arithmetic, the affine views against a closed
form.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from star_fast.config import DataConfig
from star_fast.data import views as definition
from star_fast.data.sources import DataError
from star_fast.data.views import (
    TEN_CROP_VIEWS,
    affine_parameters,
    centre_crop,
    make_views,
    plain_view,
    small_affine,
    view_names,
)
from tests.data.pictures import picture


def coordinates(width: int, height: int) -> Image.Image:
    """An image whose pixel (x, y) has the colour (x, y, 7): a crop says where it came from."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 7)], -1).astype(np.uint8))


def ten_crop(image: Image.Image, size: int) -> list[np.ndarray]:
    """The ten views (H, W, C) of a square image that is brought to its own size."""
    return list(make_views(image, 0, DataConfig(crop_ranges=(image.width / size,)), size, 3).transpose(0, 2, 3, 1))


def test_ten_crop_order_and_places() -> None:
    crops = ten_crop(coordinates(21, 21), 16)
    assert len(crops) == len(TEN_CROP_VIEWS) == 10
    corners = [(crop[0, 0, 0], crop[0, 0, 1]) for crop in crops[:5]]
    assert corners == [(0, 0), (5, 0), (0, 5), (5, 5), (2, 2)]  # the centre: 2.5 goes to the even 2
    for mirrored, plain in ((5, 1), (6, 0), (7, 3), (8, 2)):
        assert np.array_equal(crops[mirrored], crops[plain][:, ::-1])
    # The odd margin's centre: in the mirrored image it starts at 2 too, in the image itself that is column 3.
    assert crops[9][0, :, 0].tolist() == list(range(18, 2, -1)) and crops[9][0, 0, 1] == 2


def test_ten_crop_is_torchvisions() -> None:
    transforms = pytest.importorskip("torchvision.transforms.functional")
    for side, size in ((281, 256), (268, 256), (23, 16)):
        image = picture(side, side, 3)
        for ours, theirs in zip(ten_crop(image, size), transforms.ten_crop(image, [size, size]), strict=True):
            assert np.array_equal(ours, np.asarray(theirs))


def test_views_of_several_crop_ranges() -> None:
    transforms = pytest.importorskip("torchvision.transforms.functional")
    image, data = picture(400, 330, 5), DataConfig(crop_ranges=(1.1, 1.05))
    views, names = make_views(image, 0, data, 256, 3), view_names(data)
    assert views.shape == (20, 3, 256, 256) and len(set(names)) == 20
    expected = [crop for side in (281, 268) for crop in transforms.ten_crop(centre_crop(image, side), [256, 256])]
    for view, crop in zip(views, expected, strict=True):
        assert np.array_equal(view.transpose(1, 2, 0), np.asarray(crop))
    assert (
        names[0] == "top left, range 1.1"
        and names[14] == "centre, range 1.05"
        and names[19] == "mirrored centre, range 1.05"
    )
    assert plain_view(names) == 4 == plain_view(TEN_CROP_VIEWS) and plain_view(
        ("identity", "affine 1")
    ) == 0 == plain_view(("view 0", "view 1"))
    assert np.array_equal(make_views(image, 0, data, 256, 3, only=(14, 3)), views[[14, 3]])


def test_box_halving_then_bicubic_then_the_middle() -> None:
    image = picture(135, 97, 0)
    # 97 >= 2 * 20: halved to (67, 48), again to (33, 24); 24 < 40. Then 20 / 24 by bicubic: (round(27.5) = 28, 20);
    # columns 4 ... 23.
    expected = (
        image.resize((67, 48), Image.Resampling.BOX)
        .resize((33, 24), Image.Resampling.BOX)
        .resize((28, 20), Image.Resampling.BICUBIC)
    )
    expected = np.asarray(expected)[:, 4:24]
    assert np.array_equal(np.asarray(centre_crop(image, 20)), expected)

    # A halving is the mean of each 2 x 2 block, rounded.
    even = picture(80, 40, 1)
    blocks = np.asarray(even).astype(np.float64).reshape(20, 2, 40, 2, 3).mean((1, 3))
    # Pillow rounds after each direction
    assert np.abs(np.asarray(centre_crop(even, 20)).astype(int) - blocks[:, 10:30]).max() <= 1

    below = picture(39, 39, 2)  # under twice the target: no halving
    assert np.array_equal(
        np.asarray(centre_crop(below, 20)), np.asarray(below.resize((20, 20), Image.Resampling.BICUBIC))
    )
    assert centre_crop(picture(7, 9, 2), 20).size == (20, 20)  # a small image grows
    same = picture(20, 20, 3)
    assert np.array_equal(np.asarray(centre_crop(same, 20)), np.asarray(same))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
def test_ten_crop_views_of_any_mode(mode: str) -> None:
    data = DataConfig(crop_ranges=(1.1,))
    image = picture(50, 40, 4, mode)
    views = make_views(image, 0, data, 16, 3)
    assert views.shape == (10, 3, 16, 16) and views.dtype == np.uint8 and len(view_names(data)) == 10
    whole = np.asarray(centre_crop(image.convert("RGB"), 17)).transpose(2, 0, 1)
    assert (
        np.array_equal(views[0], whole[:, :16, :16])
        and np.array_equal(views[3], whole[:, 1:, 1:])
        and np.array_equal(views[8], views[2][:, :, ::-1])
    )
    for view in (0, 4, 9):
        assert np.array_equal(make_views(image, 0, data, 16, 3, only=view), views[view])
    assert make_views(image, 0, data, 16, 1).shape == (10, 1, 16, 16)
    with pytest.raises(DataError, match=r"1 \(gray\) or 3 \(RGB\), got 4"):
        make_views(image, 0, data, 16, 4)


def test_affine_views_depend_on_seed_image_and_view_alone() -> None:
    data = DataConfig(views="small-affine", affine_views=5)
    image = picture(28, 28, 5, "L")
    views = make_views(image, 12, data, 28, 1, seed=3)
    assert views.shape == (5, 1, 28, 28) and len(view_names(data)) == 5
    assert np.array_equal(views[0, 0], np.asarray(image))
    make_views(image, 99, data, 28, 1, seed=3)  # what was made in between does not matter
    assert np.array_equal(make_views(image, 12, data, 28, 1, seed=3, only=4), views[4])
    for index, seed in ((13, 3), (12, 4)):
        assert not np.array_equal(make_views(image, index, data, 28, 1, seed=seed, only=4), views[4])
    assert len({view.tobytes() for view in views}) == 5
    longer = DataConfig(views="small-affine", affine_views=8)
    assert np.array_equal(make_views(image, 12, longer, 28, 1, seed=3)[:5], views)
    parameters = np.array(
        [affine_parameters(0, image_index, view) for image_index in range(100) for view in range(1, 5)]
    )
    limits = np.array(
        [
            math.radians(definition.MAX_ROTATION_DEGREES),
            math.log(definition.MAX_SCALING),
            *[definition.MAX_SHIFT_SHARE] * 2,
        ]
    )
    parameters[:, 1] = np.log(parameters[:, 1])
    assert (
        (np.abs(parameters) <= limits).all()
        and (np.abs(parameters).max(0) > 0.95 * limits).all()
        and (np.abs(parameters.mean(0)) < 0.1 * limits).all()
    )


def test_affine_moves_a_blob_to_where_the_parameters_say() -> None:
    size, sigma = 64, 3.0
    y, x = np.mgrid[:size, :size] + 0.5

    def blob(centre_x: float, centre_y: float) -> np.ndarray:
        return np.exp(-((x - centre_x) ** 2 + (y - centre_y) ** 2) / (2 * sigma**2)) * 250

    image = blob(44, 27).round().astype(np.uint8)[None]
    for index in range(6):
        angle, scaling, right, down = affine_parameters(7, index, 2)
        moved = small_affine(image, index, 2, 7)[0].astype(np.float64)
        dx, dy = 44 - size / 2, 27 - size / 2
        expected_x = size / 2 + scaling * (math.cos(angle) * dx - math.sin(angle) * dy) + right * size
        expected_y = size / 2 + scaling * (math.sin(angle) * dx + math.cos(angle) * dy) + down * size
        mass = moved.sum()
        assert abs((moved * x).sum() / mass - expected_x) < 0.15
        assert abs((moved * y).sum() / mass - expected_y) < 0.15
        assert abs(mass / image.sum() - scaling**2) < 0.03

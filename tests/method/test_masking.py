"""method.masking: counts, uniformity, independence from rank and batch, exactness."""

from __future__ import annotations

import numpy as np
import pytest

from star_fast.method import masking

IMAGES = np.arange(200, dtype=np.int64) * 7


@pytest.mark.parametrize(("positions", "ratio"), [(256, 0.25), (49, 0.25), (17, 0.45), (5, 0.99), (2, 0.5)])
def test_exactly_floor_r_times_t_minus_1_positions_are_hidden_and_never_the_class(positions: int, ratio: float) -> None:
    keep = masking.key_mask(3, 1, IMAGES, 2, positions, ratio)
    hidden = int(ratio * (positions - 1))
    if hidden == 0:
        assert keep is None
        return
    assert keep.shape == (200, 2, positions)
    assert keep[:, :, 0].all()
    assert ((~keep).sum(axis=2) == hidden).all()


def test_no_ratio_no_mask() -> None:
    assert masking.key_mask(0, 0, IMAGES, 2, 256, 0.0) is None


def test_every_image_position_is_hidden_equally_often() -> None:
    keep = masking.key_mask(0, 0, np.arange(20_000), 1, 17, 0.25)[:, 0, 1:]
    hidden = (~keep).sum(axis=0)  # 20000 draws of 4 out of 16: 5000 expected a position, standard deviation 61
    assert np.abs(hidden - 5000).max() < 5 * 61
    together = (~keep[:, 0] & ~keep[:, 1]).sum()  # without replacement: 20000 * 4/16 * 3/15 = 1000
    assert abs(together - 1000) < 5 * 31


def test_choices_do_not_depend_on_the_batch_they_are_made_in() -> None:
    part = IMAGES[40:60]
    for draw in (lambda images: masking.key_mask(5, 2, images, 2, 49, 0.25), lambda images: masking.choose_views(5, 2, images, 2, 10),
                 lambda images: masking.label_drop(5, 2, images, 2, 0.3)):
        assert np.array_equal(draw(IMAGES)[40:60], draw(part))
        assert np.array_equal(draw(IMAGES)[::-1], draw(IMAGES[::-1]))


def test_choices_differ_between_seeds_epochs_images_and_views() -> None:
    keep = masking.key_mask(0, 0, IMAGES, 2, 256, 0.25)
    assert not np.array_equal(keep, masking.key_mask(1, 0, IMAGES, 2, 256, 0.25))
    assert not np.array_equal(keep, masking.key_mask(0, 1, IMAGES, 2, 256, 0.25))
    assert len({row.tobytes() for row in keep.reshape(400, 256)}) == 400


def test_views_are_different_crops_and_all_occur() -> None:
    views = masking.choose_views(0, 0, np.arange(2000), 2, 10)
    assert (views[:, 0] != views[:, 1]).all()
    counts = np.bincount(views[:, 0], minlength=10)  # 200 expected, standard deviation 13.4
    assert np.abs(counts - 200).max() < 5 * 13.4
    with pytest.raises(ValueError, match="3 different views asked for, the codes hold 2"):
        masking.choose_views(0, 0, IMAGES, 3, 2)


def test_label_drop_has_its_share() -> None:
    assert abs(masking.label_drop(0, 0, np.arange(50_000), 2, 0.1).mean() - 0.1) < 5 * (0.09 / 100_000) ** 0.5
    assert not masking.label_drop(0, 0, IMAGES, 2, 0.0).any()


def test_position_set_is_distinct_and_covers_all_positions() -> None:
    sets = [masking.position_set(0, step, 49, 4) for step in range(300)]
    assert all(len(set(chosen)) == 4 and list(chosen) == sorted(chosen) for chosen in sets)
    assert set(np.concatenate(sets)) == set(range(49))


def test_an_epoch_visits_every_image_once_in_another_order() -> None:
    first, second = masking.epoch_order(0, 0, IMAGES), masking.epoch_order(0, 1, IMAGES)
    assert sorted(first) == sorted(second) == sorted(IMAGES)
    assert not np.array_equal(first, second)


def test_splitmix64_against_its_published_sequence() -> None:
    """First outputs of SplitMix64 from state 1234567 (Vigna's reference program)."""
    state, outputs = 1234567, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        with np.errstate(over="ignore"):
            outputs.append(int(masking._mix(np.asarray(state, dtype=np.uint64))))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]

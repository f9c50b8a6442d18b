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
    for draw in (
        lambda images: masking.key_mask(5, 2, images, 2, 49, 0.25),
        lambda images: masking.choose_views(5, 2, images, 2, 10),
        lambda images: masking.label_drop(5, 2, images, 2, 0.3),
    ):
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


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """How often two draws agree, in standard deviations from what independent ones would: pairs of 50 000 booleans."""
    expected = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    return abs((a == b).mean() - expected) / (expected * (1 - expected) / a.size) ** 0.5


def test_labels_are_dropped_for_each_view_and_epoch_anew() -> None:
    images = np.arange(50_000)
    first = masking.label_drop(0, 0, images, 3, 0.4)
    for other in (
        first[:, 1],
        masking.label_drop(0, 1, images, 3, 0.4)[:, 0],
        masking.label_drop(1, 0, images, 3, 0.4)[:, 0],
        np.roll(first[:, 0], 1),
    ):
        assert agreement(first[:, 0], other) < 5
    assert agreement(first[:, 0], first[:, 0]) > 100  # what it would be if two were the same


def test_one_choice_says_nothing_about_another() -> None:
    """Each purpose has a stream of its own: what is drawn for one image is independent of what else is drawn for it."""
    words = {masking.random_words(3, purpose, 1, 2).tobytes() for purpose in masking.Purpose.__members__.values()}
    assert len(words) == len(masking.Purpose.__members__) == 6
    images = np.arange(50_000)
    dropped = masking.label_drop(0, 0, images, 2, 0.4)
    views = masking.choose_views(0, 0, images, 2, 4)
    hidden = ~masking.key_mask(0, 0, images, 2, 17, 0.25)
    place = np.argsort(masking.epoch_order(0, 0, images))  # of each image in the epoch
    for view in (0, 1):
        for a, b in (
            (dropped[:, view], views[:, 0] == 0),
            (dropped[:, view], hidden[:, view, 1]),
            (views[:, 0] == view, hidden[:, 0, 1]),
            (place < 25_000, views[:, 0] == view),
            (place < 25_000, dropped[:, view]),
            (hidden[:, 0, 1], hidden[:, 1, 1]),
        ):
            assert agreement(a, b) < 5


DRAWS = {
    "order": lambda seed, epoch: masking.epoch_order(seed, epoch, IMAGES),
    "views": lambda seed, epoch: masking.choose_views(seed, epoch, IMAGES, 2, 10),
    "mask": lambda seed, epoch: masking.key_mask(seed, epoch, IMAGES, 2, 49, 0.25),
    "label": lambda seed, epoch: masking.label_drop(seed, epoch, IMAGES, 2, 0.3),
    "positions": lambda seed, epoch: np.concatenate(
        [masking.position_set(seed, 100 * epoch + step, 49, 4) for step in range(10)]
    ),
}


SYMMETRIC = pytest.mark.xfail(strict=True, reason="the order of (seed, epoch) is that of (epoch, seed)")


@pytest.mark.parametrize("choice", [pytest.param("order", marks=SYMMETRIC), "views", "mask", "label", "positions"])
def test_every_choice_depends_on_seed_and_epoch(choice: str) -> None:
    draw = DRAWS[choice]
    assert len({draw(*where).tobytes() for where in ((0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (2, 2))}) == 6
    assert np.array_equal(draw(7, 3), draw(7, 3))


def test_the_seed_of_dropout_depends_on_seed_rank_and_images_seen() -> None:
    seeds = [
        masking.dropout_seed(*where) for where in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1))
    ]
    assert len(set(seeds)) == 6 and all(0 <= seed < 2**63 for seed in seeds)


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

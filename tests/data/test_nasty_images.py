"""A folder of nasty images through `prepare`: nothing crashes, everything is accounted for, the good ones are right."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from star_fast.config import DataConfig
from star_fast.data.decoding import decode_image
from star_fast.data.prepare import prepare
from star_fast.data.sources import ImageFolder
from star_fast.data.views import make_views
from star_fast.model.tokenizer import from_uint8
from tests.data.nasty_images import HEIGHT, WIDTH, Nasty, make_nasty_folder, quarters_of
from tests.data.pictures import tiny_tokenizer

DATA = DataConfig(views="small-affine", affine_views=2, held_out_share=0.1)


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Nasty]]:
    place = tmp_path_factory.mktemp("nasty")
    return place / "images", make_nasty_folder(place / "images" / "all", place / "elsewhere")


def test_there_are_enough_kinds(nasty: tuple[Path, list[Nasty]]) -> None:
    made = nasty[1]
    assert len({one.name for one in made}) == len(made) >= 80
    assert sum(one.quarters is not None for one in made) >= 50 and sum(one.quarters is None for one in made) >= 25


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_every_file_is_in_the_store_or_left_out_with_the_reason(
    nasty: tuple[Path, list[Nasty]], tmp_path: Path
) -> None:
    folder, made = nasty
    source, tokenizer = ImageFolder(folder), tiny_tokenizer()
    store = prepare(source, tmp_path / "store", tokenizer, DATA, chunk_images=7, progress=False)
    keys, skipped = store.keys(), {entry["key"]: entry["reason"] for entry in store.manifest["skipped"]}
    assert len(keys) + len(store.manifest["skipped"]) == len(made) and not set(keys) & set(skipped)
    assert set(keys) == {f"all/{one.name}" for one in made if one.quarters}
    assert set(skipped) == {f"all/{one.name}" for one in made if not one.quarters}
    for one in made:
        if not one.quarters:
            assert re.search(one.reason, skipped[f"all/{one.name}"]), (one.name, skipped[f"all/{one.name}"])
    assert all(reason.isprintable() and str(folder) not in reason for reason in skipped.values())
    row = keys.index("all/plain.bmp")
    views = make_views(
        source[source.files.index("all/plain.bmp")].image, source.files.index("all/plain.bmp"), DATA, 16, 3
    )
    assert torch.equal(store.codes([row], [0, 1])[0], tokenizer.encode(from_uint8(torch.from_numpy(views))))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_good_ones_have_the_right_colours_in_the_right_places(nasty: tuple[Path, list[Nasty]]) -> None:
    folder, made = nasty
    source = ImageFolder(folder)
    for one in made:
        if not one.quarters:
            continue
        place = source.files.index(f"all/{one.name}")
        image = source[place].image
        again = decode_image(source.encoded(place))  # decoders that are given bytes must see the same
        assert (again.mode, again.size, again.convert("RGB").tobytes()) == (
            image.mode,
            image.size,
            image.convert("RGB").tobytes(),
        ), one.name
        if one.name not in ("one pixel.png", "20000 x 10.png"):
            assert image.size == (WIDTH, HEIGHT), one.name
        view = make_views(image, 0, DATA, 16, 3, only=0).transpose(1, 2, 0)
        off = np.abs(quarters_of(view) - np.array(one.quarters)).max()
        assert off <= one.tolerance, (one.name, off, quarters_of(view).tolist())

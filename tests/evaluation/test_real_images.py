"""Real images are cut as the code store's own settings say, whatever the run that is looked at was trained with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from star_fast.config import DataConfig
from star_fast.data.codes import CodeStore
from star_fast.data.llamagen_codes import import_llamagen_codes
from star_fast.data.prepare import prepare
from star_fast.data.sources import open_source
from star_fast.data.views import make_views
from star_fast.errors import UserError
from star_fast.evaluation.real_images import RealImages, open_real_images, why_unknown
from star_fast.model.tokenizer import VQTokenizer
from tests.evaluation.conftest import TOKENIZER

TEN_CROP = DataConfig(views="ten-crop", crop_ranges=(1.5,), held_out_share=0.3)
AFFINE = DataConfig(views="small-affine", affine_views=3, held_out_share=0.3)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of smooth pictures, so that a turned one is near to, but not, the one it came from."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir()
        for index in range(6):
            Image.fromarray(rng.integers(0, 255, (5, 6), dtype=np.uint8)).resize(
                (18, 15), Image.Resampling.BICUBIC
            ).save(folder / name / f"{index}.png")
    return folder


def store_of(pictures: Path, out: Path, data: DataConfig, seed: int) -> CodeStore:
    torch.manual_seed(0)
    return prepare(open_source(pictures), out, VQTokenizer(TOKENIZER).eval(), data, seed=seed, progress=False)


@pytest.mark.parametrize(("data", "seed", "view"), [(TEN_CROP, 0, 4), (AFFINE, 7, 0)])
def test_the_stores_own_views(data: DataConfig, seed: int, view: int, pictures: Path, tmp_path: Path) -> None:
    store = store_of(pictures, tmp_path / "codes", data, seed)
    real = open_real_images(store, str(pictures))
    rows = torch.arange(len(store))
    source = open_source(pictures)
    expected = np.stack(
        [make_views(source[index].image, index, data, 8, 1, seed, only=view) for index in range(len(source))]
    )
    assert np.array_equal(real.read(rows).numpy(), expected)
    real.view = 1  # any other view as well: seed and crop range are the store's
    expected = np.stack(
        [make_views(source[index].image, index, data, 8, 1, seed, only=1) for index in range(len(source))]
    )
    assert np.array_equal(real.read(rows).numpy(), expected)


def test_codes_of_an_earlier_version_are_named(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = store_of(pictures, tmp_path / "codes", AFFINE, 0)
    open_real_images(store, str(pictures))
    assert not caplog.records
    del store.manifest["pixels"]
    open_real_images(store, str(pictures))
    assert "made by an earlier version" in caplog.records[0].message


def test_imported_codes_have_no_images(tmp_path: Path) -> None:
    for what, array in (("codes", np.zeros((1, 2, 16), dtype=np.int16)), ("labels", np.zeros(1, dtype=np.int64))):
        (tmp_path / f"imagenet256_{what}").mkdir()
        np.save(tmp_path / f"imagenet256_{what}" / "0.npy", array)
    store = import_llamagen_codes(tmp_path, tmp_path / "codes", "0" * 64, progress=False)
    assert open_real_images(store, "") is None
    assert "imported as extracted by LlamaGen" in why_unknown(store)
    with pytest.raises(UserError, match=r"imported from codes as extracted by LlamaGen.*leave --source out"):
        open_real_images(store, str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "no such views"}, "kind: expected 'ten-crop' or 'small-affine'"),
        (None, "expected a mapping"),
        ({"kind": "ten-crop", "crop_ranges": [1e300]}, "crop_range"),
        ({"kind": "ten-crop", "crop_ranges": [16000.0]}, "crop_range"),
        ({"kind": "ten-crop", "crop_ranges": [10**400]}, "crop_range"),
        ({"kind": "small-affine", "seed": -1}, "seed"),
    ],
)
def test_view_settings_that_cannot_be(settings: object, says: str, pictures: Path, tmp_path: Path) -> None:
    store = store_of(pictures, tmp_path / "codes", AFFINE, 0)
    store.manifest["view_settings"] = settings
    with pytest.raises(UserError, match=says) as caught:
        RealImages(store, open_source(pictures))
    assert "\n" not in str(caught.value)

"""data.online and data.origin: codes of fresh crops are those of the crops that augment.py defines, whoever decodes;
and a store finds its images again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from star_fast.config import ConfigError, DataConfig
from star_fast.data.augment import Augmentation, augment
from star_fast.data.codes import CodeStore
from star_fast.data.online import OnlineCodes
from star_fast.data.origin import ORIGIN_FILE, Origin, images_of, write_origin
from star_fast.data.prepare import prepare
from star_fast.data.sources import DataError, ImageFolder
from star_fast.model.tokenizer import from_uint8
from star_fast.storage import StorageError
from tests.data.pictures import make_folder, tiny_tokenizer

CPU = torch.device("cpu")
TOKENIZER = tiny_tokenizer()
DATA = DataConfig(crop_ranges=(1.3,), held_out_share=0.25, online=True, crop_area=(0.3, 0.9), crop_aspect=(0.5, 2.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine images, the third damaged."""
    made = make_folder(tmp_path_factory.mktemp("online") / "images", {"oak": 4, "elm": 5}, ".jpg")
    (made / "elm" / "02.jpg").write_bytes(b"no image")
    return made


@pytest.fixture(scope="module")
def store(folder: Path) -> CodeStore:
    made = prepare(ImageFolder(folder), folder.parent / "codes", TOKENIZER, DATA, progress=False)
    write_origin(made, Origin(str(folder)))
    return made


def test_codes_are_those_of_the_defined_crops(store: CodeStore, folder: Path) -> None:
    source, rows = ImageFolder(folder), np.array([2, 7, 0])
    codes = OnlineCodes(store, source, TOKENIZER, DATA, 5, CPU)
    made = codes(3, rows, 2)
    assert made.shape == (3, 2, 64) and made.dtype == torch.int64
    settings = Augmentation(DATA.crop_area, DATA.crop_aspect, True)
    for place, index in enumerate((3, 8, 0)):  # the source's numbers: its third image is not in the store
        crops = augment(source[index].image, settings, 2, 16, 3, 5, 3, index)
        assert torch.equal(made[place], TOKENIZER.encode(from_uint8(torch.from_numpy(np.stack(crops)))))
    assert set(codes.seconds) == {"views_s", "tokenizer_s"} and min(codes.seconds.values()) > 0


def test_the_same_whatever_else_is_asked(store: CodeStore, folder: Path) -> None:
    first, second = (OnlineCodes(store, ImageFolder(folder), TOKENIZER, DATA, 5, CPU) for _ in range(2))
    whole = first(0, np.arange(8), 2)
    second(1, np.arange(3), 2)
    assert torch.equal(second(0, np.array([6, 1]), 2), whole[[6, 1]])
    assert torch.equal(second(0, np.array([4]), 1), whole[[4], :1])
    for epoch, seed in ((1, 5), (0, 6)):
        other = OnlineCodes(store, ImageFolder(folder), TOKENIZER, DATA, seed, CPU)(epoch, np.arange(8), 2)
        assert (other != whole).any(2).all()


def test_dali_draws_the_same_codes(store: CodeStore, folder: Path) -> None:
    pytest.importorskip("nvidia.dali")
    made = [
        OnlineCodes(store, ImageFolder(folder), TOKENIZER, replace(DATA, decoder=decoder), 5, CPU)(2, np.arange(8), 2)
        for decoder in ("pillow", "dali")
    ]
    assert torch.equal(*made)


def test_what_is_not_there_is_said(store: CodeStore, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="made by tokenizer"):
        OnlineCodes(store, ImageFolder(folder), tiny_tokenizer(1), DATA, 5, CPU)
    copy = make_folder(tmp_path / "images", {"oak": 4, "elm": 5}, ".jpg")
    (copy / "elm" / "02.jpg").write_bytes(b"no image")
    source = images_of(store, str(copy))
    (copy / "oak" / "03.jpg").unlink()
    for decoder in ("pillow", "dali") if pytest.importorskip("nvidia.dali") else ("pillow",):
        codes = OnlineCodes(store, source, TOKENIZER, replace(DATA, decoder=decoder), 5, CPU)
        with pytest.raises(DataError, match=r"oak/03\.jpg: .*; it could be read when the codes were made"):
            codes(0, np.array([7]), 1)
    for wrong in (
        {"crop_area": (0.5, 0.2)},
        {"crop_area": (0.0, 0.2)},
        {"crop_area": (0.5, 1.5)},
        {"crop_aspect": (-1.0, 2.0)},
        {"crop_aspect": (1.0,)},
        {"crop_area": (0.1, 0.2, 0.3)},
    ):
        with pytest.raises(ConfigError, match=rf"data\.{next(iter(wrong))}: expected two rising numbers above 0"):
            DataConfig(**wrong)


def test_a_store_finds_its_images(
    store: CodeStore, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert images_of(store).description() == ImageFolder(folder).description()
    monkeypatch.chdir(folder.parent)  # named from here, found from anywhere
    write_origin(store, Origin("images"))
    monkeypatch.chdir(tmp_path)
    assert len(images_of(store)) == 9
    other = make_folder(tmp_path / "other", {"oak": 2})
    with pytest.raises(DataError, match=r"other: not the images that .* was made of \(.*images 9 there and 2 here"):
        images_of(store, str(other))
    file = store.path / ORIGIN_FILE
    file.write_text('{"source": 3}')
    with pytest.raises(StorageError, match=r"source\.json: source: .*; delete it, and say where the images are"):
        images_of(store)
    file.unlink()
    assert images_of(store) is None and len(images_of(store, str(folder))) == 9

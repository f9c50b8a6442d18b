"""Token stability against crops cut by Pillow and codes compared cell by cell."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from star_fast import cli
from star_fast.config import DataConfig
from star_fast.data.codes import CodeStore
from star_fast.data.folders import ImageFolder
from star_fast.data.image_source import UnreadableImage
from star_fast.data.prepare import prepare
from star_fast.data.sources import open_source
from star_fast.errors import UserError
from star_fast.evaluation.stability import StabilityConfig, centre, followed, run_stability
from star_fast.model.tokenizer import VQTokenizer, from_uint8
from tests.evaluation.conftest import TOKENIZER


@pytest.fixture(scope="module")
def photographs(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, VQTokenizer]:
    """(images, store of ten-crop codes, tokenizer): 20 x 20 pixels, crops cut from 22 x 22 and 21 x 21."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(1)
    for label in "ab":
        (root / "images" / label).mkdir(parents=True)
        for index in range(4):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))
            coarse.resize((22, 22), Image.Resampling.BICUBIC).save(root / "images" / label / f"{index}.png")
    torch.manual_seed(3)
    tokenizer = VQTokenizer(replace(TOKENIZER, image_size=20)).eval()
    store = prepare(
        open_source(root / "images"),
        root / "codes",
        tokenizer,
        DataConfig(codes=str(root / "codes"), held_out_share=0.5),
        progress=False,
    )
    tokenizer.save(store.path / "tokenizer")
    return root / "images", store.path, tokenizer


def codes_by_hand(tokenizer: VQTokenizer, crop: Image.Image) -> np.ndarray:
    """(10, 10) codes of one crop."""
    with torch.no_grad():
        return tokenizer.encode(from_uint8(torch.from_numpy(np.array(crop))[None, None])).numpy().reshape(10, 10)


def test_shares_by_hand(photographs: tuple[Path, Path, VQTokenizer], tmp_path: Path) -> None:
    images, store, tokenizer = photographs
    shown = run_stability(
        StabilityConfig(codes=str(store), source=str(images), out=str(tmp_path), shifts=(1, 2), device="cpu")
    )
    written = json.loads((tmp_path / "stability.json").read_text())
    assert (
        written["images"] == 4
        and written["unmoved_as_stored"] == 1.0
        and written["cell_pixels"] == 2
        and written["skipped"] == []
    )
    held_out = CodeStore.open(store).held_out_indices.tolist()
    files = [path for label in "ab" for path in sorted((images / label).iterdir())]
    plain, stay, worst, follow, ranges, every = [], {1: [], 2: []}, {1: 1.0, 2: 1.0}, [], [], []
    for row in held_out:
        whole = Image.open(files[row])  # 22 x 22: the square of range 1.1 as it is
        before = codes_by_hand(tokenizer, whole.crop((1, 1, 21, 21)))
        plain.append(before)
        padded = Image.fromarray(np.pad(np.array(whole), 4, mode="edge"))
        for shift in (1, 2):
            same = []
            for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1)):
                left, top = 5 + shift * x, 5 + shift * y
                after = codes_by_hand(tokenizer, padded.crop((left, top, left + 20, top + 20)))
                same.append(np.mean([before[r, c] == after[r, c] for r in range(10) for c in range(10)]))
                if shift == 2:  # one cell: new cell (r, c) shows what (r + y, c + x) did
                    follow += [
                        np.mean(
                            [
                                before[r + y, c + x] == after[r, c]
                                for r in range(10)
                                for c in range(10)
                                if 0 <= r + y < 10 and 0 <= c + x < 10
                            ]
                        )
                    ]
            stay[shift].append(np.mean(same))
            worst[shift] = min(worst[shift], np.mean(same))
        smaller = whole.resize((21, 21), Image.Resampling.BICUBIC)
        after = codes_by_hand(tokenizer, smaller.crop((0, 0, 20, 20)))
        ranges.append(np.mean(before == after))
        every.append(before)
    one, two, crop = written["moves"]
    assert (one["stay"], two["stay"]) == pytest.approx((np.mean(stay[1]), np.mean(stay[2])))
    assert (one["worst_image"], two["worst_image"]) == pytest.approx((worst[1], worst[2]))
    assert two["follow"] == pytest.approx(np.mean(follow)) and one["follow"] is None
    assert crop["stay"] == pytest.approx(np.mean(ranges)) and crop["name"] == "crop range 1.1 -> 1.05"
    assert (one["repeated_edge"], two["repeated_edge"]) == (0, 1)
    assert written["other_image"] == pytest.approx(np.mean([every[i] == every[i - 1] for i in range(4)]))
    assert 0.02 < two["stay"] < one["stay"] < 1
    assert f"{100 * one['stay']:.1f} %" in shown
    with Image.open(tmp_path / "stability.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**20)}
    assert (249, 115, 22) in colours  # the mark of a changed cell


def test_crops_and_cells() -> None:
    square = np.arange(36).reshape(1, 6, 6)
    assert centre(square, 4, 0, 0).tolist() == square[:, 1:5, 1:5].tolist()
    assert centre(square, 4, 1, -1).tolist() == square[:, 0:4, 2:6].tolist()
    assert centre(square, 4, 3, 0)[0, 0].tolist() == [10, 11, 11, 11]  # beyond the edge the edge again
    rng = np.random.default_rng(0)
    plain = rng.integers(0, 9, (2, 5, 7))
    for right, down in ((1, 0), (-2, 0), (0, 3), (0, -1)):
        moved = np.full_like(plain, 99)
        for r in range(5):
            for c in range(7):
                if 0 <= r + down < 5 and 0 <= c + right < 7:
                    moved[:, r, c] = plain[:, r + down, c + right]
        assert followed(plain, moved, right, down) == 1.0
        assert followed(plain, moved, -right, -down) < 0.6


def test_of_a_run_and_images_that_cannot_be_read(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    read, broken = ImageFolder.__getitem__, []

    def damaged(self: ImageFolder, index: int) -> object:
        if not broken or index in broken:
            broken.append(index)
            raise UnreadableImage("fox/3.png", "cut short")
        return read(self, index)

    monkeypatch.setattr(ImageFolder, "__getitem__", damaged)
    arguments = [
        "stability",
        "--run",
        str(finished_run / "run"),
        "--source",
        str(finished_run / "images"),
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    assert cli.main(arguments) == 0
    assert "left out: fox/3.png: cut short" in capsys.readouterr().out
    written = json.loads((tmp_path / "stability.json").read_text())
    # 8 x 8: both crop ranges are the same
    assert written["images"] == 11 and [move["shift"] for move in written["moves"]] == [1, 2]
    monkeypatch.setattr(ImageFolder, "__getitem__", lambda *_: (_ for _ in ()).throw(UnreadableImage("all", "gone")))
    with pytest.raises(UserError, match="expected at least two images that can be read, got 0; all: gone"):
        run_stability(
            StabilityConfig(
                codes=str(finished_run / "codes"),
                source=str(finished_run / "images"),
                tokenizer=str(finished_run / "run/model/tokenizer"),
                out=str(tmp_path),
                device="cpu",
            )
        )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "--run: expected a run folder, or --codes"),
        ({"codes": "x", "shifts": (0,)}, "--shifts: expected pixels"),
        ({"codes": "x", "images": 1}, "--images: expected 2"),
    ],
)
def test_bad_settings(options: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        StabilityConfig(**options)


def test_unknown_images(finished_run: Path) -> None:
    with pytest.raises(UserError, match="does not say where its images are; give --source"):
        run_stability(
            StabilityConfig(
                codes=str(finished_run / "codes"), tokenizer=str(finished_run / "run/model/tokenizer"), device="cpu"
            )
        )

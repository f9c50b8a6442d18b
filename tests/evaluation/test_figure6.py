"""Figure 6: both rows come from the same random streams, without guidance, and stand where the picture says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from star_fast import cli
from star_fast.errors import UserError
from star_fast.evaluation.figure6 import Figure6Config, draw_pairs, run_figure6
from star_fast.evaluation.samples import SampleSet
from star_fast.generation import generate
from star_fast.model.tokenizer import VQTokenizer, to_uint8
from star_fast.model.weights import load_model, save_model


def tile_at(picture: Image.Image, tile: np.ndarray) -> list[tuple[int, int]]:
    """Where (left, top) a tile (h, w, 3) stands in the picture, pixel for pixel."""
    pixels = np.asarray(picture.convert("RGB"))
    height, width = tile.shape[:2]
    starts = np.argwhere((pixels[: len(pixels) - height + 1, : pixels.shape[1] - width + 1] == tile[0, 0]).all(-1))
    return [(int(x), int(y)) for y, x in starts if np.array_equal(pixels[y : y + height, x : x + width], tile)]


def enlarged(image: torch.Tensor) -> np.ndarray:
    """(C, 8, 8) uint8 seven times as large: 56 pixels."""
    return np.asarray(image.expand(3, -1, -1).permute(1, 2, 0)).repeat(7, axis=0).repeat(7, axis=1)


def test_rows_stand_in_pairs_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 0, 2, 2])
    above, below = (
        SampleSet(
            labels, torch.zeros(4, 1), torch.randint(0, 256, (4, 1, 8, 8), generator=generator, dtype=torch.uint8)
        )
        for _ in range(2)
    )
    picture = draw_pairs(above, below, ["ash", "oak"], [0, 2], ("plain", "star"), "no guidance")
    places = [[tile_at(picture, enlarged(image)) for image in samples.images] for samples in (above, below)]
    assert all(len(found) == 1 for row in places for found in row)
    (upper, lower) = [[found[0] for found in row] for row in places]
    assert [x for x, _ in upper] == [x for x, _ in lower] and upper[0][0] == upper[2][0] < upper[1][0]  # columns
    # Baseline above, classes one after the other
    assert upper[0][1] == upper[1][1] < lower[0][1] < upper[2][1] < lower[2][1]
    assert lower[0][1] - upper[0][1] < upper[2][1] - lower[0][1]  # a pair lies closer together than two pairs


def test_the_same_streams_without_guidance(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A model above itself gives the same images; they are what generate() draws at guidance 1."""
    run, twin = (Path(shutil.copytree(finished_run / "run", tmp_path / name)) for name in ("run", "twin"))
    arguments = [
        "figure6",
        "--run",
        str(run),
        "--against",
        str(twin),
        "--classes",
        "fox",
        "dog",
        "--per-class",
        "3",
        "--seed",
        "5",
        "--device",
        "cpu",
    ]
    assert cli.main(arguments) == 0
    assert "above twin, below run; no guidance, temperature 1, seed 5" in capsys.readouterr().out
    loaded = load_model(run)
    with torch.no_grad():
        codes = generate(
            loaded.transformer, torch.tensor([2, 2, 2, 1, 1, 1]), guidance=1.0, seed=5, image_index=torch.arange(6)
        )
        images = to_uint8(VQTokenizer.load(loaded.tokenizer_folder).decode(codes))
    with Image.open(run / "figure6.png") as picture:
        for image in images:
            found = tile_at(picture, enlarged(image))
            assert len(found) % 2 == 0 and found, "every image stands in both rows"
    written = json.loads((run / "figure6.json").read_text())
    assert written["classes"] == ["fox", "dog"] and written["sampling"]["guidance"] == 1.0
    assert (
        written["models"]["run"]["weights_sha256"]
        == written["models"]["baseline"]["weights_sha256"]
        == loaded.weights_sha256
    )


def test_what_cannot_be_compared(finished_run: Path, tmp_path: Path) -> None:
    run = finished_run / "run"
    loaded = load_model(run)
    save_model(tmp_path / "other", loaded.transformer, class_names=["x", "y", "z"], tokenizer=loaded.tokenizer_folder)
    with pytest.raises(
        UserError, match=r"--against: expected a model of the classes of .* \(3: cat <b> \.\.\.\), got 3: x"
    ):
        run_figure6(Figure6Config(str(run), str(tmp_path / "other"), device="cpu"))
    save_model(tmp_path / "bare", loaded.transformer, class_names=loaded.class_names)
    with pytest.raises(UserError, match="comes without a tokenizer; give --tokenizer"):
        run_figure6(
            Figure6Config(str(tmp_path / "bare"), str(tmp_path / "bare"), out=str(tmp_path / "out"), device="cpu")
        )
    with pytest.raises(UserError, match=r"--out: missing: .*other is no run folder"):
        run_figure6(Figure6Config(str(tmp_path / "other"), str(tmp_path / "other"), device="cpu"))
    # Which it refuses where anything else lies
    save_model(tmp_path / "other", loaded.transformer, class_names=["x", "y", "z"])
    with pytest.raises(UserError, match="no class 'wolf'"):
        run_figure6(Figure6Config(str(run), str(run), classes=("wolf",), device="cpu"))
    with pytest.raises(UserError, match="--temperature must be"):
        Figure6Config(str(run), str(run), temperature=-1)
    with pytest.raises(UserError, match="--per-class: expected 1"):
        Figure6Config(str(run), str(run), per_class=0)

"""Many images into one file: what is in it, on any number of ranks, after any kill."""

from __future__ import annotations

import json
import random
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from star_fast.errors import UserError
from star_fast.generation import generate
from star_fast.generation.label_plan import plan_labels
from star_fast.generation.sample import SampleResult, sample_images
from star_fast.generation.sample_config import SampleConfig
from star_fast.model.tokenizer import VQTokenizer, to_uint8
from star_fast.model.transformer import Transformer
from tests.generation.processes import kill_after_progress, run_ranks
from tests.generation.small_model import images_of, journal_of, save_small_model


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Transformer, VQTokenizer]:
    folder = tmp_path_factory.mktemp("sample") / "model"
    return folder, *save_small_model(folder)


def settings(folder: Path, where: Path, **changes: object) -> SampleConfig:
    return replace(
        SampleConfig(
            model=str(folder), out=str(where), images=43, batch_images=8, precision="fp32", seed=3, top_k=20, grid=False
        ),
        **changes,
    )


@pytest.fixture(scope="module")
def unbroken(small: tuple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of one undisturbed process."""
    out = tmp_path_factory.mktemp("unbroken") / "images.npz"
    run_ranks(settings(small[0], out), 1)
    return out


def test_the_file_holds_what_generate_and_the_tokenizer_make(small: tuple, tmp_path: Path) -> None:
    folder, model, tokenizer = small
    result = sample_images(settings(folder, tmp_path / "images.npz", grid=True, png_folder=True))
    assert result == SampleResult(tmp_path / "images.npz", tmp_path / "images.json", tmp_path / "images.png", 43)
    expected = []
    for start in range(0, 43, 8):
        index = torch.arange(start, min(start + 8, 43))
        pixels = tokenizer.decode(generate(model, index % 3, guidance=2.0, top_k=20, seed=3, image_index=index))
        expected.append(to_uint8(pixels).repeat(1, 3, 1, 1).permute(0, 2, 3, 1))
    with np.load(result.npz) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.dtype == np.uint8 and np.array_equal(images, torch.cat(expected).numpy())
    assert labels.tolist() == [i % 3 for i in range(43)]
    assert len({image.tobytes() for image in images}) > 35  # not one picture 43 times
    with zipfile.ZipFile(result.npz) as archive:
        assert archive.testzip() is None and archive.namelist() == ["arr_0.npy", "arr_1.npy"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "images" / "000041.png")), images[41])
    assert not (tmp_path / "images.npz.parts").exists()
    record = json.loads(result.record.read_text())
    assert (
        len(record["plan"]["weights_sha256"]) == 64 and record["plan"]["tokenizer_sha256"] == tokenizer.weights_hash()
    )
    assert (record["plan"]["seed"], record["plan"]["labels"], record["plan"]["batch_images"]) == (3, "balanced", 8)


def test_the_grid_shows_a_row_a_class(small: tuple, tmp_path: Path) -> None:
    config = settings(small[0], tmp_path / "images.npz", grid=True, grid_columns=4, classes=("7", "ash"))
    result = sample_images(config)
    with np.load(result.npz) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert labels.tolist() == [(2, 0)[i % 2] for i in range(43)]
    picture = np.asarray(Image.open(result.grid))
    tile = 64  # 16 pixels enlarged four times
    assert picture.shape[0] == 4 + 2 * (tile + 4)
    left = picture.shape[1] - 4 * (tile + 4)
    for row, label in enumerate((0, 2)):
        for column, index in enumerate(np.flatnonzero(labels == label)[:4]):
            top, start = 4 + row * (tile + 4), left + column * (tile + 4)
            assert np.array_equal(picture[top : top + tile : 4, start : start + tile : 4], images[index])
    assert (picture[:, :left] < 100).any()  # the names are there


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_file_is_the_same_on_any_number_of_ranks(small: tuple, tmp_path: Path, unbroken: Path, ranks: int) -> None:
    out = tmp_path / "images.npz"
    run_ranks(settings(small[0], out), ranks)
    assert out.read_bytes() == unbroken.read_bytes()


def test_after_three_kills_the_file_is_that_of_an_unbroken_run(small: tuple, tmp_path: Path, unbroken: Path) -> None:
    config = settings(small[0], tmp_path / "images.npz")
    moments = random.Random(0)
    for _ in range(3):
        kill_after_progress(config, moments.random() * 0.03)
    drawn = sample_images(config).drawn
    assert drawn < 43  # what was there was not drawn again
    assert (tmp_path / "images.npz").read_bytes() == unbroken.read_bytes()


def test_a_batch_written_by_half_is_drawn_or_copied_again(small: tuple, tmp_path: Path, unbroken: Path) -> None:
    """Every place a kill can leave the files in, made by hand: the unfinished file and its journal cut at each kind of
    byte. The shorter one counts.
    """
    config = settings(small[0], tmp_path / "images.npz")
    whole, lines = unbroken.read_bytes(), journal_of(unbroken)
    image, batch = 16 * 16 * 3, 8 * 16 * 16 * 3
    header = whole.index(images_of(unbroken)[0].tobytes())
    data_end = header + 43 * image
    everything = len(whole), len(lines)
    for cut, journal_cut, drawn in (
        (0, len(lines), 43),
        (10, len(lines), 43),
        (header, len(lines), 43),
        (header + 3 * image + 5, len(lines), 43),
        (header + batch, len(lines), 35),
        (header + 5 * batch + 7, len(lines), 3),
        (data_end, len(lines), 0),
        (data_end + 100, len(lines), 0),
        (len(whole) - 1, len(lines), 0),
        (*everything, 0),
        (len(whole), 0, 43),
        (len(whole), 38, 43),
        (header + 2 * batch, 39, 35),
        (header + 2 * batch, 39 + 20, 35),
        (data_end, 6 * 39 - 1, 3),
    ):
        for file in tmp_path.glob("images.*"):
            if file.is_file():
                file.unlink()
        parts = tmp_path / "images.npz.parts"
        parts.mkdir(exist_ok=True)
        (parts / "unfinished.npz").write_bytes(whole[:cut])
        (parts / "unfinished.journal").write_bytes(lines[:journal_cut])
        assert sample_images(config).drawn == drawn, (cut, journal_cut)
        assert (tmp_path / "images.npz").read_bytes() == whole, (cut, journal_cut)
        assert not parts.exists()
    assert sample_images(config).drawn == 0  # a finished job draws nothing


def test_exact_mode_gives_the_same_bytes_for_any_batch_size(
    small: tuple, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    contents = set()
    for batch in (1, 8, 13, 64):
        config = settings(small[0], tmp_path / f"{batch}.npz", batch_images=batch, exact=True)
        sample_images(config)
        contents.add(Path(config.out).read_bytes())
    assert len(contents) == 1
    assert "exact mode: 43 images in fixed blocks of 8" in capsys.readouterr().out


def test_random_labels_are_uniform_and_named_by_the_seed(small: tuple, tmp_path: Path) -> None:
    labels = plan_labels(3000, [0, 1, 2], "random", 0)
    assert np.array_equal(labels, plan_labels(3000, [0, 1, 2], "random", 0)) and not np.array_equal(
        labels, plan_labels(3000, [0, 1, 2], "random", 1)
    )
    counts = np.bincount(labels)
    assert ((counts - 1000) ** 2 / 1000).sum() < 13.8  # chi-square, 2 degrees of freedom, p 0.001
    assert np.bincount(plan_labels(3001, [2, 0], "balanced", 0)).tolist() == [1500, 0, 1501]


def test_bad_settings_and_foreign_files_get_one_clear_line(small: tuple, tmp_path: Path) -> None:
    folder, out = small[0], tmp_path / "images.npz"
    for changes, message in (
        ({"classes": ("oak",)}, r"no class 'oak'.*there are ash, birch, 7, or numbers 0 \.\.\. 2"),
        ({"classes": ("brich",)}, r"near: birch"),
        ({"classes": ("birch", "1")}, "birch more than once"),
        ({"images": 0}, "images: expected at least 1"),
        ({"guidance": 0.2}, "guidance must be"),
        ({"exact": True, "precision": "bf16"}, "exact: needs precision fp32"),
        ({"model": str(tmp_path / "nowhere")}, "nowhere"),
        ({"device": "cuda"}, "no CUDA device"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            sample_images(settings(folder, out, **changes))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"ends in \.npz, got 'x\.zip'"):
        SampleConfig(out="x.zip")
    sample_images(settings(folder, out, images=3))
    with pytest.raises(UserError, match=r"of another sampling job .seed 3 there, 4 asked for.; choose another --out"):
        sample_images(settings(folder, out, images=3, seed=4))
    (tmp_path / "other.npz.parts").mkdir()
    (tmp_path / "other.npz.parts" / "plan.json").write_text("{}")
    with pytest.raises(UserError, match=r"plan\.json: weights: missing; delete"):
        sample_images(settings(folder, tmp_path / "other.npz", images=3))

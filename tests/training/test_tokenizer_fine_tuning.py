"""The weights that a tokenizer's training is given: which of them fine-tuning starts from, what of their shape it
keeps, what is refused, what is missing.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from star_fast.config import ConfigError, DataConfig, TokenizerConfig
from star_fast.data.sources import ImageFolder
from star_fast.errors import UserError
from star_fast.model.tokenizer import VQTokenizer
from star_fast.training.tokenizer import FINE_TUNING_LR, fine_tuning_config, tokenizer_for
from tests.data.pictures import TINY, make_folder, tiny_tokenizer
from tests.training.optimizer_steps import killed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"), {"a": 3, "b": 2})


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tokenizer in a folder of ours, and the same weights in a file as LlamaGen's training writes it."""
    root = tmp_path_factory.mktemp("starts")
    tiny_tokenizer(3).save(root / "folder")
    torch.save({"model": tiny_tokenizer(3).state_dict(), "args": {"vq_model": "VQ-16"}}, root / "released.pt")
    tiny_tokenizer(4).save(root / "other")
    return {name: str(root / name) for name in ("folder", "released.pt", "other")}


CHOSEN = replace(TINY, steps=2, images_per_step=4)
FEW = DataConfig(crop_ranges=(1.2,), held_out_share=0.3)


@pytest.mark.parametrize("kind", ["folder", "released.pt"])
def test_fine_tuning_starts_from_the_weights_given(
    tmp_path: Path, folder: Path, starts: dict[str, str], kind: str
) -> None:
    # Of another shape: nobody chose it
    defaults = TokenizerConfig(base_channels=32, multipliers=(1, 2, 2), image_size=64)
    asked = replace(
        defaults, steps=2, images_per_step=4, lr=1e-9, **({"image_size": 16} if kind == "released.pt" else {})
    )

    def tuned(out: Path, start: str = starts[kind]) -> VQTokenizer:
        return tokenizer_for(ImageFolder(folder), out, asked, FEW, progress=False, fine_tune=start, defaults=defaults)

    found, start = tuned(tmp_path), tiny_tokenizer(3)
    assert all(
        torch.allclose(a, b, rtol=0, atol=1e-6)
        for a, b in zip(found.state_dict().values(), start.state_dict().values(), strict=True)
    )
    assert found.weights_hash() != start.weights_hash()
    assert found.config == replace(TINY, steps=2, images_per_step=4, lr=1e-9, reseed_every_steps=0)
    record = json.loads((tmp_path / "tokenizer/training.json").read_text())
    assert record["started_from"] == start.weights_hash() and record["ssim"] is not None
    assert tuned(tmp_path).weights_hash() == found.weights_hash()  # kept
    with pytest.raises(
        ConfigError, match=rf"^fine_tune: .* from weights {start.weights_hash()[:12]}, asked for is one from weights "
    ):
        tuned(tmp_path, starts["other"])
    with pytest.raises(ConfigError, match=r"^fine_tune: .*, asked for is one from random weights"):
        tokenizer_for(ImageFolder(folder), tmp_path, found.config, FEW, progress=False)


def test_fine_tuning_takes_the_shape_of_the_start() -> None:
    start, defaults = tiny_tokenizer(3), TokenizerConfig()
    assert fine_tuning_config(start, defaults, defaults) == replace(
        TINY, steps=defaults.steps, lr=FINE_TUNING_LR, reseed_every_steps=0
    )
    chosen = {"lr": 3e-4, "image_size": 32, "reseed_every_steps": 20}
    assert fine_tuning_config(start, replace(defaults, **chosen), defaults) == replace(TINY, **chosen)
    assert fine_tuning_config(start, TINY, None) == TINY
    with pytest.raises(
        ConfigError,
        match=r"^tokenizer\.codebook: the tokenizer to fine-tune has 300, asked for is 512; leave that setting out",
    ):
        fine_tuning_config(start, replace(defaults, codebook=512), defaults)
    with pytest.raises(ConfigError, match=r"^tokenizer\.base_channels"):
        fine_tuning_config(start, defaults, None)


def test_fine_tuning_that_was_killed_goes_on_from_its_own_start_only(
    tmp_path: Path, folder: Path, starts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, config = ImageFolder(folder), replace(CHOSEN, steps=60)

    def tune(out: Path, start: str) -> VQTokenizer:
        return tokenizer_for(source, out, config, FEW, progress=False, fine_tune=start)

    unbroken = tune(tmp_path / "unbroken", starts["folder"]).weights_hash()

    killed(monkeypatch, 55, lambda: tune(tmp_path / "killed", starts["folder"]))
    for start in (starts["other"], ""):
        with pytest.raises(
            ConfigError, match=r"^fine_tune: .* holds a training begun from weights \w{12}, asked for is one from"
        ):
            tune(tmp_path / "killed", start)
    assert tune(tmp_path / "killed", starts["released.pt"]).weights_hash() == unbroken


def test_fine_tuning_and_a_given_tokenizer(tmp_path: Path, folder: Path, starts: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"^fine_tune: .* leave one of the two out"):
        tokenizer_for(
            ImageFolder(folder),
            tmp_path,
            CHOSEN,
            FEW,
            given=starts["folder"],
            fine_tune=starts["folder"],
            progress=False,
        )
    tokenizer_for(ImageFolder(folder), tmp_path, CHOSEN, FEW, given=starts["folder"], progress=False)
    with pytest.raises(ConfigError, match=r"^fine_tune: .* holds a tokenizer that was given, not trained"):
        tokenizer_for(ImageFolder(folder), tmp_path, CHOSEN, FEW, fine_tune=starts["folder"], progress=False)
    with pytest.raises(UserError, match=r"nowhere\.pt"):
        tokenizer_for(ImageFolder(folder), tmp_path / "new", CHOSEN, FEW, fine_tune="nowhere.pt", progress=False)


def test_missing_weights_are_told_before_images_are_read(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("star_fast.training.tokenizer.collect_views", None)
    with pytest.raises(ConfigError, match=r"^tokenizer\.perceptual_weights: expected a file of VGG16's weights"):
        tokenizer_for(ImageFolder(folder), tmp_path, replace(CHOSEN, perceptual_weight=1.0), FEW, progress=False)

"""Samples of a model whose classes are only numbers, under names that a file gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from star_fast.errors import UserError
from star_fast.generation.sample import sample_images
from star_fast.generation.sample_config import SampleConfig
from star_fast.model.llamagen import save_transformer
from tests.generation.small_model import save_small_model


def test_names_for_a_released_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformer, _ = save_small_model(tmp_path / "model")
    classes = transformer.config.num_classes
    save_transformer(transformer, tmp_path / "released.pt")
    (tmp_path / "names.txt").write_text("".join(f"kind {number}\n" for number in range(classes)))
    config = SampleConfig(
        model=str(tmp_path / "released.pt"),
        tokenizer=str(tmp_path / "model" / "tokenizer"),
        out=str(tmp_path / "x.npz"),
        images=2,
        precision="fp32",
        classes=("kind 1",),
        class_names=str(tmp_path / "names.txt"),
    )
    sample_images(config)
    assert (tmp_path / "x.png").exists() and "2 images" in capsys.readouterr().out
    assert np.load(tmp_path / "x.npz")["arr_1"].tolist() == [1, 1]
    # The same job, whatever its classes are called
    sample_images(SampleConfig(**{**vars(config), "class_names": "", "classes": ("1",)}))
    with pytest.raises(UserError, match="names of its own"):
        sample_images(
            SampleConfig(**{**vars(config), "model": str(tmp_path / "model"), "out": str(tmp_path / "y.npz")})
        )

"""model.llamagen: released tokenizers in every form they come in, and one clear line for each that is not one."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import safetensors.torch
import torch

from star_fast.config import TokenizerConfig
from star_fast.errors import UserError
from star_fast.model.llamagen import load_tokenizer
from star_fast.model.tokenizer import VQTokenizer, tokenizer_config
from tests.model.released_weights import small_weights

TOKENIZER = TokenizerConfig(
    base_channels=16,
    multipliers=(1, 3, 2),
    residual_blocks=1,
    z_channels=12,
    code_channels=4,
    codebook=23,
    image_channels=1,
    image_size=28,
)


@pytest.mark.parametrize("form", ["model", "state_dict", "bare", "safetensors"])
def test_tokenizer_round_trip(tmp_path: Path, form: str) -> None:
    torch.manual_seed(0)
    tokenizer = VQTokenizer(TOKENIZER).eval()
    weights = tokenizer.state_dict() | {"quantize.codebook_used": torch.zeros(65536)}
    path = tmp_path / ("x.safetensors" if form == "safetensors" else "vq_ds4.pt")
    if form == "safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        torch.save(
            weights if form == "bare" else {form: weights, "ema": {}, "args": argparse.Namespace(vq_model="VQ-16")},
            path,
        )
    loaded = load_tokenizer(path, image_size=28)
    assert loaded.config == TOKENIZER and not loaded.training
    assert loaded.weights_hash() == tokenizer.weights_hash()
    images = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(2)) * 2 - 1
    codes = tokenizer.encode(images)
    assert torch.equal(loaded.encode(images), codes) and torch.equal(loaded.decode(codes), tokenizer.decode(codes))


def test_tokenizer_folder(tmp_path: Path) -> None:
    tokenizer = VQTokenizer(TOKENIZER)
    tokenizer.save(tmp_path / "tokenizer")
    assert load_tokenizer(tmp_path / "tokenizer").weights_hash() == tokenizer.weights_hash()


@pytest.mark.parametrize(
    ("multipliers", "downsampling"), [((1, 1, 2, 2, 4), 16), ((1, 2, 2, 4), 8)], ids=["VQ-16", "VQ-8"]
)
def test_released_tokenizers_are_recognised(multipliers: tuple[int, ...], downsampling: int) -> None:
    with torch.device("meta"):
        config = tokenizer_config(
            VQTokenizer(TokenizerConfig(multipliers=multipliers)).state_dict(), "vq.pt", image_size=256
        )
    assert config == TokenizerConfig(multipliers=multipliers) and config.downsampling == downsampling


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with pytest.raises(UserError, match="not found; expected a LlamaGen checkpoint"):
        load_tokenizer(path)
    torch.save({"model": small_weights()}, path)
    with pytest.raises(
        UserError,
        match=r"expected the weights of a LlamaGen VQ tokenizer, but 'encoder\.conv_in\.weight' is not among them",
    ):
        load_tokenizer(path)
    weights = VQTokenizer(TOKENIZER).state_dict()
    del weights["decoder.mid.1.q.weight"]
    weights["decoder.conv_out.weight"] = torch.zeros(3, 16, 3, 3)
    torch.save({"model": weights}, path)
    with pytest.raises(UserError) as caught:
        load_tokenizer(path)
    assert "decoder.conv_out.weight: expected (1, 16, 3, 3), found (3, 16, 3, 3)" in str(caught.value)
    assert "missing: decoder.mid.1.q.weight" in str(caught.value)

"""What scripts/quickstart.sh leaves, in miniature: data/digits of ten classes of 8x8 images, 16 codes each, and
runs/digits with a model of random weights.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from star_fast.config import TokenizerConfig
from star_fast.config_file import write_config
from star_fast.data.prepare import prepare
from star_fast.data.sources import open_source
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.transformer import Transformer
from star_fast.model.weights import save_model
from star_fast.presets import preset

TOKENIZER = TokenizerConfig(
    base_channels=8,
    multipliers=(1, 2),
    residual_blocks=1,
    z_channels=8,
    code_channels=4,
    codebook=16,
    image_channels=1,
    image_size=8,
)
IMAGES_OF_CLASS = 6


def make_small_digits(root: Path) -> None:
    """Below `root`; the transformer has preset tiny's size."""
    rng = np.random.default_rng(0)
    for digit in range(10):
        folder = root / "images" / str(digit)
        folder.mkdir(parents=True)
        for index in range(IMAGES_OF_CLASS):
            pixels = rng.integers(0, 60, (8, 8), dtype=np.uint8)
            pixels[digit % 5 : digit % 5 + 3, digit // 5 : digit // 5 + 6] += 150
            Image.fromarray(pixels).save(folder / f"{index}.png")
    config = preset("tiny")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = VQTokenizer(TOKENIZER).eval()
    data = dataclasses.replace(config.data, codes=str(root / "data/digits"), affine_views=2, held_out_share=0.34)
    store = prepare(open_source(root / "images"), data.codes, tokenizer, data, progress=False)
    tokenizer.save(store.path / "tokenizer")
    model = dataclasses.replace(config.model, vocab=store.codebook, positions=store.positions, num_classes=10)
    transformer, generator = Transformer(model), torch.Generator().manual_seed(0)
    transformer.init_weights(generator)
    with torch.no_grad():
        transformer.output.weight.normal_(0, 0.5, generator=generator)
    teacher = copy.deepcopy(transformer)
    with torch.no_grad():
        teacher.output.weight.mul_(1.5)
    run = root / "runs/digits"
    run.mkdir(parents=True)
    write_config(dataclasses.replace(config, model=model, data=data, tokenizer=TOKENIZER), run / "config.yaml")
    record = {
        "step": 20,
        "images_seen": 640,
        "contrast_depth": config.contrast_depth,
        "tokenizer_hash": store.tokenizer_hash,
    }
    save_model(
        run / "model", transformer, class_names=store.class_names, teacher=teacher, tokenizer=tokenizer, record=record
    )

"""Small image folders for the data tests, made from fixed seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from star_fast.config import TokenizerConfig
from star_fast.model.tokenizer import VQTokenizer

TINY = TokenizerConfig(
    base_channels=4,
    multipliers=(1, 2),
    residual_blocks=1,
    z_channels=8,
    code_channels=4,
    codebook=300,
    image_channels=3,
    image_size=16,
)


def tiny_tokenizer(seed: int = 0) -> VQTokenizer:
    """An untrained tokenizer of 16 x 16 RGB images, 8 x 8 codes: what it does is arbitrary but fixed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VQTokenizer(TINY).eval()


def picture(width: int, height: int, seed: int, mode: str = "RGB") -> Image.Image:
    """Smooth random colours."""
    coarse = np.random.RandomState(seed).randint(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def make_folder(folder: Path, counts: dict[str, int], suffix: str = ".png") -> Path:
    """FOLDER/class/NN.png, `counts` of each class, of various sizes."""
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            picture(20 + 3 * i % 17, 18 + 5 * i % 13, 100 * number + i).save(folder / name / f"{i:02d}{suffix}")
    return folder

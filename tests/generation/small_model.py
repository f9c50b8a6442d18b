"""A model folder small enough that a hundred images take a second: random weights, 16 codes an image, 3 classes, a grey
16-pixel tokenizer.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch

from star_fast.config import ModelConfig, TokenizerConfig
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.transformer import Transformer
from star_fast.model.weights import save_model

CLASS_NAMES = ["ash", "birch", "7"]  # the last is named like a number
MODEL = ModelConfig(blocks=2, heads=2, width=32, vocab=32, positions=16, num_classes=3)
TOKENIZER = TokenizerConfig(
    base_channels=16,
    multipliers=(1, 2, 2),
    residual_blocks=1,
    z_channels=16,
    code_channels=4,
    codebook=32,
    image_channels=1,
    image_size=16,
)


def save_small_model(folder: Path) -> tuple[Transformer, VQTokenizer]:
    """Write the folder; returns what is in it."""
    generator = torch.Generator().manual_seed(0)
    model = Transformer(MODEL)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = VQTokenizer(TOKENIZER).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.2, generator=generator)
            else:
                parameter.fill_(1)
    save_model(folder, model, class_names=CLASS_NAMES, tokenizer=tokenizer, record={})
    return model.eval(), tokenizer


def images_of(npz: Path) -> np.ndarray:
    """(N, H, W, 3) uint8."""
    with np.load(npz) as file:
        return file["arr_0"]


def journal_of(npz: Path, batch: int = 8) -> bytes:
    """The journal of the job that made this file, as it was before the file was finished."""
    images, lines = images_of(npz), b""
    for start in range(0, len(images), batch):
        end = min(start + batch, len(images))
        line = f"{end:020d} {zlib.crc32(images[start:end].tobytes()):08x}".encode()
        lines += line + f" {zlib.crc32(line):08x}\n".encode()
    return lines

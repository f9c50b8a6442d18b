"""A small code store with structure to learn, made in a moment: for tests of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from star_fast.data.codes import CodeStore
from star_fast.data.store_writer import StoreWriter

CLASSES, VIEWS, GRID, VOCAB = ("round", "square", "long"), 4, 4, 16


def write_store(folder: Path, images: int = 90, tokenizer_hash: str = "0" * 64) -> CodeStore:
    """`images` images of three classes, 4 views of 4x4 codes below 16; each class prefers its own codes."""
    rng = np.random.default_rng(0)
    labels = np.arange(images) % len(CLASSES)
    base = rng.integers(0, VOCAB, (images, 1, GRID * GRID))
    codes = np.where(rng.random((images, VIEWS, GRID * GRID)) < 0.6, labels[:, None, None] * 5, base)
    writer = StoreWriter(
        folder,
        {
            "views": tuple(f"view {index}" for index in range(VIEWS)),
            "view_settings": {"kind": "small-affine", "seed": 0},
            "positions": GRID * GRID,
            "grid": (GRID, GRID),
            "image_size": 16,
            "image_channels": 1,
            "codebook": VOCAB,
            "class_names": CLASSES,
            "tokenizer_sha256": tokenizer_hash,
            "source": {"kind": "test"},
            "decoder": "none",
            "chunk_images": images,
            "batch_views": 1,
        },
    )
    writer.append(codes, labels.tolist(), [str(index) for index in range(images)], images)
    return writer.finish(labels, 0.2)

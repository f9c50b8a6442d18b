"""A finished run as training would leave it, small enough to be looked at in a second: 3 classes of 8x8 images, 16
codes each.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from star_fast.config import DataConfig, MethodConfig, ModelConfig, RunConfig, TokenizerConfig, TrainConfig
from star_fast.config_file import write_config
from star_fast.data.prepare import prepare
from star_fast.data.sources import open_source
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.transformer import Transformer
from star_fast.model.weights import save_model

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
CLASSES = ("cat <b>", "dog", "fox")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """root/run is a run folder, root/codes its code store, root/images the real images."""
    root = tmp_path_factory.mktemp("finished")
    make_finished_run(root)
    return root


def make_finished_run(root: Path) -> None:
    """Below `root`, as above."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        folder = root / "images" / name
        folder.mkdir(parents=True)
        for index in range(14):
            pixels = rng.integers(0, 60, (8, 8), dtype=np.uint8)
            pixels[2 * label : 2 * label + 3] += 150  # a bright bar at another height
            Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    torch.manual_seed(0)
    tokenizer = VQTokenizer(TOKENIZER).eval()
    data = DataConfig(codes=str(root / "codes"), views="small-affine", affine_views=2, held_out_share=0.3)
    store = prepare(open_source(root / "images"), root / "codes", tokenizer, data, progress=False)
    model = ModelConfig(blocks=2, heads=2, width=16, vocab=16, positions=16, num_classes=3)
    transformer = Transformer(model)
    transformer.init_weights()
    with torch.no_grad():
        transformer.output.weight.normal_(0, 0.5)
    write_run(
        root / "run",
        RunConfig(model, MethodConfig(), train=TrainConfig(images_per_step=8), data=data, tokenizer=TOKENIZER),
        transformer,
        tokenizer,
        store.tokenizer_hash,
    )


def write_run(
    folder: Path, config: RunConfig, transformer: Transformer, tokenizer: VQTokenizer, tokenizer_hash: str
) -> None:
    folder.mkdir()
    write_config(config, folder / "config.yaml")
    record = {"step": 20, "images_seen": 160, "contrast_depth": config.contrast_depth, "tokenizer_hash": tokenizer_hash}
    save_model(folder / "model", transformer, class_names=CLASSES, tokenizer=tokenizer, record=record)
    lines = [
        {
            "step": step,
            "images": 8 * step,
            "loss": 4 - 0.1 * step,
            "ar": 2.7 - 0.05 * step,
            "mim": 0.5,
            "step_contrast": 2.0,
            "view_contrast": 1.5,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "images_per_s": 30.0,
            "time_s": 0.3 * step,
        }
        for step in (10, 20)
    ]
    lines.insert(1, {"step": 10, "images": 80, "val_ar": 2.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

"""Named runs, one aligned row each: architecture, method, schedule; command, machine and published figure beside each.

Paper figures: FID on ImageNet 256x256 without guidance, 50 000 samples, with ST-AR (arXiv 2509.15185, Table 1). They
are what the paper reports, not what was measured here; rows without a figure are LlamaGen sizes that the paper does not
train. The paper prints one learning rate for all sizes, 1e-4 for 256 images, which these runs take; LlamaGen's own
stands beside it.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from star_fast.config import (
    ConfigError,
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TokenizerConfig,
    TrainConfig,
)


class Preset(NamedTuple):
    """A named run and what to expect of it."""

    config: RunConfig
    machine: str  # what it is meant for
    paper: str  # the paper's figure
    llamagen: str  # LlamaGen's own learning rate and images a step, as its authors give them
    command: str


def _imagenet(
    blocks: int, heads: int, width: int, depth: int, epochs: float, stage: int, *, recompute: bool = False
) -> RunConfig:
    return RunConfig(
        model=ModelConfig(blocks, heads, width, vocab=16384, positions=256, num_classes=1000),
        method=MethodConfig(contrast_depth=depth),
        train=TrainConfig(epochs=epochs, zero_stage=stage, block_checkpointing=recompute),
    )


# The built-in digits, 28x28, on a laptop CPU: sizes chosen so that the whole quickstart takes minutes.
_TINY = RunConfig(
    model=ModelConfig(blocks=6, heads=4, width=96, dropout=0.0),
    method=MethodConfig(ema_decay=0.99, projector_width=256),
    optim=OptimConfig(lr_per_256_images=0.02, warmup_steps=50, schedule="cosine", final_lr_share=0.02),
    train=TrainConfig(
        images_per_step=32,
        epochs=1000.0,
        max_steps=1300,
        precision="fp32",
        zero_stage=0,
        save_every_steps=250,
        validate_every_steps=250,
    ),
    data=DataConfig(codes="data/digits", views="small-affine"),
    tokenizer=TokenizerConfig(
        base_channels=8,
        multipliers=(1, 3, 4),
        residual_blocks=1,
        z_channels=32,
        code_channels=8,
        codebook=256,
        image_channels=1,
        image_size=28,
        steps=300,
    ),
)

# What `star-fast prepare FOLDER` trains when no tokenizer is given: 64x64 colour images as 16x16 codes, for a CPU or
# one small GPU. Small steps, and many of them: what is learnt depends on their number far more than on the images in
# each (benchmarks/tokenizer.py).
FOLDER_TOKENIZER = TokenizerConfig(
    base_channels=16,
    multipliers=(1, 2, 2),
    residual_blocks=1,
    z_channels=64,
    code_channels=8,
    codebook=1024,
    image_channels=3,
    image_size=64,
    steps=1800,
    images_per_step=8,
    lr=2e-3,
)


# depth, heads, width, contrast depth, epochs, ZeRO stage; machine; the paper's figure; LlamaGen's learning rate.
_ROWS = {
    "tiny": (_TINY, "a laptop CPU", "not in the paper", "none"),
    "B": (
        _imagenet(12, 12, 768, 6, 50, 1),
        "8 GPUs of 40 GB",
        "FID 26.58 (plain LlamaGen 31.35)",
        "1e-4 at 256 images",
    ),
    "B-300": (_imagenet(12, 12, 768, 6, 300, 1), "8 GPUs of 40 GB", "FID 18.44 (plain 26.26)", "1e-4 at 256 images"),
    "L": (_imagenet(24, 16, 1024, 18, 50, 1), "8 GPUs of 80 GB", "FID 12.59 (plain 21.81)", "1e-4 at 256 images"),
    "L-300": (_imagenet(24, 16, 1024, 18, 300, 1), "8 GPUs of 80 GB", "FID 9.38 (plain 13.45)", "1e-4 at 256 images"),
    "XL": (_imagenet(36, 20, 1280, 18, 50, 1), "8 GPUs of 80 GB", "FID 9.81 (plain 19.42)", "2e-4 at 256 images"),
    # The paper sets a released model of another resolution beside this one: no plain figure to compare with.
    "XL-300": (
        _imagenet(36, 20, 1280, 18, 300, 1),
        "8 GPUs of 80 GB",
        "FID 6.20 (plain not comparable)",
        "2e-4 at 256 images",
    ),
    "XXL": (_imagenet(48, 24, 1536, 24, 50, 2, recompute=True), "16 GPUs of 80 GB", "none", "2e-4 at 512 images"),
    "3B": (_imagenet(24, 32, 3200, 12, 50, 2, recompute=True), "32 GPUs of 80 GB", "none", "2e-4 at 512 images"),
}

PRESETS = {
    name: Preset(
        *row,
        f"deepspeed star_fast/train.py --preset {name} --data.codes CODES --run "
        f"runs/{'digits' if name == 'tiny' else name}",
    )
    for name, row in _ROWS.items()
}


# All training images; the validation images are the held-out ones
IMAGENET_CODES = (
    "star-fast prepare IMAGENET/train --held-out-source IMAGENET/val --class-names imagenet --tokenizer vq_ds16_c2i.pt "
    "--data.crop-ranges 1.1 1.05 --out CODES"
)


def preset(name: str) -> RunConfig:
    """The config of a named run. Raises ConfigError listing the names for one that does not exist."""
    if name not in PRESETS:
        raise ConfigError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name].config


def plain(config: RunConfig, views: int = 1) -> RunConfig:
    """The same run without ST-AR: LlamaGen's own training, with `views` views of each image a step. A run that is so
    already stays as it is.
    """
    method = config.method
    if not (method.mask_ratio or method.has_teacher):
        return config
    return dataclasses.replace(
        config, method=dataclasses.replace(method, views=views, mask_ratio=0.0, mim_weight=0.0, contrast_weight=0.0)
    )

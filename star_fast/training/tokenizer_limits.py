"""What a tokenizer's training is refused for before it begins: sizes, numbers, images that cannot work."""

from __future__ import annotations

import torch
from torch import Tensor

from star_fast.config import ConfigError, TokenizerConfig
from star_fast.host_memory import physical_bytes
from star_fast.model.tokenizer import VQTokenizer
from star_fast.training.perceptual import load_perceptual

# Settings that the weights tell
SHAPE = ("base_channels", "multipliers", "residual_blocks", "z_channels", "code_channels", "codebook", "image_channels")
_MOST_LR = 1e30  # beyond, AdamW's step is no float32
_MOST_LATENTS = 2**24  # of one step: more torch.multinomial does not draw from


def require_possible(config: TokenizerConfig, device: torch.device) -> None:
    """Raise ConfigError for settings that cannot work, and sizes that this machine cannot hold by any means: what is
    possible is never refused.
    """
    if config.lr > _MOST_LR:
        raise ConfigError(f"tokenizer.lr: expected at most {_MOST_LR:g}, got {config.lr:g}")
    if config.images_per_step * config.positions > _MOST_LATENTS:
        raise ConfigError(
            f"tokenizer.images_per_step: expected at most {_MOST_LATENTS // config.positions} images of "
            f"{config.positions} codes, "
            f"got {config.images_per_step}"
        )
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in VQTokenizer(config).parameters())
    features = config.images_per_step * config.base_channels * config.image_size**2
    # Float32: weights, gradients, two moments; what the first block alone keeps for its gradient
    needed = 4 * (4 * weights + 4 * features)
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else physical_bytes()
    if needed > memory:
        raise ConfigError(
            f"tokenizer.base_channels: training {weights:,} weights on {config.images_per_step} images of "
            f"{config.image_size} pixels a step "
            f"takes at least {needed / 2**30:,.0f} GiB, the machine has {memory / 2**30:,.0f}; choose smaller sizes"
        )
    if config.perceptual_weight:
        load_perceptual(config.perceptual_weights)  # what is missing is told before images are read for minutes


def require_same_shape(there: TokenizerConfig, asked: TokenizerConfig) -> None:
    """Raise ConfigError naming the first setting of the shape in which the tokenizer to start from and the one asked
    for differ.
    """
    for name in SHAPE:
        if getattr(there, name) != getattr(asked, name):
            raise ConfigError(
                f"tokenizer.{name}: the tokenizer to fine-tune has {getattr(there, name)}, asked for is "
                f"{getattr(asked, name)}; "
                "leave that setting out"
            )


def require_images(images: Tensor, config: TokenizerConfig, name: str) -> None:
    """Raise ConfigError unless `images` are uint8 (N, C, H, W) of the tokenizer's size; `name` is the argument's."""
    expected = (config.image_channels, config.image_size, config.image_size)
    if images.ndim != 4 or tuple(images.shape[1:]) != expected or images.dtype != torch.uint8 or len(images) == 0:
        raise ConfigError(
            f"train_tokenizer: {name} must be uint8 (N >= 1, {', '.join(map(str, expected))}) to fit "
            "tokenizer.image_channels and "
            f"tokenizer.image_size, got {images.dtype} {tuple(images.shape)}"
        )

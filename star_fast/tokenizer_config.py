"""The settings of the VQ tokenizer, marked as config.py's are; read from there. Standard library only."""

from __future__ import annotations

import typing
from dataclasses import dataclass

from star_fast.records import require, require_finite


@dataclass(frozen=True)
class TokenizerConfig:
    """The VQ tokenizer: shape, and how a small one is trained on own images."""

    base_channels: int = 128  # (LlamaGen)
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # per level; len - 1 halvings: 16x downsampling (LlamaGen VQ-16)
    residual_blocks: int = 2  # per level of the encoder; the decoder has one more (LlamaGen)
    z_channels: int = 256  # (LlamaGen)
    code_channels: int = 8  # codebook entry length (LlamaGen)
    codebook: int = 16384  # entries, V (LlamaGen)
    image_channels: int = 3
    image_size: int = 256  # pixels, square
    steps: int = 600  # training steps of `star-fast prepare` when no tokenizer is given
    images_per_step: int = 64
    lr: float = 2e-3  # AdamW, cosine to 0
    commitment: float = 0.25  # weight of the commitment loss (VQ-VAE)
    reseed_every_steps: int = 50  # codes unused for so long are moved onto current encoder outputs; 0: never
    warmup_steps: int = 20  # the learning rate rises linearly from 0
    # of the average of the weights that is measured and kept, a step; 0: the last weights (LlamaGen: 0.9999)
    ema_decay: float = 0.0
    # of LPIPS, beside 1 for L1 + L2 in pixels (LlamaGen: 1); 0: none. Costs a VGG16 forward and backward pass a step
    perceptual_weight: float = 0.0
    perceptual_weights: str = ""  # file with VGG16's weights for it; nothing is ever downloaded
    discriminator_weight: float = 0.0  # of the patch discriminator's hinge loss (LlamaGen: 0.5); 0: none
    # it sets in when so many steps are done and images are roughly right (LlamaGen: 20000)
    discriminator_start_step: int = 0
    # times the ratio of the gradients at the decoder's last layer (VQGAN: True, LlamaGen: False)
    discriminator_adaptive: bool = False
    # bf16: products of training in bfloat16; weights, losses and codes stay float32
    precision: typing.Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        require_finite(self, "tokenizer")
        for name, most in (
            ("base_channels", 2**12),
            ("residual_blocks", 2**6),
            ("z_channels", 2**14),
            ("code_channels", 2**14),
            ("codebook", 2**16),
            ("image_channels", 2**4),
            ("image_size", 2**14),
            ("steps", 2**40),
            ("images_per_step", 2**20),
        ):
            require(1 <= getattr(self, name) <= most, f"tokenizer.{name}", getattr(self, name), f"1 ... {most}")
        require(
            1 <= len(self.multipliers) <= 12 and min(self.multipliers) >= 1 and max(self.multipliers) <= 2**6,
            "tokenizer.multipliers",
            self.multipliers,
            "one factor in 1 ... 64 per level, at most 12 levels",
        )
        require(
            self.image_size % self.downsampling == 0,
            "tokenizer.image_size",
            self.image_size,
            f"a multiple of the downsampling {self.downsampling}",
        )
        require(self.lr > 0, "tokenizer.lr", self.lr, "more than 0")
        for name in ("perceptual_weight", "discriminator_weight"):
            require(getattr(self, name) >= 0, f"tokenizer.{name}", getattr(self, name), "0 or more")
        for name in ("reseed_every_steps", "warmup_steps", "discriminator_start_step"):
            require(0 <= getattr(self, name) <= 2**40, f"tokenizer.{name}", getattr(self, name), f"0 ... {2**40}")
        require(0 <= self.ema_decay < 1, "tokenizer.ema_decay", self.ema_decay, "a share in [0, 1)")
        require(self.precision in ("fp32", "bf16"), "tokenizer.precision", self.precision, "'fp32' or 'bf16'")
        if self.perceptual_weight or self.discriminator_weight:
            require(
                self.image_channels in (1, 3),
                "tokenizer.image_channels",
                self.image_channels,
                "1 (gray) or 3 (RGB), which the sharpening losses compare",
            )
        if self.perceptual_weight:
            require(
                self.image_size >= 16,
                "tokenizer.image_size",
                self.image_size,
                "at least 16 pixels, which tokenizer.perceptual_weight needs",
            )
        if self.discriminator_weight:
            require(
                self.image_size >= 24,
                "tokenizer.image_size",
                self.image_size,
                "at least 24 pixels, which tokenizer.discriminator_weight needs",
            )
            require(
                self.discriminator_start_step < self.steps,
                "tokenizer.discriminator_start_step",
                self.discriminator_start_step,
                f"less than tokenizer.steps = {self.steps}",
            )

    @property
    def downsampling(self) -> int:
        """Pixels a side that one code stands for."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def positions(self) -> int:
        """Codes of one image, T."""
        return (self.image_size // self.downsampling) ** 2

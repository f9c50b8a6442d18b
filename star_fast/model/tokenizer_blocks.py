"""What the VQ tokenizer's encoder and decoder are built of: LlamaGen's architecture and state-dict names (method.md
section 3).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_fast.config import TokenizerConfig
from star_fast.ops.group_norm_silu import group_norm_silu


class Norm(nn.GroupNorm):
    """GroupNorm, then SiLU if asked for, with LlamaGen's 32 groups where a group then has at least its 4 channels
    (width 128 and up); fewer groups for narrower layers."""

    def __init__(self, channels: int, *, silu: bool) -> None:
        super().__init__(math.gcd(32, max(channels // 4, 1), channels), channels, eps=1e-6)
        self.silu, self.in_place = silu, False  # in place: for inference, where nothing else reads x

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:  # within autocast, which decides in what dtype to compute
            normed = super().forward(x)
            return F.silu(normed) if self.silu else normed
        return group_norm_silu(
            x, self.weight, self.bias, self.num_groups, self.eps, silu=self.silu, out=x if self.in_place else None
        )


class AddingConv2d(nn.Conv2d):
    """A convolution whose result is added to what is given beside its input: where both are computed at once, the sum
    costs no pass, and in inference no memory."""

    def forward(self, x: Tensor, beside: Tensor) -> Tensor:  # type: ignore[override]  # no stand-in for a Conv2d
        out = super().forward(x)
        return beside + out if torch.is_grad_enabled() or out.dtype != beside.dtype else out.add_(beside)


def conv3(channels_in: int, channels_out: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size."""
    return nn.Conv2d(channels_in, channels_out, 3, padding=1)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on the skip path where the width changes."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = Norm(channels_in, silu=True)
        self.conv1 = conv3(channels_in, channels_out)
        self.norm2 = Norm(channels_out, silu=True)
        self.conv2 = AddingConv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm2(self.conv1(self.norm1(x)))  # what stands between has no name: it would be held on to
        return self.conv2(normed, self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    """x + single-head self-attention over all pixels of norm(x), softmax scale 1/sqrt(channels)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels, silu=False)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = AddingConv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q_BTC, k_BTC, v_BTC = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed_BTC = F.scaled_dot_product_attention(q_BTC, k_BTC, v_BTC)
        return self.proj_out(mixed_BTC.transpose(1, 2).reshape(x.shape), x)


class Downsample(nn.Module):
    """Half the size: pad right and bottom by one pixel, then a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size: repeat each pixel, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """All blocks of one resolution: residual blocks, each followed by attention at the lowest level, then a change of
    size.
    """

    def __init__(self, channels_in: int, channels_out: int, blocks: int, attention: bool) -> None:
        super().__init__()
        self.res = nn.ModuleList(
            ResidualBlock(channels_in if i == 0 else channels_out, channels_out) for i in range(blocks)
        )
        self.attn = nn.ModuleList(AttentionBlock(channels_out) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        for resize in ("downsample", "upsample"):
            if hasattr(self, resize):
                x = getattr(self, resize)(x)
        return x


def middle(channels: int) -> nn.ModuleList:
    """Residual block, attention, residual block at the lowest resolution."""
    return nn.ModuleList(
        [ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels)]
    )


class Encoder(nn.Module):
    """Image (B, C, H, W) -> (B, z_channels, h, w)."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.base_channels * factor for factor in config.multipliers]
        self.conv_in = conv3(config.image_channels, config.base_channels)
        self.conv_blocks = nn.ModuleList()
        for i, (before, width) in enumerate(zip([config.base_channels, *widths], widths, strict=False)):
            lowest = i == len(widths) - 1
            level = Level(before, width, config.residual_blocks, attention=lowest)
            if not lowest:
                level.downsample = Downsample(width)
            self.conv_blocks.append(level)
        self.mid = middle(widths[-1])
        self.norm_out = Norm(widths[-1], silu=True)
        self.conv_out = conv3(widths[-1], config.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(self.norm_out(x))


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> image (B, C, H, W); one residual block more per level than the encoder."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.base_channels * factor for factor in reversed(config.multipliers)]  # lowest resolution first
        self.conv_in = conv3(config.z_channels, widths[0])
        self.mid = middle(widths[0])
        self.conv_blocks = nn.ModuleList()
        for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            level = Level(before, width, config.residual_blocks + 1, attention=i == 0)
            if i < len(widths) - 1:
                level.upsample = Upsample(width)
            self.conv_blocks.append(level)
        self.norm_out = Norm(widths[-1], silu=True)
        self.conv_out = conv3(widths[-1], config.image_channels)

    def forward(self, z: Tensor) -> Tensor:
        z = self.conv_in(z)
        for block in (*self.mid, *self.conv_blocks):
            z = block(z)
        return self.conv_out(self.norm_out(z))

"""What a tokenizer does to images, in figures (PSNR, SSIM, use of the codebook) and as a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from star_fast.model.tokenizer import VQTokenizer, from_uint8, to_uint8
from star_fast.storage import atomic_writer

EVALUATION_IMAGES = 64  # images encoded at once when nothing is learnt
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels (Wang et al. 2004)
_SSIM_C1, _SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


@dataclass(frozen=True, kw_only=True)
class TokenizerReport:
    """What a tokenizer does to images that it was not trained on (where such images were given)."""

    psnr_db: float  # 10 log10(255^2 / mean squared error) over all pixels of the uint8 reconstructions
    ssim: float | None = None  # mean over images, see structural_similarity; None: images smaller than its window, or a record older than this field
    codes_used: int  # codebook entries that occur
    codebook: int  # entries there are
    perplexity: float  # exp(entropy) of the codes: how many entries a uniform use would need
    images: int  # number of images measured


@dataclass(frozen=True, kw_only=True)
class TrainingRecord(TokenizerReport):
    """training.json: the schema."""

    measured_on: str  # "held-out images" or "training images"
    training_images: int
    steps: int
    seed: int
    trained_on: dict[str, Any] = field(default_factory=dict)  # source, views and split
    started_from: str = ""  # hash of the weights that were fine-tuned; "": random ones
    perceptual_sha256: str = ""  # of the perceptual loss's weights; "": there was none


@torch.no_grad()
def reconstruct(tokenizer: VQTokenizer, images: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 reconstructions (N, C, H, W) and codes (N, T) int64, on the CPU, of uint8 images (N, C, H, W)."""
    device, parts, codes = tokenizer.quantize.embedding.weight.device, [], []
    for batch in images.split(EVALUATION_IMAGES):
        codes.append(tokenizer.encode(from_uint8(batch.to(device))))
        parts.append(to_uint8(tokenizer.decode(codes[-1])).cpu())
    return torch.cat(parts), torch.cat(codes).cpu()


def structural_similarity(first: Tensor, second: Tensor) -> Tensor:
    """SSIM (N,) float64 of uint8 images (N, C, H, W): the mean over windows and colour channels of Wang et al. 2004.

    Each channel (R, G and B as stored: neither luma nor linear light) is compared by itself. Means and variances are weighted by a Gaussian window of
    11 x 11 pixels, sigma 1.5, that sums to 1; windows lie wholly inside the image; C1 = (0.01 * 255)^2, C2 = (0.03 * 255)^2.

    Raises:
        ValueError: two shapes, or images smaller than the window.
    """
    if first.shape != second.shape or first.ndim != 4 or min(first.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"structural_similarity: expected two batches of one shape (N, C, H, W), H and W at least {SSIM_WINDOW}, "
                         f"got {tuple(first.shape)} and {tuple(second.shape)}")
    return torch.cat([_similarity(a.double(), b.double()) for a, b in zip(first.split(EVALUATION_IMAGES), second.split(EVALUATION_IMAGES), strict=True)])


def _similarity(a: Tensor, b: Tensor) -> Tensor:
    """structural_similarity of a few float64 images: five planes an image are enough memory to bound."""
    place = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    row = torch.exp(-place.square() / (2 * SSIM_SIGMA**2))
    row = (row / row.sum()).view(1, 1, 1, SSIM_WINDOW)

    def windowed(values: Tensor) -> Tensor:
        """Weighted means (N*C, 1, H-10, W-10): along rows, then along columns, since the Gaussian is the product of the two."""
        return F.conv2d(F.conv2d(values.flatten(0, 1).unsqueeze(1), row), row.transpose(2, 3))

    mean_a, mean_b = windowed(a), windowed(b)
    variances = windowed(a * a) - mean_a.square() + windowed(b * b) - mean_b.square()
    covariance = windowed(a * b) - mean_a * mean_b
    similarity = (2 * mean_a * mean_b + _SSIM_C1) * (2 * covariance + _SSIM_C2) / ((mean_a.square() + mean_b.square() + _SSIM_C1) * (variances + _SSIM_C2))
    return similarity.view(len(a), -1).mean(1)


def measure_tokenizer(tokenizer: VQTokenizer, images: Tensor) -> TokenizerReport:
    """PSNR, SSIM and use of the codebook on uint8 images (N, C, H, W), N >= 1."""
    made, codes = reconstruct(tokenizer, images)
    error = (made.double() - images.double()).square().mean().item()
    count = torch.bincount(codes.flatten(), minlength=tokenizer.config.codebook).double()
    share = count[count > 0] / count.sum()
    ssim = round(structural_similarity(made, images).mean().item(), 4) if min(images.shape[-2:]) >= SSIM_WINDOW else None
    return TokenizerReport(psnr_db=round(10 * math.log10(255**2 / max(error, 1e-12)), 3), ssim=ssim, codes_used=len(share),
                           codebook=tokenizer.config.codebook, perplexity=round(math.exp(-(share * share.log()).sum().item()), 2), images=len(images))


def write_reconstructions(tokenizer: VQTokenizer, images: Tensor, path: str | Path) -> None:
    """Write a PNG: uint8 images (N, C, H, W) in the upper row, their reconstructions below; small images are enlarged to at least 96 pixels."""
    rows = torch.stack([images, reconstruct(tokenizer, images)[0]])  # (2, N, C, H, W)
    sheet = F.pad(rows, (2, 2, 2, 2), value=128).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2).numpy()  # (2H, N*W, C)
    zoom = max(1, math.ceil(96 / images.shape[-1]))
    picture = Image.fromarray(np.ascontiguousarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet))
    with atomic_writer(path) as file:
        picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(file, format="PNG")

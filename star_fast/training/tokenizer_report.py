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

from star_fast.model.image_likeness import SSIM_WINDOW, psnr_of_error, structural_similarity
from star_fast.model.tokenizer import VQTokenizer, from_uint8, to_uint8
from star_fast.storage import atomic_writer

EVALUATION_IMAGES = 64  # images encoded at once when nothing is learnt


@dataclass(frozen=True, kw_only=True)
class TokenizerReport:
    """What a tokenizer does to images that it was not trained on (where such images were given)."""

    psnr_db: float  # 10 log10(255^2 / mean squared error) over all pixels of the uint8 reconstructions
    # Mean over images, see structural_similarity; None: images smaller than its window, or a record older than this
    # field
    ssim: float | None = None
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


def measure_tokenizer(tokenizer: VQTokenizer, images: Tensor) -> TokenizerReport:
    """PSNR, SSIM and use of the codebook on uint8 images (N, C, H, W), N >= 1."""
    made, codes = reconstruct(tokenizer, images)
    error = (made.double() - images.double()).square().mean().item()
    count = torch.bincount(codes.flatten(), minlength=tokenizer.config.codebook).double()
    share = count[count > 0] / count.sum()
    ssim = (
        round(structural_similarity(made, images).mean().item(), 4) if min(images.shape[-2:]) >= SSIM_WINDOW else None
    )
    return TokenizerReport(
        psnr_db=round(psnr_of_error(error), 3),
        ssim=ssim,
        codes_used=len(share),
        codebook=tokenizer.config.codebook,
        perplexity=round(math.exp(-(share * share.log()).sum().item()), 2),
        images=len(images),
    )


def write_reconstructions(tokenizer: VQTokenizer, images: Tensor, path: str | Path) -> None:
    """Write a PNG: uint8 images (N, C, H, W) in the upper row, their reconstructions below; small images are enlarged
    to at least 96 pixels.
    """
    rows = torch.stack([images, reconstruct(tokenizer, images)[0]])  # (2, N, C, H, W)
    # (2H, N*W, C)
    sheet = F.pad(rows, (2, 2, 2, 2), value=128).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2).numpy()
    zoom = max(1, math.ceil(96 / images.shape[-1]))
    picture = Image.fromarray(np.ascontiguousarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet))
    with atomic_writer(path) as file:
        picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(file, format="PNG")

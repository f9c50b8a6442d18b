"""How like two sets of images are: PSNR and SSIM of uint8 images, in float64."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels (Wang et al. 2004)
_SSIM_C1, _SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_IMAGES_AT_ONCE = 64


def structural_similarity(first: Tensor, second: Tensor) -> Tensor:
    """SSIM (N,) float64 of uint8 images (N, C, H, W): the mean over windows and colour channels of Wang et al. 2004.

    Each channel (R, G and B as stored: neither luma nor linear light) is compared by itself. Means and variances are
    weighted by a Gaussian window of 11 x 11 pixels, sigma 1.5, that sums to 1; windows lie wholly inside the image; C1
    = (0.01 * 255)^2, C2 = (0.03 * 255)^2.

    Raises:
        ValueError: two shapes, or images smaller than the window.
    """
    if first.shape != second.shape or first.ndim != 4 or min(first.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(
            f"structural_similarity: expected two batches of one shape (N, C, H, W), H and W at least {SSIM_WINDOW}, "
            f"got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    return torch.cat(
        [
            _similarity(a.double(), b.double())
            for a, b in zip(first.split(_IMAGES_AT_ONCE), second.split(_IMAGES_AT_ONCE), strict=True)
        ]
    )


def _similarity(a: Tensor, b: Tensor) -> Tensor:
    """structural_similarity of a few float64 images: five planes an image are enough memory to bound."""
    place = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    row = torch.exp(-place.square() / (2 * SSIM_SIGMA**2))
    row = (row / row.sum()).view(1, 1, 1, SSIM_WINDOW)

    def windowed(values: Tensor) -> Tensor:
        """Weighted means (N*C, 1, H-10, W-10): along rows, then along columns, since the Gaussian is the product of the
        two.
        """
        return F.conv2d(F.conv2d(values.flatten(0, 1).unsqueeze(1), row), row.transpose(2, 3))

    mean_a, mean_b = windowed(a), windowed(b)
    variances = windowed(a * a) - mean_a.square() + windowed(b * b) - mean_b.square()
    covariance = windowed(a * b) - mean_a * mean_b
    similarity = (
        (2 * mean_a * mean_b + _SSIM_C1)
        * (2 * covariance + _SSIM_C2)
        / ((mean_a.square() + mean_b.square() + _SSIM_C1) * (variances + _SSIM_C2))
    )
    return similarity.view(len(a), -1).mean(1)


def psnr_of_error(squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error of uint8 images; 168 dB where it is 0, so that it stays
    a number.
    """
    return 10 * math.log10(255**2 / max(squared_error, 1e-12))

"""The patch discriminator (PatchGAN, Isola et al. 2017) that makes a tokenizer's reconstructions look sharp, with the
hinge loss of VQGAN and LlamaGen.

It judges overlapping patches of 70 x 70 pixels: three halvings, then two 4x4 convolutions. Of images under 24 pixels
they leave nothing to judge, which tokenizer_config.py refuses.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WIDTHS = (64, 128, 256, 512)
_MOST_ADAPTIVE = 1e4  # (VQGAN)


class PatchDiscriminator(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> how real each patch looks, (B, 1, h, w), any number.

    Batch normalisation always takes the statistics of its own batch: nothing but weights has to be kept.
    """

    def __init__(self, image_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(image_channels, _WIDTHS[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for number, (before, width) in enumerate(itertools.pairwise(_WIDTHS), 2):
            layers += [
                nn.Conv2d(before, width, 4, stride=2 if number < len(_WIDTHS) else 1, padding=1, bias=False),
                nn.BatchNorm2d(width, track_running_stats=False),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(_WIDTHS[-1], 1, 4, padding=1))
        for module in self.modules():  # (pix2pix)
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def hinge_loss(real: Tensor, made: Tensor) -> Tensor:
    """What the discriminator minimises: (mean max(0, 1 - real) + mean max(0, 1 + made)) / 2."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + made).mean())


def adversarial_loss(made: Tensor) -> Tensor:
    """What the tokenizer minimises: -mean made."""
    return -made.mean()


def adaptive_factor(reconstruction_loss: Tensor, adversarial: Tensor, last_weight: Tensor) -> Tensor:
    """VQGAN's factor of the adversarial loss, detached: |d reconstruction / d last| / (|d adversarial / d last| +
    1e-6), at most 10^4.

    With it both losses pull equally at the decoder's last layer, however their scales differ.
    """
    norms = [
        torch.autograd.grad(loss, last_weight, retain_graph=True)[0].norm()
        for loss in (reconstruction_loss, adversarial)
    ]
    return (norms[0] / (norms[1] + 1e-6)).clamp(0, _MOST_ADAPTIVE).detach()

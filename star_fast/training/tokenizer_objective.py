"""What a tokenizer is trained to minimise, and one optimizer step of it.

loss = L1 + L2 in pixels + w_p LPIPS + codebook + commitment + w_d (-mean D(reconstruction)). The perceptual distance
and the discriminator D are options: small images do well without, large natural ones need them to look sharp (VQGAN,
LlamaGen).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from star_fast.model.tokenizer import TokenizerOutput
from star_fast.training.discriminator import PatchDiscriminator, adaptive_factor, adversarial_loss, hinge_loss
from star_fast.training.perceptual import Perceptual
from star_fast.training.tokenizer_state import Training

MOST_GRADIENT = 1.0  # norm that gradients are clipped to


class Stepped(NamedTuple):
    """What one forward and backward pass found; the optimizer has not moved yet."""

    output: TokenizerOutput
    pixels: Tensor  # L1 + L2, a scalar
    measured: Tensor  # (2,) the loss and its gradient's norm


def backward(
    training: Training, target: Tensor, perceptual: Perceptual | None, adversary: PatchDiscriminator | None
) -> Stepped:
    """Fill the tokenizer's gradients, clipped, for images (B, C, H, W) float32 in [-1, 1]."""
    tokenizer, config = training.tokenizer, training.tokenizer.config
    with _products(training):
        output = tokenizer(target)
        reconstruction = output.reconstruction.float()
        pixels = F.l1_loss(reconstruction, target) + F.mse_loss(reconstruction, target)
        seen = pixels if perceptual is None else pixels + config.perceptual_weight * perceptual(reconstruction, target)
        loss = seen + output.codebook_loss + config.commitment * output.commitment_loss
        if adversary is not None:
            adversary.requires_grad_(False)
            adversarial = adversarial_loss(adversary(reconstruction).float())
            factor = (
                adaptive_factor(seen, adversarial, tokenizer.decoder.conv_out.weight)
                if config.discriminator_adaptive
                else 1.0
            )
            loss = loss + config.discriminator_weight * factor * adversarial
            adversary.requires_grad_(True)
    training.optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), MOST_GRADIENT)
    return Stepped(
        output._replace(reconstruction=reconstruction.detach()), pixels.detach(), torch.stack([loss.detach(), norm])
    )


def step_discriminator(
    training: Training, target: Tensor, reconstruction: Tensor, check: Callable[[Tensor], None]
) -> None:
    """One step of the discriminator on images and their reconstructions (B, C, H, W), both detached; `check` sees its
    loss and norm before it moves.
    """
    discriminator, optimizer = training.discriminator, training.discriminator_optimizer
    assert discriminator is not None and optimizer is not None, "the caller has seen one"
    with _products(training):
        loss = hinge_loss(discriminator(target).float(), discriminator(reconstruction).float())
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(discriminator.parameters(), MOST_GRADIENT)
    check(torch.stack([loss.detach(), norm]))
    optimizer.step()


def _products(training: Training) -> torch.autocast:
    """bfloat16 products where the settings ask for them."""
    return torch.autocast(
        training.used.device.type, dtype=torch.bfloat16, enabled=training.tokenizer.config.precision == "bf16"
    )

"""What a tokenizer makes of images, batch by batch: the reconstructions that rFID measures, and PSNR and SSIM beside
it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from star_fast.errors import UserError
from star_fast.generation.render import PIECE_IMAGES
from star_fast.model.image_likeness import SSIM_WINDOW, psnr_of_error, structural_similarity
from star_fast.model.llamagen import load_tokenizer
from star_fast.model.tokenizer import VQTokenizer, from_uint8, to_uint8


class OpenTokenizer:
    """A tokenizer on a device, and the side of the images that it is measured on."""

    def __init__(self, name: str, tokenizer: VQTokenizer, image_size: int, device: torch.device) -> None:
        self.name, self.image_size = name, image_size or tokenizer.config.image_size
        if self.image_size % tokenizer.config.downsampling:
            raise UserError(
                f"--image-size: expected a multiple of {tokenizer.config.downsampling}, which {name} makes one "
                f"code of, got {self.image_size}"
            )
        self.model, self.device, self.channels = (
            tokenizer.to(device).eval().requires_grad_(False),
            device,
            tokenizer.config.image_channels,
        )

    def record(self) -> dict[str, Any]:
        """For the protocol."""
        return {
            "name": self.name,
            "weights_sha256": self.model.weights_hash(),
            "image_size": self.image_size,
            "precision": "float32",
        }


def open_tokenizer(path: str | Path, image_size: int, device: torch.device) -> OpenTokenizer:
    """Raises UserError where there is none, or `image_size` is none of its sizes; 0: its own."""
    return OpenTokenizer(str(path), load_tokenizer(path), image_size, device)


class TokenizerPass:
    """Reconstructs batches and sums up how like they are."""

    def __init__(self, tokenizer: OpenTokenizer) -> None:
        self.tokenizer, self._images, self._squares, self._values, self._ssim = tokenizer, 0, 0.0, 0, 0.0

    @torch.inference_mode()
    def reconstruct(self, images: Tensor) -> Tensor:
        """uint8 (n, C, H, W) on the CPU -> their reconstructions, the same."""
        model, device, parts = self.tokenizer.model, self.tokenizer.device, []
        for piece in images.split(PIECE_IMAGES):
            parts.append(to_uint8(model.decode(model.encode(from_uint8(piece.to(device))))).cpu())
        made = torch.cat(parts)
        self._squares += (made.double() - images.double()).square().sum().item()
        self._values += images.numel()
        self._images += len(images)
        if self.tokenizer.image_size >= SSIM_WINDOW:
            self._ssim += structural_similarity(made, images).sum().item()
        return made

    def figures(self) -> dict[str, float | None]:
        """PSNR over all pixels, and the mean SSIM of the images; None where they are smaller than its window."""
        ssim = self._ssim / self._images if self.tokenizer.image_size >= SSIM_WINDOW else None
        return {"psnr_db": psnr_of_error(self._squares / self._values), "ssim": ssim}

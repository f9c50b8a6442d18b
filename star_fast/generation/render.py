"""Codes to pixels: the VQ decoder in small pieces; on CUDA in bf16, channels last, on a stream of its own beside the next batch's decoding."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from star_fast.model.tokenizer import VQTokenizer, to_uint8

PIECE_IMAGES = 8  # decoded at once: at 256 px one activation of VQ-16 is 268 MB in float32


@dataclass
class Rendering:
    """Images on their way."""

    images: Tensor  # (B, H, W, 3) uint8 in host memory, complete once `done` has happened
    done: torch.cuda.Event | None  # None on the CPU

    def wait(self) -> Tensor:
        """(B, H, W, 3) uint8 on the CPU."""
        if self.done is not None:
            self.done.synchronize()
        return self.images


class Renderer:
    """A tokenizer's decoder, ready to turn batches of codes into uint8 images.

    Args:
        tokenizer: any device; a copy is taken.
        device: where to decode: the model's device.
        pixels: side of the images to return; 0: as the tokenizer makes them. Another size is reached by bicubic interpolation without antialias, before
            rounding to uint8, as LlamaGen does for its 384-pixel models.

    Numerics:
        bfloat16 on CUDA, float32 on the CPU. Images are decoded 8 at a time whatever the batch, so that pieces, not batches, decide the rounding.
    """

    def __init__(self, tokenizer: VQTokenizer, device: torch.device, pixels: int = 0) -> None:
        self.device, self.pixels = device, pixels
        self.tokenizer = copy.deepcopy(tokenizer).eval().requires_grad_(False).to(device)
        self.stream = None
        if device.type == "cuda":
            self.tokenizer = self.tokenizer.to(torch.bfloat16, memory_format=torch.channels_last)
            self.stream = torch.cuda.Stream(device)
        else:
            self.tokenizer = self.tokenizer.float()

    def start(self, codes: Tensor) -> Rendering:
        """Begin to decode codes (B, T). On CUDA this returns at once; what is enqueued on the current stream afterwards runs beside it."""
        if self.stream is None:
            return Rendering(self._images(codes), None)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            codes.record_stream(self.stream)
            on_device = self._images(codes)
            images = torch.empty(on_device.shape, dtype=torch.uint8, pin_memory=True)
            images.copy_(on_device, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self.stream)
        return Rendering(images, done)

    @torch.no_grad()
    def _images(self, codes_BT: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 on the device; one grey channel is repeated."""
        images_BHWC = None
        for start in range(0, len(codes_BT), PIECE_IMAGES):
            piece_BCHW = self.tokenizer.decode(codes_BT[start : start + PIECE_IMAGES])
            if self.pixels and self.pixels != piece_BCHW.shape[-1]:
                piece_BCHW = F.interpolate(piece_BCHW.float(), size=(self.pixels, self.pixels), mode="bicubic")
            if images_BHWC is None:
                images_BHWC = torch.empty(len(codes_BT), *piece_BCHW.shape[2:], 3, dtype=torch.uint8, device=self.device)
            images_BHWC[start : start + PIECE_IMAGES] = to_uint8(piece_BCHW).permute(0, 2, 3, 1)
        return images_BHWC

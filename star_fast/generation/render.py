"""Codes to pixels: the VQ decoder in small pieces, in bf16 and channels last where the device multiplies bf16; on CUDA
on a stream of its own beside the next batch's decoding."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from star_fast.generation.device import native_dtype
from star_fast.generation.packed_convolutions import bfloat16_decoder, largest_activation_bytes
from star_fast.host_memory import keep_freed_memory
from star_fast.model.tokenizer import VQTokenizer, to_uint8

# Of the largest activation of a piece in bfloat16 on the CPU: one image of VQ-16 at 256 px (two at once take 10 %
# longer each, as activations leave the caches), 445 of the built-in digits, which pay the same calls' overhead together
# (0.14 ms each at 256 together, 0.50 at 8).
_PIECE_BYTES = 2**24
_KEPT_BYTES = 2**28  # of activations, taken and given back 40 times an image
PIECE_IMAGES = 8  # decoded at once in float32: at 256 px one activation of VQ-16 is 268 MB
# On CUDA. An H100 makes VQ-16's images of 256 px in 1.15 ms each; by 32, which take 1 GB more, in 1.10; by 8 it waits
# for Python, 1.3 to 2.5 ms (benchmarks/results/h100.md).
CUDA_PIECE_IMAGES = 16


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


def pixel_precision(device: torch.device, float32: bool) -> Literal["bf16", "fp32"]:
    """In what a Renderer computes: it decides bytes. `float32`: on the CPU whatever it multiplies."""
    if device.type == "cuda":
        return "bf16"
    # torch's attention in bfloat16 cannot do without AVX-512, which ATEN_CPU_CAPABILITY may have forbidden.
    native = native_dtype(device) == torch.bfloat16 and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return "bf16" if native and not float32 else "fp32"


class Renderer:
    """A tokenizer's decoder, ready to turn batches of codes into uint8 images.

    Args:
        tokenizer: any device; a copy is taken.
        device: where to decode: the model's device.
        pixels: side of the images to return; 0: as the tokenizer makes them. Another size is reached by bicubic
            interpolation without antialias, before rounding to uint8, as LlamaGen does for its 384-pixel models.
        float32: on the CPU decode in float32, whatever it multiplies.

    Numerics:
        See pixel_precision. Tokenizer and precision decide how many images are decoded at once, never the batch. In
        bfloat16 on the CPU an image's bytes do not depend on its batch at all: oneDNN's packed kernels sum an image's
        products in one order however many images lie beside it. In float32 a piece that is not full may differ in a
        last bit (torch has other convolutions for single images); exact mode (generation/batch.py) fills its pieces.
    """

    def __init__(self, tokenizer: VQTokenizer, device: torch.device, pixels: int = 0, *, float32: bool = False) -> None:
        self.device, self.pixels = device, pixels
        self.stream: torch.cuda.Stream | None = None
        self.precision = pixel_precision(device, float32)
        if device.type == "cuda":
            self.tokenizer = _ready(tokenizer).to(device).to(torch.bfloat16).to(memory_format=torch.channels_last)
            self.stream = torch.cuda.Stream(device)
        elif self.precision == "bf16":
            keep_freed_memory(_KEPT_BYTES)
            self.tokenizer = bfloat16_decoder(tokenizer)
        else:
            self.tokenizer = _ready(tokenizer).to(device).float()

    def start(self, codes: Tensor) -> Rendering:
        """Begin to decode codes (B, T). On CUDA this returns at once; what is enqueued on the current stream afterwards
        runs beside it.
        """
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

    def piece_images(self, side: int) -> int:
        """How many images of side x side codes are decoded at once."""
        if self.device.type == "cuda":
            return CUDA_PIECE_IMAGES
        if self.precision == "fp32":
            return PIECE_IMAGES
        return max(1, _PIECE_BYTES // largest_activation_bytes(self.tokenizer.config, side, torch.bfloat16))

    @torch.no_grad()
    def _images(self, codes_BT: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 on the device; one grey channel is repeated."""
        images_BHWC, piece = None, self.piece_images(math.isqrt(codes_BT.shape[1]))
        for start in range(0, len(codes_BT), piece):
            piece_BCHW = self.tokenizer.decode(codes_BT[start : start + piece])
            if self.pixels and self.pixels != piece_BCHW.shape[-1]:
                piece_BCHW = F.interpolate(piece_BCHW.float(), size=(self.pixels, self.pixels), mode="bicubic")
            if images_BHWC is None:
                images_BHWC = torch.empty(
                    len(codes_BT), *piece_BCHW.shape[2:], 3, dtype=torch.uint8, device=self.device
                )
            images_BHWC[start : start + piece] = to_uint8(piece_BCHW).permute(0, 2, 3, 1)
        assert images_BHWC is not None, "no codes, no images"
        return images_BHWC


def _ready(tokenizer: VQTokenizer) -> VQTokenizer:
    return copy.deepcopy(tokenizer).eval().requires_grad_(False)

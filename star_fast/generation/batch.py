"""One batch of images, from their indices to pixels on their way; and the exact mode, whose bytes no batch size can
change.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from star_fast.errors import UserError
from star_fast.generation.decoder import Decoder
from star_fast.generation.device import native_dtype
from star_fast.generation.products import resolve
from star_fast.generation.render import PIECE_IMAGES, Renderer, Rendering, pixel_precision
from star_fast.generation.sample_config import SampleConfig
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.transformer import Transformer

EXACT_IMAGES = PIECE_IMAGES  # of a fixed block: image i is always computed in slot i mod 8 of block i div 8
_CACHE_DTYPES = {"model": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
_COST_STEPS = 6


class Drawer:
    """A model and its tokenizer on a device, ready to draw any of the job's images.

    Exact mode: rounding in a matrix product can depend on the product's shape and a row's place in it. So image i
    always has the same place in a block of the same 8 images, whatever the batch; slots past the job's end hold a fixed
    label.
    """

    def __init__(
        self, config: SampleConfig, transformer: Transformer, tokenizer: VQTokenizer, device: torch.device
    ) -> None:
        self.config, self.device = config, device
        dtype = _dtype(config, device)
        self.precision = "bf16" if dtype == torch.bfloat16 else "fp32"
        try:
            self.products = resolve("plain" if config.exact else config.products, device, dtype)
        except ValueError as error:
            raise UserError(str(error)) from error
        with _explained(config):
            self.transformer = transformer.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.images_in_batch = min(config.batch_images, config.images)
        self.images_together = EXACT_IMAGES if config.exact else self.images_in_batch
        codes = math.isqrt(transformer.config.positions)
        if codes * codes != transformer.config.positions:
            raise UserError(
                f"model: its {transformer.config.positions} codes an image fill no square, and no other image can "
                "be made of them"
            )
        side = config.pixels or codes * tokenizer.config.downsampling
        self.image_shape = (side, side, 3)
        self._tokenizer, self._float32_pixels = tokenizer, dtype == torch.float32
        self.pixels_precision = pixel_precision(device, self._float32_pixels)
        self._decoder: Decoder | None = None
        self._renderer: Renderer | None = None

    def start(self, first: int, end: int, labels: np.ndarray) -> Rendering:
        """Draw images first ... end-1 of those with these labels (N,) int64; their pixels may still be on their way.

        Raises:
            UserError: the model's numbers are not finite, or the memory does not suffice.
        """
        with _explained(self.config):
            # Not before it is known that there is something to draw
            if self._decoder is None or self._renderer is None:
                self._decoder = self._new_decoder(self.images_together)
                self._renderer = Renderer(
                    self._tokenizer, self.device, self.config.pixels, float32=self._float32_pixels
                )
            if not self.config.exact:
                return self._renderer.start(self._codes(torch.arange(first, end), torch.from_numpy(labels)))
            blocks = []
            for start in range(first - first % EXACT_IMAGES, end, EXACT_IMAGES):
                images = self._renderer.start(
                    self._codes(torch.arange(start, start + EXACT_IMAGES), torch.from_numpy(labels))
                ).wait()
                blocks.append(images[max(first - start, 0) : end - start])
            return Rendering(torch.cat(blocks), None)

    def _codes(self, index: Tensor, labels: Tensor) -> Tensor:
        label = torch.where(index < len(labels), labels[index.clamp(max=len(labels) - 1)], 0)
        c = self.config
        assert self._decoder is not None, "start makes one"
        return self._decoder.generate(
            label,
            guidance=c.guidance,
            cfg_interval=c.cfg_interval,
            temperature=c.temperature,
            top_k=c.top_k,
            top_p=c.top_p,
            seed=c.seed,
            image_index=index,
        )

    def _new_decoder(self, images: int) -> Decoder:
        return Decoder(
            self.transformer,
            images * (2 if self.config.guidance > 1 else 1),
            _CACHE_DTYPES[self.config.cache],
            self.products,
        )

    def exact_cost(self) -> float:
        """Time of a batch in blocks of 8 over the same batch in one piece: a few decoding steps in the middle of an
        image, medians.
        """
        images = self.images_in_batch
        with _explained(self.config):
            whole, block = self._new_decoder(images), self._new_decoder(EXACT_IMAGES)
        blocks = -(-images // EXACT_IMAGES)
        times: dict[str, list[float]] = {"whole": [], "blocks": []}
        for step in range(_COST_STEPS):
            for name, decoder, rows, repeats in (
                ("whole", whole, whole.rows, 1),
                ("blocks", block, block.rows, blocks),
            ):
                seconds = _step_seconds(decoder, rows, repeats)
                if step:  # the first warms up
                    times[name].append(seconds)
        return float(np.median(times["blocks"]) / np.median(times["whole"]))


@torch.no_grad()
def _step_seconds(decoder: Decoder, rows: int, repeats: int) -> float:
    embedded_RD = decoder.model.tok_embeddings.weight[:1].repeat(rows, 1)
    started = time.perf_counter()
    for _ in range(repeats):
        decoder.logits(embedded_RD, decoder.config.positions // 2)
    if decoder.device.type == "cuda":
        torch.cuda.synchronize(decoder.device)
    return time.perf_counter() - started


def _dtype(config: SampleConfig, device: torch.device) -> torch.dtype:
    if config.exact or config.precision == "fp32":
        return torch.float32
    return torch.bfloat16 if config.precision == "bf16" else native_dtype(device)


@contextlib.contextmanager
def _explained(config: SampleConfig) -> Iterator[None]:
    """What torch and the decoder say of a model that cannot be drawn from, or of too little memory, as one line."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{config.model or 'model'}: cannot be drawn from: {error}") from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            raise UserError(
                f"batch_images: the memory does not suffice for {config.batch_images} images at once; give a "
                "smaller --batch-images"
            ) from error
        raise

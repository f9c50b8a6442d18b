"""The named baseline of benchmarks/sampling.py: a decent, straightforward PyTorch pipeline in the style of LlamaGen's
released code, labels to pixels.

    python benchmarks/llamagen_style.py MODEL OUT.npz [--images 32]      a process of its own: what its user waits for

What its codes share with that code (autoregressive/models/{gpt,generate}.py): a padded key-value cache read in full at
every step with a mask over the future, separate w1, w3 products, both logit rows of a guided image computed and
combined, top-k by sorting, softmax, multinomial. What it does better: weights and cache in one dtype, no autocast, no
list building; everything that a careful reader would do without changing the method.

Its pixels are that code's arithmetic (tokenizer/tokenizer_image/vq_model.py): float32, contiguous, the whole batch at
once, x * sigmoid(x), attention by two batched products; plain torch throughout, so that it stays what it is whatever
our own decoder becomes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from star_fast.model.llamagen import load_tokenizer
from star_fast.model.tokenizer import VQTokenizer, to_uint8
from star_fast.model.tokenizer_blocks import AttentionBlock, ResidualBlock
from star_fast.model.transformer import NORM_EPS, Block, Transformer
from star_fast.model.weights import load_model


class LlamaGenStyle:
    """Samples from a Transformer's weights, `images` at a time, always guided."""

    def __init__(self, model: Transformer, images: int) -> None:
        self.model, self.images, config = model, images, model.config
        weight = model.output.weight
        shape = (2 * images, config.heads, config.positions, config.head_size)
        self.caches = [
            tuple(torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
            for _ in range(config.blocks)
        ]
        self.causal = torch.full(
            (config.positions, config.positions), float("-inf"), dtype=weight.dtype, device=weight.device
        ).triu(1)
        self.w1w3 = [tuple(block.feed_forward.w13.weight.chunk(2)) for block in model.layers]
        self.rotary = torch.view_as_complex(model.rotary.float())

    @torch.no_grad()
    def generate(self, label: Tensor, guidance: float, temperature: float, top_k: int) -> Tensor:
        """Codes (B, T) of labels (B,)."""
        codes = []
        x = self.model.cls_embedding.embedding_table(torch.cat([label, torch.full_like(label, self.model.null_class)]))
        for position in range(self.model.config.positions):
            codes.append(self.step(x, position, guidance, temperature, top_k))
            x = self.model.tok_embeddings(torch.cat([codes[-1], codes[-1]])[:, 0])
        return torch.cat(codes, dim=1)

    @torch.no_grad()
    def step(self, x: Tensor, position: int, guidance: float, temperature: float, top_k: int) -> Tensor:
        """Input rows (2B, D), conditional first -> tokens (B, 1)."""
        mask = self.causal[position][None, None, None]
        for block, cache, w1w3 in zip(self.model.layers, self.caches, self.w1w3, strict=True):
            x = x + self._attend(block, _rms_norm(x, block.attention_norm.weight), cache, position, mask)
            h = _rms_norm(x, block.ffn_norm.weight)
            x = x + block.feed_forward.w2(F.silu(F.linear(h, w1w3[0])) * F.linear(h, w1w3[1]))
        logits = self.model.output(_rms_norm(x, self.model.norm.weight)).float()
        with_class, without = logits.chunk(2)
        logits = without + (with_class - without) * guidance
        return draw(logits / max(temperature, 1e-5), top_k)

    def _attend(self, block: Block, h: Tensor, cache: tuple[Tensor, Tensor], position: int, mask: Tensor) -> Tensor:
        rows, heads = h.shape[0], block.heads
        qkv = block.attention.wqkv(h).view(rows, 3, heads, -1)
        (q, k), v = self._rotate(qkv[:, :2], position).unbind(1), qkv[:, 2]
        cache[0][:, :, position], cache[1][:, :, position] = k, v
        # Written out: on the CPU, scaled_dot_product_attention with a mask takes 3 to 15 times as long for one bfloat16
        # query.
        scores = (q * q.shape[-1] ** -0.5).unsqueeze(2) @ cache[0].transpose(2, 3) + mask
        return block.attention.wo((torch.softmax(scores, dim=-1) @ cache[1]).reshape(rows, -1))

    def _rotate(self, x: Tensor, position: int) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self.rotary[position]).flatten(-2).to(x.dtype)


def draw(logits: Tensor, top_k: int, top_p: float = 1.0) -> Tensor:
    """LlamaGen's sampler: logits (B, V) float32 -> tokens (B, 1)."""
    if top_k > 0:
        logits = logits.masked_fill(
            logits < torch.topk(logits, min(top_k, logits.shape[-1]))[0][..., -1:], float("-inf")
        )
    if top_p < 1.0:
        ordered, order = torch.sort(logits, descending=True)
        beyond = torch.cumsum(F.softmax(ordered, dim=-1), dim=-1) > top_p
        beyond = torch.cat([torch.zeros_like(beyond[:, :1]), beyond[:, :-1]], dim=1)
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), float("-inf"))
    return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + NORM_EPS)).type_as(x) * weight


@torch.no_grad()
def decode_pixels(tokenizer: VQTokenizer, codes: Tensor) -> Tensor:
    """Images (B, C, H, W) float32 in about [-1, 1] of codes (B, T), in LlamaGen's order of operations."""
    side, decoder = math.isqrt(codes.shape[1]), tokenizer.decoder
    h = decoder.conv_in(tokenizer.post_quant_conv(tokenizer.quantize.look_up(codes, (side, side))))
    for block in decoder.mid:
        h = _residual(block, h) if isinstance(block, ResidualBlock) else _attend_pixels(block, h)
    for level in decoder.conv_blocks:
        for number, block in enumerate(level.res):
            h = _residual(block, h)
            if len(level.attn):
                h = _attend_pixels(level.attn[number], h)
        if hasattr(level, "upsample"):
            h = level.upsample.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))
    return decoder.conv_out(_swish(_group_norm(decoder.norm_out, h)))


def _residual(block: ResidualBlock, x: Tensor) -> Tensor:
    h = block.conv1(_swish(_group_norm(block.norm1, x)))
    h = torch.nn.Conv2d.forward(block.conv2, _swish(_group_norm(block.norm2, h)))
    return (block.nin_shortcut(x) if hasattr(block, "nin_shortcut") else x) + h


def _attend_pixels(block: AttentionBlock, x: Tensor) -> Tensor:
    h, (batch, channels, height, width) = _group_norm(block.norm, x), x.shape
    q, k, v = (layer(h).reshape(batch, channels, height * width) for layer in (block.q, block.k, block.v))
    weights = torch.softmax(torch.bmm(q.transpose(1, 2), k) * channels**-0.5, dim=2)
    return x + torch.nn.Conv2d.forward(block.proj_out, torch.bmm(v, weights.transpose(1, 2)).reshape(x.shape))


def _group_norm(norm: torch.nn.GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def main() -> None:
    """Load, draw one batch with guidance 2.0 and top-k 2000, write the .npz; prints the seconds of drawing as JSON."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("model", help="a model folder with its tokenizer")
    parser.add_argument("out")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the transformer")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_model(arguments.model)
    model = loaded.transformer.to(device, torch.bfloat16 if arguments.precision == "bf16" else torch.float32).eval()
    tokenizer = load_tokenizer(loaded.tokenizer_folder).to(device).float().eval().requires_grad_(False)
    start = time.perf_counter()
    label = torch.arange(arguments.images, device=device) % model.config.num_classes
    torch.manual_seed(0)
    codes = LlamaGenStyle(model, arguments.images).generate(label, 2.0, 1.0, 2000).cpu()  # waits for the device
    drawn = time.perf_counter()
    images = to_uint8(decode_pixels(tokenizer, codes.to(device))).permute(0, 2, 3, 1).cpu().numpy()
    seen = time.perf_counter()
    np.savez(arguments.out, images, label.cpu().numpy())
    print(json.dumps({"codes_s": drawn - start, "pixels_s": seen - drawn, "all_s": time.perf_counter() - start}))


if __name__ == "__main__":
    main()

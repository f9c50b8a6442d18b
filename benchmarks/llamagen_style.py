"""The named baseline of benchmarks/sampling.py: a decent, straightforward PyTorch sampling loop in the style of LlamaGen's released code.

What it shares with that code (autoregressive/models/{gpt,generate}.py): a padded key-value cache read in full at every step with a mask over the future,
separate w1, w3 products, both logit rows of a guided image computed and combined, top-k by sorting, softmax, multinomial. What it does better: weights and
cache in one dtype, no autocast, no list building; everything that a careful reader would do without changing the method.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from star_fast.model.transformer import NORM_EPS, Block, Transformer


class LlamaGenStyle:
    """Samples from a Transformer's weights, `images` at a time, always guided."""

    def __init__(self, model: Transformer, images: int) -> None:
        self.model, self.images, config = model, images, model.config
        weight = model.output.weight
        shape = (2 * images, config.heads, config.positions, config.head_size)
        self.caches = [tuple(torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2)) for _ in range(config.blocks)]
        self.causal = torch.full((config.positions, config.positions), float("-inf"), dtype=weight.dtype, device=weight.device).triu(1)
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
        # Written out: on the CPU, scaled_dot_product_attention with a mask takes 3 to 15 times as long for one bfloat16 query.
        scores = (q * q.shape[-1] ** -0.5).unsqueeze(2) @ cache[0].transpose(2, 3) + mask
        return block.attention.wo((torch.softmax(scores, dim=-1) @ cache[1]).reshape(rows, -1))

    def _rotate(self, x: Tensor, position: int) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self.rotary[position]).flatten(-2).to(x.dtype)


def draw(logits: Tensor, top_k: int, top_p: float = 1.0) -> Tensor:
    """LlamaGen's sampler: logits (B, V) float32 -> tokens (B, 1)."""
    if top_k > 0:
        logits = logits.masked_fill(logits < torch.topk(logits, min(top_k, logits.shape[-1]))[0][..., -1:], float("-inf"))
    if top_p < 1.0:
        ordered, order = torch.sort(logits, descending=True)
        beyond = torch.cumsum(F.softmax(ordered, dim=-1), dim=-1) > top_p
        beyond = torch.cat([torch.zeros_like(beyond[:, :1]), beyond[:, :-1]], dim=1)
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), float("-inf"))
    return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + NORM_EPS)).type_as(x) * weight

"""The weights of a released LlamaGen file: names and shapes, and random ones of a small model."""

from __future__ import annotations

import torch


def shapes(blocks: int, width: int, vocab: int = 16384, classes: int = 1000) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released file, written down from its description."""
    hidden = {32: 256, 64: 256, 200: 768, 768: 2048, 1024: 2816, 1280: 3584, 1536: 4096, 2048: 5632, 3200: 8704}[width]
    listed = {"cls_embedding.embedding_table.weight": (classes + 1, width), "tok_embeddings.weight": (vocab, width)}
    for n in range(blocks):
        listed |= {
            f"layers.{n}.attention.wqkv.weight": (3 * width, width),
            f"layers.{n}.attention.wo.weight": (width, width),
            f"layers.{n}.feed_forward.w1.weight": (hidden, width),
            f"layers.{n}.feed_forward.w3.weight": (hidden, width),
            f"layers.{n}.feed_forward.w2.weight": (width, hidden),
            f"layers.{n}.attention_norm.weight": (width,),
            f"layers.{n}.ffn_norm.weight": (width,),
        }
    return listed | {"norm.weight": (width,), "output.weight": (vocab, width)}


def small_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes(2, 32, 37, 5).items()}

"""LlamaGen's forward pass and AdamW written out by hand, from method.md alone: what plain training must agree with."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + 1e-5) * weight


def turn(x: Tensor, grid: int) -> Tensor:
    """2-D rotary of x (T, E) with x[2p], x[2p+1] as pairs; row 0 (the class) becomes zero."""
    quarter = x.shape[1] // 4
    out = [torch.zeros_like(x[0])]
    for t in range(1, x.shape[0]):
        row, column = divmod(t - 1, grid)
        pairs = []
        for p in range(2 * quarter):
            angle = (row if p < quarter else column) * 10000.0 ** (-2.0 * (p % quarter) / (2 * quarter))
            cos, sin = torch.cos(torch.tensor(angle, dtype=x.dtype)), torch.sin(torch.tensor(angle, dtype=x.dtype))
            pairs += [x[t, 2 * p] * cos - x[t, 2 * p + 1] * sin, x[t, 2 * p] * sin + x[t, 2 * p + 1] * cos]
        out.append(torch.stack(pairs))
    return torch.stack(out)


def loss(weights: dict[str, Tensor], tokens: Tensor, label: Tensor, blocks: int, heads: int, grid: int) -> Tensor:
    """Mean next-token cross-entropy of (B, T) tokens under weights with LlamaGen's names."""
    total = 0.0
    for sequence, cls in zip(tokens, label, strict=True):
        T = len(sequence)
        x = torch.stack(
            [weights["cls_embedding.embedding_table.weight"][cls], *weights["tok_embeddings.weight"][sequence[:-1]]]
        )
        for n in range(blocks):
            w = {
                name.removeprefix(f"layers.{n}."): value
                for name, value in weights.items()
                if name.startswith(f"layers.{n}.")
            }
            q, k, v = (rms_norm(x, w["attention_norm.weight"]) @ w["attention.wqkv.weight"].T).chunk(3, dim=1)
            size, outs = x.shape[1] // heads, []
            for h in range(heads):
                part = slice(h * size, (h + 1) * size)
                scores = turn(q[:, part], grid) @ turn(k[:, part], grid).T / size**0.5
                scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), float("-inf"))
                outs.append(torch.softmax(scores, dim=1) @ v[:, part])
            x = x + torch.cat(outs, dim=1) @ w["attention.wo.weight"].T
            y = rms_norm(x, w["ffn_norm.weight"])
            gate = y @ w["feed_forward.w1.weight"].T
            x = x + (gate * torch.sigmoid(gate) * (y @ w["feed_forward.w3.weight"].T)) @ w["feed_forward.w2.weight"].T
        logits = rms_norm(x, weights["norm.weight"]) @ weights["output.weight"].T
        total = total - (logits[torch.arange(T), sequence] - torch.logsumexp(logits, dim=1)).sum()
    return total / tokens.numel()


class AdamW:
    """Loshchilov and Hutter's update with bias correction, one tensor at a time."""

    def __init__(
        self, weights: dict[str, Tensor], lr: float, beta1: float, beta2: float, eps: float, decay: float
    ) -> None:
        self.weights, self.lr, self.betas, self.eps, self.decay, self.count = weights, lr, (beta1, beta2), eps, decay, 0
        self.m = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.v = {name: torch.zeros_like(w) for name, w in weights.items()}

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor], clip: float) -> None:
        self.count += 1
        norm = torch.sqrt(sum((g * g).sum() for g in gradients.values()))
        scale = min(1.0, clip / (norm.item() + 1e-6))
        b1, b2 = self.betas
        for name, w in self.weights.items():
            g = gradients[name] * scale
            self.m[name] = b1 * self.m[name] + (1 - b1) * g
            self.v[name] = b2 * self.v[name] + (1 - b2) * g * g
            m, v = self.m[name] / (1 - b1**self.count), self.v[name] / (1 - b2**self.count)
            w.mul_(1 - self.lr * (self.decay if w.ndim >= 2 else 0.0)).sub_(self.lr * m / (v.sqrt() + self.eps))

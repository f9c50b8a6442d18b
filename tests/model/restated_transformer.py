"""The published architecture re-stated: one sequence in float64, with plain loops."""

from __future__ import annotations

import math

import numpy as np

from star_fast.config import ModelConfig


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / math.sqrt(float(np.mean(x * x)) + 1e-5) * weight


def turned(x: np.ndarray, position: int, grid: int, class_factor: float) -> np.ndarray:
    """2-D rotary of one head's vector at one position of the sequence; the class position's vector is multiplied by
    `class_factor` (published: 0).
    """
    size = len(x)
    if position == 0:
        return class_factor * x
    row, column = divmod(position - 1, grid)
    out = np.empty_like(x)
    for pair in range(size // 2):
        i = pair % (size // 4)
        angle = (row if pair < size // 4 else column) * 10000.0 ** (-2 * i / (size / 2))
        a, b = x[2 * pair], x[2 * pair + 1]
        out[2 * pair] = a * math.cos(angle) - b * math.sin(angle)
        out[2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


def restated(
    weights: dict[str, np.ndarray],
    config: ModelConfig,
    tokens: np.ndarray,
    label: int,
    keep: np.ndarray | None = None,
    class_factor: float = 0.0,
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """One sequence, in float64: logits (n+1, V), each block's output (n+1, D), and the final normed state (n+1, D)."""
    heads, size, width, grid = config.heads, config.width // config.heads, config.width, math.isqrt(config.positions)
    stream = [
        weights["cls_embedding.embedding_table.weight"][label],
        *(weights["tok_embeddings.weight"][token] for token in tokens),
    ]
    outputs = []
    for n in range(config.blocks):
        w = {
            name.removeprefix(f"layers.{n}."): value
            for name, value in weights.items()
            if name.startswith(f"layers.{n}.")
        }
        q, k, v = [], [], []
        for t, x in enumerate(stream):
            product = w["attention.wqkv.weight"] @ rms_norm(x, w["attention_norm.weight"])
            split = [product[part * width : (part + 1) * width].reshape(heads, size) for part in range(3)]
            q.append([turned(split[0][h], t, grid, class_factor) for h in range(heads)])
            k.append([turned(split[1][h], t, grid, class_factor) for h in range(heads)])
            v.append(split[2])
        after = []
        for t, x in enumerate(stream):
            visible = [s for s in range(t + 1) if keep is None or keep[s]]
            attended = []
            for h in range(heads):
                scores = np.array([q[t][h] @ k[s][h] / math.sqrt(size) for s in visible])
                shares = np.exp(scores - scores.max())
                attended.append(sum(share * v[s][h] for share, s in zip(shares / shares.sum(), visible, strict=True)))
            x = x + w["attention.wo.weight"] @ np.concatenate(attended)
            y = rms_norm(x, w["ffn_norm.weight"])
            gate, value = w["feed_forward.w1.weight"] @ y, w["feed_forward.w3.weight"] @ y
            after.append(x + w["feed_forward.w2.weight"] @ (gate / (1 + np.exp(-gate)) * value))
        stream = after
        outputs.append(np.stack(stream))
    hidden = np.stack([rms_norm(x, weights["norm.weight"]) for x in stream])
    return hidden @ weights["output.weight"].T, outputs, hidden

"""The student's weights beside the teacher's, without guidance too: which of them the paper evaluates is not known, and
its claims are about no guidance.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from star_fast.evaluation.attention_maps import attention_shares, mean_attention
from star_fast.evaluation.frechet import frechet_distance_of_features
from star_fast.evaluation.report_material import Material
from star_fast.evaluation.runs import codes_of, spread
from star_fast.evaluation.samples import draw_samples
from star_fast.model.transformer import Transformer
from star_fast.model.weights import WEIGHTS_FILES, Weights, load_model

ATTENTION_IMAGES = 32  # held-out images that attention is averaged over


@torch.inference_mode()
def next_token_loss(model: Transformer, codes: Tensor, labels: Tensor, batch_images: int = 64) -> float:
    """Mean cross-entropy in nats over all positions of images (N, T), (N,): true labels, nothing hidden. The model is
    in evaluation mode, on any device.
    """
    device, total = next(model.parameters()).device, 0.0
    for part, label in zip(codes.split(batch_images), labels.split(batch_images), strict=True):
        logits = model(part[:, :-1].to(device), label.to(device)).logits
        total += cross_entropy(logits.flatten(0, 1), part.flatten().to(device), reduction="sum").item()
    return total / codes.numel()


def other_weights(material: Material) -> dict[Weights, Transformer]:
    """{name: model} of the run's weights that the report does not show; empty where training kept no teacher."""
    folder = material.run.folder / "model"
    kinds: tuple[Weights, ...] = ("student", "teacher")
    return {
        name: load_model(folder, weights=name).transformer.to(material.device).eval()
        for name in kinds
        if name != material.config.weights and os.path.exists(folder / WEIGHTS_FILES[name])
    }


def attention_of(material: Material, model: Transformer) -> dict[str, Any]:
    """Where the last block looks, over held-out images."""
    store = material.run.store
    rows = spread(store.judging().judge, ATTENTION_IMAGES)
    mean = mean_attention(
        model, codes_of(store, rows, store.plain_view).to(material.device), store.labels[rows].to(material.device)
    )
    return {"images": len(rows), **vars(attention_shares(mean))}


def held_out_loss(material: Material, model: Transformer) -> float:
    """`next_token_loss` over the report's held-out images."""
    return next_token_loss(
        model, codes_of(material.run.store, material.rows, material.run.store.plain_view), material.row_labels
    )


def judge_drawn(material: Material, model: Transformer, guidance: float) -> dict[str, float]:
    """What the report's classifier says of samples drawn with the report's settings and seed, at another guidance or
    with other weights.

    Returns:
        agreement: share of the class asked for. frechet_distance: to the held-out real images of these classes. Nothing
            without a classifier.
    """
    if material.classifier is None:
        return {}
    config, settings = material.config, {**material.figures["samples"]["settings"], "guidance": guidance}
    samples = draw_samples(
        model,
        material.tokenizer,
        material.classes,
        config.samples_per_class,
        batch_images=config.batch_images,
        **settings,
    )
    assert material.real_features is not None, "measured with the classifier"
    verdict = material.classifier.judge(samples.images)
    return {
        "agreement": verdict.accuracy(samples.labels),
        "frechet_distance": frechet_distance_of_features(verdict.features, material.real_features),
    }

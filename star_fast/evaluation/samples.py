"""Samples of a run, and what the small classifier says of them beside real images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from star_fast.data.codes import CodeStore
from star_fast.errors import UserError
from star_fast.evaluation.classifier import Verdict
from star_fast.evaluation.frechet import frechet_distance_of_features
from star_fast.evaluation.runs import codes_of
from star_fast.generation.decoder import generate
from star_fast.model.tokenizer import VQTokenizer, to_uint8
from star_fast.model.transformer import Transformer


@dataclass(frozen=True)
class SampleSet:
    """Samples in order of class, `per_class` of each."""

    labels: Tensor  # (N,) int64, the class asked for
    codes: Tensor  # (N, T) int64
    images: Tensor  # (N, C, H, W) uint8

    def of_class(self, label: int) -> Tensor:
        """(n, C, H, W) uint8 images of one class."""
        return self.images[self.labels == label]


def draw_samples(
    model: Transformer,
    tokenizer: VQTokenizer,
    classes: Sequence[int],
    per_class: int,
    *,
    batch_images: int = 64,
    **sampling: Any,
) -> SampleSet:
    """Draw `per_class` images of each class; image i of the set has random stream i. `sampling` goes to
    generation.generate (guidance, seed ...).
    """
    device = next(model.parameters()).device
    labels = torch.tensor(list(classes)).repeat_interleave(per_class)
    codes = []
    for index in tqdm(torch.arange(len(labels)).split(batch_images), desc="samples", unit="batch", leave=False):
        codes.append(generate(model, labels[index].to(device), image_index=index.to(device), **sampling))
    all_codes = torch.cat(codes)
    return SampleSet(labels, all_codes.cpu(), decode(tokenizer.to(device), all_codes))


@torch.inference_mode()
def decode(tokenizer: VQTokenizer, codes: Tensor, batch_images: int = 64) -> Tensor:
    """(N, C, H, W) uint8 images on the CPU of codes (N, T)."""
    device = next(tokenizer.parameters()).device
    return torch.cat([to_uint8(tokenizer.decode(part.to(device))).cpu() for part in codes.split(batch_images)])


@dataclass(frozen=True)
class Reconstruction:
    """What the tokenizer makes of held-out images: the best that samples could look like."""

    rows: Tensor  # (N,) rows of the store
    images: Tensor  # (N, C, H, W) uint8, decoded from the stored codes
    codes_used: int  # codebook entries that occur in them
    codebook: int


def reconstruct_held_out(store: CodeStore, tokenizer: VQTokenizer, rows: Tensor) -> Reconstruction:
    """Decode the stored codes (plain view) of the store's rows."""
    codes = codes_of(store, rows, store.plain_view)
    return Reconstruction(rows, decode(tokenizer, codes), len(codes.unique()), store.codebook)


def psnr_db(images: Tensor, others: Tensor) -> float:
    """Peak signal-to-noise ratio over all pixels of two uint8 sets of one shape, in dB; infinite for equal sets."""
    error = (images.double() - others.double()).square().mean()
    return float(10 * torch.log10(255**2 / error))


def distinct_sequences(samples: SampleSet) -> dict[int, int]:
    """How many different code sequences the samples of each class are: {label: count}."""
    return {
        label: len(samples.codes[samples.labels == label].unique(dim=0)) for label in samples.labels.unique().tolist()
    }


def class_agreement(verdict: Verdict, labels: Tensor) -> dict[int, float]:
    """Share of each class's images that the classifier takes for that class: {label: share}."""
    right = (verdict.classes == labels).double()
    return {label: right[labels == label].mean().item() for label in labels.unique().tolist()}


def distances(
    samples: Verdict, reconstructions: Verdict, held_out: Verdict, held_out_labels: Tensor, per_class: int
) -> dict[str, float | int]:
    """Classifier Fréchet distances to the held-out real images of the sampled classes, and what to compare them with.

    Returns:
        samples: samples to all those real images. reconstructions: the same real images after the tokenizer, to all of
            them: what the tokenizer alone costs.
        real_halves: `per_class` real images of each class (at most half) to the remaining ones: what so few images
            alone cost, where at least two are left.

    Raises:
        UserError: the classifier's features are not finite.
    """
    if not all(verdict.features.isfinite().all() for verdict in (samples, reconstructions, held_out)):
        raise UserError("classifier: its features are not finite numbers; give a smaller --classifier.lr")
    result: dict[str, float | int] = {
        "samples": frechet_distance_of_features(samples.features, held_out.features),
        "reconstructions": frechet_distance_of_features(reconstructions.features, held_out.features),
    }
    first = torch.zeros(len(held_out_labels), dtype=torch.bool)
    for label in held_out_labels.unique():
        members = (held_out_labels == label).nonzero().flatten()
        first[members[: min(per_class, len(members) // 2)]] = True
    if first.sum() >= 2 and (~first).sum() >= 2:
        result["real_halves"] = frechet_distance_of_features(held_out.features[first], held_out.features[~first])
    return {
        **result,
        "sample_images": len(samples.features),
        "real_images": len(held_out.features),
        "features": held_out.features.shape[1],
    }

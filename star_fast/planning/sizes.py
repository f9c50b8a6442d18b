"""How large a run is: parameters, and the numbers of one micro-batch that every formula here is made of."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from star_fast.config import MethodConfig, ModelConfig, RunConfig

IMAGENET_CLASSES = 1000


class Parameters(NamedTuple):
    """Trained numbers of a run."""

    transformer: int  # the student's; the teacher has as many
    projector: int  # on the student's side only; 0 where no contrastive loss is on
    largest: int  # of the largest single weight

    @property
    def student(self) -> int:
        """All that the optimizer holds."""
        return self.transformer + self.projector


def sized(config: RunConfig) -> tuple[RunConfig, str]:
    """`config` with the sizes that a code store would fill in taken from its tokenizer and ImageNet, and a sentence
    that says so (or nothing).
    """
    model, tokenizer = config.model, config.tokenizer
    found = {"vocab": tokenizer.codebook, "positions": tokenizer.positions, "num_classes": IMAGENET_CLASSES}
    taken = {name: value for name, value in found.items() if not getattr(model, name)}
    config = dataclasses.replace(config, model=dataclasses.replace(model, **taken))
    return (
        config,
        f"assumed, since the code store decides: {', '.join(f'model.{name} {value}' for name, value in taken.items())}"
        if taken
        else "",
    )


class Projector(NamedTuple):
    """The projector's numbers; all 0 where no contrastive loss is on."""

    matrices: int  # numbers in its matrices
    hidden: int  # widths of its hidden layers together
    largest: int  # numbers of the largest matrix


def projector(model: ModelConfig, method: MethodConfig) -> Projector:
    """Sizes of method.student.Projector, without a list of its layers: there may be any number."""
    if not method.contrasts:
        return Projector(0, 0, 0)
    D, W, inner = model.width, method.projector_width, method.projector_layers - 2
    if inner < 0:
        return Projector(D * D, 0, D * D)
    return Projector(2 * D * W + inner * W * W, (inner + 1) * W, max(D * W, W * W if inner else 0))


def block_weights(model: ModelConfig) -> int:
    """Numbers in the matrices of one block: wqkv, wo, w1, w3, w2."""
    return 4 * model.width**2 + 3 * model.width * model.feed_forward


def parameters(config: RunConfig) -> Parameters:
    """Parameters of a run whose sizes are set: exactly those of model.transformer.Transformer and
    method.student.Projector.
    """
    model, D = config.model, config.model.width
    embeddings = (model.num_classes + 1 + model.vocab) * D
    transformer = embeddings + model.blocks * (block_weights(model) + 2 * D) + D + model.vocab * D
    own = projector(model, config.method)
    # With batch norm the hidden ones are its biases, and it has as many weights
    biases = own.hidden + D if own.matrices else 0
    normed = own.hidden if config.method.projector_norm == "batch" else 0
    largest = max(model.vocab * D, (model.num_classes + 1) * D, 2 * model.feed_forward * D, 3 * D * D, own.largest)
    return Parameters(transformer, own.matrices + biases + normed, largest)


class Micro(NamedTuple):
    """One micro-batch of one GPU."""

    images: int  # B
    sequences: int  # B * M
    rows: int  # N = B * M * T
    slots: int  # B * M * K projected rows; 0 where no contrastive loss is on
    pairs: int  # (anchor slot, key slot) pairs of the contrastive losses
    keys: int  # images whose keys are compared with: of all GPUs


def micro(config: RunConfig, images: int, gpus: int) -> Micro:
    """Sizes of a micro-batch of `images` on each of `gpus`."""
    method = config.method
    M, K = method.views, method.contrast_positions
    pairs = 0
    if method.contrasts:  # L_step: ordered pairs of positions in a view; L_view: ordered pairs of views at a position
        pairs = (M * K * (K - 1) if method.step_contrast else 0) + (K * M * (M - 1) if method.view_contrast else 0)
    return Micro(
        images,
        images * M,
        images * M * config.model.positions,
        images * M * K if method.contrasts else 0,
        pairs,
        images * gpus,
    )


def cache_bytes(config: RunConfig, rows: int) -> int:
    """Key-value cache of `rows` decoding rows (an image takes two with guidance) in the working precision."""
    return 2 * config.model.blocks * rows * config.model.positions * config.model.width * number_bytes(config)


def number_bytes(config: RunConfig) -> int:
    """Bytes of a weight or activation."""
    return 2 if config.train.precision == "bf16" else 4

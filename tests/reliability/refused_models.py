"""A small model and what its files are held to when they are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from star_fast.config import ModelConfig, TokenizerConfig
from star_fast.errors import UserError
from star_fast.model.transformer import Transformer
from tests.model.torch_archives import at_most

SMALL = ModelConfig(blocks=2, heads=2, width=32, vocab=37, positions=16, num_classes=3)
NAMES = ["zero", "one", "two"]
TOKENIZER = TokenizerConfig(
    base_channels=8,
    multipliers=(1, 2),
    residual_blocks=1,
    z_channels=8,
    code_channels=4,
    codebook=37,
    image_channels=1,
    image_size=8,
)
ARGS = {"n_head": 2, "block_size": 16}


def model(seed: int = 0) -> Transformer:
    built = Transformer(SMALL)
    built.init_weights(torch.Generator().manual_seed(seed))
    torch.nn.init.normal_(built.output.weight, generator=torch.Generator().manual_seed(seed))
    return built


def weights() -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model().state_dict().items()}


def same(a: Transformer, b: Transformer) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def refusal(load: Callable[..., Any], path: str | Path, *, mebibytes: int = 200, **options: Any) -> str:
    """The one line that answers, within so much memory."""
    with at_most(mebibytes), pytest.raises(UserError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert message.isprintable() and 0 < len(message) < 1500 + len(str(path)), message
    return message


def edit(file: Path, **changes: Any) -> None:
    """Change fields of a JSON file; a__b means b in a."""
    values = json.loads(file.read_text())
    for name, value in changes.items():
        *parents, last = name.split("__")
        inner = values
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    file.write_text(json.dumps(values))

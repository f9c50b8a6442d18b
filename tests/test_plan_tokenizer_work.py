"""planning.tokenizer_work: FLOPs, weights and live bytes of a tokenizer are those of the module that runs."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from star_fast.config import TokenizerConfig
from star_fast.model.tokenizer import VQTokenizer
from star_fast.ops import dispatch
from star_fast.planning import tokenizer_work
from star_fast.presets import preset

VQ16 = TokenizerConfig()
TOKENIZERS = {
    "VQ-16": VQ16,
    "VQ-8": TokenizerConfig(multipliers=(1, 2, 2, 4)),
    "tiny": preset("tiny").tokenizer,
    "widths that fall": TokenizerConfig(
        base_channels=8,
        multipliers=(3, 1, 2),
        residual_blocks=3,
        z_channels=16,
        code_channels=5,
        codebook=64,
        image_size=32,
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokenizers_flops_and_weights_are_those_of_the_module(name: str) -> None:
    config = TOKENIZERS[name]
    with torch.device("meta"):  # shapes alone: nothing is computed
        made = VQTokenizer(config)
        image, codes = (
            torch.zeros(1, config.image_channels, config.image_size, config.image_size),
            torch.zeros(1, config.positions, dtype=torch.int64),
        )
    with FlopCounterMode(display=False) as encoding, torch.no_grad():
        latents = made.quant_conv(made.encoder(image)).permute(0, 2, 3, 1).flatten(0, 2)
        made.quantize.nearest(latents)
    with FlopCounterMode(display=False) as decoding_flops:
        made.decode(codes)
    halves = tokenizer_work.encoder(config), tokenizer_work.decoder(config)
    assert [half.flops for half in halves] == [encoding.get_total_flops(), decoding_flops.get_total_flops()]
    numbers = {
        part: sum(p.numel() for p in getattr(made, part).parameters())
        for part in ("encoder", "decoder", "quant_conv", "post_quant_conv", "quantize")
    }
    assert halves[0].weights == numbers["encoder"] + numbers["quant_conv"] + numbers["quantize"]
    assert halves[1].weights == numbers["decoder"] + numbers["post_quant_conv"] + numbers["quantize"]


def test_vq_16_is_as_large_as_it_was_measured_to_be() -> None:
    assert tokenizer_work.decoder(VQ16).flops / 1e9 == pytest.approx(253, abs=0.5)


class Living(TorchDispatchMode):
    """Bytes of all storages that torch made and that are still alive; the most of them at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if (
                isinstance(tensor, torch.Tensor)
                and (storage := tensor.untyped_storage()).data_ptr() not in self.sizes
                and storage.nbytes()
            ):
                self.sizes[storage.data_ptr()] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage.data_ptr())
        return made

    def _gone(self, address: int) -> None:
        self.now -= self.sizes.pop(address)


@pytest.mark.parametrize(
    "config",
    [
        TokenizerConfig(
            base_channels=32,
            multipliers=(1, 2, 2),
            residual_blocks=2,
            z_channels=32,
            code_channels=4,
            codebook=64,
            image_size=64,
        ),
        TokenizerConfig(base_channels=16, multipliers=(1, 1, 2, 2, 4), z_channels=32, codebook=64, image_size=128),
        TokenizerConfig(
            base_channels=16, multipliers=(4, 1), residual_blocks=1, z_channels=32, codebook=64, image_size=32
        ),
    ],
)
def test_live_bytes_are_those_that_torch_holds(config: TokenizerConfig) -> None:
    made, images = VQTokenizer(config).eval(), 2
    calls = (
        (made.encoder, torch.rand(images, 3, config.image_size, config.image_size), tokenizer_work.encoder(config)),
        (made.decode, torch.zeros(images, config.positions, dtype=torch.int64), tokenizer_work.decoder(config)),
    )
    for call, given, half in calls:
        # Norm and activation in two: what the compiled ones, where they serve, stay below
        with torch.no_grad(), dispatch.use_backend("reference"), Living() as living:
            call(given)
        assert tokenizer_work.live_bytes(half, images, 4) == pytest.approx(living.peak, rel=0.05)

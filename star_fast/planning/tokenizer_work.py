"""Arithmetic and memory of the VQ tokenizer, layer by layer as model/tokenizer_blocks.py builds it: what encoding and
decoding an image costs.

A product or convolution counts 2 FLOPs a multiplication; norms, activations and changes of size count none. Attention
is counted in full. Letters: C image channels, Z latent channels of the encoder, V codebook; "places" are pixels of the
resolution at hand.
"""

from __future__ import annotations

from typing import NamedTuple

from star_fast.config import TokenizerConfig

SEARCH_ROWS = 4096  # of model/tokenizer.py: latents that are compared with the codebook at once, in float32


class Layer(NamedTuple):
    """One layer on one image."""

    flops: int
    weights: int  # numbers in it
    alive: int  # numbers of all tensors that are held while it runs, those of the functions that called it too


class Half(NamedTuple):
    """The encoder's or the decoder's side of a tokenizer, for one image."""

    flops: int
    weights: int  # numbers
    alive: int  # most numbers in tensors at any moment of a forward pass without gradients; weights not counted


def encoder(config: TokenizerConfig) -> Half:
    """Encoder, quant_conv and the search for the nearest entry."""
    layers, before = (
        [_convolution(config.image_channels, config.base_channels, 3, _places(config, 0))],
        config.base_channels,
    )
    lowest = len(config.multipliers) - 1
    for level, width in enumerate(_widths(config)):
        places = _places(config, level)
        layers += _level(before, width, config.residual_blocks, level == lowest, places)
        if level < lowest:  # padded by one row and column, not counted
            after = _places(config, level + 1)
            layers.append(_convolution(width, width, 3, after, (before + 2 * width) * places + width * after))
        before = width
    places = _places(config, lowest)
    layers += [
        *_middle(before, places),
        _norm(before),
        _convolution(before, config.z_channels, 3, places),
        _convolution(config.z_channels, config.code_channels, 1, places),
    ]
    search = Layer(2 * places * config.code_channels * config.codebook, config.codebook * config.code_channels, 0)
    return _together([*layers, search])


def decoder(config: TokenizerConfig) -> Half:
    """Look-up (no arithmetic), post_quant_conv and decoder."""
    lowest = len(config.multipliers) - 1
    places, widths = _places(config, lowest), _widths(config)[::-1]
    layers = [
        Layer(0, config.codebook * config.code_channels, 0),
        _convolution(config.code_channels, config.z_channels, 1, places),
        _convolution(config.z_channels, widths[0], 3, places),
        *_middle(widths[0], places),
    ]
    before = widths[0]
    for step, width in enumerate(widths):
        places = _places(config, lowest - step)
        layers += _level(before, width, config.residual_blocks + 1, step == 0, places)
        if step < lowest:
            after = _places(config, lowest - step - 1)
            layers.append(_convolution(width, width, 3, after, (before + width) * places + 2 * width * after))
        before = width
    return _together(
        [
            *layers,
            _norm(before),
            _convolution(before, config.image_channels, 3, places, (3 * before + config.image_channels) * places),
        ]
    )


def live_bytes(half: Half, images: int, number_bytes: int) -> int:
    """Most memory of the tensors of `images` at once; weights, and what convolutions and attention take for themselves,
    not counted.
    """
    return half.alive * images * number_bytes


def search_bytes(config: TokenizerConfig, images: int) -> int:
    """Similarities of latents and codebook, float32; the latents are searched in pieces."""
    return 4 * min(images * config.positions, SEARCH_ROWS) * config.codebook


def _widths(config: TokenizerConfig) -> list[int]:
    return [config.base_channels * factor for factor in config.multipliers]


def _places(config: TokenizerConfig, level: int) -> int:
    return (config.image_size // 2**level) ** 2


def _level(before: int, width: int, blocks: int, attention: bool, places: int) -> list[Layer]:
    """Whoever called the level holds its input until it is done."""
    layers = []
    for block in range(blocks):
        held = before * places if block else 0  # the first block's input is the level's
        layers += _residual(width if block else before, width, places, held)
        layers += _attention(width, places, before * places) if attention else []
    return layers


def _middle(width: int, places: int) -> list[Layer]:
    return [*_residual(width, width, places), *_attention(width, places), *_residual(width, width, places)]


def _residual(before: int, width: int, places: int, held: int = 0) -> list[Layer]:
    """At its widest: the input, the first convolution's result, that activated, and the second's norm or result, or
    skip path and sum.
    """
    skip = [_convolution(before, width, 1, places)] if before != width else []
    return [
        _norm(before),
        _convolution(before, width, 3, places),
        _norm(width),
        _convolution(width, width, 3, places, held + (before + 3 * width) * places),
        *skip,
    ]


def _attention(width: int, places: int, held: int = 0) -> list[Layer]:
    """At its widest: the input, its norm, q, k, v, their mixture, that as an image, and what the last product makes of
    it.
    """
    return [
        _norm(width),
        *[_convolution(width, width, 1, places)] * 4,
        Layer(4 * places * places * width, 0, held + 8 * width * places),
    ]


def _convolution(before: int, width: int, side: int, places: int, alive: int = 0) -> Layer:
    return Layer(
        2 * side * side * before * width * places, side * side * before * width + width, alive or width * places
    )


def _norm(width: int) -> Layer:
    return Layer(0, 2 * width, 0)


def _together(layers: list[Layer]) -> Half:
    return Half(
        sum(layer.flops for layer in layers),
        sum(layer.weights for layer in layers),
        max(layer.alive for layer in layers),
    )

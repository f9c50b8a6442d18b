"""Codes to pixels on the CPU: what bfloat16 costs in PSNR, and that nothing but codes, tokenizer and precision decides
an image's bytes.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_fast.config import TokenizerConfig
from star_fast.errors import UserError
from star_fast.generation.packed_convolutions import PackedConv2d, bfloat16_decoder, largest_activation_bytes
from star_fast.generation.record import JobPlan
from star_fast.generation.render import PIECE_IMAGES, Renderer, pixel_precision
from star_fast.generation.sample import sample_images
from star_fast.generation.sample_config import SampleConfig
from star_fast.model.image_likeness import psnr_of_error
from star_fast.model.tokenizer import VQTokenizer, to_uint8
from star_fast.model.tokenizer_blocks import AddingConv2d
from star_fast.presets import PRESETS
from star_fast.storage import to_record
from tests.generation.small_model import save_small_model

CPU = torch.device("cpu")
COLOUR = TokenizerConfig(
    base_channels=16,
    multipliers=(1, 2, 4),
    residual_blocks=1,
    z_channels=32,
    code_channels=8,
    codebook=64,
    image_size=32,
)
needs_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 kernels for this processor"
)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that multiplies bfloat16, or at least is taken for one: where there is AVX-512
    all works, if slowly.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("pixels are made in float32 here: no AVX-512")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)


def tokenizer_of(config: TokenizerConfig, spread: float = 1.0) -> VQTokenizer:
    """Random weights, the last layer's stretched until its images fill their range as a trained one's do."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = VQTokenizer(config).eval().requires_grad_(False)
        for norm in (module for module in tokenizer.decoder.modules() if isinstance(module, nn.GroupNorm)):
            norm.weight.normal_(1, 0.2)
            norm.bias.normal_(0, 0.2)
    tokenizer.decoder.conv_out.weight *= spread
    return tokenizer


def codes_of(config: TokenizerConfig, images: int) -> Tensor:
    return torch.randint(
        config.codebook,
        (images, (config.image_size // config.downsampling) ** 2),
        generator=torch.Generator().manual_seed(1),
    )


@pytest.mark.parametrize("config", [COLOUR, PRESETS["tiny"].config.tokenizer], ids=["colour", "digits"])
def test_bfloat16_is_within_a_level_or_two_of_float32(config: TokenizerConfig, native: None) -> None:
    """Judged by the same decoder in float64, so that a fault that both precisions share would show."""
    tokenizer, codes = tokenizer_of(config, spread=3), codes_of(config, 6)
    truth = to_uint8(copy.deepcopy(tokenizer).double().decode(codes)).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).double()
    assert truth.std() > 40  # pictures of some contrast
    in_float32, in_bfloat16 = (
        Renderer(tokenizer, CPU, float32=float32).start(codes).wait().double() for float32 in (True, False)
    )
    assert (in_float32 - truth).abs().max() <= 1 and (in_float32 != truth).double().mean() < 1e-3
    assert 38 < psnr_of_error((in_bfloat16 - truth).square().mean().item()) < 70


def test_float32_keeps_the_tokenizers_bits() -> None:
    tokenizer, codes = tokenizer_of(COLOUR), codes_of(COLOUR, 11)
    renderer = Renderer(tokenizer, CPU, float32=True)
    expected = torch.cat([to_uint8(tokenizer.decode(part)) for part in codes.split(PIECE_IMAGES)]).permute(0, 2, 3, 1)
    assert renderer.precision == "fp32" and torch.equal(renderer.start(codes).wait(), expected)
    assert torch.equal(
        Renderer(tokenizer, CPU, 24, float32=True).start(codes[:3]).wait(),
        to_uint8(F.interpolate(tokenizer.decode(codes[:3]), size=(24, 24), mode="bicubic")).permute(0, 2, 3, 1),
    )


@pytest.mark.parametrize(
    ("multiplies", "widest", "precision"), [(True, "AVX512", "bf16"), (False, "AVX512", "fp32"), (True, "AVX2", "fp32")]
)
def test_who_gets_which_precision(
    multiplies: bool, widest: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: multiplies)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: widest)
    assert pixel_precision(CPU, float32=False) == precision and pixel_precision(CPU, float32=True) == "fp32"
    assert pixel_precision(torch.device("cuda"), float32=True) == "bf16"


@pytest.mark.parametrize("config", [COLOUR, PRESETS["tiny"].config.tokenizer], ids=["colour", "digits"])
@needs_bf16
def test_an_image_is_the_same_in_any_batch(config: TokenizerConfig, native: None) -> None:
    renderer, codes = Renderer(tokenizer_of(config, spread=3), CPU), codes_of(config, 21)
    whole = renderer.start(codes).wait()
    assert len({image.numpy().tobytes() for image in whole}) == 21
    for batch in (1, 2, 5, 8, 13):
        assert torch.equal(torch.cat([renderer.start(part).wait() for part in codes.split(batch)]), whole), batch


def test_pieces_follow_from_the_largest_activation(native: None) -> None:
    """Counted here from what the decoder's layers really give."""
    for config in (
        COLOUR,
        PRESETS["tiny"].config.tokenizer,
        TokenizerConfig(base_channels=16, multipliers=(1, 1, 2, 2, 4), residual_blocks=1, image_size=64),
    ):
        tokenizer, sizes = VQTokenizer(config).eval(), []
        for module in tokenizer.decoder.modules():
            if not list(module.children()):
                module.register_forward_hook(
                    lambda module, given, out, sizes=sizes: sizes.extend(
                        (out.numel(), *(tensor.numel() for tensor in given))
                    )
                )
        tokenizer.decode(codes_of(config, 1))
        assert largest_activation_bytes(config, config.image_size // config.downsampling, torch.bfloat16) == 2 * max(
            sizes
        )
    with torch.device("meta"):
        vq16 = VQTokenizer(TokenizerConfig())
    assert largest_activation_bytes(vq16.config, 16, torch.bfloat16) == 2**24
    assert Renderer(tokenizer_of(COLOUR), CPU).piece_images(8) == 2**24 // (2 * 32 * 32 * 32)
    assert Renderer(tokenizer_of(COLOUR), CPU).piece_images(1024) == 1  # larger than any piece
    assert Renderer(tokenizer_of(COLOUR), CPU, float32=True).piece_images(8) == PIECE_IMAGES


@needs_bf16
def test_packed_convolutions_are_those_of_torch() -> None:
    """The bits of F.conv2d; with a summand one rounding instead of two, into the summand's memory."""
    for layer in (
        nn.Conv2d(24, 40, 3, padding=1),
        nn.Conv2d(16, 3, 1),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.Conv2d(32, 64, 3, padding=1, groups=2),
        nn.Conv2d(12, 8, 3, bias=False),
    ):
        layer = layer.to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_(False)
        packed = PackedConv2d(layer)
        for side in (9, 9, 14):  # packed for the first size, used for every one
            x = torch.randn(3, layer.in_channels, side, side).bfloat16().contiguous(memory_format=torch.channels_last)
            made = packed(x)
            assert torch.equal(made, layer(x)) and made.is_contiguous(memory_format=torch.channels_last)
            bias = None if layer.bias is None else layer.bias.double()
            truth = F.conv2d(x.double(), layer.weight.double(), bias, layer.stride, layer.padding, groups=layer.groups)
            beside = torch.randn_like(made)
            truth += beside.double()
            once = packed(x, given := beside.clone())
            assert (
                once.data_ptr() == given.data_ptr()
                and ((once.double() - truth).abs() <= 2**-8 * truth.abs() + 2**-14).all()
            )


def test_without_onednns_kernels_the_layers_stay(native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, codes = tokenizer_of(COLOUR), codes_of(COLOUR, 2)
    packed = bfloat16_decoder(tokenizer).decode(codes)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    plain = bfloat16_decoder(tokenizer)
    assert sum(isinstance(module, AddingConv2d) for module in plain.decoder.modules()) > 4 and not any(
        isinstance(module, PackedConv2d) for module in plain.modules()
    )
    made = plain.decode(codes)
    # Where a sum is rounded twice
    assert made.dtype == torch.bfloat16 and (made - packed).float().std() < 0.03 * packed.float().std()
    assert tokenizer.dtype == torch.float32 and torch.equal(
        plain.quantize.embedding.weight, tokenizer.quantize.embedding.weight
    )


def test_a_job_goes_on_in_its_precision_alone(tmp_path: Path, native: None) -> None:
    """The plan says in what the pixels were made; that of a version which did not say, made them in float32."""
    save_small_model(tmp_path / "model")
    config = SampleConfig(
        model=str(tmp_path / "model"), out=str(tmp_path / "images.npz"), images=5, precision="fp32", grid=False
    )
    sample_images(config)
    record = tmp_path / "images.json"
    told = json.loads(record.read_text())
    assert told["plan"].pop("pixels_precision") == "fp32"
    record.write_text(json.dumps(told))
    assert sample_images(config).drawn == 0
    told["plan"]["pixels_precision"] = "bf16"
    record.write_text(json.dumps(told))
    with pytest.raises(UserError, match="pixels_precision 'bf16' there, 'fp32' asked for"):
        sample_images(config)
    del told["plan"]["pixels_precision"]
    cuda = to_record(told["plan"] | {"device": "cuda"}, record, JobPlan, "")
    assert cuda.pixels_precision == "bf16"
    exact = dataclasses.replace(config, out=str(tmp_path / "exact.npz"), exact=True, precision="auto")
    sample_images(exact)
    assert json.loads((tmp_path / "exact.json").read_text())["plan"]["pixels_precision"] == "fp32"

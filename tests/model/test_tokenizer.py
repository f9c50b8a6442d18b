"""model.tokenizer: LlamaGen's names and shapes, the forward pass against a restatement in plain arithmetic, the
quantizer against loops, files.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from star_fast.config import TokenizerConfig
from star_fast.model import tokenizer as tokenizers
from star_fast.model.tokenizer import VQTokenizer, from_uint8, to_uint8
from star_fast.model.tokenizer_blocks import Norm
from star_fast.storage import StorageError

SMALL = TokenizerConfig(
    base_channels=12,
    multipliers=(1, 2, 2),
    residual_blocks=2,
    z_channels=20,
    code_channels=5,
    codebook=37,
    image_size=16,
)


def small_tokenizer(seed: int = 0) -> VQTokenizer:
    torch.manual_seed(seed)
    return VQTokenizer(SMALL).eval()


def llamagen_shapes(multipliers: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Every name and shape of a released VQ file, written down from method.md section 3 without
    looking at the module.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, out: int, into: int, size: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into, size, size), (out,)

    def group_norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def residual(name: str, into: int, out: int) -> None:
        group_norm(f"{name}.norm1", into)
        layer(f"{name}.conv1", out, into, 3)
        group_norm(f"{name}.norm2", out)
        layer(f"{name}.conv2", out, out, 3)
        if into != out:
            layer(f"{name}.nin_shortcut", out, into, 1)

    def attention(name: str, width: int) -> None:
        group_norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{part}", width, width, 1)

    def half(side: str, first: int, factors: list[int], blocks: int, lowest: int, resize: str) -> int:
        width = first
        for n, factor in enumerate(factors):
            for m in range(blocks):
                residual(f"{side}.conv_blocks.{n}.res.{m}", width, 128 * factor)
                width = 128 * factor
                if n == lowest:
                    attention(f"{side}.conv_blocks.{n}.attn.{m}", width)
            if n != len(factors) - 1:
                layer(f"{side}.conv_blocks.{n}.{resize}.conv", width, width, 3)
        group_norm(f"{side}.norm_out", width)
        return width

    top = 128 * multipliers[-1]
    layer("encoder.conv_in", 128, 3, 3)
    layer("encoder.conv_out", 256, half("encoder", 128, list(multipliers), 2, len(multipliers) - 1, "downsample"), 3)
    layer("decoder.conv_in", top, 256, 3)
    layer("decoder.conv_out", 3, half("decoder", top, list(multipliers)[::-1], 3, 0, "upsample"), 3)
    for side in ("encoder", "decoder"):
        residual(f"{side}.mid.0", top, top)
        attention(f"{side}.mid.1", top)
        residual(f"{side}.mid.2", top, top)
    shapes["quantize.embedding.weight"] = (16384, 8)
    layer("quant_conv", 8, 256, 1)
    layer("post_quant_conv", 256, 8, 1)
    return shapes


@pytest.mark.parametrize(("multipliers", "millions"), [((1, 1, 2, 2, 4), 71.88), ((1, 2, 2, 4), 70.11)])
def test_names_and_shapes_of_the_released_tokenizers(multipliers: tuple[int, ...], millions: float) -> None:
    with torch.device("meta"):
        tokenizer = VQTokenizer(TokenizerConfig(multipliers=multipliers))
    assert {name: tuple(value.shape) for name, value in tokenizer.state_dict().items()} == llamagen_shapes(multipliers)
    assert round(sum(value.numel() for value in tokenizer.parameters()) / 1e6, 2) == millions
    assert {module.num_groups for module in tokenizer.modules() if isinstance(module, torch.nn.GroupNorm)} == {32}
    assert {module.eps for module in tokenizer.modules() if isinstance(module, torch.nn.GroupNorm)} == {1e-6}


@pytest.mark.parametrize("channels", [1, 3, 6, 8, 12, 18, 20, 32, 96, 128, 256, 512])
def test_narrow_layers_get_groups_that_divide(channels: int) -> None:
    groups = Norm(channels, silu=False).num_groups
    assert channels % groups == 0
    assert groups == 32 if channels % 128 == 0 else channels // groups >= min(channels, 4)


class Restated:
    """Encoder and decoder once more, in float64, from method.md section 3: group statistics, softmax and padding
    written out.
    """

    def __init__(self, tokenizer: VQTokenizer) -> None:
        self.w = {name: value.double() for name, value in tokenizer.state_dict().items()}

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.w[f"{name}.weight"]
        out_height, out_width = ((size - weight.shape[2]) // stride + 1 for size in x.shape[2:])
        columns = [
            x[:, :, i : i + stride * out_height : stride, j : j + stride * out_width : stride]
            for i in range(weight.shape[2])
            for j in range(weight.shape[3])
        ]
        return (
            torch.einsum("bckhw,ock->bohw", torch.stack(columns, 2), weight.flatten(2))
            + self.w[f"{name}.bias"][:, None, None]
        )

    def same(self, name: str, x: Tensor) -> Tensor:
        return self.conv(name, F.pad(x, (1, 1, 1, 1)))

    def norm(self, name: str, x: Tensor) -> Tensor:
        groups = math.gcd(32, max(x.shape[1] // 4, 1), x.shape[1])
        grouped = x.unflatten(1, (groups, -1))
        mean = grouped.mean((2, 3, 4), keepdim=True)
        variance = ((grouped - mean) ** 2).mean((2, 3, 4), keepdim=True)
        return ((grouped - mean) / (variance + 1e-6).sqrt()).flatten(1, 2) * self.w[f"{name}.weight"][
            :, None, None
        ] + self.w[f"{name}.bias"][:, None, None]

    def act(self, x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    def res(self, name: str, x: Tensor) -> Tensor:
        h = self.same(f"{name}.conv1", self.act(self.norm(f"{name}.norm1", x)))
        h = self.same(f"{name}.conv2", self.act(self.norm(f"{name}.norm2", h)))
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.w else x)

    def attn(self, name: str, x: Tensor) -> Tensor:
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
        weight = torch.exp(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(x.shape[1]))
        weight = weight / weight.sum(2, keepdim=True)
        return x + self.conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", weight, v).view_as(x))

    def mid(self, side: str, x: Tensor) -> Tensor:
        return self.res(f"{side}.mid.2", self.attn(f"{side}.mid.1", self.res(f"{side}.mid.0", x)))

    def encode(self, x: Tensor) -> Tensor:
        x = self.same("encoder.conv_in", x)
        for level in range(3):
            for block in range(2):
                x = self.res(f"encoder.conv_blocks.{level}.res.{block}", x)
                x = self.attn(f"encoder.conv_blocks.{level}.attn.{block}", x) if level == 2 else x
            x = (
                self.conv(f"encoder.conv_blocks.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
                if level < 2
                else x
            )
        x = self.same("encoder.conv_out", self.act(self.norm("encoder.norm_out", self.mid("encoder", x))))
        return self.conv("quant_conv", x)

    def decode(self, entries: Tensor) -> Tensor:
        x = self.mid("decoder", self.same("decoder.conv_in", self.conv("post_quant_conv", entries)))
        for level in range(3):
            for block in range(3):
                x = self.res(f"decoder.conv_blocks.{level}.res.{block}", x)
                x = self.attn(f"decoder.conv_blocks.{level}.attn.{block}", x) if level == 0 else x
            x = (
                self.same(
                    f"decoder.conv_blocks.{level}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                )
                if level < 2
                else x
            )
        return self.same("decoder.conv_out", self.act(self.norm("decoder.norm_out", x)))


def test_forward_against_the_restatement() -> None:
    tokenizer = small_tokenizer()
    with torch.no_grad():
        for value in tokenizer.parameters():  # biases and gains off their initial 0 and 1
            value.add_(0.1 * torch.randn(value.shape))
    restated = Restated(tokenizer)
    images = torch.rand(2, 3, 16, 24) * 2 - 1  # not square: a swap of height and width would show
    with torch.no_grad():
        latents = tokenizer.quant_conv(tokenizer.encoder(images))
    truth = restated.encode(images.double())
    assert latents.shape == (2, 5, 4, 6)
    torch.testing.assert_close(latents.double(), truth, rtol=0, atol=1e-5 * truth.abs().max().item())

    codes = torch.randint(0, 37, (3, 16))
    entries = torch.stack([tokenizer.quantize.embedding.weight[code].double() for code in codes.flatten()]).detach()
    entries = (entries / entries.norm(dim=1, keepdim=True)).view(3, 4, 4, 5).permute(0, 3, 1, 2)
    truth = restated.decode(entries)
    decoded = tokenizer.decode(codes)
    assert decoded.shape == (3, 3, 16, 16)
    torch.testing.assert_close(decoded.double(), truth, rtol=0, atol=1e-5 * truth.abs().max().item())


def test_quantizer_against_loops_over_the_codebook() -> None:
    tokenizer = small_tokenizer()
    tokenizer.quantize.embedding.weight.data.mul_(torch.rand(37, 1) * 5 + 0.1)  # length must not matter
    z = torch.randn(2, 5, 3, 4)
    codes = tokenizer.quantize(z).codes
    assert codes.shape == (2, 12) and codes.dtype == torch.int64
    book = [row / row.norm() for row in tokenizer.quantize.embedding.weight.detach().double()]
    for b in range(2):
        for y in range(3):
            for x in range(4):
                latent = z[b, :, y, x].double()
                latent = latent / latent.norm()
                distances = [float(((latent - entry) ** 2).sum()) for entry in book]
                assert codes[b, 4 * y + x] == distances.index(min(distances))


def test_encode_is_the_forward_pass_and_decode_inverts_its_layout() -> None:
    tokenizer = small_tokenizer()
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    codes = tokenizer.encode(images)
    assert codes.shape == (3, SMALL.positions) and codes.dtype == torch.int64
    output = tokenizer(images)
    assert torch.equal(output.codes, codes)
    torch.testing.assert_close(output.reconstruction, tokenizer.decode(codes), rtol=0, atol=1e-5)


def test_gradients_pass_straight_through_and_each_loss_moves_its_own_side() -> None:
    tokenizer = small_tokenizer()
    z = torch.randn(2, 5, 2, 2, requires_grad=True)
    quantized = tokenizer.quantize(z)
    torch.testing.assert_close(quantized.codebook_loss, quantized.commitment_loss)
    cotangent = torch.randn_like(quantized.entries)
    straight = torch.autograd.grad((quantized.entries * cotangent).sum(), z, retain_graph=True)[0]
    plain = torch.autograd.grad((F.normalize(z, dim=1) * cotangent).sum(), z)[0]
    torch.testing.assert_close(straight, plain)
    book = tokenizer.quantize.embedding.weight
    assert torch.autograd.grad(quantized.codebook_loss, z, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(quantized.commitment_loss, book, allow_unused=True, retain_graph=True)[0] is None
    moved = torch.autograd.grad(quantized.codebook_loss, book)[0].abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == sorted(set(quantized.codes.flatten().tolist()))


def test_uint8_there_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)
    assert to_uint8(torch.tensor([-3.0, -1.0, 0.0, 0.9999, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255, 255]
    assert from_uint8(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_save_and_load(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    tokenizer.save(tmp_path / "tokenizer")
    again = VQTokenizer.load(tmp_path / "tokenizer")
    assert again.config == SMALL and not again.training
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in tokenizer.state_dict().items())
    assert again.weights_hash() == tokenizer.weights_hash() != small_tokenizer(1).weights_hash()
    assert sorted(path.name for path in (tmp_path / "tokenizer").iterdir()) == [
        "tokenizer.json",
        "tokenizer.safetensors",
    ]


def test_damaged_files_say_so(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"tokenizer\.json: not found"):
        VQTokenizer.load(tmp_path)
    small_tokenizer().save(tmp_path)
    weights, about = tmp_path / "tokenizer.safetensors", tmp_path / "tokenizer.json"
    whole, settings = weights.read_bytes(), json.loads(about.read_text())
    weights.write_bytes(whole[:-100])
    with pytest.raises(StorageError, match="truncated"):
        VQTokenizer.load(tmp_path)
    weights.write_bytes(whole[:-4] + b"\0\0\0\1")
    with pytest.raises(StorageError, match="its hash is not the one"):
        VQTokenizer.load(tmp_path)
    weights.unlink()
    with pytest.raises(StorageError, match=r"tokenizer\.safetensors: not found"):
        VQTokenizer.load(tmp_path)
    weights.write_bytes(whole)
    about.write_text(json.dumps({**settings, "format_version": 99}))
    with pytest.raises(StorageError, match="expected format_version 1, got 99"):
        VQTokenizer.load(tmp_path)
    about.write_text(json.dumps({**settings, "config": {**settings["config"], "codebook": 64}}))
    with pytest.raises(StorageError, match="not the weights of"):
        VQTokenizer.load(tmp_path)
    about.write_text(about.read_text()[:50])
    with pytest.raises(StorageError, match="truncated or not JSON"):
        VQTokenizer.load(tmp_path)


def test_bad_input_says_what_came() -> None:
    tokenizer = small_tokenizer()
    for bad in (
        torch.zeros(2, 1, 16, 16),
        torch.zeros(2, 3, 16, 18),
        torch.zeros(3, 16, 16),
        torch.zeros(2, 3, 16, 16, dtype=torch.uint8),
    ):
        with pytest.raises(ValueError, match="tokenizer: images must be"):
            tokenizer.encode(bad)
    with pytest.raises(ValueError, match=r"T = side \* side, got shape \(2, 15\)"):
        tokenizer.decode(torch.zeros(2, 15, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"0 \.\.\. 36, got 0 \.\.\. 37"):
        tokenizer.decode(torch.tensor([[0, 1, 2, 37]]))


@pytest.mark.parametrize("entries", [1, 7, 96, 300, 16384])
def test_the_first_of_equal_entries_wins_whatever_their_number(entries: int) -> None:
    """The search goes by blocks of entries: found against plain Python, with equal values within a block and across
    blocks.
    """
    similarity = torch.randint(0, 5, (9, entries), generator=torch.Generator().manual_seed(entries)).float()
    similarity[0] = 2.0
    rows = similarity.tolist()
    assert tokenizers._argmax(similarity).tolist() == [row.index(max(row)) for row in rows]

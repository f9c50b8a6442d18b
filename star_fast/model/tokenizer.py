"""The VQ tokenizer: an image becomes a grid of codes and back. LlamaGen's architecture and state-dict names (method.md
section 3).

Letters: B images, C image channels, H and W pixels, T codes of an image (h*w positions in row order), V codebook
entries, Z entry length. `VQTokenizer(TokenizerConfig())` is LlamaGen's VQ-16; multipliers (1, 2, 2, 4) give VQ-8; small
ones tokenize small images.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_fast.config import ConfigError, TokenizerConfig
from star_fast.errors import UserError
from star_fast.model.bounded_file import read_small_json, shown
from star_fast.model.tensor_files import fill, hold, open_tensors, require_finite, require_fit, some
from star_fast.model.tokenizer_blocks import Decoder, Encoder
from star_fast.records import to_dict
from star_fast.storage import StorageError, atomic_write_bytes, atomic_write_json, remove_leftovers, to_record

WEIGHTS_FILE = "tokenizer.safetensors"
CONFIG_FILE = "tokenizer.json"
FORMAT_VERSION = 1
_MOST_CONFIG_BYTES = 2**16
_RESIDUAL_BLOCK = re.compile(r"encoder\.conv_blocks\.([0-9]{1,2})\.res\.([0-9]{1,2})\.conv1\.weight")
_SEARCH_ROWS = 4096  # latents searched at once: 4096 x 16384 float32 similarities are 268 MB


class Quantized(NamedTuple):
    """What the quantizer made of a grid of latents."""

    entries: Tensor  # (B, Z, h, w) normalised codebook entries; the gradient passes straight through to the latents
    codes: Tensor  # (B, T) int64
    codebook_loss: Tensor  # moves entries to latents
    commitment_loss: Tensor  # moves latents to entries (unweighted)
    latents: Tensor  # (B*T, Z) normalised, detached


class TokenizerOutput(NamedTuple):
    """One training forward pass."""

    reconstruction: Tensor  # (B, C, H, W), about [-1, 1]
    codes: Tensor  # (B, T) int64
    codebook_loss: Tensor  # mean (entry - latent)^2, gradient to the codebook only
    # The same value, gradient to the encoder only; not yet weighted by TokenizerConfig.commitment
    commitment_loss: Tensor
    latents: Tensor  # (B*T, Z) normalised encoder outputs, detached: what unused codes may be moved onto


class VectorQuantizer(nn.Module):
    """Nearest codebook entry, latents and entries l2-normalised: the nearest is the one of largest cosine."""

    def __init__(self, entries: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(entries, length)
        with torch.no_grad():  # directions spread evenly over the sphere
            self.embedding.weight.copy_(F.normalize(torch.randn(entries, length), dim=-1))

    def entries(self) -> Tensor:
        """The normalised codebook (V, Z) float32."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    @torch.no_grad()
    def nearest(self, latents: Tensor) -> Tensor:
        """Codes (N,) int64 of normalised latents (N, Z); in exact arithmetic LlamaGen's argmin of squared distances.
        Among equals the lowest code wins.
        """
        entries_ZV = self.entries().t().contiguous()
        return torch.cat([_argmax(part @ entries_ZV) for part in latents.split(_SEARCH_ROWS)])

    def forward(self, z: Tensor) -> Quantized:
        """Quantize z (B, Z, h, w)."""
        batch, length, height, width = z.shape
        latents_NZ = F.normalize(z.float().permute(0, 2, 3, 1).reshape(-1, length), dim=-1)
        with torch.autocast(z.device.type, enabled=False):  # rounded products would choose other codes
            codes_N = self.nearest(latents_NZ)
        chosen_NZ = self.entries()[codes_N]
        codebook_loss = F.mse_loss(chosen_NZ, latents_NZ.detach())
        commitment_loss = F.mse_loss(latents_NZ, chosen_NZ.detach())
        through_NZ = latents_NZ + (chosen_NZ - latents_NZ).detach()
        entries = through_NZ.view(batch, height, width, length).permute(0, 3, 1, 2).to(z.dtype)
        return Quantized(entries, codes_N.view(batch, -1), codebook_loss, commitment_loss, latents_NZ.detach())

    def look_up(self, codes_BT: Tensor, grid: tuple[int, int]) -> Tensor:
        """Normalised entries (B, Z, h, w) float32 of codes (B, T)."""
        return self.entries()[codes_BT].transpose(1, 2).unflatten(2, grid)


def _argmax(similarity_NV: Tensor) -> Tensor:
    """The first largest column of each row: of blocks of columns first, since a CPU takes maxima many at a time but
    places one by one (4x).
    """
    block = math.gcd(similarity_NV.shape[1], 128)
    if similarity_NV.device.type != "cpu" or block == 1:
        return similarity_NV.argmax(dim=1)
    blocks = similarity_NV.unflatten(1, (-1, block))
    best = blocks.amax(dim=2).argmax(dim=1)
    return best * block + blocks[torch.arange(len(best)), best].argmax(dim=1)


class VQTokenizer(nn.Module):
    """The tokenizer: encoder, quantizer, decoder, under LlamaGen's state-dict names."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(config.codebook, config.code_channels)
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.code_channels, config.z_channels, 1)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of the images that come out."""
        return self.quant_conv.weight.dtype

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Reconstruct images (B, C, H, W) in [-1, 1] and return what training needs."""
        self._check_images(images)
        quantized = self.quantize(self.quant_conv(self.encoder(images.to(self.dtype))))
        reconstruction = self.decoder(self.post_quant_conv(quantized.entries))
        return TokenizerOutput(reconstruction, *quantized[1:])

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes (B, T) int64, in row order, of images (B, C, H, W) in [-1, 1]; H and W multiples of the downsampling.

        Raises:
            ValueError: another number of dimensions or channels, or a size that the downsampling does not divide.
        """
        self._check_images(images)
        return self.quantize(self.quant_conv(self.encoder(images.to(self.dtype)))).codes

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images (B, C, H, W), about [-1, 1], dtype of the weights, of codes (B, T) int64 on a square grid.

        Raises:
            ValueError: not (B, T) with T a square number, or (on the CPU) a code outside 0 ... V-1.
        """
        side = math.isqrt(codes.shape[-1])
        if codes.ndim != 2 or side * side != codes.shape[-1] or side == 0:
            raise ValueError(f"decode: codes must be (B, T) with T = side * side, got shape {tuple(codes.shape)}")
        if (
            codes.device.type == "cpu"
            and codes.numel()
            and not 0 <= int(codes.min()) <= int(codes.max()) < self.config.codebook
        ):
            raise ValueError(
                f"decode: codes must lie in 0 ... {self.config.codebook - 1}, got {int(codes.min())} ... "
                f"{int(codes.max())}"
            )
        return self.decoder(self.post_quant_conv(self.quantize.look_up(codes, (side, side)).to(self.dtype)))

    def _check_images(self, images: Tensor) -> None:
        step = self.config.downsampling
        if (
            images.ndim != 4
            or images.shape[1] != self.config.image_channels
            or images.shape[2] % step
            or images.shape[3] % step
        ):
            raise ValueError(
                f"tokenizer: images must be (B, {self.config.image_channels}, H, W) with H and W multiples of {step}, "
                f"got shape {tuple(images.shape)}"
            )
        if not images.is_floating_point():
            raise ValueError(
                f"tokenizer: images must be floating point in [-1, 1] (see from_uint8), got {images.dtype}"
            )

    def weights_hash(self) -> str:
        """sha256 over names, dtypes, shapes and bytes of all weights: it names the tokenizer that made a code. Take it
        before a cast to bf16.
        """
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.safetensors, then tokenizer.json (settings and hash), each whole or not at all.

        Raises:
            UserError: weights that are not finite. StorageError: the disk is full or the place cannot be written.
        """
        folder, state = (
            Path(folder),
            {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()},
        )
        require_finite(state, f"{folder}: not saved")
        remove_leftovers(folder, (WEIGHTS_FILE, CONFIG_FILE))
        atomic_write_bytes(folder / WEIGHTS_FILE, safetensors.torch.save(state))
        atomic_write_json(
            folder / CONFIG_FILE,
            {"format_version": FORMAT_VERSION, "weights_sha256": self.weights_hash(), "config": to_dict(self.config)},
        )

    @classmethod
    def load(cls, folder: str | Path) -> VQTokenizer:
        """The tokenizer that `save` wrote, in eval mode on the CPU.

        Raises:
            StorageError: a file is missing, damaged, of another version, or the weights are not the ones that
                tokenizer.json names, or not finite.
        """
        folder = Path(folder)
        file, hint = folder / WEIGHTS_FILE, f"a tokenizer folder holds {CONFIG_FILE} and {WEIGHTS_FILE}"
        values = read_small_json(folder / CONFIG_FILE, hint, _MOST_CONFIG_BYTES)
        if values.get("format_version") != FORMAT_VERSION:
            raise StorageError(
                f"{folder / CONFIG_FILE}: expected format_version {FORMAT_VERSION}, got "
                f"{shown(values.get('format_version'))}; "
                "train the tokenizer again"
            )
        about = to_record(values, folder / CONFIG_FILE, _About, hint)
        try:
            with open_tensors(file, hint) as opened:
                told = tokenizer_config(opened.content, file)
                for name in (
                    "base_channels",
                    "multipliers",
                    "residual_blocks",
                    "z_channels",
                    "code_channels",
                    "codebook",
                    "image_channels",
                ):
                    if getattr(told, name) != getattr(about.config, name):
                        raise StorageError(
                            f"{file}: not the weights of {CONFIG_FILE}: tokenizer.{name} is "
                            f"{getattr(about.config, name)} there, and "
                            f"{getattr(told, name)} by their shapes; train or copy the tokenizer again"
                        )
                tokenizer = empty_tokenizer(about.config, opened.content, file)
                fill(tokenizer, opened.content, opened.file)
        except UserError as error:
            raise error if isinstance(error, StorageError) else StorageError(error) from error
        if tokenizer.weights_hash() != about.weights_sha256:
            raise StorageError(
                f"{file}: its hash is not the one in {CONFIG_FILE}: damaged, or two tokenizers mixed; train or "
                "copy it again"
            )
        return tokenizer


def at_size(tokenizer: VQTokenizer, image_size: int) -> VQTokenizer:
    """The same tokenizer for images of `image_size` pixels a side, which its weights fit as well; 0: as it is. Raises
    ConfigError for a size that cannot be.
    """
    if image_size:
        try:
            tokenizer.config = replace(tokenizer.config, image_size=image_size)
        except ConfigError as error:
            raise ConfigError(str(error).replace("tokenizer.image_size", "image_size")) from error
    return tokenizer


@dataclass(frozen=True)
class _About:
    """tokenizer.json."""

    format_version: int
    weights_sha256: str
    config: TokenizerConfig


def tokenizer_config(weights: Mapping[str, Any], source: str | Path, *, image_size: int = 0) -> TokenizerConfig:
    """The shape of a VQ tokenizer, from the names and shapes of its weights (tensors or StoredTensors).

    Args:
        image_size: pixels a side, which the weights don't tell; 0: one code's.

    Raises:
        UserError: a weight that it is read off is not there, or they contradict each other.
    """

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in weights or len(weights[name].shape) != dimensions:
            raise UserError(
                f"{source}: expected the weights of a LlamaGen VQ tokenizer, but {name!r} is not among them; "
                f"found {some(weights)}"
            )
        return tuple(weights[name].shape)

    base, image_channels = shape("encoder.conv_in.weight", 4)[:2]
    z_channels = shape("encoder.conv_out.weight", 4)[0]
    codebook, code_channels = shape("quantize.embedding.weight", 2)
    found = {(int(match[1]), int(match[2])) for name in weights if (match := _RESIDUAL_BLOCK.fullmatch(name))}
    levels, blocks = (1 + max((place[axis] for place in found), default=0) for axis in (0, 1))
    widths = []
    for level in range(levels):
        for block in range(blocks):
            width = shape(f"encoder.conv_blocks.{level}.res.{block}.conv1.weight", 4)[0]
        widths.append(width)
    try:
        if not base or any(width % base for width in widths):
            raise ConfigError(
                f"the widths of its levels, {widths}, must be multiples of the first convolution's {base}"
            )
        return TokenizerConfig(
            base_channels=base,
            multipliers=tuple(width // base for width in widths),
            residual_blocks=blocks,
            z_channels=z_channels,
            code_channels=code_channels,
            codebook=codebook,
            image_channels=image_channels,
            image_size=image_size or 2 ** (levels - 1),
        )
    except ConfigError as error:
        raise UserError(f"{source}: not the weights of a LlamaGen VQ tokenizer: {error}") from error


def empty_tokenizer(config: TokenizerConfig, weights: Mapping[str, Any], source: str | Path) -> VQTokenizer:
    """A tokenizer in eval mode on the CPU that `weights` fit, yet to be filled. Raises UserError, before memory is
    taken, where they don't (require_fit).
    """
    with torch.device("meta"):
        tokenizer = VQTokenizer(config)
    require_fit(tokenizer, weights, source)
    return hold(tokenizer, weights["quantize.embedding.weight"].dtype, source)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 images, any shape, to float32 in [-1, 1], with the arithmetic of LlamaGen's extraction: (x / 255 - 0.5) /
    0.5.
    """
    return images.to(torch.float32).div(255).sub(0.5).div(0.5)


def to_uint8(images: Tensor) -> Tensor:
    """Images in about [-1, 1], any shape, to uint8: clamp(127.5 x + 128, 0, 255), cut to whole numbers (LlamaGen)."""
    return images.float().mul(127.5).add(128).clamp(0, 255).to(torch.uint8)

"""LPIPS, the perceptual distance of Zhang et al. 2018 (v0.1, VGG16): how far apart two images are in the features of a
network trained on ImageNet.

Images have at least 16 pixels a side, for four halvings (tokenizer_config.py). Two sets of weights, neither of them
ever downloaded: VGG16's from a file that is given, the five small linear layers from the installed package `lpips`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_fast.config import ConfigError
from star_fast.errors import UserError
from star_fast.storage import require_regular

# VGG16's convolutions between its halvings
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# ImageNet's mean and deviation, for images in [-1, 1] (lpips)
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_LINEAR_FILE = "weights/v0.1/vgg.pth"  # within the package lpips
_GET_BACKBONE = (
    "save torchvision's once, where there is a network: python -c \"import torch, torchvision; "
    "torch.save(torchvision.models.vgg16(weights='IMAGENET1K_V1').state_dict(), 'vgg16.pt')\", and give the file "
    "(--new-tokenizer.perceptual-weights vgg16.pt)"
)
_GET_LINEAR = "pip install 'star_fast[tokenizer]'"


class Perceptual(nn.Module):
    """The distance; frozen. Its state dict has the convolutions in order and the linear layers' weights."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        widths = [3, *(width for stage in _STAGES for width in stage)]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, width, 3, padding=1) for before, width in itertools.pairwise(widths)
        )
        self.linear = nn.ParameterList(torch.empty(stage[-1]) for stage in _STAGES)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def weights_hash(self) -> str:
        """sha256 over all weights, in order."""
        digest = hashlib.sha256()
        for parameter in self.parameters():
            digest.update(parameter.detach().cpu().contiguous().numpy().data.cast("B"))
        return digest.hexdigest()

    def features(self, images: Tensor) -> list[Tensor]:
        """The last rectified features of each stage, (B, C_i, H / 2^i, W / 2^i), each pixel's scaled to length one."""
        x, found, layer = (images - self.shift) / self.scale, [], 0
        for number, stage in enumerate(_STAGES):
            if number:
                x = F.max_pool2d(x, 2)
            for _ in stage:
                x = F.relu(self.convolutions[layer](x))
                layer += 1
            # lpips adds its 1e-10 to the length instead: the same number, but its gradient is not a number where all
            # features are zero.
            found.append(x / x.square().sum(1, keepdim=True).clamp_min(1e-20).sqrt())
        return found

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Mean distance of images (B, C, H, W) from targets, both in [-1, 1], C 1 (gray) or 3;
        gradient to images only.
        """
        images, targets = (batch.float().expand(-1, 3, -1, -1) for batch in (images, targets))
        with torch.no_grad():
            wanted = self.features(targets)
        total = images.new_zeros(())
        for a, b, weight in zip(self.features(images), wanted, self.linear, strict=True):
            total = total + torch.einsum("bchw,c->bhw", (a - b).square(), weight).mean()
        return total


def load_perceptual(backbone: str | Path) -> Perceptual:
    """The distance with trained weights, on the CPU.

    Args:
        backbone: a file with VGG16's state dict under torchvision's names (.pt, .pth or .safetensors).

    Raises:
        ConfigError: no backbone is given, or the package lpips is missing; the line says how to get them. UserError: a
            file is damaged, or holds other weights.
    """
    if not str(backbone):
        raise ConfigError(
            "tokenizer.perceptual_weights: expected a file of VGG16's weights, got none, and nothing is "
            f"downloaded; {_GET_BACKBONE}"
        )
    linear_file = linear_layers_file()
    found, linear = _read(Path(backbone), _GET_BACKBONE), _read(linear_file, f"install it again: {_GET_LINEAR}")
    # torchvision counts convolutions, rectifiers and halvings alike: `features.0`, `.2`, `.5` ...
    places, place = [], 0
    for stage in _STAGES:
        places += [place + 2 * i for i in range(len(stage))]
        place += 2 * len(stage) + 1
    perceptual = Perceptual()
    names = {
        f"convolutions.{i}.{kind}": (f"features.{place}.{kind}", backbone, found)
        for i, place in enumerate(places)
        for kind in ("weight", "bias")
    }
    names |= {f"linear.{i}": (f"lin{i}.model.1.weight", linear_file, linear) for i in range(len(_STAGES))}
    for ours, target in perceptual.named_parameters():
        theirs, file, weights = names[ours]
        value = weights.get(theirs)
        if (
            not isinstance(value, Tensor)
            or value.numel() != target.numel()
            or not value.is_floating_point()
            or not value.isfinite().all()
        ):
            there = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else "none"
            raise UserError(
                f"{file}: expected finite weights {theirs} of {target.numel()} numbers, found {there}; "
                + (_GET_BACKBONE if weights is found else _GET_LINEAR)
            )
        target.copy_(value.reshape(target.shape))
    return perceptual.eval()


def linear_layers_file() -> Path:
    """Where the installed package lpips keeps its linear layers. The package itself is not imported. Raises ConfigError
    where it is not installed.
    """
    package = importlib.util.find_spec("lpips")
    if package is None or not package.submodule_search_locations:
        raise ConfigError(
            f"tokenizer.perceptual_weight: needs the package lpips, which is not installed: {_GET_LINEAR}; or set "
            "it to 0"
        )
    return Path(package.submodule_search_locations[0]) / _LINEAR_FILE


def _read(path: Path, hint: str) -> dict[str, Any]:
    """Tensors by name, without running code from the file. VGG16's and lpips's own files are of torch before 1.6, which
    torch itself reads.
    """
    require_regular(path, hint)
    try:
        content = (
            safetensors.torch.load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # a damaged pickle fails in many ways
        raise UserError(f"{path}: cannot be read as weights ({' '.join(str(error).split())[:200]}); {hint}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected tensors by name, got {type(content).__name__}; {hint}")
    return content

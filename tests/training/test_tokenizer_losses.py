"""SSIM, the perceptual distance and the patch discriminator against arithmetic by hand; weights that are not there, and
how to get them.
"""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from star_fast.config import ConfigError, TokenizerConfig
from star_fast.errors import UserError
from star_fast.model.image_likeness import structural_similarity
from star_fast.model.tokenizer import VectorQuantizer
from star_fast.training.discriminator import PatchDiscriminator, adaptive_factor, adversarial_loss, hinge_loss
from star_fast.training.perceptual import load_perceptual

# Of VGG16, by their place in torchvision's `features`
CONVOLUTIONS = {
    0: (3, 64),
    2: (64, 64),
    5: (64, 128),
    7: (128, 128),
    10: (128, 256),
    12: (256, 256),
    14: (256, 256),
    17: (256, 512),
    19: (512, 512),
    21: (512, 512),
    24: (512, 512),
    26: (512, 512),
    28: (512, 512),
}
HALVINGS, TAPS = (4, 9, 16, 23), (3, 8, 15, 22, 29)  # places of its max pooling; of the rectifiers that LPIPS looks at


def random_uint8(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_ssim_against_loops() -> None:
    first = random_uint8(2, 3, 13, 12)
    second = (first.float() * 0.7 + random_uint8(2, 3, 13, 12, seed=1).float() * 0.3).to(torch.uint8)
    window = [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)]
    total = sum(map(sum, window))
    for image in range(2):
        found = []
        for channel in range(3):
            a, b = first[image, channel].tolist(), second[image, channel].tolist()
            for y in range(3):
                for x in range(2):
                    places = [
                        (window[i][j] / total, a[y + i][x + j], b[y + i][x + j]) for i in range(11) for j in range(11)
                    ]
                    mean_a, mean_b = sum(w * p for w, p, _ in places), sum(w * q for w, _, q in places)
                    var_a, var_b = (
                        sum(w * (p - mean_a) ** 2 for w, p, _ in places),
                        sum(w * (q - mean_b) ** 2 for w, _, q in places),
                    )
                    covariance = sum(w * (p - mean_a) * (q - mean_b) for w, p, q in places)
                    found.append(
                        (2 * mean_a * mean_b + 6.5025)
                        * (2 * covariance + 58.5225)
                        / ((mean_a**2 + mean_b**2 + 6.5025) * (var_a + var_b + 58.5225))
                    )
        assert structural_similarity(first, second)[image].item() == pytest.approx(sum(found) / len(found), abs=1e-9)
    assert structural_similarity(first, first).tolist() == pytest.approx([1, 1], abs=1e-12)
    with pytest.raises(ValueError, match="at least 11"):
        structural_similarity(first[..., :10], second[..., :10])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A file with VGG16's weights, and a folder with a package lpips: both random, in the formats of the real ones."""
    folder, generator = tmp_path_factory.mktemp("weights"), torch.Generator().manual_seed(0)
    backbone = {}
    for place, (before, width) in CONVOLUTIONS.items():
        backbone[f"features.{place}.weight"] = torch.randn(width, before, 3, 3, generator=generator) * math.sqrt(
            2 / (9 * before)
        )
        backbone[f"features.{place}.bias"] = 0.1 * torch.randn(width, generator=generator)
    # As torchvision's is
    torch.save(
        {**backbone, "classifier.0.weight": torch.zeros(2, 2)},
        folder / "vgg16.pth",
        _use_new_zipfile_serialization=False,
    )
    linear = {
        f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator)
        for i, width in enumerate((64, 128, 256, 512, 512))
    }
    (folder / "packages/lpips/weights/v0.1").mkdir(parents=True)
    (folder / "packages/lpips/__init__.py").write_text("raise ImportError('this package is not to be imported')\n")
    torch.save(linear, folder / "packages/lpips/weights/v0.1/vgg.pth", _use_new_zipfile_serialization=False)
    return folder / "vgg16.pth", folder / "packages"


@pytest.fixture
def backbone(weights: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(weights[1])
    importlib.invalidate_caches()
    return weights[0]


def lpips_by_hand(backbone: Path, linear: Path, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """In float64, from the paper: unit-length features, squared differences, weighted over channels, averaged over
    places, summed over layers.
    """
    network, layers = torch.load(backbone, weights_only=True), torch.load(linear, weights_only=True)
    shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]], dtype=torch.float64).view(
        2, 1, 3, 1, 1
    )

    def taps(x: torch.Tensor) -> list[torch.Tensor]:
        x, found = (x.double() - shift) / scale, []
        for place in range(30):
            if place in CONVOLUTIONS:
                x = F.conv2d(
                    x,
                    network[f"features.{place}.weight"].double(),
                    network[f"features.{place}.bias"].double(),
                    padding=1,
                )
            elif place in HALVINGS:
                x = F.max_pool2d(x, 2, 2)
            else:
                x = x.clamp_min(0)
            if place in TAPS:
                found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    differences = [(a - b).square() for a, b in zip(taps(images), taps(targets), strict=True)]
    return torch.stack(
        [(layers[f"lin{i}.model.1.weight"].double() * d).sum(1).mean() for i, d in enumerate(differences)]
    ).sum()


def test_perceptual_distance_against_arithmetic_by_hand(backbone: Path, weights: tuple[Path, Path]) -> None:
    perceptual, linear = load_perceptual(backbone), weights[1] / "lpips/weights/v0.1/vgg.pth"
    images, targets = torch.rand(2, 2, 3, 32, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    images.requires_grad_()
    found = perceptual(images, targets)
    found.backward()
    gradient, images.grad = images.grad.clone(), None
    expected = lpips_by_hand(backbone, linear, images, targets)
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (gradient - images.grad).abs().max() < 1e-4 * gradient.abs().max()
    assert not any(parameter.requires_grad for parameter in perceptual.parameters())
    gray = images.detach()[:, :1]
    assert perceptual(gray, targets[:, :1]).item() == pytest.approx(
        lpips_by_hand(backbone, linear, gray.expand(-1, 3, -1, -1), targets[:, :1].expand(-1, 3, -1, -1)).item(),
        rel=1e-5,
    )


def test_perceptual_gradient_where_all_features_are_zero(backbone: Path) -> None:
    perceptual = load_perceptual(backbone)
    with torch.no_grad():
        perceptual.convolutions[3].bias.fill_(-1e6)  # nothing passes the second stage's last rectifier
    images = torch.rand(1, 3, 16, 16).requires_grad_()
    perceptual(images, torch.rand(1, 3, 16, 16)).backward()
    assert images.grad.isfinite().all()


def test_weights_of_the_perceptual_loss_that_are_not_there(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ConfigError, match=r"^tokenizer\.perceptual_weights: expected a file of VGG16's weights, got none, .*vgg16\.pt"
    ):
        load_perceptual("")
    with pytest.raises(UserError, match=r"none\.pt: not found; .*torchvision\.models\.vgg16"):
        load_perceptual(tmp_path / "none.pt")
    (tmp_path / "noise.pt").write_bytes(b"noise" * 100)
    with pytest.raises(UserError, match=r"noise\.pt: cannot be read as weights"):
        load_perceptual(tmp_path / "noise.pt")
    good = torch.load(backbone, weights_only=True)
    for name, value, message in (
        ("features.28.bias", None, "found none"),
        ("features.0.weight", torch.zeros(64, 3, 5, 5), "of 1728 numbers, found torch"),
        ("features.2.bias", torch.full((64,), math.nan), "expected finite weights features.2.bias"),
    ):
        safetensors.torch.save_file(
            {key: tensor for key, tensor in {**good, name: value}.items() if tensor is not None},
            tmp_path / "bad.safetensors",
        )
        with pytest.raises(UserError, match=rf"bad\.safetensors: .*{message}"):
            load_perceptual(tmp_path / "bad.safetensors")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"needs the package lpips, which is not installed: pip install 'star_fast\[tokenizer\]'"
    ):
        load_perceptual(backbone)


def test_discriminator_judges_patches_of_70_pixels() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        discriminator = PatchDiscriminator(3)
    assert discriminator(torch.rand(2, 3, 64, 64)).shape == (2, 1, 6, 6) and discriminator(
        torch.rand(2, 3, 24, 24)
    ).shape == (2, 1, 1, 1)
    for module in discriminator.modules():  # its statistics couple all places
        if isinstance(module, torch.nn.BatchNorm2d):
            module.forward = lambda x: x
    image = torch.rand(1, 3, 160, 160, requires_grad=True)
    discriminator(image)[0, 0, 9, 9].backward()
    rows = image.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert len(rows) == 70 == rows[-1] - rows[0] + 1


def test_adversarial_losses_against_arithmetic_by_hand() -> None:
    real, made = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.25])
    assert hinge_loss(real, made).item() == pytest.approx(((0 + 0.5 + 2) / 3 + (0 + 1.25) / 2) / 2)
    assert adversarial_loss(made).item() == pytest.approx(2.75 / 2)
    last = torch.tensor([3.0, 4.0], requires_grad=True)
    factor = adaptive_factor((last**2).sum(), 0.5 * last[0], last)  # gradients (6, 8) and (0.5, 0)
    assert factor.item() == pytest.approx(10 / 0.500001, rel=1e-6) and not factor.requires_grad
    assert adaptive_factor(1e6 * last.sum(), 0 * last.sum(), last).item() == 1e4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 16, "discriminator_weight": 0.5}, r"^tokenizer\.image_size: expected at least 24 pixels"),
        ({"image_size": 8, "perceptual_weight": 1.0}, r"^tokenizer\.image_size: expected at least 16 pixels"),
        ({"image_channels": 4, "perceptual_weight": 1.0}, r"^tokenizer\.image_channels: expected 1 \(gray\) or 3"),
        (
            {"steps": 10, "discriminator_weight": 0.5, "discriminator_start_step": 10},
            r"^tokenizer\.discriminator_start_step: expected less than .* 10",
        ),
        ({"ema_decay": 1.0}, r"^tokenizer\.ema_decay"),
        ({"perceptual_weight": -1.0}, r"^tokenizer\.perceptual_weight"),
        ({"warmup_steps": -1}, r"^tokenizer\.warmup_steps"),
        ({"precision": "fp16"}, r"^tokenizer\.precision: expected 'fp32' or 'bf16'"),
    ],
)
def test_settings_that_contradict(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TokenizerConfig(**{"multipliers": (1, 2), "image_size": 32, **changes})  # type: ignore[arg-type]


def test_codes_are_chosen_in_float32_where_products_are_bfloat16() -> None:
    quantizer, latents = VectorQuantizer(512, 8), torch.randn(2, 8, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = quantizer(latents).codes
        assert not torch.equal(
            (F.normalize(latents.permute(0, 2, 3, 1).reshape(-1, 8), dim=-1) @ quantizer.entries().t()).argmax(1),
            found.flatten(),
        )
    assert torch.equal(found, quantizer(latents).codes)

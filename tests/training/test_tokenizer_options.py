"""The options of tokenizer training (averaged weights, sharpening losses, bf16), what is told and shown on the way, and
that all of it resumes. (Weights that it is given: test_tokenizer_fine_tuning.py.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from star_fast.config import ConfigError, TokenizerConfig
from star_fast.model.tokenizer import VQTokenizer
from star_fast.training import tokenizer_limits, tokenizer_objective, tokenizer_training
from star_fast.training.perceptual import Perceptual
from star_fast.training.tokenizer_report import reconstruct
from star_fast.training.tokenizer_training import train_tokenizer
from tests.training.optimizer_steps import killed, steps_of

SHORT = TokenizerConfig(
    base_channels=4,
    multipliers=(1, 2),
    residual_blocks=1,
    z_channels=8,
    code_channels=4,
    codebook=12,
    image_channels=1,
    image_size=24,
    steps=6,
    images_per_step=4,
    lr=4e-3,
    reseed_every_steps=3,
    warmup_steps=2,
)
IMAGES = torch.randint(0, 256, (20, 1, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
ALL = replace(
    SHORT,
    ema_decay=0.9,
    perceptual_weight=0.5,
    perceptual_weights="vgg16.pt",
    discriminator_weight=0.5,
    discriminator_start_step=3,
    discriminator_adaptive=True,
)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small_perceptual(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """The perceptual distance over a narrow network instead of VGG16; called with a seed, its weights become others."""

    def seeded(seed: int) -> None:
        def load(path: str) -> Perceptual:
            assert path == "vgg16.pt"
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                perceptual = Perceptual()
                for weight in perceptual.linear:
                    torch.nn.init.uniform_(weight)
            return perceptual

        for module in (tokenizer_limits, tokenizer_training):
            monkeypatch.setattr(module, "load_perceptual", load)

    monkeypatch.setattr("star_fast.training.perceptual._STAGES", ((4, 4), (4,), (8,), (8,), (8,)))
    seeded(0)
    return seeded


def test_averaged_weights_against_arithmetic_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    config, history = replace(SHORT, ema_decay=0.3, reseed_every_steps=100), []
    steps_of(
        monkeypatch,
        lambda optimizer, number: history.append(
            [p.detach().double().clone() for p in optimizer.param_groups[0]["params"]]
        ),
    )
    averaged = train_tokenizer(IMAGES, config, progress=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = [p.detach().double() for p in VQTokenizer(config).parameters()]
    codebook = next(i for i, (name, _) in enumerate(averaged.named_parameters()) if name == "quantize.embedding.weight")
    for number, weights in enumerate(history):
        decay = min(0.3, (1 + number) / (10 + number))
        expected = [decay * e + (1 - decay) * w for e, w in zip(expected, weights, strict=True)]
    for i, (found, wanted) in enumerate(zip(averaged.parameters(), expected, strict=True)):
        # Its entries are placed on latents first, in the average too: from there they go at most the learning rate a
        # step
        if i != codebook:
            assert torch.allclose(found.double(), wanted, rtol=0, atol=1e-6)
    assert 0 < (averaged.quantize.embedding.weight.double() - history[-1][codebook]).abs().max() < 6 * config.lr


@pytest.mark.parametrize(("every", "times"), [(1, 1 + 5), (4, 1 + 1), (0, 1)])  # the first time all of them are placed
def test_codes_that_are_moved_are_moved_in_the_average(monkeypatch: pytest.MonkeyPatch, every: int, times: int) -> None:
    moved: list[torch.Tensor] = []
    move = tokenizer_training._move_unused

    def watched(training: Any, latents: torch.Tensor) -> None:
        unused = ~training.used
        move(training, latents)
        assert torch.equal(
            training.averaged.quantize.embedding.weight[unused], training.tokenizer.quantize.embedding.weight[unused]
        )
        assert unused.all() or not torch.equal(
            training.averaged.quantize.embedding.weight, training.tokenizer.quantize.embedding.weight
        )
        moved.append(unused)

    monkeypatch.setattr(tokenizer_training, "_move_unused", watched)
    train_tokenizer(IMAGES, replace(SHORT, ema_decay=0.9, codebook=2500, reseed_every_steps=every), progress=False)
    # More codes than the 576 latents of a step: some are always unused; the last of six steps lies in the time to
    # settle
    assert len(moved) == times


def test_the_discriminator_sets_in_when_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(SHORT, discriminator_weight=0.5, discriminator_start_step=4, reseed_every_steps=100)
    owners: dict[int, list[torch.Tensor]] = {}
    steps_of(
        monkeypatch,
        lambda optimizer, number: owners.setdefault(id(optimizer), []).append(
            optimizer.param_groups[0]["params"][0].detach().clone()
        ),
    )
    train_tokenizer(IMAGES, replace(config, discriminator_weight=0.0), progress=False)
    (plain,) = owners.values()
    owners.clear()
    train_tokenizer(IMAGES, config, progress=False)
    tokenizer, discriminator = owners.values()
    assert len(tokenizer) == 6 and len(discriminator) == 2
    assert [torch.equal(a, b) for a, b in zip(plain, tokenizer, strict=True)] == [True] * 4 + [False] * 2


@pytest.mark.usefixtures("small_perceptual")
def test_the_losses_pull_at_the_weights_they_are_meant_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adversarial loss leaves no gradient in the discriminator, the discriminator's own none in the tokenizer; each
    loss changes what is learnt.
    """
    found = {}
    for name, changes in {
        "plain": {},
        "perceptual": {"perceptual_weight": 0.5, "perceptual_weights": "vgg16.pt"},
        "fixed": {"discriminator_weight": 0.5},
        "adaptive": {"discriminator_weight": 0.5, "discriminator_adaptive": True},
    }.items():
        found[name] = train_tokenizer(IMAGES, replace(SHORT, steps=1, **changes), progress=False).weights_hash()
    assert len(set(found.values())) == 4
    step = tokenizer_objective.step_discriminator

    def checked(
        training: Any, target: torch.Tensor, reconstruction: torch.Tensor, check: Callable[[torch.Tensor], None]
    ) -> None:
        assert all(
            parameter.grad is None and parameter.requires_grad for parameter in training.discriminator.parameters()
        )
        before = [parameter.grad.clone() for parameter in training.tokenizer.parameters()]
        step(training, target, reconstruction, check)
        assert all(torch.equal(a, b.grad) for a, b in zip(before, training.tokenizer.parameters(), strict=True))
        assert all(parameter.grad is not None for parameter in training.discriminator.parameters())

    monkeypatch.setattr(tokenizer_training, "step_discriminator", checked)
    train_tokenizer(IMAGES, replace(SHORT, steps=1, discriminator_weight=0.5), progress=False)


@pytest.mark.parametrize("death", [2, 5])  # before and after the discriminator sets in
def test_killed_with_everything_on_it_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_perceptual: Callable[[int], None], death: int
) -> None:
    def train(out: Path) -> None:
        train_tokenizer(IMAGES, ALL, out=out, progress=False, save_every_steps=1)

    train(tmp_path / "unbroken")

    killed(monkeypatch, death, lambda: train(tmp_path / "killed"))
    tensors = safetensors.torch.load_file(next((tmp_path / "killed").glob("unfinished-*.safetensors")))
    assert ("discriminator exp_avg layers.0.weight" in tensors) == (death == 5) and "average quant_conv.bias" in tensors
    small_perceptual(1)
    with pytest.raises(
        ConfigError, match=r"^tokenizer\.perceptual_weights: .* begun with other weights of the perceptual loss"
    ):
        train(tmp_path / "killed")
    small_perceptual(0)
    train(tmp_path / "killed")
    assert content(tmp_path / "killed") == content(tmp_path / "unbroken")
    # No place on this machine is kept
    assert VQTokenizer.load(tmp_path / "killed").config == replace(ALL, perceptual_weights="")


def test_bf16_products_train_too(tmp_path: Path) -> None:
    wide = replace(SHORT, base_channels=8, steps=20)
    images = (
        (torch.arange(24).view(1, 1, 1, 24) * torch.arange(1, 21).view(20, 1, 1, 1) // 2 % 256)
        .expand(20, 1, 24, 24)
        .to(torch.uint8)
    )
    psnr = {}
    for precision in ("fp32", "bf16"):
        tokenizer = train_tokenizer(
            images, replace(wide, precision=precision), out=tmp_path / precision, progress=False
        )
        psnr[precision] = json.loads((tmp_path / precision / "training.json").read_text())["psnr_db"]
        assert tokenizer.dtype == torch.float32
    untrained = train_tokenizer(images, replace(wide, steps=1, lr=1e-9), out=tmp_path / "none", progress=False)
    before = json.loads((tmp_path / "none" / "training.json").read_text())["psnr_db"]
    assert untrained.dtype == torch.float32 and psnr["bf16"] != psnr["fp32"] and min(psnr.values()) > before + 3


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that training writes; its clock goes on by half a second at each look."""
    lines: list[str] = []
    monkeypatch.setattr(tokenizer_training.tqdm, "write", lambda line: lines.append(line))
    clock = iter(np.arange(1, 10**4) * 0.5)
    monkeypatch.setattr(tokenizer_training.time, "perf_counter", lambda: float(next(clock)))
    return lines


def test_the_time_is_told_and_pictures_are_written_on_the_way(
    tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures: list[tuple[int, np.ndarray]] = []
    write = tokenizer_training.write_reconstructions

    def watched(tokenizer: VQTokenizer, images: torch.Tensor, path: Path) -> None:
        write(tokenizer, images, path)
        # 24 and a border, enlarged 4 times
        shown = np.asarray(Image.open(path))[::4, ::4].reshape(2, 28, 16, 28)[:, 2:-2, :, 2:-2].transpose(0, 2, 1, 3)
        assert np.array_equal(shown[0], images[:, 0].numpy()) and np.array_equal(
            shown[1], reconstruct(tokenizer, images)[0][:, 0].numpy()
        )
        pictures.append((steps[0], shown[1]))

    steps = [0]
    monkeypatch.setattr(tokenizer_training, "write_reconstructions", watched)
    steps_of(monkeypatch, lambda optimizer, number: steps.__setitem__(0, number))
    train_tokenizer(IMAGES, replace(SHORT, steps=40), out=tmp_path, held_out=IMAGES[:16].flip(0))
    assert [step for step, _ in pictures] == [2, 4, 8, 14, 20, 30, 40]
    assert not np.array_equal(pictures[0][1], pictures[-1][1])
    # The clock is looked at once or twice a step: four steps between 2 s and 4 s.
    (forecast,) = [
        re.fullmatch(r"tokenizer: 40 steps of 4 images, about (\d+) s \(([\d.]+) s a step\)", line)
        for line in told
        if "about" in line
    ]
    assert 0.5 <= float(forecast[2]) <= 1 and int(forecast[1]) == round(40 * float(forecast[2]))
    (where,) = [line for line in told if "on the way" in line]
    assert where == f"tokenizer: images above their reconstructions, renewed on the way: {tmp_path}/reconstructions.png"
    assert re.search(r"PSNR \d+\.\d dB, SSIM -?\d\.\d{3} on held-out images", told[-1])


def test_the_time_that_is_left_is_told_after_a_kill(
    tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(monkeypatch, 21, lambda: train_tokenizer(IMAGES, replace(SHORT, steps=40), out=tmp_path, save_every_steps=5))
    told.clear()
    train_tokenizer(IMAGES, replace(SHORT, steps=40), out=tmp_path, save_every_steps=5)
    assert any(line.startswith("tokenizer: the 20 steps of 40 that are left, of 4 images, about ") for line in told)


def test_a_discriminator_that_sets_in_later_is_told_with_the_time(told: list[str]) -> None:
    for start, told_of in ((9, True), (0, False)):
        told.clear()
        train_tokenizer(
            IMAGES,
            replace(SHORT, steps=10, images_per_step=2, discriminator_weight=0.1, discriminator_start_step=start),
        )
        assert [f"; more from step {start} on" in line for line in told if "about" in line] == [told_of]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 0 min"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert tokenizer_training._duration(seconds) == text

"""training.tokenizer_state: a tokenizer's training that died goes on to the bytes of an unbroken one, and on nothing
that is damaged or another's.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from star_fast.config import ConfigError, TokenizerConfig
from star_fast.errors import UserError
from star_fast.storage import StorageError, sha256_of_bytes
from star_fast.training.tokenizer_training import train_tokenizer

SHORT = TokenizerConfig(
    base_channels=4,
    multipliers=(1, 2),
    residual_blocks=1,
    z_channels=8,
    code_channels=4,
    codebook=12,
    image_channels=1,
    image_size=8,
    steps=10,
    images_per_step=6,
    lr=4e-3,
    reseed_every_steps=4,
)
IMAGES = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Killed(BaseException):
    """What no clean-up code catches by name."""


def train(out: Path, config: TokenizerConfig = SHORT, seed: int = 0, images: torch.Tensor = IMAGES) -> None:
    train_tokenizer(images, config, seed=seed, out=out, progress=False, save_every_steps=3)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("unbroken")
    train(out)
    files = content(out)
    assert set(files) == {"tokenizer.json", "tokenizer.safetensors", "training.json", "reconstructions.png"}
    return files


def dying(target: Callable[..., Any], after: int, late: bool) -> Callable[..., Any]:
    """`target`, which at call number `after` dies, before or after its work."""
    calls = 0

    def mortal(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == after and not late:
            raise Killed
        result = target(*arguments, **named)
        if calls == after:
            raise Killed
        return result

    return mortal


@pytest.mark.parametrize(
    ("place", "after", "late"), [("step", 4, False), ("rename", 3, False), ("rename", 4, True), ("remove", 2, False)]
)
def test_killed_again_and_again_it_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: dict[str, bytes], place: str, after: int, late: bool
) -> None:
    owner, name = {"step": (torch.optim.AdamW, "step"), "rename": (os, "replace"), "remove": (Path, "unlink")}[place]
    deaths, before, target = 0, -1, getattr(owner, name)
    while True:
        with monkeypatch.context() as patched:
            # Where it dies before its first save, it dies later the next time.
            patched.setattr(owner, name, dying(target, after + 2 * deaths, late))
            try:
                train(tmp_path)
                break
            except Killed:
                deaths += 1
        record = tmp_path / "unfinished.json"
        step = json.loads(record.read_text())["step"] if record.exists() else 0
        assert step >= before or not record.exists()
        before = step
    assert deaths >= 1
    assert content(tmp_path) == unbroken


def test_ctrl_c_loses_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: dict[str, bytes]) -> None:
    steps, step = 0, torch.optim.AdamW.step

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 5:
            signal.raise_signal(signal.SIGINT)
        return step(*arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    with pytest.raises(KeyboardInterrupt, match="5 of 10 tokenizer steps are kept"):
        train(tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(tmp_path)
    assert steps == 10 and content(tmp_path) == unbroken


@pytest.fixture(scope="module")
def dead(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("dead")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", dying(torch.optim.AdamW.step, 8, False))
        with pytest.raises(Killed):
            train(out)
    files = content(out)
    assert set(files) == {"unfinished.json", "unfinished-0000006.safetensors", "reconstructions.png"}
    return files


@pytest.fixture
def begun(tmp_path: Path, dead: dict[str, bytes]) -> Path:
    """A training that died after its save at step 6."""
    for name, data in dead.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_another_training_is_refused_and_the_setting_named(begun: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^tokenizer\.lr: .* holds a training begun with 0\.004, asked for is 0\.003; give the same, or delete",
    ):
        train(begun, replace(SHORT, lr=3e-3))
    with pytest.raises(ConfigError, match=r"^seed: .* with 0, asked for is 1"):
        train(begun, seed=1)
    with pytest.raises(UserError, match="begun on other images"):
        train(begun, images=IMAGES.flip(0))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: b"",
        lambda data: data + b"\0" * 10**7,
    ],
)
def test_a_damaged_state_is_refused(begun: Path, damage: Callable[[bytes], bytes]) -> None:
    path = begun / "unfinished-0000006.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StorageError, match=r"unfinished-0000006\.safetensors: .*; delete .* to train from the start"):
        train(begun)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("order", torch.tensor([20])),
        ("order", torch.tensor([-1])),
        ("order", torch.zeros(2, 2, dtype=torch.int64)),
        ("order", torch.zeros(2)),
        ("used", torch.zeros(13, dtype=torch.bool)),
        ("generator", torch.zeros(9)),
        ("weight quant_conv.bias", torch.zeros(1)),
        ("exp_avg quant_conv.bias", torch.zeros(4, 1)),
        ("step quant_conv.bias", torch.zeros(1)),
        ("weight quant_conv.bias", None),
    ],
)
def test_a_state_that_does_not_fit_is_refused(begun: Path, name: str, value: torch.Tensor | None) -> None:
    path, record = begun / "unfinished-0000006.safetensors", begun / "unfinished.json"
    tensors = safetensors.torch.load(path.read_bytes())
    tensors.pop(name)
    path.write_bytes(safetensors.torch.save(tensors if value is None else {**tensors, name: value}))
    record.write_text(json.dumps({**json.loads(record.read_text()), "sha256": sha256_of_bytes(path.read_bytes())}))
    with pytest.raises(StorageError, match="not the state of this training"):
        train(begun)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 10**9},
        {"step": 0},
        {"step": "6"},
        {"format_version": 2},
        {"job": {}},
        {"sha256": None},
        {"more": 1},
        {"step": 9},
    ],
)
def test_a_damaged_record_is_refused(begun: Path, changes: dict[str, Any]) -> None:
    record = begun / "unfinished.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), **changes}))
    with pytest.raises(StorageError, match=r"delete .* to train from the start"):
        train(begun)


def test_a_loss_that_is_not_finite_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError,
        match=r"at step \d+ of 10; no tokenizer is written; lower the learning rate "
        r"\(--new-tokenizer\.lr, now 1e\+30\)",
    ):
        train(tmp_path / "at once", replace(SHORT, lr=1e30))
    assert not (tmp_path / "at once" / "tokenizer.json").exists()
    clip, calls = torch.nn.utils.clip_grad_norm_, 0

    def poisoned(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return clip(*arguments) * (float("nan") if calls == 5 else 1)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    with pytest.raises(UserError, match=r"the gradient's norm nan at step 5 of 10"):
        train(tmp_path / "later")
    # The last good state
    assert set(content(tmp_path / "later")) == {
        "unfinished.json",
        "unfinished-0000003.safetensors",
        "reconstructions.png",
    }
    assert all(
        value.isfinite().all()
        for value in safetensors.torch.load(
            (tmp_path / "later" / "unfinished-0000003.safetensors").read_bytes()
        ).values()
    )


def test_weights_that_are_not_finite_are_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = torch.optim.AdamW.step

    def overflowing(optimizer: torch.optim.AdamW, *arguments: Any) -> None:
        step(optimizer, *arguments)
        with torch.no_grad():
            optimizer.param_groups[0]["params"][3].view(-1)[0] = float("inf")

    monkeypatch.setattr(torch.optim.AdamW, "step", overflowing)
    with pytest.raises(UserError, match="weights are not finite at step 1 of 1"):
        train(tmp_path, replace(SHORT, steps=1))
    assert not any(tmp_path.iterdir())


def test_leftovers_of_dead_jobs_go_when_it_is_done(begun: Path, unbroken: dict[str, bytes]) -> None:
    for name in (".tokenizer.safetensors.77.tmp", ".unfinished.json.77.tmp", "unfinished-0000003.safetensors"):
        (begun / name).write_bytes(b"half")
    train(begun)
    assert content(begun) == unbroken

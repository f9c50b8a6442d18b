"""Runs that start from given weights, and the plain baseline's views, as a user starts them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from star_fast.config import ModelConfig
from star_fast.config_file import read_config
from star_fast.data.codes import CodeStore
from star_fast.model.llamagen import save_transformer
from star_fast.model.transformer import Transformer
from star_fast.model.weights import load_model, save_model
from star_fast.train import main
from star_fast.training.engine import build_student
from tests.training.store import write_store

TABLE = "cls_embedding.embedding_table.weight"
SMALL = [
    "--preset",
    "tiny",
    "--model.width",
    "32",
    "--model.blocks",
    "2",
    "--method.projector-width",
    "16",
    "--train.images-per-step",
    "4",
    "--train.max-steps",
    "1",
    "--train.tensorboard",
    "False",
    "--train.validate-every-steps",
    "0",
]
# So that the model folder shows what the run began with
STILL = ["--optim.lr-per-256-images", "1e-12", "--optim.warmup-steps", "0"]


@pytest.fixture(scope="module")
def store(one_rank: torch.device, tmp_path_factory: pytest.TempPathFactory) -> CodeStore:
    return write_store(tmp_path_factory.mktemp("init") / "codes")  # classes round, square, long; 16 positions


@pytest.fixture
def start(
    store: CodeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> Callable[..., tuple[int, str]]:
    """train.py with these further arguments: exit status and what was said."""

    def run(*more: str) -> tuple[int, str]:
        monkeypatch.setattr(
            sys, "argv", ["train.py", *SMALL, "--data.codes", str(store.path), "--run", str(tmp_path / "run"), *more]
        )
        status = main()
        said = "".join(capfd.readouterr())
        assert "Traceback" not in said
        return status, said

    return run


def weights(classes: int, positions: int = 16, seed: int = 5) -> Transformer:
    """A model of the run's size; all numbers far from how a run draws them."""
    made = Transformer(ModelConfig(2, 4, 32, vocab=16, positions=positions, num_classes=classes, dropout=0.0))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    return made


@pytest.mark.parametrize("released", [False, True])
def test_other_classes_and_another_grid(start: Callable, store: CodeStore, tmp_path: Path, released: bool) -> None:
    source, names = weights(4, positions=25), ["long", "blue", "red", "round"]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    if released:
        save_transformer(source, tmp_path / "there")
        status, said = start(
            *STILL, "--init", str(tmp_path / "there"), "--init-class-names", str(tmp_path / "names.txt")
        )
    else:
        save_model(tmp_path / "there", source, class_names=names, record={"tokenizer_hash": store.tokenizer_hash})
        status, said = start(*STILL, "--init", str(tmp_path / "there"))
    assert status == 0, said
    assert f"{tmp_path / 'there'}: class embeddings: 2 of 3 taken by name, 1 fresh: square\n" in said
    assert f"{tmp_path / 'there'}: positions: trained with 25, here 16; the rotary table is computed anew\n" in said
    drawn = build_student(read_config(tmp_path / "run/config.yaml")).transformer.state_dict()[TABLE]
    table = source.state_dict()[TABLE]
    for kind in ("student", "teacher"):
        found = load_model(tmp_path / "run/model", weights=kind).transformer
        assert found.config.positions == 16
        expected = source.state_dict() | {TABLE: torch.stack([table[3], drawn[1], table[0], table[4]])}
        for name, value in found.state_dict().items():
            assert (value - expected[name]).abs().max() <= 1e-6, f"{kind} {name}"


def test_averaged_weights_by_name(start: Callable, tmp_path: Path) -> None:
    source, averaged = weights(3), weights(3, seed=6)
    torch.save({"model": source.state_dict(), "ema": averaged.state_dict()}, tmp_path / "x.pt")
    status, said = start(*STILL, "--init", str(tmp_path / "x.pt"), "--init-weights", "ema")
    assert (
        status == 0
        and "class embeddings: all 3 taken by number, since names are not known" in said
        and "positions:" not in said
    )
    found = load_model(tmp_path / "run/model").transformer
    torch.testing.assert_close(found.state_dict()[TABLE], averaged.state_dict()[TABLE], rtol=0, atol=1e-6)


def test_what_cannot_start(start: Callable, tmp_path: Path) -> None:
    save_transformer(weights(4), tmp_path / "x.pt")
    (tmp_path / "names.txt").write_text("a\nb\n")
    for more, line in (
        (
            ["--init", "{}/x.pt"],
            "x.pt: weights of 4 classes, the data here has 3: give the names of its 4 classes with "
            "--init-class-names FILE",
        ),
        (
            ["--init", "{}/x.pt", "--init-class-names", "{}/names.txt"],
            "x.pt: has 4 classes, got 2 names of them; give one name for each",
        ),
        (
            ["--init", "{}/x.pt", "--init-class-names", "{}/absent.txt"],
            "absent.txt: not found; expected a text file with one class name a line",
        ),
        (["--init", "{}/x.pt", "--init-weights", "ema"], "x.pt: holds no weights 'ema'; it has model"),
        (["--init-weights", "ema"], "--init-weights: expected with --init, which was not given"),
        (["--init-class-names", "x"], "--init-class-names: expected with --init, which was not given"),
    ):
        status, said = start(*(word.format(tmp_path) for word in more))
        assert status == 2 and line in said, said
    made = Transformer(ModelConfig(2, 4, 32, vocab=17, positions=16, num_classes=3))
    save_transformer(made, tmp_path / "codes.pt")
    status, said = start("--init", str(tmp_path / "codes.pt"))
    assert status == 2 and "tok_embeddings.weight: expected (16, 32), found (17, 32)" in said


@pytest.mark.parametrize(("more", "views"), [([], 1), (["--method.views", "2"], 2), (["--method.views=3"], 3)])
def test_plain_training_has_one_view_or_those_it_is_told(
    start: Callable, tmp_path: Path, more: list[str], views: int
) -> None:
    status, said = start("--plain", *more)
    assert status == 0, said
    assert "plain next-token training" in said and f"72 training images x {views} views" in said
    method = read_config(tmp_path / "run/config.yaml").method
    assert (method.views, method.has_teacher, method.mask_ratio) == (views, False, 0.0)
    assert not (tmp_path / "run/model/teacher.safetensors").exists()

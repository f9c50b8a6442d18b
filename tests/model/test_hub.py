"""Model folders as the hub holds them: saved with a card, loaded again, fetched only when hf:// asks for it, and one
line where that cannot be.
"""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml

import star_fast
from star_fast import UserError
from star_fast.model.hub import fetch, model_card
from star_fast.model.weights import load_model, save_model
from tests.generation.small_model import CLASS_NAMES, MODEL, save_small_model
from tests.small_digits import make_small_digits

METRICS = {
    "metrics": {"fid": 12.3456789, "sfid": None, "inception_score": 80.0},
    "warnings": ["only 24 images"],
    "protocol": {"samples": {"images": 24}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_small_model(tmp_path / "model")
    return tmp_path / "model"


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first
    )


def test_saved_and_loaded_again(folder: Path, tmp_path: Path) -> None:
    """The same weights, tokenizer, names and images; a second save replaces the first, a third by a training run does
    too.
    """
    model = star_fast.load(folder, dtype=torch.float32)
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    for metrics in (tmp_path / "metrics.json", ""):
        assert model.save(tmp_path / "shown", metrics=metrics) == tmp_path / "shown"
        assert sorted(path.name for path in (tmp_path / "shown").iterdir()) == [
            "README.md",
            "config.json",
            "model.safetensors",
            "tokenizer",
        ]
        again = star_fast.load(tmp_path / "shown", dtype=torch.float32)
        assert (
            same(again.transformer, model.transformer)
            and same(again.tokenizer, model.tokenizer)
            and again.class_names == CLASS_NAMES
        )
        assert torch.equal(again.sample("birch", n=2).pixels, model.sample("birch", n=2).pixels)
        assert ("12.35" in (tmp_path / "shown/README.md").read_text()) == bool(metrics)
    save_model(tmp_path / "shown", model.transformer, class_names=CLASS_NAMES)
    assert not (tmp_path / "shown/README.md").exists()


def test_rounded_weights_are_not_saved_by_mistake(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("star_fast.api.native_dtype", lambda device: torch.bfloat16)
    with pytest.raises(
        UserError,
        match=r"^save: the weights of .*model are float32, and were rounded to bfloat16 .*dtype=torch\.float32",
    ):
        star_fast.load(folder).save(tmp_path / "shown")
    assert not (tmp_path / "shown").exists()
    star_fast.load(folder, dtype=torch.bfloat16).save(tmp_path / "shown")
    assert load_model(tmp_path / "shown").transformer.output.weight.dtype == torch.bfloat16
    star_fast.load(tmp_path / "shown").save(tmp_path / "again")  # nothing is lost any more
    assert same(load_model(tmp_path / "again").transformer, load_model(tmp_path / "shown").transformer)


def test_the_card_says_what_the_weights_are(tmp_path: Path) -> None:
    record = {
        "method": {"mask_ratio": 0.25, "mim_weight": 1.0, "contrast_weight": 0.5},
        "step": 7,
        "environment": {"torch": "x"},
    }
    card = model_card(MODEL, [f"class\n{number}" for number in range(25)], record=record, metrics=METRICS)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "star_fast" and front["tags"] == ["autoregressive", "llamagen", "st-ar"]
    assert (
        "2 blocks, 2 heads and width 32" in card
        and "16 codes of a codebook of 32" in card
        and "class\\n19 and 5 more." in card
    )
    assert (
        "Trained by ST-AR" in card
        and "| fid | 12.35 |" in card
        and "sfid" not in card
        and "Warning: only 24 images" in card
    )
    blocks = [json.loads(block.split("```")[0]) for block in card.split("```json\n")[1:]]
    assert blocks == [METRICS["protocol"], record]
    plain = model_card(
        MODEL, CLASS_NAMES, record={"method": {"mask_ratio": 0.0, "mim_weight": 0.0, "contrast_weight": 0.0}}
    )
    assert (
        "Trained by next-token prediction alone." in plain
        and "st-ar" not in plain
        and "3 classes: ash, birch, 7." in plain
    )
    assert "None: the weights came without one." in model_card(MODEL, CLASS_NAMES, record={})


def test_metrics_must_be_what_evaluate_writes(folder: Path, tmp_path: Path) -> None:
    model = star_fast.load(folder, dtype=torch.float32)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"other\.json: expected what star-fast evaluate writes, with its metrics and their protocol"
    ):
        model.save(tmp_path / "shown", metrics=tmp_path / "other.json")
    with pytest.raises(UserError, match="expected what star-fast evaluate writes"):
        model.save(tmp_path / "shown", metrics=tmp_path / "none.json")
    assert not (tmp_path / "shown").exists()


def hub(monkeypatch: pytest.MonkeyPatch, **functions: object) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(**functions))


def test_hf_names_are_fetched_and_nothing_else(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By stand-ins for the hub's two functions; its cache is a folder of links, as the real one."""
    asked: list[tuple] = []
    make_small_digits(tmp_path)
    cache = tmp_path / "snapshot"
    (cache / "tokenizer").mkdir(parents=True)
    for file in [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]:
        os.symlink(folder / file, cache / file)
    hub(
        monkeypatch,
        snapshot_download=lambda name, allow_patterns: asked.append((name, len(allow_patterns))) or str(cache),
        hf_hub_download=lambda name, file: asked.append((name, file)) or str(folder / file),
    )
    assert same(
        star_fast.load("hf://someone/birds-1.0", dtype=torch.float32).transformer, load_model(folder).transformer
    )
    assert fetch("hf://a/b/dir/c2i.pt") == folder / "dir/c2i.pt"
    assert asked == [("someone/birds-1.0", 5), ("a/b", "dir/c2i.pt")]
    monkeypatch.chdir(tmp_path)
    star_fast.load("runs/digits")  # owner/name of a folder that is here
    with pytest.raises(UserError, match="someone/birds: not found; expected a model folder"):
        star_fast.load("someone/birds")
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("name", "functions", "message"),
    [
        ("hf://only", {}, "hf://only: expected hf://OWNER/REPOSITORY"),
        ("hf://a/b/../../etc/passwd\n", {}, "expected hf://OWNER/REPOSITORY"),
        (
            "hf://a/b",
            {"snapshot_download": lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no route\nmore"))},
            r"hf://a/b: cannot be had from the hub \(no route\); see to the network and the name",
        ),
        (
            "hf://a/b/x.pt",
            {"hf_hub_download": lambda *_: (_ for _ in ()).throw(KeyError())},
            r"hf://a/b/x.pt: cannot be had from the hub \(KeyError\)",
        ),
    ],
)
def test_what_cannot_be_fetched_is_one_line(
    name: str, functions: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(monkeypatch, **functions)
    with pytest.raises(UserError, match=message) as error:
        star_fast.load(name)
    assert "\n" not in str(error.value)


def test_without_huggingface_hub_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        UserError,
        match=r"hf://a/b: downloading needs huggingface_hub, which cannot be imported .*pip install 'star_fast\[hub\]'",
    ):
        star_fast.load("hf://a/b")

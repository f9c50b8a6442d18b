"""hub_model: the hub's methods on an ImageModel, against folders as `ImageModel.save` writes them; the hub itself is
played.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import star_fast
from star_fast.errors import UserError
from tests.small_digits import make_small_digits

NEEDED = pytest.importorskip("huggingface_hub")


@pytest.fixture
def model(tmp_path: Path) -> Any:
    make_small_digits(tmp_path)
    hub_model = importlib.import_module("star_fast.hub_model")
    return hub_model.HubModel(star_fast.load(tmp_path / "runs/digits", dtype=torch.float32))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_saved_as_ever_and_read_again(model: Any, tmp_path: Path) -> None:
    model.save(tmp_path / "saved")
    assert model.save_pretrained(tmp_path / "one") is None
    model.save_pretrained(tmp_path / "one")  # again, over itself
    assert files_of(tmp_path / "one") == files_of(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "one", dtype=torch.float32, device="cpu")
    assert isinstance(again, NEEDED.PyTorchModelHubMixin) and isinstance(again, star_fast.ImageModel)
    assert torch.equal(again.sample(0, n=2, seed=1).pixels, model.sample(0, n=2, seed=1).pixels)
    again.save_pretrained(tmp_path / "two")  # what from_pretrained noted of config.json changes nothing
    assert files_of(tmp_path / "two") == files_of(tmp_path / "saved")


def test_published_whole(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, dict[str, bytes]]] = []

    class Api:
        def __init__(self, token: object = None) -> None: ...

        def create_repo(self, repo_id: str, **_: object) -> Any:
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id: str, folder_path: Path, **_: object) -> str:
            sent.append((repo_id, files_of(Path(folder_path))))
            return "https://commit"

    monkeypatch.setattr(importlib.import_module("huggingface_hub.hub_mixin"), "HfApi", Api)
    model.save(tmp_path / "saved")
    assert model.push_to_hub("someone/digits") == "https://commit"
    assert model.save_pretrained(tmp_path / "here", push_to_hub=True, repo_id="someone/again") == "https://commit"
    whole = files_of(tmp_path / "saved")
    assert sent == [("someone/digits", whole), ("someone/again", whole)] and json.loads(whole["config.json"])


def test_a_name_is_fetched_as_asked(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model.save(tmp_path / "saved")
    asked: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(
        importlib.import_module("huggingface_hub.hub_mixin"),
        "hf_hub_download",
        lambda **_: str(tmp_path / "saved/config.json"),
    )
    monkeypatch.setattr(
        sys.modules["star_fast.hub_model"],
        "snapshot_download",
        lambda name, **options: asked.append((name, options)) or str(tmp_path / "saved"),
    )
    found = type(model).from_pretrained("someone/digits", revision="v1", local_files_only=True, weights="student")
    assert found.class_names == model.class_names
    assert asked[0][0] == "someone/digits" and asked[0][1]["revision"] == "v1" and asked[0][1]["local_files_only"]


def test_mistakes_are_one_line(model: Any, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="full"):
        model.save_pretrained(tmp_path / "full")
    assert (tmp_path / "full/notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        type(model).from_pretrained(tmp_path / "empty")

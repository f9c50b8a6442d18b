"""Saving models and tokenizers: whole or not at all, never what is not finite, and what a killed save left is told,
cleared or brought back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from star_fast.errors import UserError
from star_fast.model.llamagen import load_transformer, save_transformer
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.weights import load_model, save_model
from star_fast.records import to_dict
from star_fast.storage import StorageError
from tests.reliability.refused_models import NAMES, SMALL, TOKENIZER, model, refusal, same


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with a teacher and a tokenizer."""
    save_model(tmp_path / "m", model(), class_names=NAMES, teacher=model(1), tokenizer=VQTokenizer(TOKENIZER))
    return tmp_path / "m"


def test_what_is_not_finite_is_not_written(tmp_path: Path, folder: Path) -> None:
    bad, tokenizer = model(3), VQTokenizer(TOKENIZER)
    with torch.no_grad():
        bad.norm.weight[3] = torch.nan
        tokenizer.quantize.embedding.weight[1, 1] = torch.inf
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for save, message in (
        (lambda: save_model(folder, bad, class_names=NAMES), "not saved: of the student: norm.weight is not finite"),
        (
            lambda: save_model(folder, model(), class_names=NAMES, teacher=bad),
            "not saved: of the teacher: norm.weight is not finite",
        ),
        (
            lambda: save_model(folder, model(), class_names=NAMES, tokenizer=tokenizer),
            "quantize.embedding.weight is not finite",
        ),
        (lambda: tokenizer.save(folder / "tokenizer"), "not saved: quantize.embedding.weight is not finite"),
        (lambda: save_transformer(bad, tmp_path / "x.pt"), "not saved: norm.weight is not finite"),
        (lambda: save_transformer(bad, tmp_path / "x.safetensors"), "not saved: norm.weight is not finite"),
    ):
        with pytest.raises(UserError, match=message):
            save()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m"]


@contextlib.contextmanager
def files_of_at_most(kibibytes: int) -> Iterator[None]:
    """Writing more to a file fails, as on a full disk."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kibibytes << 10, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_fills_up(tmp_path: Path, folder: Path) -> None:
    for name in ("x.pt", "x.safetensors"):
        save_transformer(model(0), tmp_path / name)
    with files_of_at_most(50):
        for save in (
            lambda: save_transformer(model(1), tmp_path / "x.pt"),
            lambda: save_transformer(model(1), tmp_path / "x.safetensors"),
            lambda: save_model(folder, model(1), class_names=NAMES),
            lambda: VQTokenizer(TOKENIZER).save(tmp_path / "t"),
        ):
            with pytest.raises(StorageError, match="cannot be written: File too large"):
                save()
    assert same(load_transformer(tmp_path / "x.pt"), model(0)) and same(
        load_transformer(tmp_path / "x.safetensors"), model(0)
    )
    assert same(load_model(folder).transformer, model(0))
    assert sorted(entry.name for entry in tmp_path.rglob(".*")) == []


def test_leftovers_of_killed_saves_are_cleared(tmp_path: Path, folder: Path) -> None:
    for name in (f".m.{os.getpid()}.tmp", ".m.999999999.tmp", ".m.4.old", ".m.99999999999999999999999.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "teacher.safetensors").write_text("stale")
    (tmp_path / ".m.5.tmp").write_text("a file")
    (tmp_path / ".m.6.old").symlink_to("/")
    for name in (".other.4.tmp", "m.4.tmp", ".m.tmp", ".m.x.tmp", ".mm.4.tmp"):
        (tmp_path / name).mkdir()
    save_model(folder, model(2), class_names=NAMES)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(
        [".other.4.tmp", "m.4.tmp", ".m.tmp", ".m.x.tmp", ".mm.4.tmp", "m"]
    )
    assert sorted(entry.name for entry in folder.iterdir()) == ["config.json", "model.safetensors"] and same(
        load_model(folder).transformer, model(2)
    )
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / ".tokenizer.json.7.tmp").write_text("{")
    VQTokenizer(TOKENIZER).save(folder / "tokenizer")
    assert sorted(entry.name for entry in (folder / "tokenizer").iterdir()) == [
        "tokenizer.json",
        "tokenizer.safetensors",
    ]


def test_a_save_killed_between_its_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    save_model(run / "model", model(0), class_names=NAMES)
    rename, pid = os.rename, os.getpid()

    def killed(source: Path, target: Path) -> None:
        if Path(target).name == "model":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: None)
    with pytest.raises(KeyboardInterrupt):
        save_model(run / "model", model(1), class_names=NAMES)
    monkeypatch.undo()
    assert sorted(entry.name for entry in run.iterdir()) == [f".model.{pid}.old", f".model.{pid}.tmp"]
    for path in (run, run / "model"):
        message = refusal(load_model, path)
        assert (
            "model: not found: a save was killed while it replaced this model; the older one is in "
            f".model.{pid}.old: rename that to model" in message
        )
    with files_of_at_most(10), pytest.raises(StorageError):  # the next save fails too, but the model is back
        save_model(run / "model", model(2), class_names=NAMES)
    assert same(load_model(run).transformer, model(0)) and [entry.name for entry in run.iterdir()] == ["model"]
    save_model(run / "model", model(2), class_names=NAMES)
    assert same(load_model(run).transformer, model(2)) and [entry.name for entry in run.iterdir()] == ["model"]


def test_configs_are_written_as_before(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    assert list(values) == ["format_version", "model", "class_names", "weights_sha256", "record"] and values[
        "model"
    ] == to_dict(SMALL)
    assert dataclasses.asdict(load_model(folder).transformer.config) == values["model"]

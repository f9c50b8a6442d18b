"""Our own model folders and tokenizers, however damaged or hostile: one line, bounded memory, no weights that are not
finite. LlamaGen's files: test_released_files.py.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from star_fast.model.llamagen import load_tokenizer, load_transformer, save_transformer
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.weights import load_into, load_model, save_model
from star_fast.storage import sha256_of_file
from tests.reliability.refused_models import NAMES, TOKENIZER, edit, model, refusal, same


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder, not to be changed."""
    folder = tmp_path_factory.mktemp("original") / "m"
    save_model(
        folder, model(), class_names=NAMES, teacher=model(1), tokenizer=VQTokenizer(TOKENIZER), record={"step": 3}
    )
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A whole model folder."""
    return shutil.copytree(original, tmp_path / "m")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": 10_000_000}, "model.blocks: expected 1 ... 1024, got 10000000"),
        ({"blocks": 1024, "width": 65536, "heads": 64}, "expected the weights of 1024 blocks, found 18 tensors"),
        ({"width": 65536, "heads": 64}, "tok_embeddings.weight: expected (37, 65536), found (37, 32)"),
        ({"vocab": 65536}, "expected (65536, 32)"),
        ({"positions": 2**20}, "1,048,576 positions at head size 16 are more than any model has"),
        ({"positions": 0}, "model.positions: expected at least 1"),
        ({"num_classes": 0}, "model.num_classes: expected at least 1"),
        ({"vocab": 0}, "model.vocab: expected at least 1"),
        ({"num_classes": 2**24}, "class_names: expected 16777216 class names"),
        ({"heads": 0}, "model.heads"),
        ({"width": "wide"}, "model.width: expected"),
        ({"blocks": 2.5}, "model.blocks: expected"),
        ({"blocks": True}, "model.blocks: expected"),
        ({"vocab": None}, "model.vocab: expected"),
        ({"blocks": 10**400}, "model.blocks: expected"),
        ({"dropout": "nan"}, "model.dropout: expected a finite number"),
        ({"more": 1}, "model.more: unknown setting"),
    ],
)
def test_a_config_that_asks_for_more_than_its_weights(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder / "config.json", **{f"model__{name}": value for name, value in changes.items()})
    assert message in refusal(load_model, folder)
    if changes != {"vocab": 65536}:  # a run has a config of its own, which these weights fit
        assert refusal(lambda path: load_into(model(5), path), folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_channels": 10_000_000}, "tokenizer.base_channels: expected 1 ... 4096"),
        ({"base_channels": 4096}, "tokenizer.base_channels is 4096 there, and 8"),
        ({"multipliers": [64] * 12, "image_size": 4096}, "tokenizer.multipliers is"),
        ({"residual_blocks": 64}, "tokenizer.residual_blocks is 64 there, and 1"),
        ({"codebook": 65536}, "tokenizer.codebook is"),
        ({"z_channels": 16384}, "tokenizer.z_channels is"),
        ({"code_channels": 8}, "tokenizer.code_channels is"),
        ({"image_channels": 3}, "tokenizer.image_channels is"),
        ({"multipliers": "12"}, "config.multipliers: expected a list"),
        ({"lr": "1e400"}, "config.lr: expected a finite number"),
        ({"multipliers": [[1], 2]}, "config.multipliers[0]: expected"),
        ({"image_size": -8}, "tokenizer.image_size: expected"),
        ({"more": 1}, "config.more: unknown"),
    ],
)
def test_a_tokenizer_that_asks_for_more_than_its_weights(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder / "tokenizer" / "tokenizer.json", **{f"config__{name}": value for name, value in changes.items()})
    assert message in refusal(VQTokenizer.load, folder / "tokenizer")


@pytest.mark.parametrize("kind", ["pipe", "zeros", "folder", "long", "null", "absent"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_only_ordinary_files_are_read(tmp_path: Path, folder: Path, kind: str, suffix: str) -> None:
    path = tmp_path / {"long": "x" * 300, "null": "a\0b"}.get(kind, f"x{suffix}")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "zeros":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    for load in (load_transformer, load_tokenizer, load_model, lambda path: load_into(model(), path)):
        assert refusal(load, path)
    if kind in ("pipe", "zeros", "folder"):
        for name in ("config.json", "model.safetensors", "tokenizer/tokenizer.json", "tokenizer/tokenizer.safetensors"):
            original = (folder / name).read_bytes()
            (folder / name).unlink()
            path.rename(folder / name)
            assert "expected an ordinary file" in refusal(
                VQTokenizer.load if name.startswith("tok") else load_model, folder / ("tokenizer" * (name[0] == "t"))
            )
            (folder / name).rename(path)
            (folder / name).write_bytes(original)


def test_links_to_ordinary_files_are_followed(tmp_path: Path, folder: Path) -> None:
    save_transformer(model(), tmp_path / "x.pt")
    (tmp_path / "link.pt").symlink_to("x.pt")
    (tmp_path / "link").symlink_to("m")
    assert same(load_transformer(tmp_path / "link.pt"), model()) and same(
        load_model(tmp_path / "link").transformer, model()
    )


def damaged(file: Path, name: str) -> str:
    """The file with one number of a tensor made NaN; its new sha256."""
    tensors, header = safetensors.torch.load_file(file), file.read_bytes()
    with safetensors.safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors[name].view(-1)[-1] = torch.nan
    safetensors.torch.save_file(tensors, file, metadata=metadata)
    assert len(file.read_bytes()) == len(header)
    return sha256_of_file(file)


def test_own_files_that_are_not_finite(folder: Path) -> None:
    """The hashes are right: a run that diverged was saved."""
    for which, name in (("student", "model.safetensors"), ("teacher", "teacher.safetensors")):
        edit(folder / "config.json", **{f"weights_sha256__{which}": damaged(folder / name, "norm.weight")})
        assert f"{name}: norm.weight is not finite" in refusal(load_model, folder, weights=which)
    damaged(folder / "tokenizer" / "tokenizer.safetensors", "quant_conv.bias")
    assert "tokenizer.safetensors: quant_conv.bias is not finite" in refusal(VQTokenizer.load, folder / "tokenizer")


JSONS = [
    "",
    "{",
    "[]",
    "null",
    "3",
    '"x"',
    "[" * 100_000,
    '{"a":' * 50_000,
    '{"format_version": NaN}',
    '{"format_version": 1e999}',
    '{"format_version": "1"}',
    '{"format_version": true}',
    '{"format_version": [[1]]}',
    '{"format_version": 1}',
    '{"format_version": ' + "9" * 5000 + "}",
    "\0",
    "\ufeff{}",
    "{}",
]


@pytest.mark.parametrize("text", [*JSONS, b"\xff\xfe{\0}\0", b'{"format_version": "\xff"}'])
def test_records_that_are_none(folder: Path, text: str | bytes) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    (folder / "config.json").write_bytes(data)
    (folder / "tokenizer" / "tokenizer.json").write_bytes(data)
    assert str(folder / "config.json") in refusal(load_model, folder)
    assert "tokenizer.json" in refusal(VQTokenizer.load, folder / "tokenizer")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": "abc"}, "class_names: expected a list"),
        ({"class_names": [1, 2, 3]}, "class_names[0]: expected a value of type str, got 1"),
        ({"class_names": [["a"], "b", "c"]}, "class_names[0]: expected"),
        ({"class_names": None}, "class_names: expected a list"),
        ({"model": []}, "model: expected"),
        ({"weights_sha256": ["x"]}, "weights_sha256: expected a mapping"),
        ({"weights_sha256": {"student": 3}}, "weights_sha256.student: expected a value of type str"),
        ({"weights_sha256": {}}, "its sha256 is not the one"),
        ({"record": [1]}, "record: expected a mapping"),
        ({"record": {"step": "9"}}, "record.step: expected"),
        ({"record": {"step": -1}}, "record.step: expected 0 or more"),
        ({"record": {"images_seen": 1.5}}, "record.images_seen: expected"),
        ({"record": {"tokenizer_hash": 3}}, "record.tokenizer_hash: expected"),
        ({"record": {"method": [1]}}, "record.method: expected a mapping"),
        ({"record": {"environment": {"device": 3}}}, "record.environment.device: expected"),
        ({"more": 1}, "more: unknown setting"),
        ({"record": {"contrast_depth": None, "precision": {}}}, "record.precision: expected"),
        ({"class_names": ["a", "\x1b[2J\n", 3]}, "class_names[2]"),
    ],
)
def test_a_config_of_other_kinds(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder / "config.json", **changes)
    assert message in refusal(load_model, folder)
    assert message in refusal(lambda path: load_into(model(), path, tokenizer_hash="x"), folder)


def test_names_twice_and_further_records_are_fine(folder: Path) -> None:
    edit(
        folder / "config.json",
        class_names=["a", "a", ""],
        record={"step": 3, "note": {"deep": [1, None]}, "method": {"views": 2}, "tokenizer_hash": None},
    )
    loaded = load_model(folder)
    assert loaded.class_names == ["a", "a", ""] and loaded.record["note"] == {"deep": [1, None]}
    load_into(target := model(4), folder, tokenizer_hash="abc")
    assert same(target, model())


def test_records_that_are_too_large(folder: Path) -> None:
    edit(folder / "config.json", record={"x": "y" * 9_000_000})
    assert "config.json: expected at most 8,388,608 bytes" in refusal(load_model, folder)
    edit(folder / "tokenizer" / "tokenizer.json", note="y" * 70_000)
    assert "tokenizer.json: expected at most 65,536 bytes" in refusal(VQTokenizer.load, folder / "tokenizer")


def test_permissions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As anyone but root meets them."""

    def refused(*arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("builtins.open", refused)
    assert refusal(load_transformer, folder / "model.safetensors").count("cannot be read: Permission denied") == 1
    monkeypatch.setattr(os, "stat", refused)
    for load in (load_transformer, load_model, VQTokenizer.load, load_tokenizer):
        assert refusal(load, folder)

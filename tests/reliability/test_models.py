"""Model folders, tokenizers and LlamaGen files, however damaged or hostile: one line, bounded memory, no weights that
are not finite.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from star_fast.config import ModelConfig, TokenizerConfig
from star_fast.errors import UserError
from star_fast.model import tensor_files
from star_fast.model.llamagen import load_tokenizer, load_transformer, save_transformer
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.transformer import Transformer
from star_fast.model.weights import load_into, load_model, save_model
from star_fast.storage import sha256_of_file
from tests.model.torch_archives import Described, Run, archive, at_most, pickled, rewritten

SMALL = ModelConfig(blocks=2, heads=2, width=32, vocab=37, positions=16, num_classes=3)
NAMES = ["zero", "one", "two"]
TOKENIZER = TokenizerConfig(
    base_channels=8,
    multipliers=(1, 2),
    residual_blocks=1,
    z_channels=8,
    code_channels=4,
    codebook=37,
    image_channels=1,
    image_size=8,
)
ARGS = {"n_head": 2, "block_size": 16}


def model(seed: int = 0) -> Transformer:
    built = Transformer(SMALL)
    built.init_weights(torch.Generator().manual_seed(seed))
    torch.nn.init.normal_(built.output.weight, generator=torch.Generator().manual_seed(seed))
    return built


def weights() -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model().state_dict().items()}


def same(a: Transformer, b: Transformer) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def refusal(load: Callable[..., Any], path: str | Path, *, mebibytes: int = 200, **options: Any) -> str:
    """The one line that answers, within so much memory."""
    with at_most(mebibytes), pytest.raises(UserError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert message.isprintable() and 0 < len(message) < 1500 + len(str(path)), message
    return message


def edit(file: Path, **changes: Any) -> None:
    """Change fields of a JSON file; "a.b" means b in a."""
    values = json.loads(file.read_text())
    for name, value in changes.items():
        *parents, last = name.split("__")
        inner = values
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    file.write_text(json.dumps(values))


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


# --- what a file may ask for
# ------------------------------------------------------------------------------------------------------


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


def test_torch_files_that_ask_for_more_than_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"model": {**weights(), "norm.weight": torch.zeros(1).expand(32)}}, path)
    assert "a tensor of shape (32,) says to hold more numbers than the 1 of its storage" in refusal(
        load_transformer, path
    )
    torch.save({"model": {name: torch.zeros(1).expand(1000, 1000, 1000) for name in weights()}}, path)
    assert "says to hold more numbers" in refusal(load_transformer, path)
    torch.save({"model": weights() | {"x": torch.zeros(5_000_000)}}, path)
    assert "compressed" in refusal(load_transformer, rewritten(path, 8)) and path.stat().st_size < 300_000
    block = {name: value for name, value in weights().items() if name.startswith("layers.0.")}
    shared = {
        f"layers.{number}.{name.removeprefix('layers.0.')}": value
        for number in range(400)
        for name, value in block.items()
    }
    torch.save({"model": weights() | shared, "args": ARGS}, path)  # 400 blocks that share the memory of one
    assert "its tensors together say to hold more than the file" in refusal(load_transformer, path, mebibytes=60)
    positions = {"n_head": 2, "block_size": 2**20}
    torch.save({"model": weights(), "args": positions}, path)
    assert "1,048,576 positions at head size 16 are more than any model has" in refusal(load_transformer, path)
    archive(
        path,
        pickled({"encoder.conv_in.weight": Described(Run("0", 10**9), 0, (10_000_000, 3, 3, 3), (27, 9, 3, 1))}),
        {"data/0": b"\0" * 400},
    )
    assert "says to hold more numbers than the 100" in refusal(load_tokenizer, path)


def test_a_file_that_is_mostly_hole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its length is true, but it takes no disk: what it asks for is compared with the machine's memory."""
    with torch.device("meta"):
        wide = Transformer(dataclasses.replace(SMALL, width=8192, heads=64, vocab=65536)).state_dict()
    entries, end = {}, 0
    for name, value in wide.items():
        entries[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [end, end + 4 * value.numel()]}
        end += 4 * value.numel()
    header = json.dumps(entries).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(tmp_path / "x.safetensors", 8 + len(header) + end)
    monkeypatch.setattr(tensor_files, "_physical_memory", lambda: 4 * 2**30)
    for dtype, taken in (
        (None, "10.0 GiB of memory in torch.float32"),
        (torch.float64, "20.1 GiB of memory in torch.float64"),
    ):
        message = refusal(load_transformer, tmp_path / "x.safetensors", heads=64, positions=16, dtype=dtype)
        assert f"its weights take {taken}, this machine has 4.0 GiB" in message


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


# --- weights that are not finite
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_released_files_that_are_not_finite(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    bad = {name: tensor.to(dtype) for name, tensor in weights().items()}
    bad["layers.1.feed_forward.w3.weight"][-1, -1] = value
    torch.save({"model": bad, "args": ARGS}, tmp_path / "x.pt")
    safetensors.torch.save_file(bad, tmp_path / "x.safetensors", metadata={"args": json.dumps(ARGS)})
    tokenizer = {name: tensor.to(dtype) for name, tensor in VQTokenizer(TOKENIZER).state_dict().items()}
    tokenizer["decoder.mid.1.q.bias"][0] = value
    torch.save({"model": tokenizer}, tmp_path / "t.pt")
    for suffix in (".pt", ".safetensors"):
        target = model(7)
        for load in (load_transformer, load_model, functools.partial(load_into, target)):
            assert "layers.1.feed_forward.w3.weight is not finite" in refusal(load, tmp_path / f"x{suffix}")
            assert same(target, model(7))
    assert "decoder.mid.1.q.bias is not finite" in refusal(
        lambda path: load_tokenizer(path, image_size=8), tmp_path / "t.pt"
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


# --- one line
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["x", [1], {"a": 1}, 1.5, -1, 0, 10**30, True, (2,), float("nan")])
@pytest.mark.parametrize("name", ["n_head", "block_size", "vocab_size", "num_classes", "image_size", "downsample_size"])
def test_arguments_of_another_kind(tmp_path: Path, name: str, value: Any) -> None:
    for args in (argparse.Namespace(**{**ARGS, name: value}), {**ARGS, name: value}):
        torch.save({"model": weights(), "args": args}, tmp_path / "x.pt")
        assert f"x.pt: args.{name}: expected a whole number in 1 ... 16777216, got " in refusal(
            load_transformer, tmp_path / "x.pt"
        )


def test_arguments_that_say_nothing(tmp_path: Path) -> None:
    for args in (
        {**ARGS, "vocab_size": None, "gpt_model": None, "image_size": None, "lr": [1, 2]},
        {**ARGS, 5: 6},
        {**ARGS, "gpt_model": "GPT-none"},
    ):
        torch.save({"model": weights(), "args": args}, tmp_path / "x.pt")
        assert load_transformer(tmp_path / "x.pt").config == SMALL
    for args in (None, 3, "text", [1]):
        torch.save({"model": weights(), "args": args}, tmp_path / "x.pt")
        assert load_transformer(tmp_path / "x.pt", heads=2, positions=16).config == SMALL
    deep: list = []
    for _ in range(100):
        deep = [deep, deep]  # printing it would take forever
    for name in ("gpt_model", "gpt_type", "n_head"):
        torch.save({"model": weights(), "args": {**ARGS, name: deep}}, tmp_path / "x.pt")
        assert f"args.{name}: expected" in refusal(load_transformer, tmp_path / "x.pt")
    torch.save({"model": weights(), "args": {"image_size": 8, "downsample_size": 16, "n_head": 2}}, tmp_path / "x.pt")
    assert "positions must be 1 or more, got 0 from the file's args" in refusal(load_transformer, tmp_path / "x.pt")


@pytest.mark.parametrize(
    "args",
    ["{", "[]", "3", "null", '"x"', "NaN", '{"n_head": NaN}', "[" * 100_000, '{"n_head": 1' + "0" * 5000 + "}", ""],
)
def test_arguments_in_a_header_that_are_none(tmp_path: Path, args: str) -> None:
    safetensors.torch.save_file(weights(), tmp_path / "x.safetensors", metadata={"args": args})
    assert "x.safetensors: expected the args in its header to be " in refusal(
        load_transformer, tmp_path / "x.safetensors"
    )


def broken_states() -> Iterator[tuple[Any, str]]:
    good = weights()
    without = {name: value for name, value in good.items() if not name.startswith("layers.0.")}
    yield {"model": {"model": good}}, "expected tensors by name"
    yield {"model": {}, "module": good}, "expected tensors by name"
    yield {"model": {5: torch.ones(1)}}, "expected tensors by name"
    yield {"model": {**good, "x": 3}}, "expected tensors by name"
    yield {"model": {**good, "freqs_cis": [1]}}, "expected tensors by name"
    yield {"model": None, "state_dict": [good]}, "expected tensors by name"
    yield good | {"layers.9.ffn_norm.weight": torch.ones(32)}, "found layers.9 but nothing of layers.2"
    yield (
        good | {"layers.99999999999999999999.ffn_norm.weight": torch.ones(32)},
        "unexpected: layers.99999999999999999999.ffn_norm.weight",
    )
    yield good | {"layers.٣.ffn_norm.weight": torch.ones(32)}, "unexpected: layers.٣"
    yield without, "'layers.0.attention.wqkv.weight' is not among them"
    yield good | {"tok_embeddings.weight": torch.tensor(1.0)}, "the matrix 'tok_embeddings.weight' is not among them"
    yield good | {"tok_embeddings.weight": torch.ones(0, 32)}, "vocab must be 1 or more, got 0"
    yield good | {"cls_embedding.embedding_table.weight": torch.ones(1, 32)}, "num_classes must be 1 or more, got 0"
    yield good | {"tok_embeddings.weight": torch.ones(37, 0)}, "model.width: expected 1 ... 65536, got 0"
    yield good | {"norm.weight": torch.tensor(1.0)}, "norm.weight: expected (32,), found ()"
    yield good | {"norm.weight": torch.ones(1)}, "norm.weight: expected (32,), found (1,)"
    yield good | {"norm.weight": torch.ones(1, 32)}, "norm.weight: expected (32,), found (1, 32)"
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16):
        yield (
            good | {"norm.weight": torch.ones(32).to(dtype)},
            f"neither float32, bfloat16, float16 nor float64: norm.weight in {dtype}",
        )
    yield {name: value.long() for name, value in good.items()}, "nor float64"
    for shape in ((17, 8), (0, 8, 2), (17, 0, 2), (17, 8, 3), (17,), (), (1, 8, 2), (16, 8, 2)):
        yield (
            good | {"freqs_cis": torch.zeros(shape, dtype=torch.complex64)},
            "freqs_cis" if len(shape) != 3 or shape[2] != 2 or not shape[1] else "positions",
        )


@pytest.mark.parametrize(("content", "message"), list(broken_states()))
def test_states_that_are_no_transformers(tmp_path: Path, content: Any, message: str) -> None:
    torch.save({**content, "args": {"n_head": 2}} if "model" in content else content, tmp_path / "x.pt")
    options = {} if "freqs_cis" in content else {"heads": 2, "positions": 16}
    assert message in refusal(load_transformer, tmp_path / "x.pt", **options)


def test_tokenizers_that_are_none(tmp_path: Path) -> None:
    good = VQTokenizer(TOKENIZER).state_dict()
    block = "encoder.conv_blocks.{}.res.{}.conv1.weight"
    for change, message in (
        ({"encoder.conv_in.weight": torch.ones(8)}, "'encoder.conv_in.weight' is not among them"),
        ({"encoder.conv_in.weight": torch.ones(0, 1, 3, 3)}, "must be multiples of the first convolution's 0"),
        ({"quantize.embedding.weight": torch.tensor(1.0)}, "'quantize.embedding.weight' is not among them"),
        ({block.format(99, 0): torch.ones(8, 8, 3, 3)}, "conv_blocks.2.res.0.conv1.weight' is not among them"),
        ({block.format(0, 63): torch.ones(8, 8, 3, 3)}, "conv_blocks.0.res.1.conv1.weight' is not among them"),
        ({block.format(99999999999, 0): torch.ones(8, 8, 3, 3)}, "unexpected: encoder.conv_blocks.99999999999"),
        ({"quant_conv.bias": torch.ones(1)}, "quant_conv.bias: expected (4,), found (1,)"),
        ({"quant_conv.bias": torch.ones(4, dtype=torch.int32)}, "quant_conv.bias in torch.int32"),
    ):
        torch.save(good | change, tmp_path / "t.pt")
        assert message in refusal(lambda path: load_tokenizer(path, image_size=8), tmp_path / "t.pt")


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

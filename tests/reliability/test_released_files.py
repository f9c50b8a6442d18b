"""LlamaGen's files, however damaged or hostile: one line, bounded memory, no weights that are not finite."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from star_fast.model import tensor_files
from star_fast.model.llamagen import load_tokenizer, load_transformer
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.transformer import Transformer
from star_fast.model.weights import load_into, load_model
from tests.model.torch_archives import Described, Run, archive, pickled, rewritten
from tests.reliability.refused_models import ARGS, SMALL, TOKENIZER, model, refusal, same, weights


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
    monkeypatch.setattr(tensor_files, "physical_bytes", lambda: 4 * 2**30)
    for dtype, taken in (
        (None, "10.0 GiB of memory in torch.float32"),
        (torch.float64, "20.1 GiB of memory in torch.float64"),
    ):
        message = refusal(load_transformer, tmp_path / "x.safetensors", heads=64, positions=16, dtype=dtype)
        assert f"its weights take {taken}, this machine has 4.0 GiB" in message


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

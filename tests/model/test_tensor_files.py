"""model.tensor_files: the header of a safetensors file is held against the file; weights that do not fit, or are not
finite, are named.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from star_fast.config import ModelConfig
from star_fast.errors import UserError
from star_fast.model.tensor_files import Undrawn, fill, open_tensors, require_finite, require_fit, some
from star_fast.model.transformer import Transformer
from tests.model.torch_archives import at_most

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def written(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def refusal(path: Path) -> str:
    with at_most(200), pytest.raises(UserError) as caught, open_tensors(path, "hint"):
        pass
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400
    return str(caught.value)


def test_a_safetensors_file_as_the_library_writes_it(tmp_path: Path) -> None:
    weights = {
        "a": torch.randn(3, 4),
        "b": torch.randn(5).bfloat16(),
        "n": torch.arange(3),
        "none": torch.zeros(0, 2),
        "scalar": torch.tensor(2.0),
        "f8": torch.ones(2).to(torch.float8_e4m3fn),
        "flag": torch.tensor([True, False]),
        "c": torch.ones(2, dtype=torch.complex64),
    }
    safetensors.torch.save_file(weights, tmp_path / "x.safetensors", metadata={"args": "{}", "größe": "x"})
    with open_tensors(tmp_path / "x.safetensors", "") as opened:
        assert opened.content.keys() == weights.keys() and opened.metadata == {"args": "{}", "größe": "x"}
        for name, value in weights.items():
            stored = opened.content[name]
            assert (stored.dtype, stored.shape) == (value.dtype, tuple(value.shape))
            opened.file.read(stored, out := torch.empty(value.shape, dtype=value.dtype))
            assert torch.equal(out.view(-1).view(torch.uint8), value.view(-1).view(torch.uint8))


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"w": entry(shape=[10**9])}, "w: torch.float32 "),
        ({"w": entry(shape=[2**40, 2**40])}, "w: "),
        ({"w": entry(offsets=[0, 2**40])}, "in bytes 0 to"),
        ({"w": entry(offsets=[4, 12])}, "where 0 is the next free one"),
        ({"w": entry(offsets=[8, 0])}, "in bytes 8 to 0"),
        ({"w": entry(shape=[-2])}, "expected dtype"),
        ({"w": entry(shape=[2.0])}, "expected dtype"),
        ({"w": entry(shape=[True, 2])}, "expected dtype"),
        ({"w": entry(shape="2")}, "expected dtype"),
        ({"w": entry(shape=[1] * 9)}, "expected dtype"),
        ({"w": entry(offsets=[0])}, "expected dtype"),
        ({"w": entry(offsets={})}, "expected dtype"),
        ({"w": entry(dtype="F31")}, "expected dtype"),
        ({"w": entry(dtype=["F32"])}, "expected dtype"),
        ({"w": [1]}, "expected dtype"),
        ({"w": {}}, "expected dtype"),
        ({"w": entry(), "v": entry()}, "where 8 is the next free one"),
        ({}, "bytes are described"),
        ({"w": entry([1], [0, 4])}, "bytes are described"),
        ([], "expected tensors by name"),
        (3, "expected tensors by name"),
        ({"__metadata__": 3}, "metadata that is text"),
        ({"__metadata__": {"a": 1}}, "metadata"),
        (b"{", "header: "),
        (b"\xff\xfe{}", "header: "),
        (b'{"w": NaN}', "NaN is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"w": 1' + b"0" * 5000 + b"}", "digits"),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: Any, message: str) -> None:
    assert message in refusal(written(tmp_path / "x.safetensors", header, b"\0" * 8))


def test_lengths_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for length, message in (
        (2**63, "a header of 9,223,372,036,854,775,808 bytes"),
        (2**40, "a header of"),
        (50_000, "50,000 bytes at 8 expected"),
        (0, "header: "),
    ):
        assert message in refusal(written(path, {"w": entry()}, b"\0" * 8, length))
    path.write_bytes(b"\0" * 5)
    assert "8 bytes at 0 expected in a file of 5" in refusal(path)
    assert "a header of 5,000,000 bytes" in refusal(written(path, b"{" + b" " * 4_999_998 + b"}"))
    written(path, b'{"w":' + b"[]," * 1_000_000)  # each of these three bytes would be an object
    assert "header: " in refusal(path)


def test_every_truncation_is_answered(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.randn(3), "b": torch.randn(2).bfloat16()}, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "x.safetensors").write_bytes(whole[:length])
        assert "truncated or not a safetensors file" in refusal(tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_named(dtype: torch.dtype, value: float) -> None:
    """At every place of a vector register, and in what is left over."""
    good = torch.linspace(-5, 5, 1003).to(dtype)
    require_finite({"a": good, "b": good[:1]}, "here")
    for place in [*range(0, 70), 500, 1000, 1001, 1002]:
        bad = good.clone()
        bad[place] = value
        with pytest.raises(UserError, match=r"^here: b\.c is not finite"):
            require_finite({"a": good, "b.c": bad, "d": bad}, "here")


def test_filling_casts_and_names_what_is_not_finite(tmp_path: Path) -> None:
    values = {"weight": torch.randn(3, 4), "bias": torch.randn(3)}
    safetensors.torch.save_file(values, tmp_path / "x.safetensors")
    for dtype in FLOATS:
        with open_tensors(tmp_path / "x.safetensors", "") as opened:
            fill(layer := nn.Linear(4, 3).to(dtype), opened.content, opened.file)
        assert torch.equal(layer.weight, values["weight"].to(dtype)) and torch.equal(
            layer.bias, values["bias"].to(dtype)
        )
    safetensors.torch.save_file({**values, "bias": torch.tensor([1.0, 1e38, 0.0])}, tmp_path / "x.safetensors")
    with open_tensors(tmp_path / "x.safetensors", "") as opened:
        fill(nn.Linear(4, 3), opened.content, opened.file)
        with pytest.raises(UserError, match=r"x\.safetensors: bias is not finite"):  # too large for the dtype asked for
            fill(nn.Linear(4, 3).half(), opened.content, opened.file)


def test_what_does_not_fit_is_listed() -> None:
    layer = nn.Linear(4, 3)
    require_fit(layer, layer.state_dict(), "here")
    for weights, message in (
        ({"weight": torch.ones(3, 4)}, "missing: bias"),
        ({"weight": torch.ones(1, 4), "bias": torch.ones(3)}, r"weight: expected \(3, 4\), found \(1, 4\)"),
        ({"weight": torch.ones(3, 4), "bias": torch.tensor(1.0)}, r"bias: expected \(3,\), found \(\)"),
        ({"weight": torch.ones(3, 4), "bias": torch.ones(3), "\x1b[2J": torch.ones(1)}, r"unexpected: \\x1b\[2J"),
    ):
        with pytest.raises(UserError, match=message):
            require_fit(layer, weights, "here")
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn):
        with pytest.raises(UserError, match=rf"neither float32, bfloat16, float16 nor float64: bias in {dtype}"):
            require_fit(layer, {"weight": torch.ones(3, 4), "bias": torch.ones(3).to(dtype)}, "here")
    assert some(["a" * 500, *"bcdefgh"]).endswith("b, c, d, e, f, and 2 more") and len(some(["a" * 500] * 9)) < 1100


def test_undrawn_modules_take_no_random_number_and_keep_what_is_no_init() -> None:
    """Saving builds a model in the middle of a run, whose random numbers must not depend on when it saves."""
    config = ModelConfig(blocks=1, heads=2, width=16, vocab=8, positions=4, num_classes=2)
    with Undrawn():
        state = torch.get_rng_state()
        transformer = Transformer(config)
        torch.manual_seed(0)
        drawn = torch.randn(3)  # what is no module's init is drawn as ever
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.randn(3))
    torch.set_rng_state(state)
    with Undrawn():
        Transformer(config)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(transformer.norm.weight, torch.ones(16))
    assert torch.equal(transformer.rotary, Transformer(config).rotary)

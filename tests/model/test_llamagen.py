"""model.llamagen: released files in every form they come in, and one clear line for each that is not one. (Tokenizers:
test_released_tokenizers.py.)
"""

from __future__ import annotations

import argparse
import itertools
import logging
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch

from star_fast.config import ModelConfig
from star_fast.errors import UserError
from star_fast.model.llamagen import Checkpoint, checkpoint_config, load_transformer, save_transformer
from star_fast.model.transformer import Transformer
from tests.model.released_weights import shapes, small_weights

SMALL = ModelConfig(blocks=2, heads=2, width=32, vocab=37, positions=16, num_classes=5)


def config_of(
    name: str, blocks: int = 12, width: int = 768, freqs: tuple | None = None, args: dict | None = None, **given: int
) -> ModelConfig:
    """What is read off the shapes of a released file of that name, without the file."""
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes(blocks, width).items()}
    return checkpoint_config(
        Path(name), Checkpoint(weights, freqs, args or {}, file=None), **{"heads": None, "positions": None, **given}
    )


def expect_one_line(path: Path, *parts: str, **given: object) -> None:
    with pytest.raises(UserError) as caught:
        load_transformer(path, **given)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path)), message
    for part in parts:
        assert part in message, message


# --- what loads
# -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict", None])
@pytest.mark.parametrize("with_freqs", [False, True])
def test_every_wrapper(tmp_path: Path, wrapper: str | None, with_freqs: bool) -> None:
    weights, path = small_weights(), tmp_path / "some.pt"
    stored = weights | ({"freqs_cis": torch.full((17, 8, 2), torch.nan)} if with_freqs else {})
    beside = {
        "optimizer": {"state": {}},
        "steps": 5,
        "ema": {"tok_embeddings.weight": torch.zeros(1)},
        "args": argparse.Namespace(gpt_type="c2i", lr=1e-4),
    }
    torch.save(stored if wrapper is None else {wrapper: stored, **beside}, path)
    model = load_transformer(path, **({} if with_freqs else {"heads": 2, "positions": 16}))
    assert model.config == SMALL and not model.training
    state = model.state_dict()
    assert state.keys() == weights.keys() and all(torch.equal(state[name], value) for name, value in weights.items())
    plain = Transformer(SMALL).eval()
    plain.load_state_dict(weights)
    tokens, label = torch.arange(30).view(2, 15), torch.tensor([1, 5])
    assert torch.equal(model(tokens, label).logits, plain(tokens, label).logits)


@pytest.mark.parametrize(
    ("name", "blocks", "width", "heads", "positions"),
    [
        ("c2i_B_256.pt", 12, 768, 12, 256),
        ("c2i_L_256.pt", 24, 1024, 16, 256),
        ("c2i_B_384.pt", 12, 768, 12, 576),
        ("c2i_L_384.pt", 24, 1024, 16, 576),
        ("c2i_XL_384.pt", 36, 1280, 20, 576),
        ("c2i_XXL_384.pt", 48, 1536, 24, 576),
        ("c2i_3B_384.pt", 24, 3200, 32, 576),
    ],
)
def test_released_files_are_known_by_name(name: str, blocks: int, width: int, heads: int, positions: int) -> None:
    config = config_of(name, blocks, width)
    assert (config.blocks, config.heads, config.width, config.positions) == (blocks, heads, width, positions)
    assert (config.vocab, config.num_classes) == (16384, 1000)


def test_a_head_size_of_100_loads_whole(tmp_path: Path) -> None:
    """The 3B model's."""
    torch.save(
        {"model": {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes(1, 200, 4, 2).items()}},
        tmp_path / "wide.pt",
    )
    model = load_transformer(tmp_path / "wide.pt", heads=2, positions=4)
    assert model.config.head_size == 100 and model.tok_embeddings.weight.dtype == torch.bfloat16
    assert model.rotary.shape == (4, 50, 2) and model.rotary.dtype == torch.float32
    assert config_of("x.pt", 1, 3200).head_size == 100


@pytest.mark.parametrize(
    ("source", "args", "name", "freqs", "given", "expected"),
    [
        ("the argument", {}, "x.pt", None, {"heads": 6, "positions": 64}, (6, 64)),
        ("the shape of freqs_cis", {}, "x.pt", (145, 64, 2), {}, (6, 144)),
        (
            "the file's args",
            {"gpt_model": "GPT-B", "image_size": 384, "downsample_size": 16},
            "x.pt",
            None,
            {},
            (12, 576),
        ),
        (
            "the file's args",
            {"gpt_model": "GPT-B", "image_size": 256, "downsample_size": 8},
            "x.pt",
            None,
            {},
            (12, 1024),
        ),
        ("the file's name", {"gpt_model": "my own"}, "run7_c2i_B_384.pt", None, {}, (12, 576)),
        ("LlamaGen's", {"lr": 1.0}, "x.pt", None, {}, (12, 256)),
    ],
)
def test_sources_of_heads_and_positions(
    caplog: pytest.LogCaptureFixture,
    source: str,
    args: dict,
    name: str,
    freqs: tuple | None,
    given: dict,
    expected: tuple[int, int],
) -> None:
    with caplog.at_level(logging.INFO):
        config = config_of(name, freqs=freqs, args=args, **given)
    assert (config.heads, config.positions) == expected
    assert (
        f"heads {expected[0]}, from {source}" in caplog.text
        and f"positions {expected[1]}, from {source}" in caplog.text
    )


SOURCES = {
    "the argument": {"given": {"positions": 64}},
    "the shape of freqs_cis": {"freqs": (145, 32, 2)},
    "the file's args": {"args": {"image_size": 256, "downsample_size": 16}},
    "the file's name": {"name": "c2i_B_384.pt"},
}


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(SOURCES, 2)))
def test_sources_that_contradict_raise(first: str, second: str) -> None:
    said = SOURCES[first] | SOURCES[second]
    with pytest.raises(UserError, match=f"{first} and {second} contradict each other: positions"):
        config_of(said.get("name", "x.pt"), freqs=said.get("freqs"), args=said.get("args"), **said.get("given", {}))


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("c2i_L_256.pt", {}, "the weights' shapes and the file's name contradict each other: blocks 12 against 24"),
        (
            "x.pt",
            {"gpt_model": "GPT-XL"},
            "the weights' shapes and the file's args contradict each other: blocks 12 against 36",
        ),
        (
            "x.pt",
            {"num_classes": 10},
            "the weights' shapes and the file's args contradict each other: num_classes 1000 against 10",
        ),
        ("x.pt", {"vocab_size": 8192}, "vocab 16384 against 8192"),
        ("x.pt", {"gpt_type": "t2i"}, "a text-conditional LlamaGen model"),
    ],
)
def test_shapes_contradict_what_is_said(name: str, args: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        config_of(name, args=args)
    assert message in str(caught.value)


# --- what does not
# ----------------------------------------------------------------------------------------------------------------


def test_heads_that_nothing_tells(tmp_path: Path) -> None:
    torch.save({"model": small_weights()}, tmp_path / "x.pt")
    expect_one_line(tmp_path / "x.pt", "nothing tells the number of heads of a model of width 32; give heads")
    expect_one_line(tmp_path / "x.pt", "model.width", "a multiple of model.heads = 5", heads=5)
    expect_one_line(
        tmp_path / "x.pt", "positions must be a square number, got 15 from the argument", heads=2, positions=15
    )


def test_differences_are_listed(tmp_path: Path) -> None:
    weights, path = small_weights(), tmp_path / "x.pt"
    del weights["norm.weight"], weights["layers.1.feed_forward.w3.weight"]
    weights["layers.0.attention.wo.weight"] = torch.zeros(32, 48)
    weights |= {f"extra.{n}": torch.zeros(1) for n in range(9)}
    torch.save({"model": weights}, path)
    expect_one_line(
        path,
        "layers.0.attention.wo.weight: expected (32, 32), found (32, 48)",
        "missing: layers.1.feed_forward.w3.weight; norm.weight",
        "unexpected: extra.0; extra.1; ",
        "extra.5; and 3 more",
        heads=2,
        positions=16,
    )
    weights = {name: tensor for name, tensor in small_weights().items() if not name.startswith("tok")}
    torch.save({"model": weights}, path)
    expect_one_line(path, "'tok_embeddings.weight' is not among them")


def test_a_feed_forward_of_another_size(tmp_path: Path) -> None:
    weights = small_weights()
    weights["layers.1.feed_forward.w1.weight"] = torch.zeros(128, 32)
    torch.save(weights, tmp_path / "x.pt")
    expect_one_line(
        tmp_path / "x.pt", "layers.1.feed_forward.w1.weight: expected (256, 32), found (128, 32)", heads=2, positions=16
    )


class Harmful:
    """Unpickling this would leave a file behind."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple:
        return Path.touch, (self.witness,)


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    expect_one_line(path, "not found; expected a LlamaGen checkpoint")
    expect_one_line(tmp_path, "expected an ordinary file, found a folder")
    path.write_text("hello, this is a text file\n")
    expect_one_line(path, "not a torch checkpoint")
    path.write_bytes(b"")
    expect_one_line(path, "truncated or not a torch checkpoint")
    torch.save([1, 2, 3], path)
    expect_one_line(path, "expected a dict of weights, got list")
    torch.save({"epoch": 3, "note": "x"}, path)
    expect_one_line(path, "expected tensors by name", "found epoch, note")
    torch.save({"cls_embedding.cap_proj.fc1.weight": torch.zeros(1)}, path)
    expect_one_line(path, "text-conditional")
    witness = tmp_path / "witness"
    torch.save({"model": small_weights(), "args": Harmful(witness)}, path)
    expect_one_line(path, "holds ", "can run code and are not loaded")
    path.write_bytes(pickle.dumps(Harmful(witness), protocol=2))
    expect_one_line(path, "truncated or not a torch checkpoint")
    assert not witness.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
def test_truncated_files(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"x{suffix}"
    model = Transformer(SMALL)
    save_transformer(model, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    expect_one_line(path, "truncated or not a", "copy or download it again")


# --- saving
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_save_and_load_round_trip(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    model = Transformer(SMALL).to(dtype)
    model.init_weights(torch.Generator().manual_seed(1))
    save_transformer(model, tmp_path / f"x{suffix}")
    again = load_transformer(tmp_path / f"x{suffix}")
    assert again.config == SMALL
    assert all(
        torch.equal(value, again.state_dict()[name]) and value.dtype == again.state_dict()[name].dtype
        for name, value in model.state_dict().items()
    )
    assert load_transformer(tmp_path / f"x{suffix}", dtype=torch.float64).output.weight.dtype == torch.float64
    expect_one_line(
        tmp_path / f"x{suffix}", "the argument and the file's args contradict each other: heads 4 against 2", heads=4
    )


def test_saved_file_is_what_the_released_code_reads(tmp_path: Path) -> None:
    """It takes checkpoint["model"] from a plain torch.load and loads that strictly to resume: exact names, no table of
    angles, tensors of their own.
    """
    save_transformer(Transformer(SMALL), tmp_path / "x.pt")
    content = torch.load(tmp_path / "x.pt", map_location="cpu", weights_only=True)  # no allow-list
    assert {name: tuple(value.shape) for name, value in content["model"].items()} == shapes(2, 32, 37, 5)
    assert all(
        value.is_contiguous() and value.untyped_storage().nbytes() == 4 * value.numel()
        for value in content["model"].values()
    )
    assert content["args"] == {
        "gpt_type": "c2i",
        "cls_token_num": 1,
        "n_head": 2,
        "block_size": 16,
        "vocab_size": 37,
        "num_classes": 5,
    }


def test_safetensors_without_our_header(tmp_path: Path) -> None:
    safetensors.torch.save_file(small_weights() | {"freqs_cis": torch.zeros(17, 8, 2)}, tmp_path / "x.safetensors")
    assert load_transformer(tmp_path / "x.safetensors").config == SMALL


def test_freqs_cis_of_no_known_shape(tmp_path: Path) -> None:
    for shape in ((17, 8), (17, 5, 2), (17, 8, 3)):
        torch.save(small_weights() | {"freqs_cis": torch.zeros(shape)}, tmp_path / "x.pt")
        expect_one_line(tmp_path / "x.pt", "freqs_cis must be (T + 1, E/2, 2)", str(shape))

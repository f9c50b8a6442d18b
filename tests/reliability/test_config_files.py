"""A config file or a command line, whatever is in it, costs next to nothing and is answered in one
line that names it.
"""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest
import yaml

from star_fast.config import RunConfig
from star_fast.config_file import base_config, parse, read_config, write_config
from star_fast.errors import ConfigError
from star_fast.presets import PRESETS, preset
from star_fast.records import from_dict, to_dict
from star_fast.train import TrainCommand

MOST = 2**16
LAUGHS = "a: &a [1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}, *{old}, *{old}]\n" for old, new in zip("abcdefghijk", "bcdefghijkl", strict=True)
)

REFUSED = {
    "aliases": (LAUGHS, r"line 1: anchors \(&\) and aliases \(\*\) are not read"),
    "an alias of nothing": ("model: *x", "anchors"),
    "a tag that runs code": (
        "model: !!python/object/apply:os.system ['true']",
        "tags are not read, found tag:yaml.org,2002:python/object/apply:os.system",
    ),
    "a tag on a number": ("train: {seed: !!str 3}", "tags are not read"),
    "a merge": ("model: {<<: {width: 4}}", "'<<' is read as a merge"),
    "a date": ("data: {codes: 2024-01-01}", "line 1: '2024-01-01' is read as a timestamp; for text put it in quotes"),
    "a name given twice": ("model: {width: 64}\ntrain: {}\nmodel: {}", "line 3: model is given twice"),
    "a setting given twice": ("train:\n  seed: 1\n  seed: 2\n", "line 3: seed is given twice"),
    "lists in lists": ("[" * 50_000, "nested too deeply"),
    "dashes": ("- " * 30_000, "nested too deeply"),
    "a name that is a list": ("? [a]\n: 3", "expected the name of a setting"),
    "two documents": ("train: {}\n---\ntrain: {}", "line 2: expected one document, found another"),
    "a null byte": ("train: {seed: 1}\0", "special characters are not allowed"),
    "no UTF-8": (b"data: {codes: \xff\xfe}", "codec can't decode"),
    "too long a number": ("train: {seed: " + "9" * 5000 + "}", "4300 digits"),
    "a large number": ("train: {seed: 1" + "0" * 400 + "}", "train.seed: expected a whole number of at most 2"),
    "a float beyond all": ("optim: {eps: 1" + ":59" * 20_000 + ".5}", "too large to convert"),
    "a number that is none": ("train: {seed: 0b_}", "invalid literal"),
    "not a number": ("optim: {eps: .nan}", "optim.eps: expected a finite number, got nan"),
    "infinite": ("optim: {eps: .inf}", "optim.eps: expected a finite number, got inf"),
    "too large a file": ("#" * (MOST + 1), "expected at most 65,536 bytes, it has 65,537"),
    "a list": ("[]", "expected a mapping of settings, got list"),
    "false": ("false", "expected a mapping of settings, got False"),
    "an escape sequence": ('"\\e[31mred\\n": 1', r"\\x1b\[31mred\\n: unknown setting"),
}


def refusal(path: str | Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    message = str(caught.value)
    assert message.isprintable() and message.startswith(str(path)), message
    return message


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_config_holds_is_refused(tmp_path: Path, name: str) -> None:
    text, expected = REFUSED[name]
    (tmp_path / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=expected):
            read_config(tmp_path / "c.yaml")
        assert tracemalloc.get_traced_memory()[1] < 64e6
    finally:
        tracemalloc.stop()
    assert len(refusal(tmp_path / "c.yaml")) < 600


def test_only_ordinary_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zeros.yaml").symlink_to("/dev/zero")
    for name, message in (
        ("pipe.yaml", "found a pipe, socket or device"),
        ("zeros.yaml", "found a pipe, socket or device"),
        (".", "found a folder"),
        ("absent.yaml", "no such config file"),
        ("x" * 300, "File name too long"),
    ):
        assert message in refusal(tmp_path / name)
    with pytest.raises(ConfigError, match=r"\\x00: cannot be read: embedded null"):
        read_config("\0")
    write_config(preset("B"), tmp_path / "real.yaml")
    (tmp_path / "link.yaml").symlink_to("real.yaml")
    assert read_config(tmp_path / "link.yaml") == preset("B")


def test_what_yaml_can_say_plainly_is_read(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "\ufeff# comment\nmodel: {blocks: 0x10, width: 1_024, heads: 16}\noptim:\n  eps: 1e-4\ntokenizer:\n  "
        "multipliers:\n  - 1\n"
        '  - 2\ntrain: {tensorboard: off}\ndata: {codes: "größe"}\n',
        encoding="utf-8",
    )
    config = read_config(tmp_path / "c.yaml")
    assert (
        config.model.blocks,
        config.model.width,
        config.optim.eps,
        config.tokenizer.multipliers,
        config.train.tensorboard,
        config.data.codes,
    ) == (16, 1024, 1e-4, (1, 2), False, "größe")
    for nothing in ("", "~", "# nothing\n", "{}"):
        (tmp_path / "c.yaml").write_text(nothing)
        assert read_config(tmp_path / "c.yaml") == RunConfig()


@pytest.mark.parametrize("name", PRESETS)
def test_configs_on_disk_stay_as_they_are(tmp_path: Path, name: str) -> None:
    write_config(preset(name), tmp_path / "a.yaml")
    text = (tmp_path / "a.yaml").read_text()
    assert text.startswith("model:\n  blocks: ") and not {"&", "*", "!"} & set(text)
    assert text == yaml.safe_dump(to_dict(preset(name)), sort_keys=False)
    assert read_config(tmp_path / "a.yaml") == from_dict(RunConfig, yaml.safe_load(text)) == preset(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", ""], "--preset: expected one of tiny, B, .*, got nothing"),
        (["--preset=", "--run"], "--preset: expected one of .*, got nothing"),
        (["--preset", "--run", "x"], "got nothing"),
        (["--config", ""], "--config: expected a YAML file, got nothing"),
        (["--config", "."], "found a folder"),
        (["--preset", "tiny", "--config", "x"], "give one of them, once"),
        (["--preset", "\x1b[31m"], r"got '\\x1b\[31m'"),
    ],
)
def test_odd_presets_and_config_files(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        base_config(arguments)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.seed", "1" + "0" * 30], r"--train.seed: expected a number of at most 2\^53, got one of 31 digits"),
        (["--train.max-steps", "1" + "0" * 30], "max.steps: expected"),
        (["--train.epochs", "nan"], "epochs: expected a finite number"),
    ],
)
def test_numbers_that_no_setting_means(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(TrainCommand, arguments, "train.py", "", config=preset("tiny"))

"""What --help prints: descriptions as running text, whatever the width of the source that they are written in, and over
each group of settings what the group is, not what some other setting is.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Any

import pytest
import tyro

from star_fast import cli
from star_fast.data_commands import DATA_COMMANDS

OWN_WORDS = {"data", "presets"}  # no settings: not through the parser
HEADINGS = {"draw": "Draw the samples from --draw.model while"}  # by the setting's own comment, else its kind's words
COMMANDS = [
    *([name] for name in cli.COMMANDS if name not in OWN_WORDS),
    ["plan", "sample"],
    ["plan", "prepare"],
    *(["data", name] for name in DATA_COMMANDS),
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_is_in_sentences(words: list[str], capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    parser = tyro.cli
    monkeypatch.setattr(tyro, "cli", lambda command, **rest: asked.append(command) or parser(command, **rest))
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(cli.main([*words, "--help"]))
    assert not ended.value.code and len(asked) == 1
    printed = capfd.readouterr().out
    head, *boxes = re.split(r"^╭─ ", printed, flags=re.MULTILINE)
    description = head.split("\n", 1)[1].strip("\n")
    assert description and not [line for line in description.splitlines() if line.startswith(" ")]
    plain = [" ".join(box.replace("│", " ").replace("─", " ").split()) for box in boxes]
    kinds = typing.get_type_hints(asked[0])
    for field in dataclasses.fields(asked[0]):
        kind = kinds[field.name]
        if dataclasses.is_dataclass(kind) and field.name != "config":  # whose own groups are those below it
            about = HEADINGS.get(field.name) or " ".join((kind.__doc__ or "").split())[:40]
            assert [box for box in plain if f" options ╮ {about}" in box], (field.name, about)

"""The paper's tables as commands: the values are those of docs/method.md, every option exists, every run has a folder
of its own.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from star_fast import cli, train
from star_fast.evaluation.paper import EXHIBITS, commands, run_folder
from star_fast.presets import preset

METHOD = (Path(__file__).resolve().parents[2] / "docs/method.md").read_text().replace("\n", " ")


def told(name: str, capsys: pytest.CaptureFixture) -> list[str]:
    assert cli.main(["paper", name]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("name", EXHIBITS)
def test_every_reported_number_stands_in_the_method(name: str) -> None:
    for row in EXHIBITS[name].rows:
        for number in re.findall(r"\d+(?:\.\d+)?", row.reported.split("(")[0]):
            assert number in METHOD or f"{number}0" in METHOD or number.removeprefix("0") in METHOD, (row, number)


@pytest.mark.parametrize("name", EXHIBITS)
def test_every_option_is_understood(name: str, capsys: pytest.CaptureFixture) -> None:
    lines = [line for line in told(name, capsys) if line and not line.startswith("#")]
    assert lines[0].startswith("star-fast prepare IMAGENET/train")
    helps: dict[str, str] = {}
    for line in lines:
        words = shlex.split(line)
        words = words[words.index("--") + 1 :] if words[0] == "torchrun" else words
        command = "train" if words[0] == "deepspeed" else words[1]
        if command not in helps:
            with pytest.raises(SystemExit):
                train.run_command(["--help"], "train.py") if command == "train" else cli.main([command, "--help"])
            helps[command] = capsys.readouterr().out
        for option in (word for word in words[2:] if word.startswith("--") and word != "--preset"):
            assert option in helps[command], (line, option)


def test_tables_without_guidance_say_so_and_others_sweep() -> None:
    for name, exhibit in EXHIBITS.items():
        scales = {
            match
            for row in exhibit.rows
            for line in commands(row, exhibit)
            for match in re.findall(r"--guidance (\S+)", line)
        }
        expected = {"table2": {"1.5", "1.75", "2"}}.get(name, {"1"} if "samples" in exhibit.measures else set())
        assert scales == expected, name


def test_rows_and_their_runs() -> None:
    for exhibit in EXHIBITS.values():
        folders = [run_folder(row) for row in exhibit.rows]
        assert len(set(folders)) == len(folders)
        for row in exhibit.rows:
            lines = list(commands(row, exhibit))
            if row.preset:
                assert preset(row.preset).model.num_classes == 1000 and lines[0].startswith(
                    f"deepspeed star_fast/train.py --preset {row.preset} "
                )
                both = "samples" in exhibit.measures and "--plain" not in row.options  # a baseline has no teacher
                assert any("--weights teacher" in line for line in lines) == both
            else:
                assert "--pixels 256" in lines[0] and row.released in lines[0]


def test_the_cost_is_that_of_the_plan(capsys: pytest.CaptureFixture) -> None:
    """50 epochs of XL: the same days as `star-fast plan` says for this GPU at this share."""
    assert cli.main(["plan", "--preset", "XL", "--gpus", "8"]) == 0
    days = next(line.split()[4] for line in capsys.readouterr().out.splitlines() if line.startswith("40%"))
    line = next(line for line in told("table1", capsys) if line.startswith("# XL, 50 epochs + ST-AR"))
    assert f"training, predicted: {float(days):.2g} days on 8 h100 at 40% of their peak" in line


def test_what_is_no_exhibit(capfd: pytest.CaptureFixture) -> None:
    assert cli.main(["paper", "table9"]) == 2
    assert "exhibit: expected table1 or table2" in capfd.readouterr().err

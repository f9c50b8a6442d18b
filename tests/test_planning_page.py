"""docs/planning.md is true: its commands run, and what it shows of them is what they print today."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from star_fast import cli
from star_fast.config_file import parse

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "planning.md").read_text()
SHOWN = re.findall(r"```bash\n(star-fast plan [^\n]*)\n```\n\n```text\n(.*?)\n```", TEXT, re.DOTALL)
LINES = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize(("line", "told"), SHOWN, ids=[line for line, _ in SHOWN])
def test_what_it_shows_is_what_is_printed(line: str, told: str, capfd: pytest.CaptureFixture) -> None:
    assert cli.main(line.split()[1:]) == 0
    assert told in capfd.readouterr().out


def test_every_line_is_understood(capfd: pytest.CaptureFixture) -> None:
    assert len(SHOWN) == 3 and len(LINES) == 8
    for line in LINES:
        words = line.split()
        if words[1] == "doctor":
            settings = parse(cli.DoctorCommand, words[2:], "star-fast doctor", "")
            assert (settings != cli.DoctorCommand()) == (len(words) > 2)
        else:
            assert cli.main(words[1:]) == 0
    assert "most of it: CPU" in " ".join(capfd.readouterr().out.split())  # as the page says of its last line

"""The README is true: its files exist, its commands and options are understood."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from star_fast import cli, train
from star_fast.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
LINES = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


def test_links_and_pictures_exist() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", TEXT) if not target.startswith("http")]
    assert len(targets) > 5
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_the_lines_of_python_are_those_of_the_example_that_is_run() -> None:
    [block] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert block.strip() == (ROOT / "examples/ten_lines.py").read_text().split('"""', 2)[2].strip()


def test_the_two_commands_can_be_run() -> None:
    assert LINES[:2] == ["scripts/quickstart.sh", "scripts/test.sh"]
    for script in (ROOT / "scripts").glob("*.sh"):
        assert os.access(script, os.X_OK), script


def test_files_named_in_the_text_exist() -> None:
    for path in re.findall(r"`((?:scripts|tests|benchmarks|star_fast|csrc)/[\w./]*)`", TEXT):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith(("star-fast", "deepspeed"))])
def test_commands_and_options_are_understood(line: str, capsys: pytest.CaptureFixture) -> None:
    words = line.split()
    if words[0] == "deepspeed":
        assert words[1] == "star_fast/train.py"
        assert words[words.index("--preset") + 1] in PRESETS
        with pytest.raises(SystemExit) as end:
            train.run_command(["--help"], "train.py")
    else:
        with pytest.raises(SystemExit) as end:
            cli.main(
                [
                    *words[
                        1 : 3 if words[1] == "data" or words[1:3] in (["plan", "sample"], ["plan", "prepare"]) else 2
                    ],
                    "--help",
                ]
            )
    assert end.value.code == 0
    help_text = capsys.readouterr().out
    for option in [word for word in words if word.startswith("--") and word != "--preset"]:
        assert option in help_text, f"{line}: {option} is no option"

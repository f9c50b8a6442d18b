"""The command lines of the project's pages, and whether the commands they name understand them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from star_fast import cli, data_commands, plan_commands, train

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = ("star-fast", "deepspeed", "torchrun", "sbatch")


class Read(Exception):
    """What a command made of its arguments, in place of its work."""

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.settings = settings


def lines_of(page: Path) -> list[str]:
    """The lines of a page's bash blocks, in their order; continued ones joined, comments and empty ones left out."""
    text = page.read_text()
    outside = re.search(r"^    (star-fast|torchrun|deepspeed|sbatch) ", text, re.MULTILINE)
    assert not outside, f"{page.name}: a command outside a bash block: {outside}"
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return [told for line in lines if (told := re.sub(r"(^|\s)#\s.*", "", line).strip())]


def understood(line: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The settings that a command reads from `line`, by its own parser and checks; launchers read theirs by their own.

    Fails where a launcher does not start what it should; raises as the command does where it refuses.
    """
    words = shlex.split(line)
    if words[0] == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        told = parse_args(words[1:])
        assert bool(told.hostfile != "/job/hostfile") == bool(told.master_addr), line
        words = [told.user_script, *told.user_args]
    elif words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        told = get_args_parser().parse_args(words[1:])
        # Without a rendezvous each machine would train alone
        assert (told.nnodes == "1:1") == (not told.rdzv_endpoint) and told.nproc_per_node == "8", line
        assert told.no_python == (told.training_script == "star-fast"), line
        words = [told.training_script, *told.training_script_args]
    elif words[0] == "sbatch":
        script = words.index("scripts/train.sbatch")
        assert words[1:script] == ["--nodes", "2"], line
        words = ["star_fast/train.py", "--run", *words[script + 1 :]]
    if words[0] == "star_fast/train.py":
        words[:1] = ["star-fast", "train"]
    assert words[0] == "star-fast" and words[1] in cli.COMMANDS, line
    if words[1] == "presets":
        assert not words[2:], line
        return None
    for module in (cli, data_commands, plan_commands, train):
        read = module.parse

        def stop(*arguments: Any, read: Any = read, **defaults: Any) -> None:
            raise Read(read(*arguments, **defaults))

        monkeypatch.setattr(module, "parse", stop)
    with pytest.raises(Read) as done:
        cli.COMMANDS[words[1]][0](words[2:])
    return done.value.settings

"""What `star-fast doctor` says about one part, and how it is shown: a mark, a name, a sentence, and a line that mends
it.
"""

from __future__ import annotations

import textwrap
from typing import NamedTuple

from star_fast.errors import printable

OK, WITHOUT, MISSING = "ok", "--", "!!"
WIDTH = 96
_NAME_WIDTH = 16


class Finding(NamedTuple):
    """One part of a machine or of an installation."""

    # OK; WITHOUT: not there or not as it should be, and things work without it; MISSING: the stage it stands under
    # cannot run, or runs wrongly
    mark: str
    name: str
    told: str  # what was found, and what goes without it
    fix: str = ""  # what to do, a command where there is one


def shown(title: str, findings: list[Finding]) -> str:
    """A heading and its findings, at most WIDTH columns but for what cannot be broken, such as a command."""
    lines = [printable(title)]
    for finding in findings:
        start = f"  {finding.mark}  {printable(finding.name):{_NAME_WIDTH}} "
        lines += _wrapped(finding.told, start, " " * len(start))
        if finding.fix:
            lines += [f"{' ' * len(start)}fix: {printable(finding.fix)}"]
    return "\n".join(lines)


def _wrapped(text: str, first: str, others: str) -> list[str]:
    return textwrap.wrap(
        printable(text),
        WIDTH,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )

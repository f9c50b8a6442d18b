"""What scripts/coverage.sh found, by part of the package: python scripts/covered_lines.py [--save]"""

from __future__ import annotations

import argparse
import datetime
import io
import platform
from collections import defaultdict
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from coverage import Coverage
from rich.console import Console
from rich.markdown import Markdown

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "benchmarks/results/coverage.md"
LEAST = 90  # per cent of a file's lines


class Lines(NamedTuple):
    """Of a file or a part."""

    run: int
    counted: int

    @property
    def share(self) -> float:
        """Per cent."""
        return 100 * self.run / max(1, self.counted)


def lines_by_file() -> dict[str, Lines]:
    """Of each file, by its path within star_fast/: how many lines there are, and how many ran."""
    found, measured = {}, Coverage()
    measured.load()
    with redirect_stdout(io.StringIO()):
        for path in sorted((ROOT / "star_fast").rglob("*.py")):
            _, counted, _, missing, _ = measured.analysis2(str(path))
            found[path.relative_to(ROOT / "star_fast").as_posix()] = Lines(len(counted) - len(missing), len(counted))
    return found


def page(files: dict[str, Lines]) -> str:
    """The total, then by part, then the files below LEAST."""
    parts: dict[str, list[Lines]] = defaultdict(list)
    for file, lines in files.items():
        parts[file.rpartition("/")[0] or "single files"].append(lines)
    sums = {part: Lines(*map(sum, zip(*several, strict=True))) for part, several in sorted(parts.items())}
    whole = Lines(*map(sum, zip(*files.values(), strict=True)))
    low = {file: lines for file, lines in files.items() if lines.counted and lines.share < LEAST}
    return "\n".join(
        [
            "# Lines that the tests run",
            "",
            f"`SAVE=1 scripts/coverage.sh`, {datetime.date.today()}, Python {platform.python_version()}, coverage "
            f"{version('coverage')}, torch {version('torch')}, no GPU. **{whole.share:.1f} %** of the {whole.counted} "
            "lines of `star_fast/` are run by a test, in whatever process it starts. Nothing is left out for want of a "
            "GPU: Triton's kernels run in its interpreter, branches that only a GPU takes count as not run.",
            "",
            "| part | lines | run |",
            "|---|--:|--:|",
            *(f"| {part} | {lines.counted} | {lines.share:.1f} % |" for part, lines in sums.items()),
            "",
            f"Files below {LEAST} %: " if low else f"No file is below {LEAST} %.",
            *(
                [
                    ", ".join(f"`{file}` {low[file].share:.0f} %" for file in sorted(low, key=lambda f: low[f].share))
                    + "."
                ]
                if low
                else []
            ),
            "",
        ]
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Totals of the last scripts/coverage.sh.")
    parser.add_argument("--save", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    text = page(lines_by_file())
    Console().print(Markdown(text))
    if parser.parse_args().save:
        PAGE.write_text(text)


if __name__ == "__main__":
    main()

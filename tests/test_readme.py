"""The README is true: its files exist, its numbers stand on the pages they are linked to, its first screen and its
length are what they are meant to be. Its commands: test_docs.py.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from star_fast.method import objective
from tests.command_lines import lines_of

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


def test_length_and_first_screen() -> None:
    lines = TEXT.splitlines()
    assert len(lines) <= 250
    first = "\n".join(lines[:20])
    assert all(part in first for part in ("](docs/quickstart.png)", "scripts/quickstart.sh", "scripts/test.sh"))


def test_the_lines_of_python_are_those_of_the_example_that_is_run() -> None:
    [block] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert block.strip() == (ROOT / "examples/ten_lines.py").read_text().split('"""', 2)[2].strip()


def test_the_two_commands_can_be_run() -> None:
    assert lines_of(ROOT / "README.md")[:2] == ["scripts/quickstart.sh", "scripts/test.sh"]
    for script in (ROOT / "scripts").glob("*.sh"):
        assert os.access(script, os.X_OK) == script.read_text().startswith("#!"), script  # without: to be sourced


def test_files_named_in_the_text_exist() -> None:
    paths = re.findall(r"`(?:sudo |python )?((?:scripts|tests|benchmarks|star_fast|csrc)/[\w./]*)`", TEXT)
    assert len(paths) > 5
    for path in paths:
        assert (ROOT / path).exists(), path


def test_the_equations_name_their_functions() -> None:
    section = TEXT.split("## How it works")[1].split("\n## ")[0]
    names = re.findall(r"`(\w+)`", section)
    assert names == ["masked_feature_loss", "contrastive_losses", "step_pairs", "view_pairs", "weighted_sum"]
    assert all(callable(getattr(objective, name)) for name in names)


# Page: what the README says, and what the page must hold for it.
FIGURES = {
    "sampling.md": {
        "0.59 s an image": "| star-fast sample | 1.69 | 0.590 | 3.44 |",
        "(2.03 s)": "| LlamaGen style | 0.49 | 2.033 | 1.00 |",
        "0.46 s,\n  **4.4x**": "| star-fast sample, int8 | 2.17 | 0.461 | 4.41 |",
        "The codes alone: 2.6x": "| packed | 46.9 | 3.11 | 2.61 |",
        "in 8 bits 4.1x": "| int8, int8 cache | 29.5 | 4.89 | 4.11 |",
        "8-bit products 1.8x": "| int8 | 9.0 | 1.77 |",
        "at 94 % of what plain reads": "| 224 | 24.4 | 22.0 | 94% |",
        "4.8 % off, bf16 1.5 %": "| 1.87 | 1.20 | 4.78% |",
    },
    "training.md": {
        "1.8 s, **1.9x**": "**1.90 x** as fast as plain PyTorch, ST-AR; peak memory 0.93 of its",
        "(3.4 s)": "| plain PyTorch, ST-AR | 3429 |",
        "1.46x where that too keeps its freed memory": "**1.46 x** as fast as plain PyTorch, ST-AR, freed memory kept",
        "as many sequences: 2.0x": "**2.00 x** as fast as LlamaGen's way, plain",
    },
    "neighbour.md": {"97 images/s of `tiny`, 26 by": "| OpenMP's default | 193 | 100% | 26 | 14% |"},
    "loading.md": {"435 images/s, 4.4x": "| Pillow in threads (ours) | 435 | 6% | 4.2 | 4.39 |"},
    "tokenizer.md": {"7 minutes of CPU time, 42": "| 2512 s |"},
    "evaluation.md": {"1 minute for FID, sFID, IS": "| 59 s |", "5.5 for exact precision": "| 330 s |"},
    "eight_bits.md": {
        "96.2 ± 0.8 % of the class": "| int8, int8 cache | 96.20% +- 0.76% |",
        "float32 96.1 ± 1.2": "| float32 | 96.12% +- 1.15% |",
        "right on 98.8 %": "right on 98.8% of held-out real digits",
    },
    "small_study.md": {
        "| 81.8 → 68.4 % | 63.1 % |": "| 68.4 ± 5.0 | 81.8 ± 0.9 | 13.4 ± 4.5 | 63.1 ± 4.0 |",
        "| 81.5 → 74.3 % | 72.3 % |": "| 74.3 ± 4.6 | 81.5 ± 2.0 | 7.2 ± 5.7 | 72.3 ± 3.8 |",
        "| 82.7 → **79.7 %** | **77.9 %** |": "| 79.7 ± 0.7 | 82.7 ± 1.7 | 3.0 ± 1.9 | 77.9 ± 0.8 |",
    },
    "plan_check.md": {"within 8 % of the measured peak in eleven": "| 996 | 923 | +8% |"},
    "ranks_and_zero.md": {"gradients to 1e-6, 20 losses to 1e-5": "Bounds: gradients 1e-6, losses 1e-5"},
    "h100.md": {
        "GPT-B 785 images/s, **2.6x** plain PyTorch in 0.55": "| B, ST-AR | 32 | 41 | 785 | 2.57 | 7.4 | 0.55 |",
        "XL 90 images/s, 1.6x": "| XL, ST-AR | 16 | 177 | 90 | 1.58 |",
        "B 232 images/s, XL 89;": "| B | 4096 | 256 | 17.6 | 232 |\n| B, int8 cache | 2048 | 256 | 9.6 | 213 |\n"
        "| XL | 1024 | 256 | 11.6 | 89 |",
        "B's codes alone **10.8x**": "(**10.8 x** by",
        "pixels 2.2x what torch's GroupNorm": "(what is used) | 16 | 1.16 | 2.52 | 2.2 |",
    },
    "coverage.md": {"run 97.7 % of the package's": "**97.7 %** of the 17185 lines"},
    "mutations.md": {"105 of 105 faults put in": "105 of 105 faults were caught"},
    "fuzz.md": {"100,000 damaged": "| all |  | 100096 | 20173 | 79923 | 0 | 0 | 0 | 0 | 0 | 0 | 0 |"},
}


@pytest.mark.parametrize("page", FIGURES)
def test_figures_are_those_of_their_pages(page: str) -> None:
    assert f"(benchmarks/results/{page})" in TEXT
    there = (RESULTS / page).read_text()
    for said, shown in FIGURES[page].items():
        assert said in TEXT, f"the README no longer says {said!r}"
        assert shown in there, f"{page} no longer shows {shown!r}, of which the README says {said!r}"


def test_the_cluster_lines_are_those_that_are_run() -> None:
    """scripts/two_hosts.sh takes them from the README and changes nothing but names and numbers."""
    done = subprocess.run(["scripts/two_hosts.sh", "--lines"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = re.sub(r"\\\n\s*", "", done.stdout).splitlines()
    shown = [line for line in lines_of(ROOT / "README.md") if re.search(r"--hostfile|--nnodes|sbatch", line)]
    assert len(run) == len(shown) == 3
    for line, small in zip(shown, run, strict=True):
        words = iter(small.split())  # what `in` has passed is gone: the same words in the same order
        kept = [word for word in line.split() if word not in {"8", "hosts", "XL", "data/imagenet", "runs/XL"}]
        assert len(kept) > 5 and all(word in words for word in kept), (line, small)

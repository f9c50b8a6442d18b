"""docs/kernels/ is true where a machine can tell: a page for every op, backends, kernels, constants and costs as the
code has them, links that lead somewhere.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from star_fast import ops  # noqa: F401 (registers the ops)
from star_fast.ops import dispatch

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs/kernels"
OPS = dispatch.op_names()
HEADINGS = ["Formula", "What a plain implementation costs", "Bytes and FLOPs", "Numerics", "Proof", "Figures"]


def page(name: str) -> str:
    return (PAGES / f"{name}.md").read_text()


def quoted_constants() -> list[tuple[str, str, str, str]]:
    """(page, name, value, file) of every row of a table of constants."""
    row = re.compile(r"^\| `([\w\[\]]+)` \| `([^`]+)` \| \[[^]]+\]\(([^)]+)\) \|$", re.MULTILINE)
    return [(name, *found) for name in OPS for found in row.findall(page(name))]


def constant_of(file: Path, name: str) -> Any:
    """What a module or header sets a constant to, read from its text: a number, or a tile as nested tuples."""
    name, _, key = name.partition("[")
    text = file.read_text()
    if file.suffix == ".py":
        (value,) = (
            node.value
            for node in ast.parse(text).body
            if isinstance(node, ast.Assign) and any(ast.unparse(target) == name for target in node.targets)
        )
        found = eval(ast.unparse(value), {"Tile": lambda block, num_warps, num_stages: (block, num_warps, num_stages)})
        return found[int(key.rstrip("]"))] if key else found
    (value,) = re.findall(rf"^\s*constexpr \w+ {name} = ([^;]+);", text, re.MULTILINE)
    return ast.literal_eval(value)


def test_every_op_has_a_page_and_a_place_in_the_index() -> None:
    assert sorted(path.stem for path in PAGES.glob("*.md")) == sorted([*OPS, "README"])
    index = page("README")
    rows = dict(re.findall(r"^\| \[(\w+)\] \| ((?:`\w+`(?:, )?)+) \|", index, re.MULTILINE))
    assert rows == {name: ", ".join(f"`{backend}`" for backend in dispatch.backends(name)) for name in OPS}
    for name in OPS:
        assert len(re.findall(rf"^\| \[{name}\] ", index, re.MULTILINE)) == 2 and f"\n[{name}]: {name}.md\n" in index


@pytest.mark.parametrize("name", OPS)
def test_a_page_has_its_parts_and_names_the_backends_that_there_are(name: str) -> None:
    text = page(name)
    assert text.startswith(f"# {name}\n") and len(text.splitlines()) <= 85
    assert [heading for heading in re.findall(r"^## (.+)$", text, re.MULTILINE) if heading in HEADINGS] == HEADINGS
    told = re.search(r"^\*\*Backends:\*\* (.*?)Contract\s+and", text, re.MULTILINE | re.DOTALL)[1]
    assert re.findall(r"`(\w+)`", told) == dispatch.backends(name)


@pytest.mark.parametrize("name", [*OPS, "README"])
def test_links_lead_somewhere(name: str) -> None:
    """A link whose text is `a name` leads to a file that has this name."""
    links = re.findall(r"\[([^]]+)\]\(([^)#]+)(?:#[^)]*)?\)", page(name))
    assert len(links) > 4
    for text, target in links:
        file = PAGES / target
        assert file.exists(), f"{name}: {target}"
        if re.fullmatch(r"`\w+`", text):
            assert re.search(rf"\b{text.strip('`')}\b", file.read_text()), f"{name}: {target} has no {text}"
    assert max(map(len, page(name).splitlines())) <= 120
    if "(README.md#on-a-gpu)" in page(name):
        assert "\n## On a GPU\n" in page("README")


def test_constants_are_the_codes() -> None:
    quoted = quoted_constants()
    assert len(quoted) > 30
    wrong = [
        f"{name}: {constant} is {found}, the page says {value}"
        for name, constant, value, file in quoted
        if (found := constant_of(PAGES / file, constant)) != ast.literal_eval(value)
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("name", OPS)
def test_every_kernel_is_named(name: str) -> None:
    """Those that run in Triton, by their modules."""
    path = dispatch.module_paths(name).get("triton")
    kernel = import_module("star_fast.ops.triton.launching").Kernel
    for found in vars(import_module(path)).values() if path else ():
        if isinstance(found, kernel):
            assert f"[`{found.name}`]" in page(name), found.name


def arguments(name: str) -> dict[str, Any]:
    """Of one call at preset B in bfloat16, without data where the op allows it; attention with nothing hidden."""
    module = dispatch.module_of(name)
    if name == "int8_linear":  # packs its weights by their values; only their shape counts
        shape = import_module("star_fast.ops.shapes").SHAPES["B"]
        return {
            "x": torch.empty(shape.sequences, shape.D, dtype=torch.bfloat16),
            "weight": SimpleNamespace(shape=(2 * shape.F, shape.D)),
        }
    with FakeTensorMode():
        call = module.inputs("B", torch.bfloat16)
    return call | {"keep": None} if name == "masked_attention_qkv" else call


@pytest.mark.parametrize("name", OPS)
def test_bytes_and_flops_are_the_ops_own(name: str) -> None:
    cost = dispatch.module_of(name).cost
    rows = dict(re.findall(r"^\| (forward|backward) \| ([\d.]+ \| [\d.]+) \|$", page(name), re.MULTILINE))
    assert "forward" in rows
    if "backward" in rows:
        assert "backward" in inspect.signature(cost).parameters
    for direction, told in rows.items():
        bytes_moved, flops = cost(arguments(name), **({"backward": True} if direction == "backward" else {}))
        assert told == f"{bytes_moved / 1e6:.1f} | {flops / 1e9:.3f}", direction


def test_plain_pytorch_costs_what_is_said() -> None:
    """As the benchmark counts it now; and the pages say no other number of it."""
    index = page("README")
    if not torch.__version__.startswith(re.search(r"\(torch ([\d.]+)\)", index)[1]):
        pytest.skip("another torch takes other operations")
    done = subprocess.run(
        [sys.executable, "benchmarks/plain_bytes.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"\n{done.stdout}\n" in index
    for name, _, moved, _, backward in re.findall(
        r"^\| (\w+) \| (\d+) \| (\d+) \| (\d*) \| (\d*) \|$", index, re.MULTILINE
    ):
        section = re.search(r"## What a plain implementation costs\n(.*?)\n## ", page(name), re.DOTALL)[1]
        assert re.search(rf"\b{backward or moved}\s+MB", section), name


def test_what_is_said_of_gpus() -> None:
    """Unmeasured as long as no report is there, and no longer."""
    reports = list((ROOT / "benchmarks/results").glob("gpu_acceptance_*.md"))
    section = page("README").split("\n## On a GPU\n")[1]
    assert ("Unmeasured" in section) == (not reports)
    assert all(f"results/{report.name})" in section for report in reports if not report.stem.endswith("_details"))

"""docs/api.md is what scripts/api_page.py writes now, and what it writes is so: names that can be imported from where
it says, with the parameters that Python sees, and Markdown that shows what was meant.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import star_fast
from star_fast import method, ops

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/api.md"
TEXT = PAGE.read_text()
# Link, source, then up to the line break: the call, or the class, as the page shows it.
ENTRY = re.compile(r"^### \[([\w.]+)\]\(\.\./([\w/.]+)\)\n`((?:class )?[^`]+)`\\$", re.MULTILINE)
ENTRIES = [(name, source, re.sub(r"\s+", " ", call)) for name, source, call in ENTRY.findall(TEXT)]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("api_page", ROOT / "scripts/api_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_the_one_that_the_script_writes(script: ModuleType) -> None:
    assert script.text() == TEXT, "docs/api.md is behind the code: run python scripts/api_page.py"


def test_the_script_needs_the_standard_library_alone() -> None:
    tree = ast.parse((ROOT / "scripts/api_page.py").read_text())
    assert all(
        node.module in sys.stdlib_module_names | {"collections.abc"}
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    )
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert names and set(names) <= sys.stdlib_module_names


def test_what_is_public_is_there() -> None:
    names = {name for name, _, _ in ENTRIES}
    assert names >= {*ops.__all__, *method.__all__}
    modules = {name for name in star_fast.__all__ if f"\n## star_fast.{name}\n" in TEXT}
    assert modules == {"ops", "method"}
    assert names >= {f"star_fast.{name}" for name in set(star_fast.__all__) - modules}
    assert len(TEXT.splitlines()) < 1000 and max(map(len, TEXT.splitlines())) <= 120
    assert len(ENTRIES) == TEXT.count("\n### ") > 60


def named(dotted: str) -> Any:
    """An object by the name that the page gives it, imported as a reader would."""
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("name", "source", "call"), ENTRIES, ids=[name for name, _, _ in ENTRIES])
def test_an_entry_is_importable_and_has_these_parameters(name: str, source: str, call: str) -> None:
    dotted = re.match(r"(?:class )?([\w.]+)", call)[1]
    assert dotted.endswith(name)
    if name == "HubModel":
        pytest.importorskip("huggingface_hub")  # whose class it extends
    thing = named(dotted)
    if thing is star_fast.train:
        thing = thing.__call__
    assert Path(inspect.getsourcefile(inspect.unwrap(thing))) == ROOT / source
    if call.startswith("class "):
        return
    shown = ast.parse(f"def f{call[call.index('(') :]}: ...").body[0].args
    given = list(inspect.signature(thing).parameters.values())
    positional = [*shown.args, *([shown.vararg] if shown.vararg else [])]
    assert [one.arg for one in positional] == [
        one.name for one in given if one.kind in (one.POSITIONAL_OR_KEYWORD, one.VAR_POSITIONAL)
    ]
    assert [one.arg for one in shown.kwonlyargs] == [one.name for one in given if one.kind == one.KEYWORD_ONLY]
    defaults = [*shown.defaults, *(one for one in shown.kw_defaults if one is not None)]
    expected = [one.default for one in given if one.default is not one.empty]
    assert len(defaults) == len(expected)
    for told, default in zip(defaults, expected, strict=True):
        if isinstance(told, ast.Constant):
            assert told.value == default


def test_links_lead_somewhere(script: ModuleType) -> None:
    headings = re.findall(r"^#{2,3} (?:\[([\w.]+)\]|([\w.]+)$)", TEXT, re.MULTILINE)
    anchors = {script.anchor(linked or plain) for linked, plain in headings}
    links = re.findall(r"(?<!\\)\]\(([^)]+)\)", TEXT)
    assert len(links) > 120
    for link in links:
        assert link[1:] in anchors if link.startswith("#") else (PAGE.parent / link).exists(), link


def test_nothing_is_markup_by_accident() -> None:
    """No quotation, rule, table or numbered list from a line of prose, no emphasis from a product."""
    html = pytest.importorskip("markdown_it").MarkdownIt("commonmark").render(TEXT)
    assert set(re.findall(r"<(\w+)", html)) == {"a", "br", "code", "em", "h1", "h2", "h3", "li", "p", "pre", "ul"}
    assert set(re.findall(r"<em>(.*?)</em>", html)) <= {"returns", "raises", "yields"}
    assert html.count("<h3>") == len(ENTRIES) and "\\" not in re.sub(r"<code>.*?</code>", "", html, flags=re.DOTALL)


@pytest.mark.parametrize("sign", ["-", "+", "*", "#", ">", ">=", "2."])
def test_no_line_begins_as_a_list_or_a_quotation(script: ModuleType, sign: str) -> None:
    """Wherever the line would break: after each number of letters once."""
    for letters in range(60, 125):
        lines = script.wrapped(f"{'a ' * 20}{'x' * (letters - 40)} {sign} b {'c ' * 40}", "- ")
        assert len(lines) > 1 and not [line for line in lines[1:] if line.split()[0] == sign]
        assert " ".join(line[2:] for line in lines) == f"{'a ' * 20}{'x' * (letters - 40)} {sign} b {'c ' * 40}".strip()

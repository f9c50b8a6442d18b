"""Writes docs/api.md, what star_fast offers from Python, from signatures and docstrings.

    python scripts/api_page.py        needs neither torch nor the package to be installed

It reads the sources and runs none of them, so the page is the same under every Python and whatever else is installed.
ENTRIES says what is public and in which order; a name is followed to where it is defined.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/api.md"
WIDTH = 120
SHOWN = ("Args", "Attributes", "Returns", "Yields", "Raises")  # of a docstring's sections; others stay in the source
LISTS = ("Args", "Attributes")
MOST_FIELDS = 25  # lines of a class that are shown
# Of star_fast itself, wherever they are defined.
TOP_LEVEL = ("load", "ImageModel", "Images", "run_config", "RunConfig", "UserError")

# Heading -> what stands below it, and what is public: MODULE:NAME, MODULE:* for its __all__ in this order, and
# MODULE:NAME as NAME.
ENTRIES = {
    "star_fast": (
        "The few names of `import star_fast`, which loads nothing until one is used. At work: [python.md](python.md).",
        [
            "star_fast.api:load",
            "star_fast.api:ImageModel",
            "star_fast.generation.images:Images",
            "star_fast.hub_model:HubModel",
            "star_fast.api:run_config",
            "star_fast.config:RunConfig",
            "star_fast.train:_Callable.__call__ as train",
            "star_fast.errors:UserError",
        ],
    ),
    "star_fast.ops": (
        "The operations: each checks its arguments, then runs on the backend chosen for the call. What each computes "
        "and costs, and how it is proved: [kernels](kernels/README.md).",
        ["star_fast.ops:*"],
    ),
    "star_fast.method": (
        "ST-AR for our transformer or anybody's decoder: `objective` has one function an equation of "
        "[method.md](method.md), `masking` every random choice.",
        [
            "star_fast.method:*",
            "star_fast.method.objective:autoregressive_loss",
            "star_fast.method.objective:masked_feature_loss",
            "star_fast.method.objective:contrastive_losses",
            "star_fast.method.objective:objective",
            "star_fast.method.masking:key_mask",
            "star_fast.method.masking:choose_views",
            "star_fast.method.masking:label_drop",
            "star_fast.method.masking:position_set",
        ],
    ),
    "star_fast.model": (
        "What is trained, what tokenizes, and their files: model folders and released LlamaGen weights.",
        [
            "star_fast.model.transformer:Transformer",
            "star_fast.model.tokenizer:VQTokenizer",
            "star_fast.model.weights:load_model",
            "star_fast.model.weights:LoadedModel",
            "star_fast.model.weights:save_model",
            "star_fast.model.llamagen:load_transformer",
            "star_fast.model.llamagen:save_transformer",
            "star_fast.model.llamagen:load_tokenizer",
        ],
    ),
    "star_fast.data": (
        "Images to codes: sources, views, the code store. The formats: [data.md](data.md).",
        [
            "star_fast.data.sources:open_source",
            "star_fast.data.image_source:ImageSource",
            "star_fast.data.image_source:Sample",
            "star_fast.data.prepare:prepare",
            "star_fast.data.codes:CodeStore",
            "star_fast.data.llamagen_codes:import_llamagen_codes",
            "star_fast.data.llamagen_codes:export_llamagen_codes",
        ],
    ),
    "star_fast.generation": (
        "Weights to codes. With pixels: `ImageModel.sample` above, and `star-fast sample` for many.",
        [
            "star_fast.generation:*",
        ],
    ),
    "star_fast.evaluation": (
        "Images and features to numbers. The commands and their protocols: [evaluation.md](evaluation.md), "
        "[understanding.md](understanding.md). The functions `run_...` are those commands; `star-fast COMMAND --help` "
        "explains the fields of their configs.",
        [
            "star_fast.evaluation.evaluate:run_evaluate",
            "star_fast.evaluation.adm:adm_metrics",
            "star_fast.evaluation.frechet:frechet_distance",
            "star_fast.evaluation.inception:open_inception",
            "star_fast.evaluation.probe:run_probe",
            "star_fast.evaluation.probe:probe_positions",
            "star_fast.evaluation.probe_training:linear_probe",
            "star_fast.evaluation.attention_maps:block_attention",
            "star_fast.evaluation.attention_maps:attention_shares",
            "star_fast.evaluation.memorisation:memorisation",
        ],
    ),
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Found(NamedTuple):
    """One public thing, where it is imported from and where it is defined."""

    name: str
    module: str
    path: Path
    source: str  # of the file
    node: Function | ast.ClassDef


def text() -> str:
    """The page."""
    sections = {
        heading: (lead, [one for entry in entries for one in entries_of(entry)])
        for heading, (lead, entries) in ENTRIES.items()
    }
    headings = [*sections, *(one.name for _, found in sections.values() for one in found)]
    if twice := {name for name in headings if headings.count(name) > 1}:
        raise SystemExit(f"api_page: two entries of one name, which links cannot tell apart: {', '.join(twice)}")
    lines = [
        "# star_fast from Python: the reference",
        "",
        "<!-- Written by scripts/api_page.py from signatures and docstrings: change those, then run it again. -->",
        "",
        *wrapped(
            "Names, arguments, results and errors, as the sources have them; the module before each entry is where it "
            "is imported from. A mistake of the user raises `star_fast.UserError`, one line; operations and the method "
            "raise `TypeError` or `ValueError` with the name of the function that was called."
        ),
    ]
    for heading, (_, found) in sections.items():
        links = ", ".join(f"[{one.name}](#{anchor(one.name)})" for one in found)
        lines += ["", *wrapped(f"[{heading}](#{anchor(heading)}): {links}")]
    for heading, (lead, found) in sections.items():
        lines += ["", f"## {heading}", "", *wrapped(lead)]
        for one in found:
            lines += ["", *described(one)]
    return "\n".join(lines) + "\n"


def entries_of(entry: str) -> list[Found]:
    """What an entry of ENTRIES stands for."""
    place, _, name = entry.partition(" as ")
    module, _, wanted = place.partition(":")
    if wanted == "*":
        (names,) = (
            ast.literal_eval(node.value)
            for node in tree_of(file_of(module)).body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        )
        return [find(module, one)._replace(module=module) for one in names]
    one = find(module, wanted)
    if wanted in TOP_LEVEL or name:
        return [one._replace(name=f"star_fast.{name or wanted}", module="star_fast")]
    return [one]


def find(module: str, name: str) -> Found:
    """The definition of a name, followed through `from ... import`.

    Raises:
        SystemExit: there is none; the line names the entry.
    """
    path = file_of(module)
    first, _, rest = name.partition(".")
    for node in tree_of(path).body:
        if isinstance(node, ast.ImportFrom) and first in [alias.asname or alias.name for alias in node.names]:
            return find(str(node.module), name)
        if isinstance(node, Function | ast.ClassDef) and node.name == first:
            inner = next((one for one in methods(node) if one.name == rest), None) if rest else node
            if inner is not None:
                return Found(name, module, path, path.read_text(), inner)
    raise SystemExit(f"api_page: {module} has no {name}; say in ENTRIES of scripts/api_page.py where it is now")


def file_of(module: str) -> Path:
    """A module's file."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """A file's syntax tree."""
    if not path.exists():
        raise SystemExit(f"api_page: {path.relative_to(ROOT)} is not there; say in ENTRIES what has its names now")
    return ast.parse(path.read_text())


def described(one: Found) -> Iterator[str]:
    """The lines of one entry."""
    yield f"### [{one.name}](../{one.path.relative_to(ROOT).as_posix()})"
    whole = one.name if one.module == "star_fast" else f"{one.module}.{one.name}"
    if isinstance(one.node, Function):
        yield from explained(one.node, signature(one.source, one.node, whole))
        return
    makes = next((node for node in methods(one.node) if node.name == "__init__"), None)
    fields = [] if makes is not None else list(fields_of(one))
    yield from explained(one.node, f"class {whole}" if makes is None else signature(one.source, makes, whole))
    if makes is not None:
        yield from points_of(makes, "- ")
    if 0 < len(fields) <= MOST_FIELDS:
        yield from ("```python", *fields, "```")
    elif fields:
        yield from wrapped("Its fields, with their meaning, unit and default, stand in the source.")
    for node in methods(one.node):
        if not node.name.startswith("_") and ast.get_docstring(node):
            kinds = {ast.unparse(decorator) for decorator in node.decorator_list}
            of = one.node.name if kinds & {"classmethod", "staticmethod"} else ""
            call = signature(one.source, node, f"{of}.{node.name}")
            call = call.replace("()", "", 1) if "property" in kinds else call
            yield from wrapped(f"`{call}`: {escaped(first_paragraph(node))}", "- ")
            yield from points_of(node, "  - ")


def methods(node: ast.AST) -> Iterator[Function]:
    """Functions of a class, overloads left out."""
    for inner in getattr(node, "body", []):
        if isinstance(inner, Function) and not any("overload" in ast.unparse(one) for one in inner.decorator_list):
            yield inner


def fields_of(one: Found) -> Iterator[str]:
    """The fields of a dataclass, NamedTuple or Protocol with their comments, as the source has them."""
    lines = one.source.splitlines()
    for node in one.node.body:
        if not isinstance(node, ast.AnnAssign) or ast.unparse(node.target).startswith("_"):
            continue
        first = node.lineno - 1
        while lines[first - 1].strip().startswith("#"):
            first -= 1
        yield from textwrap.dedent("\n".join(lines[first : node.end_lineno])).splitlines()


def signature(source: str, node: Function, name: str) -> str:
    """NAME(arguments) -> result; `self` and `cls` left out."""

    def told(argument: ast.arg, default: ast.expr | None, stars: str = "") -> str:
        equals = " = " if argument.annotation else "="
        return stars + exactly(source, argument) + (equals + value(source, default) if default else "")

    given = node.args
    positional = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(positional) - len(given.defaults)) + given.defaults
    parts = [told(*pair) for pair in zip(positional, defaults, strict=True)]
    if positional and positional[0].arg in ("self", "cls"):
        parts = parts[1:]
    if given.vararg:
        parts.append(told(given.vararg, None, "*"))
    elif given.kwonlyargs:
        parts.append("*")
    parts += [told(*pair) for pair in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    if given.kwarg:
        parts.append(told(given.kwarg, None, "**"))
    result = f" -> {exactly(source, node.returns)}" if node.returns and node.name != "__init__" else ""
    return f"{name}({', '.join(parts)}){result}"


def exactly(source: str, node: ast.AST) -> str:
    """A node as it is written, on one line."""
    lines = lines_of(source)[node.lineno - 1 : node.end_lineno]
    lines[-1] = lines[-1][: node.end_col_offset]
    lines[0] = lines[0][node.col_offset :]
    return re.sub(r"\s+", " ", b" ".join(lines).decode())


@functools.cache
def lines_of(source: str) -> list[bytes]:
    """Lines in UTF-8, whose bytes a syntax tree's columns count."""
    return source.encode().splitlines()


def value(source: str, default: ast.expr) -> str:
    """A default as it is written; where that is a private name of the module, what the name stands for."""
    if not isinstance(default, ast.Name) or not default.id.startswith("_"):
        return exactly(source, default)
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == ast.unparse(default):
            return exactly(source, node.value)
    return exactly(source, default)


def paragraphs(node: Function | ast.ClassDef) -> list[str]:
    """A docstring's paragraphs, line breaks inside them kept."""
    return re.split(r"\n\s*\n", inspect.cleandoc(ast.get_docstring(node, clean=False) or ""))


SECTION = re.compile(rf"^({'|'.join(SHOWN)}):[ \n]", re.MULTILINE)


def first_paragraph(node: Function | ast.ClassDef) -> str:
    """Of a docstring, up to the first of its sections."""
    return SECTION.split(paragraphs(node)[0] + "\n")[0]


def explained(node: Function | ast.ClassDef, call: str) -> Iterator[str]:
    """A call, below it the first paragraph of its docstring, and the sections."""
    *lines, last = wrapped(f"`{call}`")
    yield from (*lines, last + "\\", *wrapped(escaped(first_paragraph(node))), *points_of(node, "- "))


def points_of(node: Function | ast.ClassDef, bullet: str) -> Iterator[str]:
    """The shown sections of a docstring as a list."""
    for paragraph in paragraphs(node):
        parts = SECTION.split(paragraph + "\n")
        for title, body in zip(parts[1::2], parts[2::2], strict=True):
            whole = [] if title in LISTS else [f"*{title.lower()}* {escaped(body)}"]
            for point in whole or [escaped(item) for item in items(body)]:
                yield from wrapped(point, bullet)


def items(body: str) -> Iterator[str]:
    """Entries of a list of arguments, their names as code: a line that is indented no further than the first begins
    one.
    """
    lines = textwrap.dedent(body).strip("\n").splitlines()
    begun: list[str] = []
    for line in lines:
        begins = re.match(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*)(:| \()", line)
        if begins and begun:
            yield " ".join(begun)
            begun = []
        begun.append(f"`{begins[1]}`{line[begins.end(1) :]}" if begins else line.strip())
    if begun:
        yield " ".join(begun)


def escaped(prose: str) -> str:
    """Prose for Markdown: what would be read as emphasis or a link is not; `code` stays."""
    parts = re.split(r"(`[^`]*`)", re.sub(r"\s+", " ", prose).strip())
    emphasis = r"(?<! )\*|\*(?! )|~|<(?=[\w/!?])|(?<!\w)_|_(?!\w)|\](?=\()"
    return "".join(part if part.startswith("`") else re.sub(f"({emphasis})", r"\\\1", part) for part in parts)


def wrapped(prose: str, bullet: str = "") -> list[str]:
    """Lines of at most WIDTH columns. None begins with what Markdown would take for a list, a heading or a quotation:
    that stays with the word before it.
    """
    bound = re.sub(r" (?=>|(?:[-+*#]|\d+[.)])(?:\s|$))", "\0", prose)
    lines = textwrap.wrap(bound, WIDTH - len(bullet) - 1, break_long_words=False, break_on_hyphens=False)
    return [(" " * len(bullet) if number else bullet) + line.replace("\0", " ") for number, line in enumerate(lines)]


def anchor(heading: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


if __name__ == "__main__":
    PAGE.write_text(text())
    print(f"wrote {PAGE.relative_to(ROOT)}, {len(PAGE.read_text().splitlines())} lines")

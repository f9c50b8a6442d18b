"""The house rules: who may import whom, names, file lengths, imports without side effects."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "star_fast"
MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# What each part of the package may import from the rest of it. Single files stand for themselves.
MAY_IMPORT = {
    "errors": set(),
    "records": {"errors"},
    "tokenizer_config": {"errors", "records"},
    "config": {"tokenizer_config", "errors", "records"},
    "storage": {"errors", "records"},
    "guard": {"errors"},
    "locks": {"errors", "storage"},
    "presets": {"config"},
    "config_file": {"config", "presets", "records", "storage", "errors"},
    "ops": {"ops"},
    "model": {"model", "host_memory", "ops", "config", "records", "storage", "errors"},
    "method": {"method", "model", "ops", "config"},
    "data": {"data", "model", "config", "records", "storage", "locks", "errors"},
    "training": {
        "training",
        "host_memory",
        "data",
        "model",
        "method",
        "ops",
        "config",
        "records",
        "storage",
        "locks",
        "errors",
    },
    "generation": {"generation", "host_memory", "model", "ops", "config", "records", "storage", "locks", "errors"},
    "evaluation": {
        "evaluation",
        "host_memory",
        "generation",
        "model",
        "data",
        "ops",
        "config",
        "config_file",
        "records",
        "storage",
        "locks",
        "errors",
    },
    "planning": {"planning", "config", "records", "errors"},
    "doctor": {"doctor", "ops", "model", "training", "evaluation", "storage", "threads", "errors"},
    "inputs": {"data", "generation", "model", "config", "errors"},
    "threads": set(),
    "host_memory": set(),
}
# May import everything; nobody imports them. (star_fast/__init__.py names api and train, and loads them when they are
# asked for.)
ENTRANCES = {"cli", "data_commands", "plan_commands", "train", "demo", "api", "hub_model"}
FORBIDDEN_NAMES = {"utils", "common", "helpers", "misc", "util", "helper"}
PACKAGES = set(sys.stdlib_module_names) | {
    "triton",
    "torch",
    "numpy",
    "kernels",
    "datasets",
    "tokenizers",
    "deepspeed",
    "apex",
    "flash_attn",
    "nvidia",
    "tyro",
    "tqdm",
    "rich",
    "yaml",
    "safetensors",
    "PIL",
    "matplotlib",
    "mlxtend",
    "gradio",
    "transformers",
    "evaluate",
    "accelerate",
    "tensorboard",
    "pytest",
    "scipy",
}


def part_of(module: str) -> str:
    """star_fast.ops.triton.swiglu -> ops."""
    return module.split(".")[1] if module.count(".") else ""


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, top_only: bool = False) -> set[str]:
    """Absolute names of the modules that a file imports."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            found |= {node.module} | {
                f"{node.module}.{alias.name}" for alias in node.names if node.module == "star_fast"
            }
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_follow_the_plan(path: Path) -> None:
    own = name_of(path)
    part = part_of(own)
    for module in imports(path):
        if module.split(".")[0] in ("tests", "benchmarks", "scripts"):
            pytest.fail(f"{own} imports {module}: the package never imports tests or benchmarks")
        if not module.startswith("star_fast.") or not part:
            continue
        target = part_of(module)
        if target == "_C":
            assert part in ("ops", "doctor"), f"{own} imports {module}: the extension is reached through star_fast.ops"
            continue
        if part in ENTRANCES:
            continue
        assert target not in ENTRANCES, f"{own} imports {module}: nobody imports cli, train or demo"
        assert target in MAY_IMPORT[part] or target == part, (
            f"{own} imports {module}: {part} may import {sorted(MAY_IMPORT[part])}"
        )
        if module.startswith("star_fast.ops.triton"):
            assert own.startswith("star_fast.ops.triton"), (
                f"{own} imports {module}: kernels are loaded by name on first use"
            )


def modules_imported(path: Path) -> set[str]:
    """The package's modules that a file imports: at its head, inside a function, for type checkers alone. A name that
    is a module counts as that module, not as the package it is taken from.
    """
    modules = {name_of(module) for module in MODULES}
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            named = {f"{node.module}.{alias.name}": node.module for alias in node.names}
            found |= {name if name in modules else module for name, module in named.items()}
    return found & modules


def rings(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that all reach each other, a node that reaches itself included."""

    def reached(start: str) -> set[str]:
        found, ahead = set(), list(graph[start])
        while ahead:
            node = ahead.pop()
            if node not in found:
                found.add(node)
                ahead += graph[node]
        return found

    onward = {node: reached(node) for node in graph}
    groups = {frozenset(other for other in onward[node] if node in onward[other]) for node in graph}
    return sorted(sorted(group) for group in groups if group)


def test_rings_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": {"e"}, "e": {"e"}, "f": {"a", "d"}}
    assert rings(graph) == [["b", "c"], ["e"]]


def test_no_two_modules_import_each_other() -> None:
    """Imports inside functions and for type checkers count: a ring is two modules that are one, or a thing that both
    need in the wrong one of them. (Backends and commands loaded by name are not seen here; they are loaded so to load
    late.)
    """
    graph = {name_of(path): modules_imported(path) for path in MODULES}
    assert sum(map(len, graph.values())) > len(graph)
    found = rings(graph)
    assert not found, "\n".join(
        f"{module} imports {', '.join(sorted(graph[module] & set(ring)))}" for ring in found for module in ring
    )


def test_every_part_is_in_the_plan() -> None:
    parts = {part_of(name_of(path)) for path in MODULES} - {""}
    assert parts <= set(MAY_IMPORT) | ENTRANCES, sorted(parts - set(MAY_IMPORT) - ENTRANCES)


def test_config_needs_the_standard_library_alone() -> None:
    for name in ("config", "tokenizer_config", "errors", "records"):
        assert all(
            module.split(".")[0] in sys.stdlib_module_names | {"__future__", "star_fast"}
            for module in imports(PACKAGE / f"{name}.py")
        ), name


def test_tests_never_import_benchmarks() -> None:
    for path in TESTS:
        assert not any(module.split(".")[0] == "benchmarks" for module in imports(path)), path


def test_no_file_over_400_lines() -> None:
    """As ruff lays them out. Past 300 look for the noun that is missing."""
    named = [path for name in ("benchmarks", "scripts", "examples") for path in (ROOT / name).rglob("*.*")]
    code = [path for path in named if path.suffix in (".py", ".sh")]
    paths = [*MODULES, *TESTS, *code, *(ROOT / "csrc").iterdir(), ROOT / "setup.py"]
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    assert len(lines) > 400 and not {path: count for path, count in lines.items() if count > 400}


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_the_linter_and_the_formatter_are_content(command: list[str]) -> None:
    """Lines of 120 columns among it: pyproject.toml says which rules."""
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_lines_of_120_columns_where_the_linter_does_not_look() -> None:
    sources = [path for folder in ("csrc", "tests/csrc") for path in (ROOT / folder).iterdir() if path.is_file()]
    paths = [*sources, *(ROOT / "scripts").glob("*.sh"), ROOT / "pyproject.toml", ROOT / "setup.py"]
    assert len(sources) > 30 and len(paths) > len(sources) + 5  # they are found
    assert not [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted(paths)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 120
    ]


def test_no_drawer_files_and_no_package_names() -> None:
    for path in [*PACKAGE.rglob("*")]:
        assert path.stem not in FORBIDDEN_NAMES, f"{path}: a function without a home means a missing room"
    for path in PACKAGE.iterdir():  # `deepspeed star_fast/train.py` puts this folder on sys.path
        assert path.stem == "__init__" or path.stem not in PACKAGES, f"{path}: hides the package of that name"


def test_every_kernel_file_has_its_op() -> None:
    shared = {"__init__", "described", "launching", "tiles"}
    ops = {path.stem for path in (PACKAGE / "ops").glob("*.py")}
    for path in (PACKAGE / "ops" / "triton").glob("*.py"):
        assert path.stem in shared or any(path.stem == op or path.stem.startswith(op) for op in ops), (
            f"{path}: a kernel file bears its op's name"
        )


def test_public_functions_have_docstrings() -> None:
    missing = []
    for path in MODULES:
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree) and path.read_text().strip():
            missing.append(name_of(path))
        for node in tree.body:
            if (
                isinstance(node, (ast.FunctionDef, ast.ClassDef))
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
            ):
                missing.append(f"{name_of(path)}.{node.name}")
    assert not missing


def test_importing_needs_torch_alone_and_is_silent() -> None:
    """`import star_fast` and its ops load no optional package, print nothing and touch no device."""
    code = (
        "import sys, warnings; warnings.simplefilter('error'); import star_fast, star_fast.ops, "
        "star_fast.model.transformer, star_fast.method.objective\n"
        "import torch\n"
        "loaded = [name for name in ('deepspeed', 'nvidia.dali', 'gradio', 'matplotlib', 'tyro', 'yaml', 'PIL', "
        "'flash_attn', 'apex',"
        " 'star_fast.ops.triton.swiglu', 'star_fast._C') if name in sys.modules]\n"
        "assert not loaded, loaded\nassert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")


def test_train_runs_as_a_file_without_its_folder_on_the_path() -> None:
    code = (
        "import runpy, sys; sys.argv = ['star_fast/train.py', '--preset', 'none-such']; sys.path.insert(0, "
        "'star_fast')\n"
        "try:\n    runpy.run_path('star_fast/train.py', run_name='__main__')\nexcept SystemExit as end:\n    "
        "print(end.code)\n"
        "print(any(p.rstrip('/').endswith('star_fast') for p in sys.path))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.split() == ["2", "False"], done.stdout + done.stderr

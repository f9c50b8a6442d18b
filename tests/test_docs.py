"""The pages are true. Every command line of every page is understood as it stands; those of docs/understanding.md and
docs/evaluation.md do their job in miniature; error lines that docs/troubleshooting.md quotes are what the code says.
Links resolve, options exist, prose is at most 120 columns wide.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from star_fast import cli, data_commands
from star_fast.data.codes import CodeStore
from star_fast.data.origin import Origin, write_origin
from star_fast.evaluation import attention, evaluate, figure6, probe, stability
from star_fast.model.weights import load_model, save_model
from tests.command_lines import COMMANDS, PAGES, lines_of, understood
from tests.evaluation.conftest import finished_run as finished_run  # a fixture
from tests.evaluation.few_features import FewFeatures, pictures, write_adm_reference
from tests.evaluation.few_features import few_features as few_features  # a fixture
from tests.generation.small_model import save_small_model

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RUNS = {
    "probe": (probe, "run_probe"),
    "attention": (attention, "run_attention"),
    "stability": (stability, "run_stability"),
    "figure6": (figure6, "run_figure6"),
    "evaluate": (evaluate, "run_evaluate"),
}
SMALLER = {  # what a model of two blocks, 16 codes an image and three classes has in place of ImageNet's
    "--depths 9 18 36": "--depths 1 2",
    "--block 18": "--block 2",
    "--rows 7 1200": "--rows 7 12",
    "--queries 64 128 192": "--queries 4 8",
    "--classes 207 360 387 974": "--classes 0 2",
    "--draw.images 50000": "--draw.images 24",
    "--image-size 256": "--image-size 16",
}
FASTER = {
    "probe": ["--epochs", "11"],
    "stability": ["--images", "4"],
    "attention": ["--images", "4"],
    "figure6": ["--per-class", "2"],
    "evaluate": [],
}


def commands_of(name: str) -> list[str]:
    """The commands of a page in their order: of its bash blocks, and whole ones within its text."""
    page = DOCS / name
    inline = re.findall(
        r"`((?:star-fast \S+|torchrun [^`]*star-fast \S+) --[^`]+)`",
        re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL),
    )
    return [line for line in lines_of(page) if not line.startswith("scripts/")] + inline


UNDERSTANDING, EVALUATION = commands_of("understanding.md"), commands_of("evaluation.md")


def words_of(line: str) -> list[str]:
    """The arguments of star-fast, without the launcher that starts it."""
    words = line.split()
    if words[0] == "torchrun":
        words = words[words.index("--") + 1 :]
    assert words[0] == "star-fast", line
    return words[1:]


LINES = [(page.relative_to(ROOT), line) for page in PAGES for line in lines_of(page) if line.startswith(COMMANDS)]


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page.name}: {line}" for page, line in LINES])
def test_a_command_is_understood_as_it_stands(page: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the parsers of the command and of its launcher, checks of the settings included."""
    understood(line, monkeypatch)


def test_every_other_line_starts_something_that_is_there() -> None:
    """A line of a bash block is a command of ours, a script or a benchmark; what installs things is shown alone."""
    for page in PAGES:
        for line in lines_of(page):
            word = line.removeprefix("python ").split()[0]
            if word not in {*COMMANDS, "git", "pip"}:
                assert re.match(r"(scripts|benchmarks)/[\w.]+$", word) and (ROOT / word).exists(), f"{page}: {line}"


def test_the_recipes_show_what_they_are_about() -> None:
    lines = lines_of(DOCS / "recipes.md")
    shown = {line.split()[-1 if "paper" in line else 0] for line in lines}
    assert {"deepspeed", "torchrun", "star-fast", "scripts/quickstart.sh", "table3"} <= shown and len(lines) > 30
    for part in (
        *("--plain --method.views 2", "--data.online True", "--init c2i_L_256.pt", "--init-weights teacher"),
        *("--preset B", "--preset L", "--preset XL", "--images 50000", "--products int8", "convert runs/XL"),
    ):
        assert any(part in line for line in lines), part


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_prose_is_at_most_120_columns_wide(page: Path) -> None:
    """Tables excepted, whose rows cannot be broken."""
    wide = [line for line in page.read_text().splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not wide


def test_scripts_are_at_most_120_columns_wide() -> None:
    scripts = [*(ROOT / "scripts").glob("*.sh"), ROOT / "scripts/train.sbatch", *(ROOT / ".ci").iterdir()]
    assert len(scripts) > 6
    for script in scripts:
        assert not [line for line in script.read_text().splitlines() if len(line) > 120], script


def anchor_of(heading: str) -> str:
    """As a page's reader makes it of a heading: links are their words."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w -]", "", words).lower().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    """Files and folders beside the page; of a heading (FILE#heading), that the file has it."""
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    assert len(targets) > 30 or page != ROOT / "README.md"  # they are found
    for target in targets:
        if not target.startswith(("http://", "https://")):
            file, _, heading = target.partition("#")
            assert (page.parent / file).exists() if file else True, f"{page.name}: {target}"
            if heading:
                there = re.findall(r"^#+ (.*)$", (page.parent / file if file else page).read_text(), re.MULTILINE)
                assert heading in [anchor_of(text) for text in there], target


def options_of_all_commands(capsys: pytest.CaptureFixture) -> str:
    """The help of every command and of those within `data` and `plan`."""
    asked = [[name] for name in cli.COMMANDS if name not in ("data", "presets")]
    asked += [["data", name] for name in data_commands.DATA_COMMANDS] + [
        ["plan", name] for name in ("sample", "prepare")
    ]
    for words in asked:
        with pytest.raises(SystemExit):
            cli.COMMANDS[words[0]][0]([*words[1:], "--help"])
    return capsys.readouterr().out


def test_options_named_in_the_text_exist(capsys: pytest.CaptureFixture) -> None:
    told = set(re.findall(r"--[a-z][\w.-]*[a-z\d]", options_of_all_commands(capsys)))
    assert len(told) > 100
    of_others = {
        "--version",
        "--requeue",
        "--signal",
        "--cpus-per-task",
        "--nnodes",
        "--save",
        "--compare",
        "--hugging-face",
    }
    for page in PAGES:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for code in re.findall(r"`([^`]*)`", prose):
            if "pip install" in code or code.startswith(("hf ", "torchrun ", "python scripts", "python benchmarks")):
                continue
            for option in re.findall(r"(?<!\S)--[a-z][\w.-]*[a-z\d]", code):
                known = option in told or option in of_others
                assert known or any(name.startswith(option + ".") for name in told), f"{page.name}: {code}"


def said_in_the_code() -> list[str]:
    """Every text of the package's sources but docstrings, on one line; `…` stands for what is put in."""
    texts = []
    for path in (ROOT / "star_fast").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        alone = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if id(node) in alone:
                continue
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return [" ".join(text.split()) for text in texts]


def test_error_lines_are_what_the_code_says() -> None:
    said = said_in_the_code()
    quoted = re.findall(r"\*\*`([^`]*)`\*\*", (DOCS / "troubleshooting.md").read_text())
    section = (ROOT / "README.md").read_text().split("## When something goes wrong")[1].split("\n## ")[0]
    short = re.findall(r"^- `([^`]*)`", section, re.MULTILINE)
    assert len(quoted) > 25 and len(short) > 4
    for line in quoted + short:
        assert any(" ".join(line.split()) in text for text in said), line


def test_the_page_on_launching_shows_the_batch_script_and_the_readme_s_lines() -> None:
    text = (DOCS / "launch.md").read_text()
    script = (ROOT / "scripts/train.sbatch").read_text()
    [shown] = re.findall(r"```text\n(run=.*?)```", text, re.DOTALL)
    assert script.endswith(shown)
    cluster = (ROOT / "README.md").read_text().split("## On a cluster")[1].split("```")[1]
    assert all(line in text for line in cluster.splitlines()[2:] if not line.startswith("#"))


def test_the_pages_show_every_command_that_they_are_about() -> None:
    assert {words_of(line)[0] for line in UNDERSTANDING} == {"probe", "attention", "stability", "figure6", "demo"}
    assert {words_of(line)[0] for line in EVALUATION} == {"evaluate"}
    assert len(UNDERSTANDING) > 9 and len(EVALUATION) > 4
    assert all(any(part in line for line in UNDERSTANDING + EVALUATION) for part in SMALLER)


def test_the_small_study_has_the_parts_that_are_shown() -> None:
    """The study itself takes hours; its committed rows are there for every run of its core."""
    lines = re.findall(r"^scripts/small_study\.sh *([a-z ]*)", (DOCS / "understanding.md").read_text(), re.MULTILINE)
    source = (ROOT / "benchmarks/small_study.py").read_text()
    groups = re.search(r"^GROUPS = {(.*?)}", source, re.MULTILINE | re.DOTALL)[1]
    assert len(lines) == 2 and all(f'"{group}"' in groups for line in lines for group in line.split())
    rows = [json.loads(line) for line in (ROOT / "benchmarks/results/small_study.jsonl").read_text().splitlines()]
    core = re.findall(r'"([^"]+)": Variant', source[source.index("CORE") : source.index("_NO_MASK")])
    assert len(core) == 6 and {(row["name"], row["seed"]) for row in rows} >= {
        (name, seed) for name in core for seed in range(3)
    }


@pytest.mark.parametrize("line", [line for line in UNDERSTANDING + EVALUATION if " demo " not in line])
def test_a_line_is_understood_as_it_stands(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command's own parser, checks of its settings included; what they say is what the line says."""
    command, *rest = words_of(line)
    got: list[Any] = []

    class Enough(Exception):
        pass

    def stop(config: Any) -> None:
        got.append(config)
        raise Enough

    monkeypatch.setattr(*RUNS[command], stop)
    with pytest.raises(Enough):
        getattr(cli, command)(rest)
    for option, *values in re.findall(r"--(\S+)((?: (?!--)\S+)*)", " ".join(rest)):
        value = got[0]
        for name in option.split("."):
            value = getattr(value, name.replace("-", "_"))
        shown = [
            f"{item:g}" if isinstance(item, float) else str(item)
            for item in (value if isinstance(value, tuple) else (value,))
        ]
        assert shown == values[0].split() or value is True, option


@pytest.fixture
def here(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages name: runs/XL with a teacher, runs/XL-plain, and the code store that both were
    trained on.
    """
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_run / "codes", "data/imagenet")
    shutil.copytree(finished_run / "run/model/tokenizer", "data/imagenet/tokenizer")
    write_origin(CodeStore.open("data/imagenet"), Origin(str(finished_run / "images")))
    for name in ("XL", "XL-plain"):
        shutil.copytree(finished_run / "run", f"runs/{name}")
    found = load_model("runs/XL/model")
    save_model(
        "runs/XL/model",
        found.transformer,
        class_names=found.class_names,
        teacher=found.transformer,
        tokenizer=found.tokenizer_folder,
        record=found.record,
    )
    return tmp_path


def run(line: str) -> None:
    """The line, with what is smaller here."""
    for large, small in SMALLER.items():
        line = line.replace(large, small)
    command, *rest = words_of(line)
    assert cli.main([command, *rest, *FASTER[command]]) == 0, line


def written(folder: Path, work: Callable[[], None]) -> set[str]:
    """Names of the files in a folder that are there, or others, after the work."""
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    work()
    return {
        path.name
        for path in folder.iterdir()
        if before.get(path.name) != path.stat().st_mtime_ns and path.is_file() and not path.name.startswith(".")
    }


def test_understanding_in_miniature(here: Path, capsys: pytest.CaptureFixture) -> None:
    """Each writes numbers as JSON and pictures as PNG, and prints its table."""
    lines = [line for line in UNDERSTANDING if not line.startswith("torchrun") and " demo " not in line]
    run("star-fast probe --run runs/XL-plain")  # "has been probed before"
    for line in lines:
        command, folder = words_of(line)[0], here / ("data/imagenet" if "--codes" in line else "runs/XL")
        capsys.readouterr()
        names = written(folder, lambda line=line: run(line))
        assert names == {f"{command}.json", f"{command}.png"} | ({"maps.png"} if command == "attention" else set()), (
            line
        )
        assert len(capsys.readouterr().out.splitlines()) > (0 if command == "figure6" else 3), line
        for name in names - {f"{command}.json"}:
            with Image.open(folder / name) as picture:
                assert len(picture.convert("RGB").getcolors(2**24)) > 10


def test_evaluation_in_miniature(few_features: FewFeatures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/L").mkdir(parents=True)
    save_small_model(Path("runs/L/model"))
    shutil.copytree("runs/L/model/tokenizer", "TOKENIZER")
    np.savez("samples.npz", pictures(24, 16))
    write_adm_reference(Path("VIRTUAL_imagenet256_labeled.npz"), pictures(9, 16, seed=1), pictures(30, 16, seed=1))
    for folder, name in (("FOLDER/only", "real"), ("FOLDER_OF_PNGS", "made")):
        Path(folder).mkdir(parents=True)
        for index, image in enumerate(pictures(12, 16, seed=2)):
            Image.fromarray(image).save(f"{folder}/{name}{index}.png")
    for line in sorted(EVALUATION, key=lambda line: "--make-reference" not in line):  # the others need it
        expected = {"ref.npz", "ref.json"} if "--make-reference" in line else {"metrics.json", "metrics.txt"}
        assert written(tmp_path, lambda line=line: run(line)) == expected, line

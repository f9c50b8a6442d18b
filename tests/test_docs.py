"""docs/understanding.md and docs/evaluation.md are true: every command line in them is understood as it stands, and
does its job in miniature.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from star_fast import cli
from star_fast.data.codes import CodeStore
from star_fast.data.origin import Origin, write_origin
from star_fast.evaluation import attention, evaluate, figure6, probe, stability
from star_fast.model.weights import load_model, save_model
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


def lines_of(name: str) -> list[str]:
    """The commands of a page in their order: of its bash blocks, and whole ones within its text."""
    text = (DOCS / name).read_text()
    assert not re.search(r"^    (star-fast|torchrun)", text, re.MULTILINE), f"{name}: a command outside a bash block"
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    inline = re.findall(
        r"`((?:star-fast \S+|torchrun [^`]*star-fast \S+) --[^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    )
    return [
        line.split("#")[0].strip() for block in blocks for line in block.splitlines() if not line.startswith("scripts/")
    ] + inline


UNDERSTANDING, EVALUATION = lines_of("understanding.md"), lines_of("evaluation.md")


def words_of(line: str) -> list[str]:
    """The arguments of star-fast, without the launcher that starts it."""
    words = line.split()
    if words[0] == "torchrun":
        words = words[words.index("--") + 1 :]
    assert words[0] == "star-fast", line
    return words[1:]


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

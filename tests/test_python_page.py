"""docs/python.md is true: its blocks run in their order, in one namespace, as they stand but for the smaller numbers in
SMALLER.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from star_fast.config import ModelConfig
from star_fast.model.llamagen import save_transformer
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.transformer import Transformer
from tests.small_digits import make_small_digits
from tests.training.conftest import one_rank as one_rank  # a fixture

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs/python.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
# A file's name tells its size, which is none of the real ones here.
SMALLER = {"c2i_B_256.pt": "small.pt", '"train.max_steps": 200': '"train.max_steps": 2, "train.images_per_step": 8'}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the page names: runs/digits, data/digits, and files as LlamaGen releases them."""
    make_small_digits(tmp_path)
    monkeypatch.chdir(tmp_path)
    released = Transformer(ModelConfig(blocks=2, heads=2, width=32, vocab=16, positions=16, num_classes=3))
    released.init_weights(torch.Generator().manual_seed(0))
    save_transformer(released, "small.pt")
    torch.save({"model": VQTokenizer.load("data/digits/tokenizer").state_dict()}, "vq_ds16_c2i.pt")
    Path("names.txt").write_text("ash\nbirch\nyew\n")
    return tmp_path


def test_every_block_runs(here: Path, one_rank: torch.device, capsys: pytest.CaptureFixture) -> None:
    assert len(BLOCKS) == TEXT.count("```") // 2 >= 9 and all(
        any(part in block for block in BLOCKS) for part in SMALLER
    )
    names: dict[str, Any] = {}
    for block in BLOCKS:
        for large, small in SMALLER.items():
            block = block.replace(large, small)
        exec(compile(block, "docs/python.md", "exec"), names)
    assert names["released"].class_names == ["ash", "birch", "yew"] and len(names["released"].sample("yew")) == 1
    assert names["pixels"].shape == (8, 8, 8, 3) and names["first"].size == (8, 8) and (here / "grid.png").exists()
    assert names["codes"].shape == (8, 16) and names["photo"].shape == (1, 16) and len(names["again"]) == 8
    assert names["features"].shape == names["told"].shape == (8, 16, 96) and not torch.equal(
        names["features"], names["told"]
    )
    assert (
        0 <= names["share"] <= 1
        and names["trained"].record["step"] == 2
        and (here / "runs/tuned/model/teacher.safetensors").exists()
    )
    assert all(value.isfinite() and value > 0 for value in names["losses"])
    assert all(weight.grad is not None for weight in names["student"].parameters() if weight.requires_grad)
    assert names["out"].shape == (2, 16, 4, 32) and names["loss"].isfinite()
    assert (here / "shared/README.md").exists() and names["shared"].class_names == names["model"].class_names
    assert capsys.readouterr().out.splitlines()[-1].startswith("sample: classes: no class 'tree'; there are 0, 1, 2")


def test_what_the_page_points_to_exists() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(targets) > 2 and not [target for target in targets if not (ROOT / "docs" / target).exists()]
    assert f"in {len((ROOT / 'examples/own_model.py').read_text().splitlines())} lines" in TEXT
    assert len(TEXT.splitlines()) <= 150

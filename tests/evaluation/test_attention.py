"""`star-fast attention`: its files say what the functions measure, of one run or two, of student and teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from star_fast import cli
from star_fast.errors import UserError
from star_fast.evaluation.attention import AttentionConfig, run_attention, table
from star_fast.evaluation.attention_maps import attention_by_block, even_attention
from star_fast.evaluation.attention_plots import block_curves
from star_fast.evaluation.runs import open_run
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.transformer import Transformer
from star_fast.model.weights import save_model


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run / "run", tmp_path / "run"))


@pytest.fixture
def other(run: Path, tmp_path: Path) -> Path:
    """The same run with other weights and a teacher."""
    folder = Path(shutil.copytree(run, tmp_path / "baseline"))
    opened = open_run(folder)
    model = opened.model.transformer
    teacher = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for block in model.layers:
            block.attention.wqkv.weight.mul_(30)
    second = Transformer(model.config)
    second.load_state_dict(teacher)
    tokenizer = VQTokenizer.load(opened.model.tokenizer_folder)
    shutil.rmtree(folder / "model")
    save_model(
        folder / "model",
        model,
        class_names=opened.store.class_names,
        tokenizer=tokenizer,
        teacher=second,
        record=opened.model.record,
    )
    return folder


def test_files_of_one_run(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert (
        cli.main(
            [
                "attention",
                "--run",
                str(run),
                "--images",
                "5",
                "--rows",
                "2",
                "40",
                "--queries",
                "3",
                "15",
                "--block",
                "1",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    written = json.loads((run / "attention.json").read_text())
    assert written["maps"] == {"block": 1, "rows": [2, 40], "queries": [3, 15]} and written["images"] == 5
    (model,) = written["models"].values()
    opened = open_run(run)
    rows = opened.store.held_out_indices[torch.tensor([0, 3, 6, 8, 11])]  # of 12, evenly spaced
    expected = attention_by_block(
        opened.model.transformer, opened.store.codes(rows, [0])[:, 0], opened.store.labels[rows]
    )
    for row, block in zip(model["blocks"], expected, strict=True):
        assert (row["block"], row["near"], row["entropy"]) == (
            block.block,
            pytest.approx(block.shares.near, abs=1e-6),
            pytest.approx(block.entropy, abs=1e-6),
        )
        assert f"{row['entropy']:.2f}" in shown
    assert written["even"]["entropy"] == even_attention(16).entropy
    for name in ("attention.png", "maps.png"):
        with Image.open(run / name) as picture:
            assert picture.width > 300 and len(picture.convert("RGB").getcolors(2**20)) > 20


def test_two_runs_student_and_teacher(run: Path, other: Path) -> None:
    looked = run_attention(AttentionConfig(other, against=str(run), device="cpu"))
    assert [each.name for each in looked] == ["baseline", "run"]
    assert looked[0].blocks[-1].entropy < looked[1].blocks[-1].entropy  # larger queries and keys: sharper
    both = run_attention(AttentionConfig(other, weights="both", device="cpu"))
    assert [each.name for each in both] == ["baseline, student", "baseline, teacher"]
    # The teacher has the other run's weights
    assert both[1].blocks == looked[1].blocks and "baseline, teacher:" in table(both)
    with pytest.raises(UserError, match="teacher"):
        run_attention(AttentionConfig(run, weights="teacher", device="cpu"))
    light, dark = (
        block_curves({each.name: each.blocks for each in both}, even_attention(16), dark=dark) for dark in (False, True)
    )
    assert light != dark


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"block": 3}, r"--block: expected 1 \.\.\. 2, or 0: the last, got 3"),
        ({"rows": (99,)}, r"--rows: expected rows of .*, 0 \.\.\. 41, got 99"),
        ({"queries": (16,)}, r"--queries: expected positions 1 \.\.\. 15, got 16"),
        ({"queries": (0,)}, "--queries"),
        ({"images": 0}, "--images"),
        ({"rows": tuple(range(42)), "queries": tuple(range(1, 16))}, "at most 400 maps"),
    ],
)
def test_what_cannot_be_shown(run: Path, options: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        run_attention(AttentionConfig(run, device="cpu", **options))
    assert not (run / "attention.json").exists()

"""The command line as a user meets it: own images end to end, and one clear line for what goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from star_fast import cli, train
from star_fast.data.codes import CodeStore

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = [
    "--new-tokenizer.image-size",
    "16",
    "--new-tokenizer.base-channels",
    "8",
    "--new-tokenizer.multipliers",
    "1",
    "1",
    "--new-tokenizer.z-channels",
    "8",
    "--new-tokenizer.codebook",
    "16",
    "--new-tokenizer.steps",
    "3",
    "--new-tokenizer.images-per-step",
    "8",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of ten small pictures, one of them cut short."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        (folder / name).mkdir()
        for index in range(10):
            Image.fromarray(np.clip(rng.normal(level, 20, (20, 24, 3)), 0, 255).astype(np.uint8)).save(
                folder / name / f"{index}.jpg"
            )
    whole = (folder / "dark/3.jpg").read_bytes()
    (folder / "dark/3.jpg").write_bytes(whole[: len(whole) // 3])
    return folder


@pytest.fixture(scope="module")
def prepared(images: Path) -> Path:
    out = images.parent / "codes"
    assert cli.main(["prepare", str(images), "--out", str(out), *TOKENIZER]) == 0
    return out


def test_prepare_own_images_and_skip_the_corrupt_one(
    prepared: Path, images: Path, capfd: pytest.CaptureFixture
) -> None:
    store = CodeStore.open(prepared)
    assert (len(store), store.class_names, len(store.views)) == (19, ("dark", "light"), 10)
    assert [entry["key"] for entry in store.manifest["skipped"]] == ["dark/3.jpg"]
    assert (prepared / "tokenizer/tokenizer.json").exists()
    before = (prepared / "manifest.json").read_bytes()
    assert cli.main(["prepare", str(images), "--out", str(prepared), *TOKENIZER]) == 0  # all is there: nothing changes
    assert "dark/3.jpg" in capfd.readouterr().err
    assert (prepared / "manifest.json").read_bytes() == before


def test_train_sample_and_report_own_images(
    prepared: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    train.run_command(
        [
            "--preset",
            "tiny",
            "--data.codes",
            str(prepared),
            "--run",
            str(run),
            "--model.width",
            "32",
            "--model.blocks",
            "2",
            "--train.images-per-step",
            "4",
            "--train.max-steps",
            "3",
            "--train.tensorboard",
            "False",
        ],
        "train.py",
    )
    assert f"model in {run / 'model'}" in capfd.readouterr().out
    out = tmp_path / "samples.npz"
    assert cli.main(["sample", "--model", str(run / "model"), "--out", str(out), "--images", "6"]) == 0
    with np.load(out) as samples:
        assert samples["arr_0"].shape == (6, 16, 16, 3)
        assert samples["arr_0"].dtype == np.uint8
    assert Image.open(out.with_suffix(".png")).size[0] > 16
    assert json.loads(out.with_suffix(".json").read_text())["plan"]["seed"] == 0
    assert (
        cli.main(["sample", "--model", str(run / "model"), "--out", str(tmp_path / "x.npz"), "--classes", "medium"])
        == 2
    )
    assert "no class 'medium'" in one_line(capfd)
    assert cli.main(["probe", "--run", str(run)]) == 0
    assert (run / "probe.png").exists()
    assert cli.main(["report", "--run", str(run), "--source", str(images)]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == str(run / "report.html")


def test_plain_training_by_the_launcher_on_two_ranks(prepared: Path, tmp_path: Path) -> None:
    """`deepspeed --num_accelerators 2 star_fast/train.py --plain`: the launcher's environment and arguments are
    understood; no teacher exists.
    """
    launcher = Path(sys.executable).with_name("deepspeed")
    done = subprocess.run(
        [
            launcher,
            "--num_accelerators",
            "2",
            str(ROOT / "star_fast/train.py"),
            "--preset",
            "tiny",
            "--plain",
            "--data.codes",
            str(prepared),
            "--run",
            "run",
            "--model.width",
            "32",
            "--model.blocks",
            "2",
            "--train.images-per-step",
            "4",
            "--train.max-steps",
            "3",
            "--train.tensorboard",
            "False",
            "--train.zero-stage",
            "1",
            "--train.precision",
            "bf16",
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{launcher.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "plain next-token training" in done.stdout
    assert "2 x cpu" in done.stdout
    assert {path.name for path in (tmp_path / "run/model").iterdir()} == {
        "model.safetensors",
        "config.json",
        "tokenizer",
    }


def one_line(capfd: pytest.CaptureFixture) -> str:
    """The last line on stderr, which must be an error line and no traceback."""
    error = capfd.readouterr().err
    assert "Traceback" not in error
    line = error.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["prepare", "{tmp}/nowhere"], "nowhere: not a folder"),
        (["prepare", "{tmp}/empty"], "no images in class subfolders"),
        (["sample", "--model", "{tmp}/nowhere"], "nowhere"),
        (["sample", "--model", "{tmp}/junk.pt"], "junk.pt"),
        (["report", "--run", "{tmp}/nowhere"], "not a folder; expected a run folder"),
        (["probe", "--run", "{tmp}/empty"], "holds no config.yaml"),
        (["fly"], "unknown command 'fly'; expected one of prepare, data, plan, paper, train"),
    ],
)
def test_what_cannot_go_on_says_why_in_one_line(
    arguments: list[str], line: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.pt").write_bytes(b"no checkpoint")
    assert cli.main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    assert line in one_line(capfd)


def test_help_lists_the_commands_and_doctor_runs(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["--help"]) == 0
    listed = capfd.readouterr().out
    assert all(name in listed for name in cli.COMMANDS)
    assert cli.main(["presets"]) == 0
    assert "deepspeed star_fast/train.py --preset XL" in capfd.readouterr().out
    assert cli.main(["doctor"]) == 0
    assert "deepspeed" in capfd.readouterr().out
    monkeypatch.setattr(sys, "argv", ["star-fast"])
    assert cli.main() == 2

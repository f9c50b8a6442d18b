"""A run that was interrupted and resumed ends with the bits of an unbroken one; damaged or foreign checkpoints are
refused in one line.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from star_fast.config import MethodConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from star_fast.config_file import write_config
from star_fast.errors import UserError
from star_fast.records import to_dict
from star_fast.storage import sha256_of_file
from star_fast.train import main as train_main
from star_fast.training import checkpoint
from tests.training.store import write_store

ROOT = Path(__file__).resolve().parents[2]


def start(folder: Path, run: str, config: RunConfig, *more: str) -> subprocess.Popen:
    if not (folder / "codes").exists():
        write_store(folder / "codes")
    file = folder / f"{run}.yaml"
    write_config(dataclasses.replace(config, data=dataclasses.replace(config.data, codes=str(folder / "codes"))), file)
    return subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "star_fast" / "train.py"),
            "--config",
            str(file),
            "--run",
            str(folder / run),
            *more,
        ],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, status: int = 0) -> str:
    output = process.communicate(timeout=600)[0]
    assert process.returncode == status, output[-3000:]
    return output


def settings(precision: str, stage: int) -> RunConfig:
    return RunConfig(
        ModelConfig(2, 2, 32, dropout=0.1),
        MethodConfig(contrast_positions=3, projector_width=24),
        OptimConfig(0.03, warmup_steps=3, schedule="cosine"),
        TrainConfig(
            images_per_step=8,
            micro_batch_images=4,
            max_steps=40,
            precision=precision,
            zero_stage=stage,
            save_every_steps=5,
            log_every_steps=1,
            validate_every_steps=8,
            tensorboard=False,
        ),
    )


@pytest.mark.parametrize(("precision", "stage", "number"), [("fp32", 0, signal.SIGINT), ("bf16", 1, signal.SIGKILL)])
def test_resume_is_bit_exact(tmp_path: Path, precision: str, stage: int, number: signal.Signals) -> None:
    config = settings(precision, stage)
    finish(start(tmp_path, "unbroken", config))
    broken = start(tmp_path, "broken", config)
    deadline = time.monotonic() + 300
    while checkpoint.latest(tmp_path / "broken") is None and broken.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    broken.send_signal(number)
    output = broken.communicate(timeout=300)[0]
    stopped = int(checkpoint.latest(tmp_path / "broken").name.removeprefix("step-"))
    assert 5 <= stopped < 40, output[-2000:]
    if number == signal.SIGINT:
        assert broken.returncode == 0
        assert f"Stopped after {stopped} of 40 steps" in output
        assert "--resume" in output
    assert "holds checkpoints up to" in finish(start(tmp_path, "broken", config), status=2)
    finish(start(tmp_path, "broken", config, "--resume"))
    for name in ("model.safetensors", "teacher.safetensors"):
        assert (tmp_path / "broken/model" / name).read_bytes() == (tmp_path / "unbroken/model" / name).read_bytes(), (
            name
        )
    unbroken, resumed = (
        [
            {
                name: value
                for name, value in json.loads(line).items()
                if name not in ("images_per_s", "data_s", "time_s")
            }
            for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in ("unbroken", "broken")
    )
    assert resumed == unbroken


class Codes(SimpleNamespace):
    """As much of a code store as a checkpoint remembers."""

    def __len__(self) -> int:
        return self.images


STORE = Codes(images=90, tokenizer_hash="a" * 64, path="codes", manifest={"files": {"codes.bin": {"sha256": "b" * 64}}})


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, SimpleNamespace]:
    """A complete checkpoint folder (of plain files) and an engine that fits it."""
    config = settings("fp32", 0)
    folder = tmp_path / "run/checkpoints/step-0000005"
    folder.mkdir(parents=True)
    (folder / "weights.pt").write_bytes(b"x" * 100)
    record = checkpoint.CheckpointRecord(
        checkpoint.FORMAT,
        5,
        1,
        0,
        "2",
        to_dict(config),
        checkpoint.codes_identity(STORE),
        {"weights.pt": checkpoint.FileRecord(100, sha256_of_file(folder / "weights.pt"))},
    )
    (folder / "complete.json").write_text(json.dumps(to_dict(record)))
    return folder, SimpleNamespace(config=config, ranks=1, rank=0)


def test_a_complete_checkpoint_is_accepted(saved) -> None:
    assert checkpoint.check(*saved, STORE).step == 5


def test_a_truncated_or_missing_file_is_named(saved) -> None:
    folder, engine = saved
    (folder / "weights.pt").write_bytes(b"x" * 60)
    with pytest.raises(UserError, match=r"weights\.pt should have 100 bytes, it has 60; the checkpoint is damaged"):
        checkpoint.check(folder, engine, STORE)
    (folder / "weights.pt").unlink()
    with pytest.raises(UserError, match=r"weights\.pt: not found; the checkpoint is damaged"):
        checkpoint.check(folder, engine, STORE)
    (folder / "complete.json").write_text("{")
    with pytest.raises(UserError, match="not a complete checkpoint"):
        checkpoint.check(folder, engine, STORE)


def test_another_model_stage_or_number_of_ranks_is_refused(saved) -> None:
    folder, engine = saved
    wider = SimpleNamespace(config=dataclasses.replace(engine.config, model=ModelConfig(2, 2, 64)), ranks=1, rank=0)
    with pytest.raises(UserError, match=r"saved with model\.width = 32, this run has 64"):
        checkpoint.check(folder, wider, STORE)
    with pytest.raises(UserError, match="saved by 1 ranks with ZeRO stage 0, this run has 2 ranks"):
        checkpoint.check(folder, SimpleNamespace(config=engine.config, ranks=2, rank=0), STORE)
    longer = dataclasses.replace(engine.config, train=dataclasses.replace(engine.config.train, max_steps=99))
    assert checkpoint.check(folder, SimpleNamespace(config=longer, ranks=1, rank=0), STORE).step == 5


def test_a_setting_that_an_older_checkpoint_does_not_know_had_its_default(saved) -> None:
    folder, engine = saved
    record = json.loads((folder / "complete.json").read_text())
    for name in ("mim_positions", "negatives", "projector_norm", "teacher_label"):
        del record["config"]["method"][name]
    (folder / "complete.json").write_text(json.dumps(record))
    assert checkpoint.check(folder, engine, STORE).step == 5
    other = dataclasses.replace(engine.config, method=dataclasses.replace(engine.config.method, negatives="all_slots"))
    with pytest.raises(UserError, match=r"saved with method\.negatives = 'slot', this run has 'all_slots'"):
        checkpoint.check(folder, SimpleNamespace(config=other, ranks=1, rank=0), STORE)


def test_codes_of_another_tokenizer_are_refused(saved) -> None:
    other = Codes(**{**vars(STORE), "tokenizer_hash": "c" * 64})
    with pytest.raises(
        UserError, match=r"code store of tokenizer aaaaaaaaaaaa, codes has cccccccccccc; give the code store"
    ):
        checkpoint.check(*saved, other)


def test_an_unfinished_checkpoint_does_not_count(saved) -> None:
    folder, _ = saved
    (folder.parent / "step-0000010.tmp").mkdir()
    assert checkpoint.latest(folder.parent.parent) == folder


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--preset", "huge"], "preset: expected one of tiny, B, B-300, L, L-300, XL, XL-300, XXL, 3B, got 'huge'"),
        (["--config", "absent.yaml"], "absent.yaml: no such config file"),
        (["--preset", "tiny", "--data.codes", "absent"], "absent/manifest.json: not found"),
        (["--preset", "tiny", "--method.views", "0"], "method.views: expected at least 1, got 0"),
        (["--preset", "B"], "data.codes: expected the folder of a code store"),
    ],
)
def test_bad_command_lines_give_one_line_and_status_2(
    arguments: list[str], line: str, capfd: pytest.CaptureFixture, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    assert train_main() == 2
    error = capfd.readouterr().err
    assert line in error
    assert "Traceback" not in error


def test_resume_without_a_checkpoint_and_init_of_another_size(
    tmp_path: Path, monkeypatch, capfd: pytest.CaptureFixture
) -> None:
    from star_fast.model.transformer import Transformer
    from star_fast.model.weights import save_model

    write_store(tmp_path / "codes")
    common = ["train.py", "--preset", "tiny", "--data.codes", str(tmp_path / "codes"), "--run", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", [*common, "--resume"])
    assert train_main() == 2
    assert "nothing to resume" in capfd.readouterr().err
    save_model(
        tmp_path / "other",
        Transformer(ModelConfig(2, 2, 32, vocab=16, positions=16, num_classes=3)),
        class_names=["a", "b", "c"],
    )
    monkeypatch.setattr(sys, "argv", [*common, "--init", str(tmp_path / "other")])
    assert train_main() == 2
    error = capfd.readouterr().err
    assert "96" in error
    assert "32" in error
    assert "Traceback" not in error
    save_model(
        tmp_path / "other",
        Transformer(ModelConfig(2, 2, 32, vocab=16, positions=16, num_classes=3)),
        class_names=["a", "b", "c"],
        record={"tokenizer_hash": "f" * 64},
    )
    assert train_main() == 2
    assert (
        "trained on codes of tokenizer ffffffffffff, the code store here is of tokenizer 000000000000"
        in capfd.readouterr().err
    )

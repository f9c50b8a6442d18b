"""What a checkpoint's folder holds is checked before it is used, and nothing of it executes: each case is one that once
went wrong.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from star_fast.model.weights import WEIGHTS_FILES, load_model
from star_fast.storage import sha256_of_file
from star_fast.train import main as train_main
from star_fast.training import checkpoint
from tests.reliability.training_job import SMALL, Training
from tests.training.store import write_store


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a code store and a run of four steps (ZeRO-1, bf16), to be copied and damaged."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        write_store(folder / "codes")
        patch.setattr(
            sys,
            "argv",
            [
                "train.py",
                *SMALL,
                "--data.codes",
                str(folder / "codes"),
                "--run",
                str(folder / "run"),
                "--train.max-steps",
                "4",
                "--train.save-every-steps",
                "2",
                "--train.zero-stage",
                "1",
                "--train.precision",
                "bf16",
            ],
        )
        assert train_main() == 0
    return folder


@pytest.fixture
def resumable(finished: Path, training: Training) -> Training:
    """A copy of that run; call it with RESUME to go on."""
    shutil.rmtree(training.codes)
    shutil.copytree(finished / "codes", training.codes)
    shutil.copytree(finished / "run", training.run)
    return training


RESUME = ["--train.max-steps", "6", "--train.zero-stage", "1", "--train.precision", "bf16", "--resume"]


def record_anew(folder: Path) -> None:
    """Make complete.json agree with the files again, as somebody would who can write to the folder."""
    file = folder / "complete.json"
    record = json.loads(file.read_text())
    record["files"] = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of_file(folder / name)}
        for name in record["files"]
    }
    file.write_text(json.dumps(record))


class Payload:
    """Pickled, this makes a file when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("name", ["optimizer-00000.safetensors", "teacher-00000.safetensors"])
@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_resume_runs_no_foreign_code(resumable: Training, tmp_path: Path, name: str, kind: str) -> None:
    folder = checkpoint.latest(resumable.run)
    canary = tmp_path / "executed"
    if kind == "pickle":
        (folder / name).write_bytes(pickle.dumps(Payload(canary)))
    else:
        torch.save({"0.master": Payload(canary)}, folder / name)
    record_anew(folder)
    status, line = resumable(*RESUME)
    assert (status, canary.exists()) == (2, False)
    assert name in line


def test_a_file_of_equal_size_is_noticed_by_its_hash(resumable: Training) -> None:
    folder = checkpoint.latest(resumable.run)
    target = folder / "optimizer-00000.safetensors"
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 1
    target.write_bytes(data)
    status, line = resumable(*RESUME)
    assert status == 2
    assert "optimizer-00000.safetensors is not the file that was saved" in line


def test_a_file_that_was_added_is_refused(resumable: Training) -> None:
    (checkpoint.latest(resumable.run) / "optimizer-00001.safetensors").write_bytes(b"x")
    status, line = resumable(*RESUME)
    assert status == 2
    assert "is not part of the checkpoint" in line


def test_checkpoints_hold_no_scripts(finished: Path) -> None:
    assert not list((finished / "run").rglob("*.py"))


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name, tensor in tensors.items() if tensor.ndim)
    tensors[name] = tensors[name][:1]


def poison(tensors: dict[str, torch.Tensor]) -> None:
    next(tensor for name, tensor in tensors.items() if name.endswith(("teacher", "master")))[3] = float("nan")


def retype(tensors: dict[str, torch.Tensor]) -> None:
    tensors[next(iter(tensors))] = tensors[next(iter(tensors))].double()


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(iter(tensors))]


@pytest.mark.parametrize("of", ["teacher", "optimizer"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (reshape, "should be torch.float32"),
        (retype, "should be torch.float32"),
        (drop, "tensors, it holds"),
        (poison, "weights are not finite"),
    ],
)
def test_a_damaged_shard_is_refused(resumable: Training, of: str, damage: Callable[[dict], None], said: str) -> None:
    folder = checkpoint.latest(resumable.run)
    file = folder / f"{of}-00000.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)
    record_anew(folder)
    status, line = resumable(*RESUME)
    assert status == 2
    assert said in line


@pytest.mark.parametrize(
    "text", ["{", "[]", "null", '{"format": 3}', "[" * 100000, '{"format": 3, "step": 1e400}', '{"format": NaN}']
)
def test_a_damaged_record_is_one_line(resumable: Training, text: str) -> None:
    (checkpoint.latest(resumable.run) / "complete.json").write_text(text)
    status, line = resumable(*RESUME)
    assert status == 2
    assert "complete.json" in line


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("files", {"../../outside": {"bytes": 1, "sha256": "0"}}),
        ("files", []),
        ("step", -1),
        ("step", "4"),
        ("config", {"model": 3}),
        ("codes", None),
        ("telemetry", {"rows": [["x"]]}),
        ("ranks", 10**400),
    ],
)
def test_a_record_of_wrong_kinds_is_one_line(resumable: Training, field: str, value: object) -> None:
    file = checkpoint.latest(resumable.run) / "complete.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    status, line = resumable(*RESUME)
    assert status == 2
    assert field in line


def test_every_checkpoint_holds_a_model_that_loads(finished: Path) -> None:
    """Student and teacher as plain safetensors, equal to the exported ones where it is the last step."""
    folders = checkpoint.finished(finished / "run")
    assert len(folders) == 2
    for name in ("student", "teacher"):
        first, last = (load_file(folder / "model" / WEIGHTS_FILES[name]) for folder in folders)
        exported = load_file(finished / "run/model" / WEIGHTS_FILES[name])
        assert all(torch.equal(last[key], exported[key]) for key in exported)
        assert any(not torch.equal(first[key], last[key]) for key in exported)
        assert load_model(folders[0] / "model", weights=name).transformer.config.blocks == 2

"""What a checkpoint's folder holds is checked before it is used, and nothing of it executes: each case is one that once went wrong."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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
        patch.setattr(sys, "argv", ["train.py", *SMALL, "--data.codes", str(folder / "codes"), "--run", str(folder / "run"), "--train.max-steps", "4",
                                    "--train.save-every-steps", "2", "--train.zero-stage", "1", "--train.precision", "bf16"])
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
    record["files"] = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of_file(folder / name)} for name in record["files"]}
    file.write_text(json.dumps(record))


class Payload:
    """Pickled, this makes a file when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"])
@pytest.mark.parametrize("legacy", [False, True])
def test_resume_runs_no_foreign_code(resumable: Training, tmp_path: Path, name: str, legacy: bool) -> None:
    folder = checkpoint.latest(resumable.run)
    target, canary = folder / "deepspeed" / name, tmp_path / "executed"
    content = torch.load(target, weights_only=False)
    if legacy:
        target.write_bytes(pickle.dumps(Payload(canary)))
    else:
        torch.save({**content, "extra": Payload(canary)}, target)
    record_anew(folder)
    status, line = resumable(*RESUME)
    assert (status, canary.exists()) == (2, False)
    assert name in line


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"])
@pytest.mark.parametrize("content", [{}, [1, 2], {"module": {"x": torch.zeros(2)}}])
def test_a_file_that_holds_something_else_is_one_line(resumable: Training, name: str, content: object) -> None:
    folder = checkpoint.latest(resumable.run)
    torch.save(content, folder / "deepspeed" / name)
    record_anew(folder)
    status, line = resumable(*RESUME)
    assert status == 2
    assert "DeepSpeed cannot load it" in line


def test_a_file_of_equal_size_is_noticed_by_its_hash(resumable: Training) -> None:
    folder = checkpoint.latest(resumable.run)
    target = folder / "deepspeed/mp_rank_00_model_states.pt"
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 1
    target.write_bytes(data)
    status, line = resumable(*RESUME)
    assert status == 2
    assert "mp_rank_00_model_states.pt is not the file that was saved" in line


def test_a_file_that_was_added_is_refused(resumable: Training) -> None:
    (checkpoint.latest(resumable.run) / "deepspeed/zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(b"x")
    status, line = resumable(*RESUME)
    assert status == 2
    assert "is not part of the checkpoint" in line


def test_checkpoints_hold_no_scripts(finished: Path) -> None:
    assert not list((finished / "run").rglob("*.py"))


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["0"] = tensors["0"][:1]


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors["0"][3] = float("nan")


def retype(tensors: dict[str, torch.Tensor]) -> None:
    tensors["0"] = tensors["0"].double()


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["0"]


@pytest.mark.parametrize(("damage", "said"), [(reshape, "tensor 0 should be"), (retype, "tensor 0 should be"), (drop, "expected 2 tensors, it holds 1"),
                                              (poison, "the teacher's weights are not finite")])
def test_a_damaged_teacher_is_refused(resumable: Training, damage: Callable[[dict], None], said: str) -> None:
    folder = checkpoint.latest(resumable.run)
    file = folder / "teacher-00000.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)
    record_anew(folder)
    status, line = resumable(*RESUME)
    assert status == 2
    assert said in line


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"format": 2}', "[" * 100000, '{"format": 2, "step": 1e400}', '{"format": NaN}'])
def test_a_damaged_record_is_one_line(resumable: Training, text: str) -> None:
    (checkpoint.latest(resumable.run) / "complete.json").write_text(text)
    status, line = resumable(*RESUME)
    assert status == 2
    assert "complete.json" in line


@pytest.mark.parametrize(("field", "value"), [("files", {"../../outside": {"bytes": 1, "sha256": "0"}}), ("files", []), ("step", -1), ("step", "4"),
                                              ("config", {"model": 3}), ("codes", None), ("telemetry", {"rows": [["x"]]}), ("ranks", 10**400)])
def test_a_record_of_wrong_kinds_is_one_line(resumable: Training, field: str, value: object) -> None:
    file = checkpoint.latest(resumable.run) / "complete.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    status, line = resumable(*RESUME)
    assert status == 2
    assert field in line


def test_zip_entries_of_a_checkpoint_are_stored(finished: Path) -> None:
    """What DeepSpeed's stand-in writes is an ordinary torch file."""
    for path in (finished / "run").rglob("*.pt"):
        with zipfile.ZipFile(path) as archive:
            assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}

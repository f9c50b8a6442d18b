"""A training run executes nothing that its folder holds, calls nothing finished that is broken, and loses nothing: each case is one that once went wrong."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from star_fast.locks import only_writer
from star_fast.model.weights import load_model
from star_fast.storage import sha256_of_file
from star_fast.train import main as train_main
from star_fast.training import checkpoint
from star_fast.training.watch import LEAST_STEPS, WINDOW_STEPS, Diverged, LossWatch
from tests.training.store import write_store

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--preset", "tiny", "--model.width", "32", "--model.blocks", "2", "--method.projector-width", "24", "--train.images-per-step", "8",
         "--train.tensorboard", "False", "--train.log-every-steps", "1", "--optim.warmup-steps", "0"]


class Training:
    """Runs train.py's main in this process, on a small code store, and keeps what it said."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
        self.run, self.monkeypatch, self.capfd = folder / "run", monkeypatch, capfd
        self.codes = folder / "codes"
        write_store(self.codes)

    def __call__(self, *more: str) -> tuple[int, str]:
        """(exit status, what stderr ends with: the error line if there is one)."""
        self.monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--data.codes", str(self.codes), "--run", str(self.run), *more])
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            self.monkeypatch.delenv(name, raising=False)
        status = train_main()
        self.out, self.err = self.capfd.readouterr()
        assert "Traceback" not in self.out + self.err
        return status, next((line for line in self.err.splitlines() if line.startswith("error: ")), "")

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.run / "checkpoints").iterdir())


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Training:
    return Training(tmp_path, monkeypatch, capfd)


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


# --- nothing executes


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


# --- a damaged teacher is refused, never broadcast


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


# --- what is not finite stops the run


def test_an_absurd_learning_rate_stops_the_run_and_exports_nothing(training: Training) -> None:
    status, line = training("--train.max-steps", "8", "--train.log-every-steps", "3", "--optim.lr-per-256-images", "1e18", "--optim.clip-norm", "0")
    assert status == 2
    assert "the loss is not finite (loss nan" in line
    assert "there is no checkpoint yet" in line
    assert not (training.run / "model").exists()
    assert not (training.run / "checkpoints").exists()
    (listed,) = training.run.glob("diverged-step-*.json")
    told = json.loads(listed.read_text())
    step = int(listed.stem.removeprefix("diverged-step-"))
    assert told["step"] == step >= 2
    assert f"step {step}: " in line
    assert len(told["images"]) == len(told["keys"]) == 8
    for text in (training.run / "metrics.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=pytest.fail)


def poisoned_step(monkeypatch: pytest.MonkeyPatch, bad_step: int, where: str) -> None:
    """From `bad_step` on (counted from 1) the student's weights, or only the loss, are NaN."""
    from star_fast.training.engine import Engine

    healthy = Engine.step

    def step(self: Engine, batches: list, number: int, lr: float) -> tuple:
        losses, norm = healthy(self, batches, number, lr)
        if number + 1 >= bad_step:
            if where == "weights":
                self.masters.tensors()[0].view(-1)[5] = float("nan")
            else:
                losses = losses * float("nan")
        return losses, norm

    monkeypatch.setattr(Engine, "step", step)


@pytest.mark.parametrize("where", ["loss", "weights"])
def test_the_last_good_checkpoint_outlives_a_nan(training: Training, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Weights that break between two log lines are noticed before they are saved."""
    poisoned_step(monkeypatch, 6, where)
    status, line = training("--train.max-steps", "12", "--train.save-every-steps", "2", "--train.keep-checkpoints", "1", "--train.log-every-steps", "5")
    assert status == 2
    assert "step 6: " in line
    assert "not finite" in line
    assert str(training.run / "checkpoints/step-0000004") in line
    assert training.checkpoints() == ["step-0000004"]
    assert not (training.run / "model").exists()
    monkeypatch.undo()
    status, _ = training("--train.max-steps", "12", "--optim.lr-per-256-images", "0.01", "--resume")
    assert status == 0
    assert "Resuming with other settings than before: optim.lr_per_256_images 0.02 -> 0.01" in training.out
    load_model(training.run / "model")


def test_the_watch_reports_a_spike_once_and_takes_a_new_level_for_granted() -> None:
    watch, rng = LossWatch(6.0), np.random.default_rng(0)
    losses = 5 + 0.1 * rng.standard_normal(3 * WINDOW_STEPS)
    assert not any(watch.see(step, {"loss": loss}) for step, loss in enumerate(losses, 1))
    step = len(losses)
    above = watch.see(step + 1, {"loss": 7.0})
    assert 15 < above < 25
    assert watch.episode == step + 1
    assert watch.see(step + 2, {"loss": 7.0}) is None
    assert watch.see(step + 3, {"loss": 5.0}) is None
    assert watch.episode is None
    assert watch.see(step + 4, {"loss": 7.0}) > 6
    later = [watch.see(step + 5 + index, {"loss": 7.0 + 0.1 * value}) for index, value in enumerate(rng.standard_normal(20 * WINDOW_STEPS))]
    assert not any(later)  # one report for a jump that stays
    assert watch.episode is None
    with pytest.raises(Diverged, match=r"step 9: the loss is not finite \(loss inf, ar 1\)"):
        watch.see(9, {"loss": float("inf"), "ar": 1.0})
    quiet = LossWatch(0.0)
    assert not any(quiet.see(step, {"loss": float(step)}) for step in range(1, 4 * LEAST_STEPS))


def test_a_spike_keeps_the_checkpoint_before_it_and_can_stop_the_run(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    from star_fast.training.engine import Engine

    healthy = Engine.step

    def step(self: Engine, batches: list, number: int, lr: float) -> tuple:
        losses, norm = healthy(self, batches, number, 0.0)
        return losses.clone().fill_(3 + 0.01 * (number % 3) + 5 * (number >= 60)), norm

    monkeypatch.setattr(Engine, "step", step)
    size = ["--train.save-every-steps", "8", "--train.keep-checkpoints", "1", "--train.validate-every-steps", "0", "--train.max-steps", "80"]
    status, _ = training(*size)
    assert status == 0
    assert "step 61: loss 8 lies" in training.err
    assert training.checkpoints() == ["step-0000056", "step-0000080"]  # the last before the spike is spared
    lines = [json.loads(text) for text in (training.run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "spike_deviations" in line] == [61]
    shutil.rmtree(training.run)
    status, line = training(*size, "--train.stop-on-spike", "True")
    assert status == 2
    assert "step 61: " in line
    assert "train.stop_on_spike is set" in line
    assert training.checkpoints() == ["step-0000056"]


# --- nothing is lost


def test_a_leftover_folder_is_no_checkpoint_and_is_cleared(training: Training) -> None:
    """A full disk leaves step-N.tmp: it once counted as one of the kept, and the last good checkpoint went."""
    left = training.run / "checkpoints/step-9999999.tmp"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x")
    (training.run / ".config.yaml.4242.tmp").write_bytes(b"x")
    status, _ = training("--train.max-steps", "4", "--train.save-every-steps", "2", "--train.keep-checkpoints", "1")
    assert status == 0
    assert training.checkpoints() == ["step-0000004"]
    assert not list(training.run.glob(".*.tmp"))


def test_pruning_counts_complete_checkpoints_only(tmp_path: Path) -> None:
    for name in ("step-0000002", "step-0000010", "step-0000008.tmp", "step-x", "step-10000000"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints/step-0000099").write_text("a file")
    assert [path.name for path in checkpoint.finished(tmp_path)] == ["step-0000002", "step-0000010", "step-10000000"]
    assert checkpoint.latest(tmp_path).name == "step-10000000"


@pytest.mark.parametrize("stage", ["0", "1"])
def test_a_full_disk_in_a_save_is_one_line_and_the_last_checkpoint_stays(training: Training, tmp_path: Path, stage: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        training.run = disk / "run"
        settings = ["--train.zero-stage", stage, "--train.save-every-steps", "2", "--train.keep-checkpoints", "9", "--train.max-steps", "40"]
        status, line = training(*settings)
        assert status == 2
        assert "the disk is full" in line
        assert training.checkpoints()
        assert not any(name.endswith(".tmp") for name in training.checkpoints())
        newest = checkpoint.latest(training.run)
        for name, file in json.loads((newest / "complete.json").read_text())["files"].items():
            assert sha256_of_file(newest / name) == file["sha256"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_the_error_of_safetensors_on_a_full_disk_is_understood(monkeypatch: pytest.MonkeyPatch, training: Training) -> None:
    from safetensors import SafetensorError

    def full(tensors: dict, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    status, line = training("--train.max-steps", "2")
    assert status == 2
    assert "the disk is full" in line
    assert training.checkpoints() == []


# --- one writer a folder


def test_a_second_training_on_one_folder_is_told_who_is_there(training: Training) -> None:
    holder = subprocess.Popen([sys.executable, "-c", "import sys; from star_fast.locks import only_writer\n"
                               f"with only_writer({str(training.run)!r}, 'training'): print('held', flush=True); sys.stdin.read()"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert holder.stdout.readline() == "held\n"
    status, line = training("--train.max-steps", "2")
    assert status == 2
    assert f"{training.run}: training is writing there (process {holder.pid} on" in line
    assert sorted(path.name for path in training.run.iterdir()) == [".lock"]
    holder.kill()
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    status, _ = training("--train.max-steps", "2")  # a dead job does not block
    assert status == 0


def test_the_lock_is_shared_by_ranks_of_one_job_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"from star_fast.locks import only_writer\nwith only_writer({str(tmp_path)!r}, 'sampling'): print('held')"
    for name in ("MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)

    def second(**environment: str) -> tuple[int, str]:
        done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "node7")
    monkeypatch.setenv("MASTER_PORT", "4711")
    with only_writer(tmp_path, "sampling"):
        assert second(RANK="1") == (0, "held\n")
        status, said = second(MASTER_PORT="4712")
        assert status == 1
        assert "Busy" in said
        assert "job at node7:4711" in said
    assert second(MASTER_PORT="4712") == (0, "held\n")
    (tmp_path / ".lock").write_bytes(b"\xff\x00 garbage")
    assert second() == (0, "held\n")


def test_zip_entries_of_a_checkpoint_are_stored(finished: Path) -> None:
    """What DeepSpeed's stand-in writes is an ordinary torch file."""
    for path in (finished / "run").rglob("*.pt"):
        with zipfile.ZipFile(path) as archive:
            assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}


# --- several ranks, launchers and signals


def test_nothing_is_compiled_at_the_first_start(training: Training, tmp_path: Path) -> None:
    """DeepSpeed compiled an op that training never calls: a silent minute, and a lock for good if that was interrupted."""
    extensions = tmp_path / "extensions"
    done = subprocess.run([sys.executable, str(ROOT / "star_fast/train.py"), *SMALL, "--data.codes", str(training.codes), "--run", str(training.run),
                           "--train.max-steps", "1"], env={**os.environ, "TORCH_EXTENSIONS_DIR": str(extensions), "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not extensions.exists() or not list(extensions.rglob("*.*"))

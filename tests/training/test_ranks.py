"""Two ranks train what one rank trains; the teacher is the closed-form average of the student, in float32, under ZeRO
too.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from star_fast.data.codes import CodeStore
from star_fast.errors import UserError
from star_fast.storage import sha256_of_file
from star_fast.training import checkpoint
from star_fast.training.conversion import ConvertCommand, run_convert
from tests.training import ranks_main
from tests.training.ranks_main import settings
from tests.training.store import write_store

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def store(folder: Path) -> CodeStore:
    return write_store(folder / "codes")


@pytest.fixture(scope="module")
def two_ranks(folder: Path, store: CodeStore) -> list[dict[str, Any]]:
    """What each of two ranks saw in the jobs of ranks_main: one launch for all of them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.ranks_main", str(folder)],
            cwd=ROOT,
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(RANKS),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        for process in processes:
            output = process.communicate(timeout=600)[0]
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in processes:  # one that failed leaves the other waiting
            process.kill()
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def plain(one_rank: torch.device, store: CodeStore) -> dict[str, Any]:
    return ranks_main.train(settings(store), store, one_rank, 20)


def test_two_ranks_have_the_gradient_of_one(
    one_rank: torch.device, store: CodeStore, two_ranks: list[dict[str, Any]]
) -> None:
    alone = ranks_main.gradients(settings(store), store, one_rank)
    for seen in two_ranks:
        assert alone.keys() == seen["gradients"].keys()
        for name, expected in alone.items():
            error = (seen["gradients"][name] - expected).norm() / expected.norm().clamp(min=1e-12)
            assert error <= 1e-6, f"{name}: relative error {error:.2e}"


def test_two_ranks_choosing_otherwise_have_gradient_and_losses_of_one(
    one_rank: torch.device, store: CodeStore, two_ranks: list[dict[str, Any]]
) -> None:
    """Above all the projector's batch norm, over the rows of both ranks, and the negatives of all slots of both ranks'
    images.
    """
    alone = ranks_main.gradients(settings(store, **ranks_main.CHOICES), store, one_rank)
    for seen in two_ranks:
        assert alone.keys() == seen["choices_gradients"].keys()
        for name, expected in alone.items():
            error = (seen["choices_gradients"][name] - expected).norm() / expected.norm().clamp(min=1e-12)
            assert error <= 2e-6, f"{name}: relative error {error:.2e}"
    losses = ranks_main.train(settings(store, **ranks_main.CHOICES), store, one_rank, 6)["losses"]
    torch.testing.assert_close(two_ranks[0]["choices"]["losses"], losses, rtol=0, atol=1e-5)
    # Seven other images, two views and three positions of each
    assert abs(losses[0, 3].item() - math.log(1 + 7 * 2 * 3)) < 0.7


def test_batch_norm_of_two_ranks_is_that_of_all_their_rows(two_ranks: list[dict[str, Any]]) -> None:
    seen, alone = [seen["normed"] for seen in two_ranks], ranks_main.normed(0, 1)
    assert [len(one["out"]) for one in seen] == [8, 3]
    for name in ("out", "rows"):
        torch.testing.assert_close(torch.cat([one[name] for one in seen]), alone[name], rtol=1e-12, atol=1e-13)
    for name in ("weight", "bias"):  # each rank's share, which the engine adds up as any parameter's
        torch.testing.assert_close(sum(one[name] for one in seen), alone[name], rtol=1e-12, atol=1e-13)


def test_two_ranks_have_the_losses_of_one_with_the_keys_of_both(
    plain: dict[str, Any], two_ranks: list[dict[str, Any]]
) -> None:
    torch.testing.assert_close(two_ranks[0]["plain"]["losses"], plain["losses"], rtol=0, atol=1e-5)
    torch.testing.assert_close(two_ranks[0]["plain"]["norms"], plain["norms"], rtol=1e-3, atol=0)
    # Contrast against 8 keys, not 4: untrained features give about log 8.
    assert abs(plain["losses"][0, 3].item() - torch.tensor(8.0).log().item()) < 0.5
    assert plain["losses"][-1, 0] < plain["losses"][0, 0]


def test_accumulation_deals_the_same_micro_batches_to_two_ranks_as_to_one(
    one_rank: torch.device, store: CodeStore, two_ranks: list[dict[str, Any]]
) -> None:
    alone = ranks_main.train(settings(store, micro=4, decay=0.5, warmup=True), store, one_rank, 6)
    both = two_ranks[0]["accumulated"]
    torch.testing.assert_close(both["losses"], alone["losses"], rtol=0, atol=1e-5)
    for name, value in alone["teacher"][-1].items():
        torch.testing.assert_close(
            both["teacher"][-1][name], value, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    # Negatives come from the micro-batch
    assert abs(alone["losses"][0, 3].item() - torch.tensor(4.0).log().item()) < 0.5


def check_teacher(saved: dict[str, Any], decay: float, warmup: bool) -> None:
    """t_n = d_n t_(n-1) + (1 - d_n) s_n from t_0 = s_0, once a step, in float64, from the students as they were; d_n =
    min(d, n / (9 + n)) while warming up.
    """
    assert not saved["trained"]
    for name, first in saved["student"][0].items():
        expected = first.double()
        for n, state in enumerate(saved["student"][1:], 1):
            d = min(decay, n / (9 + n)) if warmup else decay
            expected = d * expected + (1 - d) * state[name].double()
            # Each update rounds the average once, by at most 2^-24 of itself.
            error = (saved["teacher"][n][name].double() - expected).abs().max()
            assert error <= n * 2**-23 * expected.abs().max().clamp(min=1e-6), f"{name} after step {n}: {error:.2e}"
        if name != "output.weight":
            assert (expected - first).abs().max() > 0, name


def check_copies(saved: dict[str, Any], copies: dict[str, Tensor]) -> None:
    """In bf16 the average moves in float32, and the teacher's model is its rounded masters."""
    for name, last in saved["teacher"][-1].items():
        assert last.dtype == torch.float32
        if not torch.equal(saved["student"][0][name], saved["student"][-1][name]):
            assert not torch.equal(saved["teacher"][0][name], last), f"{name}: the average stands still"
        assert torch.equal(copies[name], last.to(torch.bfloat16)), (
            f"{name}: the teacher's model is not its rounded masters"
        )


def test_teacher_is_the_closed_form_average(plain: dict[str, Any], two_ranks: list[dict[str, Any]]) -> None:
    check_teacher(plain, 0.9999, warmup=False)
    assert max((plain["teacher"][-1][name] - first).abs().max() for name, first in plain["teacher"][0].items()) > 0
    check_teacher(two_ranks[0]["accumulated"], 0.5, warmup=True)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("decay", "warmup"), [(0.9999, False), (0.5, True)])
def test_teacher_in_bf16_training_moves_in_float32(
    one_rank: torch.device, store: CodeStore, stage: int, decay: float, warmup: bool
) -> None:
    saved = ranks_main.train(
        settings(store, precision="bf16", stage=stage, micro=4, decay=decay, warmup=warmup), store, one_rank, 4
    )
    check_teacher(saved, decay, warmup)
    check_copies(saved, saved["copies"])


def test_teacher_under_zero_2_is_whole_on_every_rank(two_ranks: list[dict[str, Any]]) -> None:
    for seen in two_ranks:
        check_teacher(seen["bf16"], 0.5, warmup=True)
        check_copies(two_ranks[0]["bf16"], seen["bf16"]["copies"])


def test_two_ranks_of_zero_1_with_float32_gradients_train_as_one(
    one_rank: torch.device, store: CodeStore, two_ranks: list[dict[str, Any]]
) -> None:
    """Accumulating over two micro-batches; the weights of student and teacher have arrived when they are read."""
    alone = ranks_main.train(
        settings(store, precision="bf16", stage=1, micro=4, decay=0.5, warmup=True), store, one_rank, 4
    )
    for seen in two_ranks:
        check_teacher(seen["zero1"], 0.5, warmup=True)
        check_copies(two_ranks[0]["zero1"], seen["zero1"]["copies"])
        torch.testing.assert_close(seen["zero1"]["losses"], alone["losses"], rtol=0, atol=5e-3)
        torch.testing.assert_close(seen["zero1"]["norms"], alone["norms"], rtol=0.03, atol=0)
        for name, value in alone["student"][-1].items():
            moved = (value - alone["student"][0][name]).norm()
            assert (seen["zero1"]["student"][-1][name] - value).norm() <= 0.1 * moved + 1e-6, name
            assert torch.equal(seen["zero1, small buckets"]["student"][-1][name], seen["zero1"]["student"][-1][name]), (
                name
            )


def test_ranks_drop_different_activations(two_ranks: list[dict[str, Any]]) -> None:
    first, second = (seen["own_loss"] for seen in two_ranks)
    assert first != second


def test_validation_is_over_the_images_of_all_ranks_once(
    one_rank: torch.device, store: CodeStore, two_ranks: list[dict[str, Any]]
) -> None:
    alone = ranks_main.validation(settings(store), store, one_rank)
    for seen in two_ranks:
        assert seen["validation"] == pytest.approx(alone, rel=1e-6)


def test_a_log_line_has_the_mean_of_all_ranks(two_ranks: list[dict[str, Any]]) -> None:
    line = two_ranks[0]["log_line"]
    assert [line[name] for name in ("loss", "ar", "mim", "step_contrast", "view_contrast")] == [5.0, 6.0, 7.0, 8.0, 9.0]
    assert (line["step"], line["images"], line["grad_norm"]) == (2, 16, 3.0)


def test_a_sharded_checkpoint_is_whole_on_every_rank_however_late_one_comes(two_ranks: list[dict[str, Any]]) -> None:
    for rank, seen in enumerate(two_ranks):
        found = {name: value for name, value in seen["saved"].items() if name not in ("student", "teacher")}
        assert found == {
            "there_on_return": True,
            "loaded": True,
            "equal": [True, True, True],
            "model_on_return": True,
        }, f"rank {rank}"


def test_what_is_wrong_on_one_rank_stops_all_of_them(two_ranks: list[dict[str, Any]]) -> None:
    for rank, seen in enumerate(two_ranks):
        faults = seen["faults"]
        for name in ("_write", "_describe"):
            assert faults[name] == ("rank 1: the disk is full", []), f"rank {rank}, {name}"
        assert faults["complete"] == ("the disk is full", []), f"rank {rank}"
        # Two shards of the student and two of the teacher; the model: its config, student, teacher
        assert len(faults["damaged"]) == 7
        for name, told in faults["damaged"].items():
            assert f"{name} is not the file that was saved" in told, f"rank {rank}"
        assert faults["whole"] == "nothing"
        assert faults["infinite"] == "step 1: the student's weights are not finite", f"rank {rank}"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_another_stage(
    one_rank: torch.device,
    store: CodeStore,
    folder: Path,
    tmp_path: Path,
    stage: int,
    two_ranks: list[dict[str, Any]],
    capsys: pytest.CaptureFixture,
) -> None:
    """Every master, moment and average is where its parameter is; what was saved on two ranks is refused as it is."""
    engine, batches = ranks_main.start(settings(store, precision="bf16", stage=stage, dropout=0.2), store, one_rank)
    with pytest.raises(
        UserError, match=r"saved by 2 ranks with ZeRO stage 1, this run has 1 ranks .* star-fast convert"
    ):
        checkpoint.load(engine, store, checkpoint.latest(folder / "run"))
    run_convert(ConvertCommand(str(folder / "run"), str(tmp_path / "any")))
    told = capsys.readouterr().out.splitlines()
    assert (
        len(told) == 4
        and "saved by 2 ranks with ZeRO-1, now for any number and stage" in told[0]
        and told[-1].startswith("Go on: deepspeed")
    )
    assert checkpoint.load(engine, store, checkpoint.latest(tmp_path / "any")).step == 2
    for who, masters in (("student", engine.masters.tensors()), ("teacher", engine.teacher.masters)):
        for name, value in ranks_main.whole(engine, masters).items():
            assert torch.equal(value, two_ranks[0]["saved"][who][name]), f"{who} {name}"
    working = ranks_main.read(engine.student.transformer.named_parameters())
    assert all(torch.equal(working[name], value.bfloat16()) for name, value in two_ranks[0]["saved"]["student"].items())
    moments = [engine.deepspeed.basic_optimizer.state[shard.tensor] for shard in engine.masters.shards()]
    assert all(float(state["step"]) == 2 and state["exp_avg_sq"].abs().max() > 0 for state in moments)
    engine.step(batches.step(2), 2, 0.01)
    assert checkpoint.finished(checkpoint.save(engine, store, tmp_path / "next", 3, 1).parent.parent)


@pytest.mark.parametrize(
    ("damage", "said"),
    [("cover", "elements of"), ("layout", "do not say what its shards hold"), ("gone", "should have|not found")],
)
def test_a_damaged_checkpoint_is_not_put_together(
    folder: Path, tmp_path: Path, two_ranks: list[dict[str, Any]], damage: str, said: str
) -> None:
    run = shutil.copytree(folder / "run", tmp_path / "run")
    source = checkpoint.latest(run)
    file = source / "optimizer-00001.safetensors"
    if damage == "gone":
        file.unlink()
    else:
        with safe_open(file, "pt") as opened:
            layout = json.loads(opened.metadata()["layout"])
        layout["shards"][0] = layout["shards"][0][:1] if damage == "cover" else [["x", -1, 2]]
        save_file(load_file(file), file, {"layout": json.dumps(layout)})
        record = json.loads((source / "complete.json").read_text())
        record["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of_file(file)}
        (source / "complete.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=said):
        run_convert(ConvertCommand(str(run), str(tmp_path / "any")))
    assert not checkpoint.finished(tmp_path / "any") and not list((tmp_path / "any").rglob("*.tmp"))


def test_what_cannot_be_converted_is_one_line(folder: Path, tmp_path: Path, two_ranks: list[dict[str, Any]]) -> None:
    for command, said in (
        (ConvertCommand(str(tmp_path / "none"), "x"), "complete ones: none"),
        (ConvertCommand(str(folder / "run"), "x", 7), "of step 7"),
        (ConvertCommand(str(folder / "run")), "--out: expected the folder"),
        (ConvertCommand(str(folder / "run"), str(folder / "run")), ""),
    ):
        with pytest.raises(UserError, match=said):
            run_convert(command)

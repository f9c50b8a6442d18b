"""What a run leaves behind, line by line and file by file, against the same run written out by hand; and what a resume
makes of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from star_fast.config import DataConfig, MethodConfig, ModelConfig, OptimConfig, RunConfig, TokenizerConfig, TrainConfig
from star_fast.data.codes import CodeStore
from star_fast.errors import UserError
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.weights import load_model
from star_fast.train import TrainCommand, train
from star_fast.training import checkpoint
from star_fast.training.batches import resolve
from star_fast.training.engine import build_student
from tests.disk_events import DiskEvent, watch_disk
from tests.training.plain_trainer import PlainTrainer, learning_rate
from tests.training.store import write_store

STEPS, IMAGES = 10, 24
TOKENIZER = TokenizerConfig(
    base_channels=4,
    multipliers=(1, 1, 1),
    residual_blocks=1,
    z_channels=4,
    code_channels=4,
    codebook=16,
    image_channels=1,
    image_size=16,
)
CONFIG = RunConfig(
    ModelConfig(2, 2, 16, dropout=0.3, label_dropout=0.4),
    MethodConfig(contrast_positions=2, projector_width=16, ema_decay=0.6),
    OptimConfig(3.0, weight_decay=0.3, eps=0.01, clip_norm=0.2, schedule="cosine", warmup_steps=3, final_lr_share=0.1),
    TrainConfig(
        images_per_step=IMAGES,
        micro_batch_images=12,
        max_steps=STEPS,
        precision="fp32",
        zero_stage=0,
        seed=4,
        save_every_steps=4,
        keep_checkpoints=2,
        log_every_steps=3,
        validate_every_steps=4,
        tensorboard=False,
    ),
)


class Run(NamedTuple):
    """One finished run, the same by hand, and what the disk was told meanwhile."""

    folder: Path
    config: RunConfig
    store: CodeStore
    losses: list[Tensor]  # by hand, of each step
    norms: list[float]
    held_out: dict[int, float]  # by hand, after so many steps
    plain: PlainTrainer
    events: list[DiskEvent]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(one_rank: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Run:
    where = tmp_path_factory.mktemp("run")
    tokenizer = VQTokenizer(TOKENIZER).eval()
    # 80 held-out images: more than one batch of validation
    store = write_store(where / "codes", 400, tokenizer.weights_hash())
    tokenizer.save(where / "codes" / "tokenizer")
    config = dataclasses.replace(CONFIG, data=DataConfig(codes=str(where / "codes")))
    left = where / "run/checkpoints/step-0000004.tmp"  # as a kill in the middle of a save leaves it
    left.mkdir(parents=True)
    (left / "half.pt").write_bytes(b"half")
    torch.manual_seed(99)  # nothing of a run depends on it
    with pytest.MonkeyPatch.context() as monkeypatch:
        events = watch_disk(monkeypatch)
        train(TrainCommand(config, run=str(where / "run")))
    config = resolve(config, store)
    plain = PlainTrainer(config, store, build_student(config), STEPS)
    losses, norms, held_out = [], [], {}
    for step in range(STEPS):
        found, norm = plain.step(step)
        losses.append(found)
        norms.append(norm)
        if step + 1 in (4, 8, 10):
            held_out[step + 1] = plain.held_out_loss()
    return Run(where / "run", config, store, losses, norms, held_out, plain, events)


def test_every_log_line_has_the_numbers_of_its_interval(run: Run) -> None:
    logged = [line for line in lines(run.folder) if "loss" in line]
    assert [line["step"] for line in logged] == [3, 6, 9, 10]
    for line, first in zip(logged, (0, 3, 6, 9), strict=True):
        means = torch.stack(run.losses[first : line["step"]]).mean(0).tolist()
        assert [line[name] for name in ("loss", "ar", "mim", "step_contrast", "view_contrast")] == pytest.approx(
            means, abs=3e-5
        )
        last = line["step"] - 1
        assert line["lr"] == pytest.approx(learning_rate(run.config, last, STEPS)) and line[
            "grad_norm"
        ] == pytest.approx(run.norms[last], rel=1e-4)
        assert line["images"] == line["step"] * IMAGES and line["images_per_s"] > 0
    assert [line["time_s"] for line in logged] == sorted(line["time_s"] for line in logged)


def test_validation_is_the_students_loss_on_view_0_of_the_held_out_images(run: Run) -> None:
    found = {line["step"]: line for line in lines(run.folder) if "val_ar" in line}
    assert list(found) == [4, 8, 10]  # and at the end, which is no multiple
    for step, line in found.items():
        assert line["val_ar"] == pytest.approx(run.held_out[step], abs=2e-5) and line["images"] == step * IMAGES
    assert abs(run.held_out[10] - run.held_out[4]) > 1e-3


def test_the_model_folder_holds_what_was_learnt(run: Run) -> None:
    for weights, plain in (("student", run.plain.student), ("teacher", run.plain.teacher)):
        loaded = load_model(run.folder / "model", weights=weights)
        for (name, ours), expected in zip(loaded.transformer.named_parameters(), plain.parameters(), strict=True):
            assert (ours - expected).abs().max() <= 3e-5 * expected.abs().max().clamp(min=1), f"{weights} {name}"
            assert weights == "teacher" or not torch.equal(ours, ours.bfloat16().float()), f"{name}: rounded"
    assert loaded.class_names == list(run.store.class_names)
    assert (
        VQTokenizer.load(loaded.tokenizer_folder).weights_hash()
        == run.store.tokenizer_hash
        == loaded.record["tokenizer_hash"]
    )
    assert (loaded.record["step"], loaded.record["images_seen"], loaded.record["contrast_depth"]) == (
        STEPS,
        STEPS * IMAGES,
        1,
    )
    assert loaded.record["precision"] == "fp32" and loaded.record["method"]["ema_decay"] == 0.6


def test_the_newest_checkpoints_stay_and_nothing_else(run: Run) -> None:
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == ["step-0000008", "step-0000010"]
    assert checkpoint.latest(run.folder).name == "step-0000010"
    saved = [
        os.path.basename(event.target)
        for event in run.events
        if event.kind == "rename" and os.path.dirname(event.target).endswith("checkpoints")
    ]
    assert saved == ["step-0000004", "step-0000008", "step-0000010"]  # every fourth, and the end


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(run: Run) -> None:
    final = run.folder / "checkpoints/step-0000010"
    synced: set[str] = set()
    named = next(number for number, event in enumerate(run.events) if event.target == str(final))
    for kind, path, target in run.events[: named + 1]:
        if kind == "sync":
            synced.add(path)
        elif kind == "rename":  # what was flushed under the old name is flushed under the new one
            synced |= {target + old.removeprefix(path) for old in synced if old == path or old.startswith(path + "/")}
    assert not [str(path) for path in final.rglob("*") if str(path) not in synced]
    assert ("sync", str(final.parent), "") in run.events[named:], "the new name itself is not flushed"


def resumed(run: Run, where: Path, **changes: Any) -> Path:
    """The run as it was after step 8, resumed under `where` with some settings changed, each given
    as section__field.
    """
    shutil.copytree(
        run.folder,
        where,
        ignore=lambda folder, names: {"step-0000010", ".lock", *(["model"] if Path(folder) == run.folder else [])},
    )
    config = run.config
    for name, value in changes.items():
        section, field = name.split("__")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{field: value})}
        )
    train(TrainCommand(config, run=str(where), resume=True))
    return where


def test_a_resumed_run_ends_as_the_unbroken_one(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(7)
    again = resumed(run, tmp_path / "again")
    for name in ("model.safetensors", "teacher.safetensors"):
        assert (again / "model" / name).read_bytes() == (run.folder / "model" / name).read_bytes(), name

    def timeless(folder: Path) -> list[dict[str, Any]]:
        return [
            {name: value for name, value in line.items() if name not in ("images_per_s", "data_s", "time_s")}
            for line in lines(folder)
        ]

    assert timeless(again) == timeless(run.folder)
    remembered = [
        json.loads((folder / "checkpoints/step-0000010/complete.json").read_text())["telemetry"]
        for folder in (again, run.folder)
    ]
    # A jump of the loss is judged by the same steps
    assert remembered[0] == remembered[1] and len(remembered[1]["window"]) == STEPS


def test_lines_of_lost_steps_go_and_the_clock_goes_on(run: Run, tmp_path: Path) -> None:
    """As after a kill at step 10: what was logged after the checkpoint's step is cut off and written anew."""
    where = tmp_path / "again"
    shutil.copytree(
        run.folder,
        where,
        ignore=lambda folder, names: {"step-0000010", ".lock", *(["model"] if Path(folder) == run.folder else [])},
    )
    known = [{**line, "time_s": line["time_s"] + 1000.0} if "time_s" in line else line for line in lines(where)]
    (where / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in known) + '{"step": 10, "los')
    train(TrainCommand(run.config, run=str(where), resume=True))
    after = lines(where)
    assert [(line["step"], "val_ar" in line) for line in after] == [
        (3, False),
        (4, True),
        (6, False),
        (8, True),
        (9, False),
        (10, False),
        (10, True),
    ]
    assert after[:4] == known[:4]
    spent = max(line.get("time_s", 0.0) for line in known[:4])
    assert all(spent < line["time_s"] < spent + 900 for line in after[4:6])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("train__seed", 5),
        ("train__images_per_step", 12),
        ("train__micro_batch_images", 24),
        ("method__temperature", 0.3),
        ("method__ema_decay", 0.5),
        ("method__views", 3),
        ("model__dropout", 0.2),
        ("model__label_dropout", 0.1),
        ("data__views", "small-affine"),
    ],
)
def test_a_resume_is_of_the_same_run(run: Run, tmp_path: Path, setting: str, value: Any) -> None:
    section, field = setting.split("__")
    with pytest.raises(UserError, match=rf"it was saved with {section}\.{field} = .*, this run has {value!r}"):
        resumed(run, tmp_path / "other", **{setting: value})


def test_a_resume_is_on_the_same_codes(run: Run, tmp_path: Path) -> None:
    """As many images, of the same tokenizer; one code differs."""
    other = tmp_path / "codes"
    shutil.copytree(run.config.data.codes, other)
    codes = bytearray((other / "codes.bin").read_bytes())
    codes[0] ^= 1
    (other / "codes.bin").write_bytes(codes)
    manifest = json.loads((other / "manifest.json").read_text())

    manifest["files"]["codes.bin"]["sha256"] = hashlib.sha256(codes).hexdigest()
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        UserError, match=r"trained on a code store of codes .* give the code store that the run began with"
    ):
        resumed(run, tmp_path / "other", data__codes=str(other))

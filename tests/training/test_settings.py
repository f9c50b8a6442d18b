"""DeepSpeed's JSON: what is derived, and what a user's own may say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from star_fast.config import ConfigError, ModelConfig, RunConfig, TrainConfig
from star_fast.data.codes import CodeStore
from star_fast.training.deepspeed_settings import derived, settings
from tests.training import ranks_main
from tests.training.store import write_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CodeStore:
    return write_store(tmp_path_factory.mktemp("settings") / "codes")


def config(**train: Any) -> RunConfig:
    return RunConfig(ModelConfig(2, 2, 32), train=TrainConfig(images_per_step=8, **train))


def with_file(folder: Path, content: object, **train: Any) -> RunConfig:
    file = folder / "ds.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return config(deepspeed=str(file), **train)


@pytest.mark.parametrize(
    ("train", "wanted"),
    [
        (
            {},
            {
                "data_types": {"grad_accum_dtype": "fp32"},
                "communication_data_type": "fp32",
                "bf16.check_grad_overflow": False,
            },
        ),
        (
            {"gradient_precision": "bf16"},
            {"data_types": {"grad_accum_dtype": "bf16"}, "communication_data_type": "bf16"},
        ),
        ({"zero_stage": 2}, {"zero_optimization.overlap_comm": True, "zero_optimization.stage": 2}),
        ({"zero_stage": 3}, {"zero_optimization.stage3_param_persistence_threshold": 0}),
        ({"offload_optimizer": True}, {"zero_optimization.offload_optimizer": {"device": "cpu", "pin_memory": False}}),
        ({"precision": "fp32", "zero_stage": 0}, {"gradient_clipping": 0.0, "bf16.enabled": False}),
    ],
)
def test_each_field_is_in_the_json(train: dict[str, Any], wanted: dict[str, Any]) -> None:
    found = derived(config(**train), 4, 2)
    assert (found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]) == (4, 2)
    for dotted, value in wanted.items():
        part = found
        for name in dotted.split("."):
            part = part[name]
        assert part == value, dotted


def test_a_json_of_ones_own_is_laid_over(tmp_path: Path) -> None:
    tuned = {"reduce_bucket_size": 1000, "stage3_max_live_parameters": 5}
    own = {"zero_optimization": {"stage": 2, **tuned}, "train_batch_size": "auto", "fp16": {"enabled": False}}
    found = settings(with_file(tmp_path, own, zero_stage=2), 4, 2)
    assert found["zero_optimization"] == {**derived(config(zero_stage=2), 4, 2)["zero_optimization"], **tuned}
    assert found["bf16"]["enabled"] is True


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"zero_optimization": {"stage": 3}}, r"sets zero_optimization\.stage = 3, the run's config gives 1"),
        ({"gradient_accumulation_steps": 5}, r"sets gradient_accumulation_steps = 5, the run's config gives 2"),
        ({"bf16": {"enabled": False}}, r"sets bf16\.enabled = False"),
        ({"fp16": {"enabled": True}}, "use --train.precision bf16"),
        ({"optimizer": {"type": "Adam"}}, r"use --optim\.\*"),
        ({"train_batch_size": 64}, "leave it out"),
        ({"zero_optimization": {"stage3_param_persistence_threshold": 1e5}}, "keeps the teacher moving"),
        ([1], "must hold one JSON object"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_a_contradiction_is_one_line(tmp_path: Path, own: object, said: str) -> None:
    with pytest.raises(ConfigError, match=f"train.deepspeed: .*{said}"):
        settings(with_file(tmp_path, own), 4, 2)
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        settings(config(deepspeed=str(tmp_path / "nowhere.json")), 4, 2)


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"precision": "bf16", "zero_stage": 0}, "train.zero_stage"),
        ({"zero_stage": 4}, "train.zero_stage"),
        ({"zero_stage": 0, "precision": "fp32", "offload_optimizer": True}, "train.offload_optimizer"),
        ({"keep_attention": True}, "train.keep_attention"),
        ({"hang_minutes": -1.0}, "train.hang_minutes"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(train: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(**train)


def _changed(run: RunConfig, **train: Any) -> RunConfig:
    return dataclasses.replace(run, train=dataclasses.replace(run.train, **train))


def test_masters_in_host_memory_train_the_same(one_rank: torch.device, store: CodeStore) -> None:
    usual = ranks_main.settings(store, precision="bf16", stage=1, micro=4)
    runs = [
        ranks_main.train(run, store, one_rank, 4)
        for run in (_changed(usual, zero_stage=2), _changed(usual, zero_stage=2, offload_optimizer=True))
    ]
    torch.testing.assert_close(runs[0]["losses"], runs[1]["losses"], rtol=0, atol=1e-3)
    for name, value in runs[0]["teacher"][-1].items():
        torch.testing.assert_close(runs[1]["teacher"][-1][name], value, rtol=0, atol=1e-5)
        assert torch.equal(runs[1]["copies"][name], runs[1]["teacher"][-1][name].bfloat16())


def test_recomputing_without_attention_gives_the_same_bits_and_runs_attention_once(
    one_rank: torch.device, store: CodeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from star_fast.model import transformer

    usual = ranks_main.settings(store, dropout=0.2)
    calls = []
    attention = transformer.masked_attention_qkv
    monkeypatch.setattr(transformer, "masked_attention_qkv", lambda *a, **k: calls.append(1) or attention(*a, **k))
    found = {}
    for name, train in {
        "none": {},
        "all": {"block_checkpointing": True},
        "rest": {"block_checkpointing": True, "keep_attention": True},
    }.items():
        calls.clear()
        found[name] = ranks_main.train(_changed(usual, **train), store, one_rank, 1), len(calls)
    # Two blocks: student and teacher, and the student's again
    assert [count for _, count in found.values()] == [4, 6, 4]
    for name, value in found["none"][0]["student"][-1].items():
        assert torch.equal(found["all"][0]["student"][-1][name], value) and torch.equal(
            found["rest"][0]["student"][-1][name], value
        ), name


def test_float32_gradients_keep_what_bf16_would_lose(one_rank: torch.device, store: CodeStore) -> None:
    """Sixteen micro-batches added up: in bfloat16 the sum loses digits, in float32 it is the sum of
    the rounded parts.
    """
    gradients = {}
    for precision in ("fp32", "bf16"):
        run = _changed(
            ranks_main.settings(store, precision="bf16", stage=1),
            gradient_precision=precision,
            images_per_step=32,
            micro_batch_images=2,
        )
        run = dataclasses.replace(run, optim=dataclasses.replace(run.optim, beta1=0.0, clip_norm=0.0))
        engine, batches = ranks_main.start(run, store, one_rank)
        engine.step(batches.step(0), 0, 0.0)
        state = engine.deepspeed.basic_optimizer.state
        gradients[precision] = torch.cat([state[shard.tensor]["exp_avg"] for shard in engine.masters.shards()])
    rounded = gradients["bf16"].bfloat16().float()
    assert torch.equal(gradients["bf16"], rounded) and not torch.equal(
        gradients["fp32"], gradients["fp32"].bfloat16().float()
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_training_loses_as_plain_training_does(
    one_rank: torch.device, store: CodeStore, precision: str
) -> None:
    """Inductor on torch 2.7 and 2.8 made this family's loss fall more slowly (pytorch#113180 has a case): the curves
    must agree.
    """
    from torch._dynamo.utils import counters

    usual = ranks_main.settings(store, precision=precision, stage=1, dropout=0.2)
    plain = ranks_main.train(usual, store, one_rank, 20)["losses"]
    torch._dynamo.reset()
    counters.clear()
    compiled = ranks_main.train(_changed(usual, compile=True), store, one_rank, 20)["losses"]
    assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"]
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5 if precision == "fp32" else 2e-2)
    assert plain[-1, 0] < plain[0, 0] - 0.3

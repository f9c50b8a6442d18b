"""The plans of sampling and preparation: arithmetic, memory and traffic are those of the modules that run; jobs are
dealt as they are; lines fit. (The tokenizer's work: test_plan_tokenizer_work.py.)
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from star_fast import cli
from star_fast.config import DataConfig, ModelConfig, RunConfig, TokenizerConfig
from star_fast.data import prepare
from star_fast.data.views import view_names
from star_fast.generation import render
from star_fast.generation.launch_count import step_launches
from star_fast.model import tokenizer as tokenizers
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.transformer import Transformer
from star_fast.ops import dispatch
from star_fast.ops.kv_cache import new_rows
from star_fast.planning import decoding, preparation, sampling, tokenizer_work
from star_fast.planning.assumptions import PreparationAssumptions, SamplingAssumptions
from star_fast.planning.gpus import GIB, gpu
from star_fast.planning.plan import RESERVED_GIB
from star_fast.planning.sizes import sized
from star_fast.presets import preset

VQ16 = TokenizerConfig()
SMALL = ModelConfig(3, 4, 64, vocab=128, positions=16, num_classes=10)
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


@pytest.mark.parametrize("cache", decoding.CACHES)
def test_a_step_reads_its_weights_and_the_caches_up_to_its_position(cache: str) -> None:
    """Summed position by position over slices of the caches that a GPU's decoder makes."""
    images, guided = 3, True
    with torch.device("meta"):
        model = Transformer(SMALL)
    multiplied = [
        parameter for name, parameter in model.named_parameters() if parameter.ndim == 2 and "embedding" not in name
    ]
    dtype = {"model": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[cache]
    made = new_rows(2 * images, SMALL.heads, SMALL.positions, SMALL.head_size, dtype, torch.device("cpu"))
    parts = [part for part in made if part is not None]
    read = [
        sum(part[:, :, : position + 1].numel() * part.element_size() for part in parts)
        for position in range(SMALL.positions)
    ]
    found = decoding.step_traffic(SMALL, images, guided=guided, cache=cache)
    assert found.weights == 2 * sum(parameter.numel() for parameter in multiplied)
    assert found.cache == SMALL.blocks * sum(read) / SMALL.positions
    held = decoding.held_cache_bytes(SMALL, 2 * images, cache)
    assert held == SMALL.blocks * sum(part.numel() * part.element_size() for part in parts)
    assert decoding.step_traffic(SMALL, images, guided=False, cache=cache).cache == found.cache / 2


def test_a_steps_flops_are_those_that_torch_counts() -> None:
    """All positions of an image, by the reference ops; guidance runs the output matrix on images, everything else on
    rows.
    """
    images, model = 2, Transformer(SMALL).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    caches = [
        new_rows(2 * images, SMALL.heads, SMALL.positions, SMALL.head_size, torch.float32, torch.device("cpu"))
        for _ in range(SMALL.blocks)
    ]
    with torch.no_grad(), dispatch.use_backend("reference"), FlopCounterMode(display=False) as counter:
        for position in range(SMALL.positions):
            hidden = model.step(torch.randn(2 * images, SMALL.width), caches, position)
            model.output(hidden[:images])
    assert decoding.step_flops(SMALL, images) * SMALL.positions == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_launches_are_those_of_the_traced_step() -> None:
    found = step_launches(SMALL)
    assert found.per_block == decoding.PRODUCTS_A_BLOCK + decoding.ATTENTION_A_BLOCK + decoding.OTHERS_A_BLOCK
    if found.backends["sample_tokens"] == "cpp":  # built with CUDA; without, the draw is counted as plain torch's
        assert found.outside == decoding.OUTSIDE


def test_with_nothing_but_bandwidth_the_speeds_are_the_committed_ceilings() -> None:
    """Of benchmarks/sampling.py, and both are what a hand counts: weights in 16 bits once a step; of every row keys and
    values at 128.5 positions on average, 16 bits or 8 and a float32 a head.
    """
    ceilings = json.loads((RESULTS / "sampling.json").read_text())["h100_ceilings"]
    limits = decoding.Rates(gpu("h100").bytes_per_s, 1e30, 0.0)
    sizes = {"B": (12, 12, 768, 2048), "L": (24, 16, 1024, 2816), "XL": (36, 20, 1280, 3584)}
    assert sizes.keys() <= ceilings.keys()
    for name, (blocks, heads, width, feed_forward) in sizes.items():
        weights = 2 * (blocks * (4 * width * width + 3 * width * feed_forward) + 16384 * width)
        for images, bf16, int8 in ceilings[name]:
            vectors = 2 * images * blocks * 2 * 128.5
            for cache, committed, bytes_each in (("model", bf16, 2 * width), ("int8", int8, width + 4 * heads)):
                step_s = decoding.step_s(preset(name).model, images, limits, cache=cache)
                expected = images * 3.35e12 / (256 * (weights + vectors * bytes_each))
                assert images / (256 * step_s) == pytest.approx(expected, rel=1e-6)
                assert committed == pytest.approx(expected, rel=1e-6)


def test_each_part_of_a_step_takes_the_longest_of_its_bounds() -> None:
    """By hand, XL on an H100 at 80 % of 3.35 TB/s, 2 us a launch, 16 and 512 rows."""
    model, rates = preset("XL").model, decoding.rates(gpu("h100"), 0.8, 0.5, 2.0)
    products, head = 36 * (4 * 1280 * 1280 + 3 * 1280 * 3584) * 2, 16384 * 1280 * 2
    bytes_us, flops_us = 0.8 * 3.35e6, 0.5 * 989e6  # bytes and FLOPs a microsecond
    cached = 36 * 2 * 1280 * 2 * 128.5  # bytes a row
    few = products / bytes_us + max(16 * cached / bytes_us, 36 * 2) + 36 * 3 * 2 + head / bytes_us + 8 * 2
    assert 1e6 * decoding.step_s(model, 8, rates) == pytest.approx(few)
    many = (
        products * 512 / flops_us
        + 512 * cached / bytes_us
        + 36 * 3 * 2
        + max(head * 256 / flops_us, head / bytes_us)
        + 8 * 2
    )
    assert 1e6 * decoding.step_s(model, 256, rates) == pytest.approx(many)
    tiny = ModelConfig(2, 1, 16, vocab=16, positions=4, num_classes=1)  # launches alone
    assert 1e6 * decoding.step_s(tiny, 1, rates) == pytest.approx(2 * 8 * 2 + 9 * 2)


def test_constants_are_those_of_the_code_that_runs() -> None:
    assert sampling.PIECE_IMAGES == render.CUDA_PIECE_IMAGES
    assert tokenizer_work.SEARCH_ROWS == tokenizers._SEARCH_ROWS
    assert prepare.prepare.__kwdefaults__["chunk_images"] == preparation.CHUNK_IMAGES
    for data in (DataConfig(), DataConfig(crop_ranges=(1.1, 1.05)), DataConfig(views="small-affine", affine_views=3)):
        assert preparation.views_of(data) == len(view_names(data))


def test_inceptions_flops_are_those_that_torch_counts() -> None:
    pytest.importorskip("torch_fidelity")
    from star_fast.evaluation.inception import Inception

    network = Inception(None)
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert counter.get_total_flops() == sampling.INCEPTION_FLOPS


def sampling_plan(
    images: int = 50_000, batch: int = 64, gpus: int = 8, config: RunConfig | None = None, **changes: Any
) -> sampling.SamplingPlan:
    return sampling.make_sampling_plan(
        sized(config or preset("XL"))[0], images, batch, gpus, gpu("h100"), SamplingAssumptions(**changes)
    )


def test_the_largest_batch_is_the_largest() -> None:
    config = sized(preset("XL"))[0]
    pixels = tokenizer_work.decoder(VQ16)
    for kind in sampling_plan().kinds:
        limit = (kind.gpu.memory_gib - RESERVED_GIB) * GIB
        totals = [sampling.memory(config, kind.largest_images + more, pixels, True, "model").total for more in (0, 1)]
        assert totals[0] <= limit < totals[1]
        assert kind.speeds[-1].batch_images == kind.largest_images or kind.largest_images < 256
    for kind in preparation_plan().kinds:
        limit = (kind.gpu.memory_gib - RESERVED_GIB) * GIB
        totals = [
            preparation.memory_bytes(VQ16, tokenizer_work.encoder(VQ16), "fp32", kind.largest_views + more)
            for more in (0, 1)
        ]
        assert totals[0] <= limit < totals[1]


def test_memory_of_a_batch_is_that_of_what_is_held() -> None:
    """Weights in bf16 and caches, by the modules' own numbers."""
    config = sized(preset("B"))[0]
    with torch.device("meta"):
        numbers = sum(p.numel() for p in Transformer(config.model).parameters())
        made = VQTokenizer(VQ16)
        numbers += sum(
            p.numel() for part in (made.decoder, made.post_quant_conv, made.quantize) for p in part.parameters()
        )
    found = sampling.memory(config, 10, tokenizer_work.decoder(VQ16), True, "model")
    assert found.weights == 2 * numbers
    assert found.cache == 12 * 2 * 20 * 256 * 768 * 2
    assert found.pixels == 5 * 128 * 256 * 256 * 10 * 2 + 10 * 256 * 256 * 3
    assert found.total == sum(found[:4])
    more = sampling.memory(config, 20, tokenizer_work.decoder(VQ16), True, "model")
    assert more.pixels == 5 * 128 * 256 * 256 * 16 * 2 + 20 * 256 * 256 * 3  # a piece of 16


def dealt(units: int, of: int, images: int, gpus: int) -> int:
    """Images of the process that has the most, units of so many images dealt in turns."""
    own = [0] * gpus
    for unit in range(units):
        own[unit % gpus] += min(of, images - unit * of)
    return max(own)


@pytest.mark.parametrize(("images", "gpus"), [(50_000, 8), (50_000, 1024), (100, 3), (64, 1)])
def test_a_job_takes_as_long_as_the_process_with_the_most(images: int, gpus: int) -> None:
    made = sampling_plan(images, 64, gpus)
    for kind in made.kinds:
        row = next(row for row in made.durations[kind.gpu.name] if row.gpus == gpus)
        most = dealt(-(-images // 64), 64, images, gpus)
        assert row.drawing_s == pytest.approx(most / kind.chosen.images_per_s)
        written = images * 256 * 256 * 3
        assert row.storage_s == pytest.approx((written + 2 * (written - written / gpus)) / 1e9)
        assert row.features_s == pytest.approx(images * sampling.INCEPTION_FLOPS / (0.5 * kind.gpu.fp32_flops_per_s))
        assert row.total_s == pytest.approx(120 + max(row.drawing_s, row.storage_s) + row.features_s)
    assert [row.gpus for row in made.durations["h100"]] == sorted({1, 8, 64, 256, 1024, gpus})
    times = [row.drawing_s for row in made.durations["b200"]]
    assert times == sorted(times, reverse=True)


def test_what_takes_most_of_it_is_named() -> None:
    def bound(**changes: float) -> str:
        return sampling_plan(**changes).durations["h100"][1].bound

    assert bound(start_s=0.0) == "drawing"
    assert bound(start_s=1e6) == "starting"
    assert bound(storage_gb_per_s=1e-3) == "storage"
    assert bound(fp32_share=1e-4) == "features"


def preparation_plan(
    images: int = 1_281_167, precision: str = "fp32", data: DataConfig | None = None, **changes: Any
) -> preparation.PreparationPlan:
    return preparation.make_preparation_plan(
        VQ16,
        data or DataConfig(crop_ranges=(1.1, 1.05)),
        images,
        8,
        gpu("h100"),
        PreparationAssumptions(**changes),
        precision=precision,
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_preparation_by_hand(precision: str) -> None:
    """ImageNet, twenty crops: 20 019 chunks over 8 GPUs of 12 cores."""
    made = preparation_plan(precision=precision)
    most = dealt(20_019, 64, 1_281_167, 8)
    row = next(row for row in made.durations["a100"] if row.gpus == 8)
    rate = 0.45 * 19.5e12 if precision == "fp32" else 0.2 * 312e12
    assert row.encoding_s == pytest.approx(most * 20 * tokenizer_work.encoder(VQ16).flops / rate)
    assert row.cpu_s == pytest.approx(most * 7.0e-3 / 12)
    codes = 1_281_167 * 20 * 256 * 2
    assert (made.code_bytes, made.read_bytes) == (codes, 1_281_167 * 110_000)
    assert row.storage_s == pytest.approx((1_281_167 * 110e3 + codes * (1 + 2 * 7 / 8)) / 1e9)
    assert row.total_s == pytest.approx(60 + max(row.encoding_s, row.cpu_s, row.storage_s))
    assert made.memory_bytes > 64 * 5 * 128 * 256 * 256 * (4 if precision == "fp32" else 2)


def test_preparation_names_what_binds() -> None:
    def bound(**changes: float) -> str:
        return preparation_plan(**changes).durations["h100"][1].bound

    assert bound() == "encoder"
    assert bound(cpu_ms_per_image=1e5) == "CPU"
    assert bound(storage_gb_per_s=1e-4) == "storage"
    assert bound(start_s=1e8) == "starting"
    assert preparation_plan(data=DataConfig()).cpu_ms == pytest.approx(4.2)  # ten crops, as measured


def test_the_cpus_rate_is_the_measured_one() -> None:
    """Of benchmarks/results/loading.md, whose Pillow rows give CPU milliseconds for ten and for twenty crops."""
    rows = [
        line.split("|")
        for line in (RESULTS / "loading.md").read_text().splitlines()
        if line.startswith("| Pillow in threads")
    ]
    measured = [float(row[4]) for row in rows]
    assert [preparation.DECODE_MS + ranges * preparation.RANGE_MS for ranges in (1, 2)] == pytest.approx(measured)


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (
            ["sample", "--preset", "XL", "--images", "50000", "--gpus", "16", "--gpu", "a100"],
            ["50000 images of 256 x 256", "On 16 x A100", "1024 GPUs"],
        ),
        (["sample"], ["images of 28 x 28, preset tiny", "VQ decoder"]),
        (["sample", "--preset", "3B", "--cache", "int8", "--guidance", "1"], ["not guided, bf16, int8 cache"]),
        (
            ["sample", "--preset", "XL", "--model.positions", "576", "--batch-images", "1500"],
            ["images of 384 x 384", "no: the batch does not fit"],
        ),
        (["prepare", "--images", "1281167"], ["1281167 images x 20 views of 256 x 256", "most of it: encoder"]),
        (
            ["prepare", "--preset", "tiny", "--images", "5000", "--precision", "bf16"],
            ["5000 images x 8 views of 28 x 28, bf16"],
        ),
        (
            ["prepare", "--data.crop-ranges", "1.1", "--assume.cpu-ms-per-image", "9"],
            ["x 10 views", "in 9 ms (as given)", "--assume.cpu-ms-per-image 9"],
        ),
    ],
)
def test_the_commands_print_tables_of_120_columns(
    arguments: list[str], needed: list[str], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    assert cli.main(["plan", *arguments, "--json", str(tmp_path / "plan.json")]) == 0
    printed, error = capfd.readouterr()
    assert error == "" and printed.startswith("Predicted, not measured: ")
    assert max(map(len, printed.splitlines())) <= 120
    assert all(part in " ".join(printed.split()) for part in needed), printed
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["predicted"] is True and record["measured"] is False and record["assumed"]["start_s"] == 60
    assert {"a100", "h100", "h200", "b200"} == record["durations"].keys()
    assert all(f"--assume.{name.replace('_', '-')} " in printed for name in record["assumed"])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["sample", "--images", "0"], "--images: expected 1 ... 9007199254740992, got 0"),
        (["sample", "--batch-images", "-1"], "--batch-images: expected 1 ..."),
        (["sample", "--gpus", "0"], "--gpus: expected 1 ..."),
        (["sample", "--gpu", "h50"], "--gpu: expected one of a100, h100, h200, b200, got 'h50'"),
        (
            ["sample", "--preset", "XL", "--model.positions", "200"],
            "model.positions: 200 codes an image fill no square",
        ),
        (
            ["sample", "--assume.read-share", "1.5"],
            "assume.read_share: expected a share of the peak, more than 0 and at most 1, got 1.5",
        ),
        (
            ["prepare", "--assume.cores-per-gpu", "0"],
            "assume.cores_per_gpu: expected a number from 1e-9 to 1e12, got 0",
        ),
        (["prepare", "--assume.start-s", "-1"], "assume.start_s: expected a number from 0 to 1e12, got -1.0"),
        (["prepare", "--batch-views", "0"], "--batch-views: expected 1 ..."),
        (["prepare", "--json", "/dev/null/plan.json"], "/dev/null/plan.json"),
    ],
)
def test_what_cannot_be_planned_says_so_in_one_line(
    arguments: list[str], line: str, capfd: pytest.CaptureFixture
) -> None:
    assert cli.main(["plan", *arguments]) == 2
    out, error = capfd.readouterr()
    assert out == "" and error.count("\n") == 1 and error.startswith("error: ")
    assert line in error


def test_each_assumption_changes_what_is_predicted() -> None:
    """No setting without effect."""
    for made, kind in ((sampling_plan, SamplingAssumptions), (preparation_plan, PreparationAssumptions)):
        usual = made()
        for field in dataclasses.fields(kind):
            value = getattr(kind(), field.name)
            other = made(**{field.name: value / 2 if value else 3.0})
            assert (other.durations, other.kinds) != (usual.durations, usual.kinds), field.name

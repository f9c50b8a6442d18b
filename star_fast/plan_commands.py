"""`star-fast plan`, `plan sample` and `plan prepare`: what a job will need before it starts, predicted. Wiring only."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import tyro

from star_fast.config import RunConfig
from star_fast.config_file import base_config, given, parse
from star_fast.errors import printable
from star_fast.planning.assumptions import PreparationAssumptions, SamplingAssumptions
from star_fast.planning.gpus import gpu
from star_fast.planning.sizes import sized
from star_fast.planning.work import IMAGENET_IMAGES
from star_fast.presets import plain
from star_fast.storage import atomic_write_json

_Settings = Annotated[tyro.conf.FlagConversionOff[RunConfig], tyro.conf.arg(name="")]
_File = Annotated[str, tyro.conf.arg(name="config")]


@dataclass(frozen=True)
class PlanCommand:
    """What a training run will need, predicted: memory by part and ZeRO stage, micro-batch, FLOPs, days. Settings as
    for training. (star-fast plan sample: drawing and scoring images; star-fast plan prepare: turning images into
    codes.)"""

    config: _Settings = field(default_factory=RunConfig)
    # Taken out of the command line before the rest is read, as in training.
    preset: str = "tiny"  # settings to start from: a name that `star-fast presets` lists
    config_file: _File = ""  # or: a YAML file, such as a run's config.yaml
    gpus: int = 8  # GPUs of the whole run
    gpu: str = "h100"  # whose published peaks count: a100, h100, h200 or b200
    gpu_memory_gib: float = 0.0  # memory of each, GiB; 0: what such a GPU has
    # assumed: from each machine to the others, all its cards together, in one direction
    network_gbit_per_s: float = 400.0
    gpus_per_machine: int = 8  # joined by NVLink
    plain: bool = False  # LlamaGen's own training, the baseline: one view a step (or --method.views)
    json: str = ""  # also write the plan to this file


@dataclass(frozen=True)
class PlanSampleCommand:
    """What drawing and scoring images will need, predicted: memory of a batch, the largest that fits, images a second,
    time on 1 ... 1024 GPUs.
    """

    config: _Settings = field(default_factory=RunConfig)
    preset: str = "tiny"  # whose model: a name that `star-fast presets` lists
    config_file: _File = ""  # or: a YAML file, such as a run's config.yaml
    images: int = 50_000  # how many
    batch_images: int = 64  # drawn together, as in star-fast sample
    # scale of classifier-free guidance; up to 1 it costs nothing, above it an image takes two rows
    guidance: float = 2.0
    cache: Literal["model", "int8", "fp8"] = "model"  # of keys and values: bf16, or 8 bits and a scale a row
    gpus: int = 8  # that the closing lines are about
    gpu: str = "h100"  # and of which kind: a100, h100, h200 or b200
    assume: SamplingAssumptions = field(default_factory=SamplingAssumptions)
    json: str = ""  # also write the plan to this file


@dataclass(frozen=True)
class PlanPrepareCommand:
    """What turning images into codes will need, predicted: memory, images a second, what binds, time on 1 ... 1024
    GPUs. Tokenizer and views as settings of a run: --tokenizer.image-size, --data.crop-ranges ..."""

    config: _Settings = field(default_factory=RunConfig)
    # whose tokenizer and views: a name that `star-fast presets` lists; all but tiny have LlamaGen's VQ-16, and here
    # twenty crops
    preset: str = "B"
    config_file: _File = ""  # or: a YAML file, such as a run's config.yaml
    images: int = IMAGENET_IMAGES  # how many
    precision: Literal["fp32", "bf16"] = "fp32"  # of encoding, as in star-fast prepare
    batch_views: int = 64  # encoded at once
    gpus: int = 8  # that the closing lines are about
    gpu: str = "h100"  # and of which kind: a100, h100, h200 or b200
    assume: PreparationAssumptions = field(default_factory=PreparationAssumptions)
    json: str = ""  # also write the plan to this file


def plan(arguments: list[str]) -> None:
    """star-fast plan [sample|prepare] ..."""
    jobs = {"sample": _sample, "prepare": _prepare}
    if arguments and arguments[0] in jobs:
        jobs[arguments[0]](arguments[1:])
    else:
        _train(arguments)


def _train(arguments: list[str]) -> None:
    from star_fast.planning.network import Network
    from star_fast.planning.plan import as_record, make_plan
    from star_fast.planning.tables import text

    base, source, rest = base_config(arguments)
    command = _parsed(PlanCommand, rest, "star-fast plan", base, source)
    # As in training: the baseline may see as many views as ST-AR
    views = command.config.method.views if given(rest, "--method.views") else 1
    config, assumed = sized(plain(command.config, views) if command.plain else command.config)
    device = gpu(command.gpu)
    made = make_plan(
        config,
        command.gpus,
        command.gpu_memory_gib or device.memory_gib,
        device,
        Network(command.network_gbit_per_s, command.gpus_per_machine),
    )
    if command.json:
        atomic_write_json(command.json, as_record(made))
    print(text(made, printable(f"{source}{', plain' if command.plain else ''}"), assumed))


def _sample(arguments: list[str]) -> None:
    from star_fast.planning.job_tables import sampling_text
    from star_fast.planning.plan import record_of
    from star_fast.planning.sampling import make_sampling_plan

    base, source, rest = base_config(arguments)
    command = _parsed(PlanSampleCommand, rest, "star-fast plan sample", base, source)
    config, assumed = sized(command.config)
    made = make_sampling_plan(
        config,
        command.images,
        command.batch_images,
        command.gpus,
        gpu(command.gpu),
        command.assume,
        guided=command.guidance > 1,
        cache=command.cache,
    )
    if command.json:
        atomic_write_json(command.json, record_of(made, config, ("model", "tokenizer")))
    print(sampling_text(made, printable(source), assumed))


def _prepare(arguments: list[str]) -> None:
    from star_fast.planning.job_tables import preparation_text
    from star_fast.planning.plan import record_of
    from star_fast.planning.preparation import make_preparation_plan

    named = given(arguments, "--preset") or given(arguments, "--config")
    base, source, rest = base_config(arguments if named else ["--preset", "B", *arguments])
    if not given(arguments, "--config"):  # as the presets' codes are made: presets.IMAGENET_CODES
        base = replace(base, data=replace(base.data, crop_ranges=(1.1, 1.05)))
    command = _parsed(PlanPrepareCommand, rest, "star-fast plan prepare", base, source)
    made = make_preparation_plan(
        command.config.tokenizer,
        command.config.data,
        command.images,
        command.gpus,
        gpu(command.gpu),
        command.assume,
        precision=command.precision,
        batch_views=command.batch_views,
    )
    if command.json:
        atomic_write_json(command.json, record_of(made, command.config, ("tokenizer", "data")))
    print(preparation_text(made, printable(source)))


def _parsed(kind: Any, rest: list[str], name: str, base: RunConfig, source: str) -> Any:
    return parse(kind, rest, name, f"{kind.__doc__} This command line starts from {source}.", config=base)

"""config, config_file and presets: round trips, unknown keys, contradictions, overriding every field."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from star_fast.config import ConfigError, MethodConfig, ModelConfig, RunConfig
from star_fast.config_file import base_config, parse, read_config, write_config
from star_fast.presets import PRESETS, plain, preset
from star_fast.records import from_dict, to_dict
from star_fast.train import TrainCommand


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_yaml(name: str, tmp_path: Path) -> None:
    write_config(preset(name), tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == preset(name)


@pytest.mark.parametrize(
    ("name", "blocks", "heads", "width", "depth", "hidden"),
    [
        ("B", 12, 12, 768, 6, 2048),
        ("B-300", 12, 12, 768, 6, 2048),
        ("L-300", 24, 16, 1024, 18, 2816),
        ("XL-300", 36, 20, 1280, 18, 3584),
        ("L", 24, 16, 1024, 18, 2816),
        ("XL", 36, 20, 1280, 18, 3584),
        ("XXL", 48, 24, 1536, 24, 4096),
        ("3B", 24, 32, 3200, 12, 8704),
    ],
)
def test_presets_have_the_papers_values(
    name: str, blocks: int, heads: int, width: int, depth: int, hidden: int
) -> None:
    config = preset(name)
    model, method, optim = config.model, config.method, config.optim
    assert (model.blocks, model.heads, model.width, config.contrast_depth, model.feed_forward) == (
        blocks,
        heads,
        width,
        depth,
        hidden,
    )
    assert (model.vocab, model.positions, model.num_classes, model.dropout, model.label_dropout) == (
        16384,
        256,
        1000,
        0.1,
        0.1,
    )
    assert (method.views, method.mask_ratio, method.mim_weight, method.contrast_weight) == (2, 0.25, 1.0, 0.5)
    assert (method.contrast_positions, method.temperature, method.ema_decay) == (4, 0.2, 0.9999)
    assert (config.lr, optim.beta1, optim.beta2, optim.weight_decay, optim.clip_norm, optim.schedule) == (
        1e-4,
        0.9,
        0.95,
        0.05,
        1.0,
        "constant",
    )


def test_presets_name_the_epochs_of_the_papers_table() -> None:
    """Rows of its Table 1: FID with ST-AR, and of plain LlamaGen where the same resolution was trained."""
    rows = {
        "B": (50, "26.58", "31.35"),
        "L": (50, "12.59", "21.81"),
        "XL": (50, "9.81", "19.42"),
        "B-300": (300, "18.44", "26.26"),
        "L-300": (300, "9.38", "13.45"),
        "XL-300": (300, "6.20", "not comparable"),
    }
    for name, (epochs, *figures) in rows.items():
        assert PRESETS[name].config.train.epochs == epochs
        assert all(figure in PRESETS[name].paper for figure in figures)
        assert f"--preset {name} " in PRESETS[name].command


def test_every_field_can_be_overridden_from_the_command_line() -> None:
    def leaves(values: dict, prefix: str = ""):
        for key, value in values.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    changed = {
        "model.blocks": 8,
        "method.step_contrast": False,
        "optim.schedule": "cosine",
        "train.precision": "fp32",
        "data.codes": "there",
        "tokenizer.multipliers": (1, 2),
        "train.epochs": 2.5,
    }
    arguments = []
    for name, value in leaves(to_dict(RunConfig())):
        value = changed.get(name, value)
        arguments += [
            f"--{name}",
            *map(str, value if isinstance(value, (list, tuple)) else [value if value != "" else "x"]),
        ]
    command = parse(TrainCommand, arguments, "train.py", "", config=preset("tiny"))
    for name, value in changed.items():
        section, field = name.split(".")
        assert getattr(getattr(command.config, section), field) == value, name
    assert command.config.model.width == RunConfig().model.width


def test_preset_and_config_are_taken_out_of_the_command_line(tmp_path: Path) -> None:
    config, source, rest = base_config(["--preset=XL", "--train.seed", "3"])
    assert config == preset("XL")
    assert source == "preset XL"
    assert rest == ["--train.seed", "3"]
    with pytest.raises(ConfigError, match="give one of them, once"):
        base_config(["--preset", "B", "--preset", "L"])
    with pytest.raises(ConfigError, match="got nothing"):
        base_config(["--config"])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: {widht: 3}", "model.widht: unknown setting"),
        ("modle: {}", "modle: unknown setting"),
        ("model: {width: wide}", "model.width: expected a value of type int, got 'wide'"),
        ("model: {width: 100, heads: 3}", "model.width: expected a multiple of model.heads"),
        ("train: {precision: fp16}", "train.precision: expected 'bf16' or 'fp32', got 'fp16'"),
        ("train: 3", "train: expected a mapping"),
        ("method: {contrast_depth: 13}", "method.contrast_depth: expected at most model.blocks = 12, got 13"),
        ("method: {views: 1}", "method.views: expected at least 2 for method.view_contrast"),
        ("{", "not a readable YAML file"),
    ],
)
def test_contradictions_and_unknown_keys_name_the_field(text: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        read_config(tmp_path / "config.yaml")
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_yaml_without_a_point_reads_as_a_number() -> None:
    assert from_dict(RunConfig, yaml.safe_load("optim: {lr_per_256_images: 1e-4}")).optim.lr_per_256_images == 1e-4


def test_plain_switches_the_method_off() -> None:
    config = plain(preset("L"))
    assert not config.method.has_teacher
    assert config.method.views == 1
    assert dataclasses.replace(config, method=preset("L").method) == preset("L")


def test_plain_keeps_the_views_it_is_told_to() -> None:
    both = plain(preset("L"), 2)
    assert both.method.views == 2 and dataclasses.replace(both, method=plain(preset("L")).method) == plain(preset("L"))
    assert plain(both) == both  # plain already


def test_ablations_switch_each_loss_off_alone() -> None:
    assert MethodConfig(mim_weight=0).has_teacher
    assert not MethodConfig(contrast_weight=0).contrasts
    assert MethodConfig(contrast_weight=0).has_teacher
    assert not MethodConfig(step_contrast=False, view_contrast=False).contrasts
    assert ModelConfig(6, 4, 128).feed_forward == 512

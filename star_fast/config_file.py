"""Configs as YAML files and as command lines: read, written, overridden field by field."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, TypeVar

import yaml

from star_fast.config import RunConfig
from star_fast.errors import ConfigError
from star_fast.presets import PRESETS, preset
from star_fast.records import from_dict, to_dict
from star_fast.storage import atomic_write_bytes

Command = TypeVar("Command")


def read_config(path: str | Path) -> RunConfig:
    """A run's config from its YAML file. Raises ConfigError naming the file, and the field where there is one."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such config file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a readable YAML file: {' '.join(str(error).split())}") from error
    try:
        return from_dict(RunConfig, values or {})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def write_config(config: RunConfig, path: str | Path) -> None:
    """Write every field of `config` to a YAML file, whole or not at all."""
    atomic_write_bytes(path, yaml.safe_dump(to_dict(config), sort_keys=False).encode())


def base_config(arguments: list[str]) -> tuple[RunConfig, str, list[str]]:
    """Take --preset NAME or --config FILE out of a command line.

    Returns:
        The config that the remaining arguments override, where it came from, the remaining arguments.
    """
    rest, source, config, index = [], "preset tiny", None, 0
    while index < len(arguments):
        name, _, value = arguments[index].partition("=")
        if name not in ("--preset", "--config"):
            rest.append(arguments[index])
            index += 1
            continue
        if not value:
            index += 1
            if index >= len(arguments):
                raise ConfigError(f"{name}: expected {'one of ' + ', '.join(PRESETS) if name == '--preset' else 'a YAML file'}, got nothing")
            value = arguments[index]
        if config is not None:
            raise ConfigError("--preset and --config: give one of them, once")
        config, source = (preset(value), f"preset {value}") if name == "--preset" else (read_config(value), value)
        index += 1
    return config or preset("tiny"), source, rest


def parse(command: Any, arguments: list[str], prog: str, description: str, **defaults: Any) -> Any:
    """An instance of the dataclass `command` from command-line arguments; every field is a flag (--name or --name.field)."""
    import tyro

    default = command(**defaults) if defaults else tyro.MISSING_NONPROP
    return tyro.cli(command, args=arguments, prog=prog, description=description, default=default)


def command_line() -> list[str]:
    """This process's arguments, without the --local_rank that DeepSpeed's launcher adds (the rank comes from the environment)."""
    return [argument for argument in sys.argv[1:] if not argument.startswith(("--local_rank", "--local-rank"))]

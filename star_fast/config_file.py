"""Configs as YAML files and as command lines: read, written, overridden field by field.

Of YAML only what a config needs is read: mappings, lists, text, numbers, true, false and null. Anchors and aliases (a
few lines of them describe more than any memory holds), tags, dates and names given twice are refused; write_config
never writes them.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml

from star_fast.config import RunConfig
from star_fast.errors import ConfigError
from star_fast.presets import PRESETS, preset
from star_fast.records import from_dict, to_dict
from star_fast.storage import StorageError, atomic_write_bytes, read_bytes

Command = TypeVar("Command")
_MOST_BYTES = 2**16  # a config takes three thousand; each byte may become a thousand in PyYAML
_MOST_DEPTH = 16
_MOST_NUMBER = 2**53
_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str")}


def read_config(path: str | Path) -> RunConfig:
    """A run's config from its YAML file. Raises ConfigError naming the file, and the field where there is one."""
    try:
        values = _parse(read_bytes(path, "expected a YAML file with settings", _MOST_BYTES).decode("utf-8-sig"))
    except StorageError as error:  # names the file
        raise ConfigError(
            f"{path}: no such config file" if isinstance(error.__cause__, FileNotFoundError) else error
        ) from error
    except (yaml.YAMLError, ValueError, OverflowError, LookupError) as error:
        # The last three of what only looks like a number
        raise ConfigError(f"{path}: not a readable YAML file: {' '.join(str(error).split())[:300]}") from error
    try:
        return from_dict(RunConfig, {} if values is None else values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _parse(text: str) -> Any:
    """The one document of a YAML text. Raises YAMLError, or ValueError and OverflowError of numbers."""
    loader = yaml.SafeLoader(text)
    try:
        value = None
        loader.get_event()  # start of the stream
        if not loader.check_event(yaml.StreamEndEvent):
            loader.get_event()
            value = _value(loader, 0)
            loader.get_event()
        if not loader.check_event(yaml.StreamEndEvent):
            raise _refused(loader.peek_event(), "expected one document, found another")
        return value
    finally:
        loader.dispose()


def _value(loader: yaml.SafeLoader, depth: int) -> Any:
    event = loader.get_event()
    if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
        raise _refused(event, "anchors (&) and aliases (*) are not read")
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(loader, event)
    if event.tag is not None:
        raise _refused(event, f"tags are not read, found {event.tag[:60]}")
    if depth >= _MOST_DEPTH:
        raise _refused(event, "nested too deeply")
    if isinstance(event, yaml.SequenceStartEvent):
        return [_value(loader, depth + 1) for _ in _until(loader, yaml.SequenceEndEvent)]
    values: dict[Any, Any] = {}
    for start in _until(loader, yaml.MappingEndEvent):
        name = _value(loader, depth + 1)
        if isinstance(name, (dict, list)):
            raise _refused(start, "expected the name of a setting")
        if name in values:
            raise _refused(start, f"{str(name)[:60]} is given twice")
        values[name] = _value(loader, depth + 1)
    return values


def _until(loader: yaml.SafeLoader, end: type[yaml.Event]) -> Iterator[yaml.Event]:
    while not loader.check_event(end):
        yield loader.peek_event()
    loader.get_event()


def _scalar(loader: yaml.SafeLoader, event: yaml.ScalarEvent) -> Any:
    if event.tag is not None:
        raise _refused(event, f"tags are not read, found {event.tag[:60]}")
    tag = loader.resolve(yaml.ScalarNode, event.value, event.implicit)
    if tag not in _PLAIN:
        raise _refused(event, f"{event.value[:60]!r} is read as a {tag.rpartition(':')[2]}; for text put it in quotes")
    return loader.construct_object(yaml.ScalarNode(tag, event.value, event.start_mark, event.end_mark))


def _refused(event: yaml.Event, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=f"line {event.start_mark.line + 1}: {problem}")


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
        name, given, value = arguments[index].partition("=")
        if name not in ("--preset", "--config"):
            rest.append(arguments[index])
            index += 1
            continue
        if not given:
            index += 1
            value = arguments[index] if index < len(arguments) and not arguments[index].startswith("--") else ""
        if not value:
            raise ConfigError(
                f"{name}: expected {'one of ' + ', '.join(PRESETS) if name == '--preset' else 'a YAML file'}, got "
                "nothing"
            )
        if config is not None:
            raise ConfigError("--preset and --config: give one of them, once")
        config, source = (preset(value), f"preset {value}") if name == "--preset" else (read_config(value), value)
        index += 1
    return config or preset("tiny"), source, rest


def given(arguments: list[str], option: str) -> bool:
    """Whether a command line says `option`, as --option VALUE or --option=VALUE."""
    return any(argument == option or argument.startswith(f"{option}=") for argument in arguments)


def parse(command: Any, arguments: list[str], prog: str, description: str, **defaults: Any) -> Any:
    """An instance of the dataclass `command` from command-line arguments; every field is a flag (--name or
    --name.field).

    Raises:
        ConfigError: a number that is not finite or absurdly large, or what the dataclass itself refuses.
    """
    import tyro

    default = command(**defaults) if defaults else tyro.MISSING_NONPROP
    paragraphs = (" ".join(paragraph.split()) for paragraph in description.split("\n\n"))  # laid out for this source
    parsed = tyro.cli(command, args=arguments, prog=prog, description="\n\n".join(paragraphs), default=default)
    _require_numbers(parsed, "--")
    return parsed


def _require_numbers(value: Any, name: str) -> None:
    """Raise ConfigError about a number that no setting means: what is read from files is checked by records.py, which
    never sees a command line.
    """
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            # train.py's options bear no "config."
            own = "" if field.name == "config" else f"{'' if name == '--' else '.'}{field.name.replace('_', '-')}"
            _require_numbers(getattr(value, field.name), name + own)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _require_numbers(item, name)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}: expected a finite number, got {value}")
    elif isinstance(value, int) and abs(value) > _MOST_NUMBER:
        raise ConfigError(f"{name}: expected a number of at most 2^53, got one of {len(str(abs(value)))} digits")


def command_line() -> list[str]:
    """This process's arguments, without the --local_rank that DeepSpeed's launcher adds (the rank comes from the
    environment).
    """
    return [argument for argument in sys.argv[1:] if not argument.startswith(("--local_rank", "--local-rank"))]

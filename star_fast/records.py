"""Plain data (from JSON or YAML) to and from dataclasses: the one check of every settings and record file this project
reads.

A dataclass is the schema of its file: fields with defaults may be missing, unknown keys are refused, every value must
have its field's type. Ranges that types cannot say are checked in the dataclass's own __post_init__, which raises
ConfigError.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from typing import Any

from star_fast.errors import ConfigError

# Whole numbers up to here are exact in JSON readers of every language; nothing that is counted here needs more
_MOST = 2**53


def to_dict(record: Any) -> dict[str, Any]:
    """A dataclass as plain nested dicts, lists and numbers, ready for YAML or JSON."""
    return {f.name: _plain(getattr(record, f.name)) for f in dataclasses.fields(record)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def from_dict(cls: type, values: Any, where: str = "", *, ignore_unknown: bool = False) -> Any:
    """The dataclass `cls` from nested dicts; missing keys take their defaults.

    Args:
        where: what stands before a field's name in messages.
        ignore_unknown: let keys pass that `cls` does not know (a record that later versions may add to).

    Raises:
        ConfigError: a key is unknown or missing, a value has a wrong type, is not finite or absurdly large, or
            contradicts another; the message names it.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where.rstrip('.') or cls.__name__}: expected a mapping of settings, got {_shown(values)}")
    hints = _hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = [key for key in values if key not in fields]
    if unknown and not ignore_unknown:
        raise ConfigError(f"{where}{_short(unknown[0])}: unknown setting; known here: {', '.join(sorted(fields))}")
    missing = [
        name
        for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}{missing[0]}: missing")
    return cls(
        **{
            key: _convert(hints[key], value, f"{where}{key}", ignore_unknown)
            for key, value in values.items()
            if key in fields
        }
    )


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _convert(hint: Any, value: Any, name: str, ignore_unknown: bool) -> Any:
    if hint is Any:
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value, name + ".", ignore_unknown=ignore_unknown)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        require(
            isinstance(value, (str, int, float, bool)) and value in inner, name, value, " or ".join(map(repr, inner))
        )
        return value
    if origin in (typing.Union, types.UnionType):
        return (
            None
            if value is None
            else _convert(next(a for a in inner if a is not type(None)), value, name, ignore_unknown)
        )
    if origin in (tuple, list):
        require(isinstance(value, (list, tuple)), name, value, "a list")
        return origin(_convert(inner[0], item, f"{name}[{index}]", ignore_unknown) for index, item in enumerate(value))
    if origin is dict:
        require(
            isinstance(value, dict) and all(isinstance(key, str) for key in value), name, value, "a mapping by name"
        )
        return {key: _convert(inner[1], item, f"{name}.{_short(key)}", ignore_unknown) for key, item in value.items()}
    if hint is float:
        return _float(value, name)
    require(
        isinstance(value, hint) and not (hint is int and isinstance(value, bool)),
        name,
        value,
        f"a value of type {hint.__name__}",
    )
    if hint is int:
        require(abs(value) <= _MOST, name, value, "a whole number of at most 2^53")
    return value


def _float(value: Any, name: str) -> float:
    number = math.nan
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-4 as a string
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
    require(math.isfinite(number), name, value, "a finite number")
    return number


def require(condition: bool, name: str, value: Any, expected: str) -> None:
    """Raise ConfigError about the field `name` unless `condition`."""
    if not condition:
        raise ConfigError(f"{name}: expected {expected}, got {_shown(value)}")


def require_finite(record: Any, section: str) -> None:
    """Raise ConfigError if a float field of the dataclass `record` is infinite or NaN."""
    for f in dataclasses.fields(record):
        value = getattr(record, f.name)
        require(not isinstance(value, float) or math.isfinite(value), f"{section}.{f.name}", value, "a finite number")


def _shown(value: Any) -> str:
    """A value for a message: simple ones as they are, others by their kind."""
    if isinstance(value, (list, tuple, dict, set, bytes)) or (isinstance(value, int) and abs(value) > _MOST):
        return f"{'a very large ' if isinstance(value, int) else ''}{type(value).__name__}"
    return _short(repr(value))


def _short(text: Any) -> str:
    text = str(text)
    return text if len(text) <= 80 else text[:77] + "..."

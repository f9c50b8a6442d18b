"""Damage to JSON, JSON lines and YAML: one value or key becomes a nasty one, and the file stays well formed around it
(or nearly).
"""

from __future__ import annotations

import copy
import json
import re
from random import Random
from typing import Any

import yaml

from scripts.fuzzing.odd_values import KEYS, RAW_JSON, RAW_YAML, VALUES, WHOLE_JSON

_RAW = "@raw@"  # stands in a value for text that no serializer would write
_LARGE_SHARE = 0.003


def damaged_json(random: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """JSON with one to three values or keys changed; now and then a large one, whose values take many times its bytes
    in memory.
    """
    if random.random() < _LARGE_SHARE and data.lstrip().startswith(b"{"):
        piece, size = (
            random.choice((b"[],", b'{"a":0},', b'"",', b"0,", b"1.5,")),
            random.choice((2 * 10**6, 12 * 10**6, 30 * 10**6)),
        )
        return f"a list of {size} bytes of {piece.decode()}", b'{"x":[' + piece * (
            size // len(piece)
        ) + b"0]," + data.lstrip()[1:]
    if random.random() < 0.05:
        return "another JSON text", random.choice(WHOLE_JSON).encode("utf-8", "surrogatepass")
    value, raws = json.loads(data), []
    changes = [damaged_value(random, value, RAW_JSON, raws) for _ in range(random.choice((1, 1, 1, 2, 3)))]
    return ", ".join(changes), with_raws(
        json.dumps(value, ensure_ascii=random.random() < 0.5, indent=random.choice((None, 1))), raws
    )


def damaged_lines(random: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """JSON lines with one line changed, doubled, dropped or moved."""
    lines = data.split(b"\n")
    index = random.randrange(len(lines))
    way = random.choice(("change", "change", "change", "change", "double", "drop", "move", "blank", "many"))
    if way == "change" and lines[index].strip():
        change, lines[index] = damaged_json(random, lines[index], other)
        lines[index] = lines[index].replace(b"\n", b" ") if random.random() < 0.9 else lines[index]
        return f"line {index}: {change}", b"\n".join(lines)
    line = lines.pop(index)
    lines[index:index] = {"double": [line, line], "drop": [], "blank": [b"", line, b"  "], "many": [line] * 2000}.get(
        way, [line]
    )
    if way == "move":
        random.shuffle(lines)
    return f"line {index}: {way}", random.choice(
        (b"\n", b"\n", b"\n", b"\r\n", b"\r", b"\x0c", "\u2028".encode())
    ).join(lines)


def damaged_table(random: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """Lines of fields with one to three fields or separators changed, or lines doubled, dropped or moved."""
    text, changes = data.decode("utf-8", "replace"), []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        lines = text.split("\n")
        index = random.randrange(len(lines))
        way = random.choice(
            ("field", "field", "field", "separator", "double", "drop", "move", "many", "blank", "quote")
        )
        pieces = re.split(r"([,;\t ])", lines[index])
        if way == "field":
            pieces[random.choice(range(0, len(pieces), 2))] = str(random.choice(VALUES))[:5000]
            lines[index] = "".join(pieces)
        elif way == "separator":
            mark = random.choice((",", ";", "\t", " ", ",,", "|", "\0", ", ", ""))
            of_all = random.random() < 0.5
            lines = [
                mark.join(re.split(r"[,;\t ]", line)) if of_all or place == index else line
                for place, line in enumerate(lines)
            ]
        elif way == "quote":
            lines[index] = random.choice(('"', '"a"b', '""', "'")) + lines[index]
        elif way == "move":
            random.shuffle(lines)
        else:
            line = lines.pop(index)
            lines[index:index] = {"double": [line, line], "blank": ["", line, "  "], "many": [line] * 2000}.get(way, [])
        text = random.choice(("\n", "\n", "\n", "\r\n", "\r", "\u2028")).join(lines)
        changes.append(f"line {index}: {way}")
    return ", ".join(changes), text.encode(
        random.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16")), "surrogatepass"
    )


def damaged_yaml(random: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """YAML with one to three values or keys changed, or an odd line put in."""
    if random.random() < 0.15:
        lines = data.decode().split("\n")
        index = random.randrange(len(lines))
        line = random.choice(
            (
                *RAW_YAML,
                "a: 1",
                "? x",
                "- x",
                "model:",
                "model: 1",
                "%YAML 9.9",
                "---",
                "...",
                "%TAG ! tag:x:",
                lines[index],
                "\ttab: 1",
                "<<: *x",
                "x: &x 1",
            )
        )
        lines[index:index] = [line]
        return f"line {index} put in: {line[:60]!r}", "\n".join(lines).encode("utf-8", "surrogatepass")
    value, raws = yaml.load(data, getattr(yaml, "CSafeLoader", yaml.SafeLoader)), []
    changes = [damaged_value(random, value, RAW_YAML, raws) for _ in range(random.choice((1, 1, 1, 2, 3)))]
    try:
        text = yaml.dump(
            value,
            Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper),
            sort_keys=False,
            allow_unicode=random.random() < 0.5,
        )
    except (yaml.YAMLError, ValueError):  # a value that YAML cannot write
        text = json.dumps(value)
    return ", ".join(changes), with_raws(text, raws, quoted=False)


def damaged_value(random: Random, root: Any, raw: tuple[str, ...], raws: list[str]) -> str:
    """Change one value or key somewhere inside `root`, in place; raw texts go to `raws` and are
    stood for in the value.
    """
    path, holder = "", root
    while isinstance(holder, (dict, list)) and holder:
        key = random.choice(list(holder)) if isinstance(holder, dict) else random.randrange(len(holder))
        path = f"{path}.{str(key)[:40]}"
        inner = holder[key]
        if isinstance(inner, (dict, list)) and inner and random.random() < 0.85:
            holder = inner
            continue
        return f"{path} {_change(random, holder, key, raw, raws)}"
    return "nothing to change"


def _change(random: Random, holder: Any, key: Any, raw: tuple[str, ...], raws: list[str]) -> str:
    way = random.choice(
        ("value", "value", "value", "raw", "raw", "near", "near", "drop", "rename", "add", "double", "nest", "swap")
    )
    old = holder[key]
    if way == "drop":
        del holder[key]
    elif way == "rename" and isinstance(holder, dict):
        del holder[key]
        holder[random.choice((*KEYS, str(key) + "x", str(key).upper()))] = old
    elif way == "add" and isinstance(holder, dict):
        holder[random.choice(KEYS)] = copy.deepcopy(random.choice(VALUES))
    elif way == "double" and isinstance(holder, list):
        holder.extend(holder[:2000] * random.choice((1, 1, 100)))
    elif way == "nest":
        holder[key] = random.choice(([old], {"a": old}, str(old), [old, old]))
    elif way == "swap":
        other = random.choice(list(holder)) if isinstance(holder, dict) else random.randrange(len(holder))
        holder[key], holder[other] = holder[other], old
    elif way == "near":
        holder[key] = _near(random, old)
    elif way == "raw":
        raws.append(random.choice(raw))
        holder[key] = f"{_RAW}{len(raws) - 1}@"
        return f"= {raws[-1][:60]!r}"
    else:
        holder[key] = copy.deepcopy(random.choice(VALUES))
        way = "="
    now = holder.get(key, "") if isinstance(holder, dict) else holder[key] if key < len(holder) else ""
    return f"{way} {str(now)[:60]!r}"


def _near(random: Random, old: Any) -> Any:
    """A value of the same kind that is only a little wrong."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return random.choice((old + 1, old - 1, -old, old * 2, 0, 1, float(old), str(old), old * 10**6, old + 0.5))
    if isinstance(old, float):
        return random.choice((-old, old * 1e300, 0.0, int(old), old + 1, str(old), 1e-300))
    if isinstance(old, str):
        return random.choice(
            (old + "x", old[:-1], old.upper(), old + "\n", "\x1b[1m" + old, old * 2, [old], ascii(old))
        )
    return copy.deepcopy(random.choice(VALUES))


def with_raws(text: str, raws: list[str], quoted: bool = True) -> bytes:
    """The text with the raw pieces in the places that stand for them."""
    place = rf"\"{_RAW}(\d+)@\"" if quoted else rf"['\"]?{_RAW}(\d+)@['\"]?"
    return re.sub(place, lambda match: raws[int(match[1])], text).encode("utf-8", "surrogatepass")

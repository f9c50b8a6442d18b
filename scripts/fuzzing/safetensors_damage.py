"""Damage to safetensors files: a header or its tensors become absurd, the file stays well formed around them."""

from __future__ import annotations

import functools
import json
import struct
from random import Random
from typing import Any

import numpy as np

from scripts.fuzzing.bytes_damage import SIZES
from scripts.fuzzing.odd_values import RAW_JSON, TENSOR_NAMES
from scripts.fuzzing.text_damage import damaged_json


def damaged_safetensors(random: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """A safetensors file with a changed header, or with other tensors under a right header."""
    if random.random() < 0.01:
        count = random.choice((1000, 55000))
        return f"safetensors of {count} tensors", _many_tensors(count)
    length = struct.unpack("<Q", data[:8])[0]
    header, body = data[8 : 8 + length], data[8 + length :]
    way = random.choice(("header", "header", "tensors", "tensors", "tensors", "field", "field", "metadata", "length"))
    if way == "header":
        change, header = damaged_json(random, header, other)
    elif way == "length":
        return way, struct.pack(
            "<Q",
            random.choice((*SIZES, length + 1, length - 1, length + 8, len(data), len(data) - 8, 10**8, 10**8 + 1)),
        ) + data[8:]
    else:
        about = json.loads(header)
        names = [name for name in about if name != "__metadata__"]
        name = random.choice(names)
        entry = about[name]
        if way == "metadata":
            args = damaged_json(random, about.get("__metadata__", {}).get("args", '{"n_head": 2}').encode(), other)[
                1
            ].decode("utf-8", "replace")
            about["__metadata__"] = random.choice(
                (
                    {"args": args},
                    {"args": args},
                    {"args": random.choice(RAW_JSON)},
                    {"args": "x" * 10000},
                    {"x": "y"},
                    {"args": "[]"},
                    {"args": "null"},
                    {"format": "pt", "args": ""},
                )
            )
            change = f"metadata {str(about['__metadata__'])[:100]}"
        elif way == "field":
            start, end = entry["data_offsets"]
            field, value = random.choice(
                (
                    ("shape", [10**18]),
                    ("shape", [2**62, 4]),
                    ("shape", [-1]),
                    ("shape", [0]),
                    ("shape", []),
                    ("shape", [1] * 5000),
                    ("shape", list(reversed(entry["shape"]))),
                    ("shape", [*entry["shape"], 1]),
                    ("dtype", "F64"),
                    ("dtype", "F16"),
                    ("dtype", "I64"),
                    ("dtype", "BOOL"),
                    ("dtype", "F8_E4M3"),
                    ("dtype", "U8"),
                    ("dtype", "X"),
                    ("data_offsets", [0, 2**63]),
                    ("data_offsets", [end, start]),
                    ("data_offsets", [start + 4, end + 4]),
                    ("data_offsets", [0, end]),
                )
            )
            entry[field] = value
            change = f"{name} {field} {str(value)[:40]}"
        else:
            return _other_tensors(random, about, body)
        header = json.dumps(about).encode("utf-8", "surrogatepass")
    return f"safetensors {way}: {change}", struct.pack("<Q", len(header)) + header + body


@functools.cache
def _many_tensors(count: int) -> bytes:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"layers.{index}.x": entry for index in range(count)}).encode()
    return struct.pack("<Q", len(header)) + header


def _other_tensors(random: Random, about: dict[str, Any], body: bytes) -> tuple[str, bytes]:
    dtypes = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "F64": np.float64}
    arrays = {}
    for name, entry in about.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            arrays[name] = np.frombuffer(body[start:end], dtypes.get(entry["dtype"], np.uint8)).reshape(
                entry["shape"] if entry["dtype"] in dtypes else -1
            )
    name = random.choice(list(arrays))
    array, way = (
        arrays[name],
        random.choice(("nan", "inf", "drop", "rename", "shape", "dtype", "add", "bigger", "scalar", "empty")),
    )
    if way in ("nan", "inf") and array.size and array.dtype.kind == "f":
        array = array.copy()
        array.reshape(-1)[random.randrange(array.size)] = float(way)
        arrays[name] = array
    elif way == "drop":
        del arrays[name]
    elif way == "rename":
        arrays[random.choice(TENSOR_NAMES)] = arrays.pop(name)
    elif way == "add":
        arrays[random.choice(TENSOR_NAMES)] = array
    elif way == "bigger":
        arrays[name] = np.concatenate([array.reshape(array.shape or (1,))] * 2)
    elif way == "dtype":
        arrays[name] = array.astype(random.choice((np.float16, np.float64, np.int64, np.bool_, np.int8)))
    else:
        arrays[name] = {"scalar": np.float32(1).reshape(()), "empty": np.zeros((0, 4), np.float32)}.get(
            way, array.reshape(1, *array.shape)
        )
    return f"safetensors {name}: {way}", safetensors_of(arrays, about.get("__metadata__"))


def safetensors_of(arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file, without the library: it would refuse some of these."""
    letters = {
        "float32": "F32",
        "float16": "F16",
        "float64": "F64",
        "int64": "I64",
        "bool": "BOOL",
        "int8": "I8",
        "uint8": "U8",
    }
    about, body = {"__metadata__": metadata} if metadata else {}, b""
    for name, array in arrays.items():
        piece = array.tobytes()
        about[name] = {
            "dtype": letters[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [len(body), len(body) + len(piece)],
        }
        body += piece
    header = json.dumps(about).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(header)) + header + body

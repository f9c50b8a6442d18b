"""Damage to files that a machine made: zip files (torch's and NumPy's), safetensors, npy. The container stays whole, what it says becomes absurd or hostile."""

from __future__ import annotations

import argparse
import copy
import functools
import io
import json
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import numpy as np
import torch

from scripts.fuzzing import payloads
from scripts.fuzzing.bytes_damage import SIZES, damaged
from scripts.fuzzing.text_damage import RAW_JSON, VALUES, damaged_json

_DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.int32)
_NAMES = ("layers.99999999999999999999.ffn.w1.weight", "layers.-1.x", "layers.1e3.x", "layers.07.attention.wqkv.weight", "freqs_cis", "model", "", "a" * 3000, "\x1b[31m", "a\nb", "layers.5000000.attention_norm.weight", "cls_embedding.cap_proj.fc1.weight")


# ---- zip ----

def damaged_zip(random: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """A zip file with one member changed, doubled, dropped, renamed, packed or lied about."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    way = random.choice(("member", "member", "member", "double", "drop", "rename", "pack", "bomb", "lie", "lie", "comment", "folder", "link", "nested", "order", "many"))
    index = random.randrange(len(members))
    name, content = members[index]
    method, told = zipfile.ZIP_STORED, f"zip: {way} {name}"
    if way == "member":
        change, content = damaged(random, content, other)
        members[index], told = (name, content), f"{told}: {change}"
    elif way == "double":
        members.insert(random.randrange(len(members) + 1), (name, damaged(random, content, other)[1]))
    elif way == "drop":
        del members[index]
    elif way == "rename":
        members[index] = (random.choice((f"../{name}", f"/{name}", name + "x", name.upper(), name.rsplit("/")[-1], "x" * 3000, "a\nb", "\x1b[31m", "", "archive/data.pkl", "data.pkl", "constants.pkl", "arr_0.npy")), content)
    elif way == "pack":
        method = random.choice((zipfile.ZIP_DEFLATED,) * 4 + (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    elif way == "bomb":
        return told, _zip_bomb(members, index, random.choice((10**6, 10**7, 5 * 10**8)))
    elif way == "link":
        members[index] = (name, b"/etc/passwd")
    elif way == "nested":
        members[index] = (name, data)
    elif way == "order":
        random.shuffle(members)
    elif way == "many":
        members += [(f"x{i}", b"") for i in range(2000)]
    made = zipped(members, method)
    if way == "lie":
        return told, _lying_zip(random, made)
    if way == "comment":
        return told, made[:-2] + struct.pack("<H", 5) + random.choice((b"PK\5\6x", b"hello", b"he"))
    return told, made


def zipped(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file of members, in order."""
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w", method) as archive:
        warnings.simplefilter("ignore")  # doubled names are wanted
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content, method)
    return stream.getvalue()


def _zip_bomb(members: list[tuple[str, bytes]], index: int, size: int) -> bytes:
    """A zip file one of whose members unpacks to `size` zeros, as its headers say."""
    packed, crc = packed_zeros(size), _crc_of_zeros(size)
    name = members[index][0]
    made = bytearray(zipped([*members[:index], (name, packed), *members[index + 1:]]))
    with zipfile.ZipFile(io.BytesIO(made)) as archive:
        offset, entry = archive.infolist()[index].header_offset, archive.start_dir
    for _ in range(index):
        entry += 46 + sum(struct.unpack("<HHH", made[entry + 28: entry + 34]))
    for place in (offset + 8, entry + 10):  # method; date and time stay; checksum, packed size, size
        made[place: place + 2] = struct.pack("<H", zipfile.ZIP_DEFLATED)
        made[place + 6: place + 18] = struct.pack("<III", crc, len(packed), size)
    return bytes(made)


@functools.cache
def packed_zeros(size: int) -> bytes:
    """A bare deflate stream of zeros, made of one piece repeated."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    pieces = [packer.compress(bytes(count)) + packer.flush(zlib.Z_FULL_FLUSH) for count in (10**6, size % 10**6)]
    return pieces[0] * (size // 10**6) + pieces[1] + b"\3\0"


@functools.cache
def _crc_of_zeros(size: int) -> int:
    crc, block = 0, bytes(10**6)
    for left in range(size, 0, -len(block)):
        crc = zlib.crc32(block[:left], crc)
    return crc


def _lying_zip(random: Random, data: bytes) -> bytes:
    """One field of one header says something else."""
    changed = bytearray(data)
    # (signature, offsets of fields of 2 or 4 bytes): local header, directory entry, end of directory
    signature, fields = random.choice(((b"PK\3\4", ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2))), (b"PK\1\2", ((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (38, 4), (42, 4))),
                                       (b"PK\5\6", ((4, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)))))
    places = [i for i in range(len(data)) if data.startswith(signature, i)] if len(data) < 200000 else [data.find(signature)]
    offset, width = random.choice(fields)
    place = random.choice(places or [0]) + offset
    changed[place: place + width] = struct.pack("<Q", random.choice((*SIZES, len(data), len(data) * 10, 2**30)))[:width]
    return bytes(changed)


# ---- torch ----

def damaged_state(random: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """The same for a nested record of tensors and numbers, as DeepSpeed saves it."""
    return damaged_torch(random, data, other, damaged_object)


def damaged_torch(random: Random, data: bytes, other: bytes, damage: Callable[[Random, Any], tuple[str, Any]] | None = None) -> tuple[str, bytes]:
    """A torch file: another object in it, saved well; or its pickle replaced; or its zip file damaged."""
    way = random.choice(("object", "object", "object", "call", "call", "bomb", "pickle bytes", "zip", "old", "tar"))
    if way == "object":
        change, content = (damage or damaged_weights)(random, _loaded(data))
        return change, torch_bytes(content, old=random.random() < 0.1)
    if way == "zip":
        return damaged_zip(random, data, other)
    if way in ("call", "bomb", "pickle bytes"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
        index = next(i for i, (name, _) in enumerate(members) if name.endswith("data.pkl"))
        name, content = members[index]
        change, content = payloads.pickle_of_call(random) if way == "call" else payloads.bomb(random) if way == "bomb" else damaged(random, content, other)
        if random.random() < 0.2:  # not torch's container: the pickle itself, or after the old format's numbers
            return f"bare {change}", content if random.random() < 0.5 else b"".join(_old_numbers()) + content
        members[index] = (name, content)
        return change, zipped(members)
    stream = io.BytesIO()
    torch.save({"model": {"x": torch.zeros(3)}}, stream, _use_new_zipfile_serialization=False)
    change, content = damaged(random, stream.getvalue() if way == "old" else b"sys_info".ljust(100, b"\0") + b"0000644\0".ljust(157, b"\0") + b"ustar\00000" + stream.getvalue(), data)
    return f"{way} torch file, {change}", content


@functools.cache
def _loaded(data: bytes) -> dict[str, Any]:
    return torch.load(io.BytesIO(data), weights_only=False)  # a good one, made by ourselves


def _old_numbers() -> list[bytes]:
    """What stands before the object in torch's old format: magic number, protocol, system."""
    return [b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", b"\x80\x02M\xe9\x03.", b"\x80\x02}q\x00(X\x10\x00\x00\x00protocol_versionq\x01M\xe9\x03X\r\x00\x00\x00little_endianq\x02\x88X\n\x00\x00\x00type_sizesq\x03}q\x04u."]


def torch_bytes(content: Any, old: bool = False) -> bytes:
    """torch.save into memory."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content, stream, _use_new_zipfile_serialization=not old)
    return stream.getvalue()


def damaged_weights(random: Random, content: dict[str, Any]) -> tuple[str, Any]:
    """A checkpoint's object with something odd: in a tensor, a name, the wrapping, the training arguments."""
    way = random.choice(("tensor", "tensor", "tensor", "tensor", "name", "name", "args", "args", "args", "wrap", "whole"))
    wrapper = next((key for key in ("model", "module", "state_dict") if isinstance(content.get(key), Mapping)), None)
    weights = dict(content[wrapper] if wrapper else content)
    rest = {key: value for key, value in content.items() if key != wrapper} if wrapper else {}
    if way == "whole":
        content = random.choice(({}, {"model": {}}, [], None, 3, "x", torch.zeros(3), {"model": 3}, {"model": None}, {"model": [torch.zeros(2)]}, {"model": {"model": weights}}, {"a": weights}, {0: 1}, {"model": {0: torch.zeros(1)}},
                                 {b"model": weights}, {("a", 1): torch.zeros(1)}, [weights], {"model": {"x": 3}}, argparse.Namespace(model=weights), set(weights), {None: torch.zeros(1)}, {"model": {None: torch.zeros(1)}}))
        return f"another object: {type(content).__name__}", content
    if way == "tensor":
        name = random.choice(list(weights))
        change, weights[name] = damaged_tensor(random, weights[name])
        change = f"{name}: {change}"
    elif way == "name":
        name, new = random.choice(list(weights)), random.choice((*_NAMES, 3, None, b"x", 1.5, (1, 2), True))
        change = f"{name} called {str(new)[:50]!r}"
        value = weights.pop(name) if random.random() < 0.5 else weights[name]
        weights[new] = value
        if random.random() < 0.3:
            change, weights = "a weight missing", {key: value for key, value in weights.items() if key != new}
    elif way == "args":
        args = {"gpt_model": "GPT-B", "gpt_type": "c2i", "image_size": 256, "downsample_size": 16, "vocab_size": 16384, "num_classes": 1000, "n_head": 12, "block_size": 256}
        for _ in range(random.choice((1, 1, 2))):
            args[random.choice((*args, "x"))] = odd_value(random)
        if random.random() < 0.6:
            args = {key: args[key] for key in random.sample(list(args), random.randrange(1, len(args)))}
        rest["args"] = random.choice((argparse.Namespace(**{str(key): value for key, value in args.items()}), args, args, odd_value(random)))
        change = f"args {str(rest['args'])[:150]!r}"
    else:
        wrapper = random.choice(("model", "module", "state_dict", "ema", None))
        rest |= {random.choice(("model", "module", "state_dict", "optimizer", "steps", "freqs_cis", "args")): odd_value(random)}
        change = f"weights under {wrapper!r}, beside {str(rest)[:80]!r}"
    return change, {**rest, wrapper: weights} if wrapper else {**weights, **rest}


def damaged_object(random: Random, content: Any) -> tuple[str, Any]:
    """The object with one thing somewhere inside it changed, left out or renamed; what is around it is copied."""
    if isinstance(content, (Mapping, list, tuple)) and len(content) and random.random() < 0.93:
        keys = list(content) if isinstance(content, Mapping) else range(len(content))
        key, way = random.choice(keys), random.choice(("in",) * 8 + ("drop", "rename"))
        copied: Any = dict(content) if isinstance(content, Mapping) else list(content)
        change, inner = damaged_object(random, copied[key])
        if way == "in" or not isinstance(content, Mapping):
            copied[key] = inner
        else:
            del copied[key]
            change = way
            if way == "rename":
                copied[random.choice((*_NAMES, 0, None))] = inner
        return f"{str(key)[:30]}.{change}", type(content)(copied) if type(content) in (tuple, list, dict) else copied
    if isinstance(content, torch.Tensor) and random.random() < 0.8:
        return damaged_tensor(random, content)
    value = odd_value(random)
    return f"= {str(value)[:40]}", value


def odd_value(random: Random) -> Any:
    """A nasty value that a pickle can hold."""
    odd = (10**400, -(10**30), float("nan"), float("inf"), b"bytes", (1, 2), {1, 2}, torch.zeros(2), torch.tensor(5), torch.zeros(1, device="meta"), torch.float32, torch.device("cpu"), torch.Size([1]), argparse.Namespace(a=1), 2.5, 1j, bytearray(b"x"))
    return copy.deepcopy(random.choice(odd)) if random.random() < 0.4 else copy.deepcopy(random.choice(VALUES))


def damaged_tensor(random: Random, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """The tensor with other numbers, dtype, shape, memory or kind."""
    way = random.choice(("nan", "inf", "dtype", "shape", "view", "empty", "scalar", "kind", "huge numbers", "transpose"))
    if way in ("nan", "inf") and tensor.numel() and tensor.is_floating_point():
        changed = tensor.clone()
        changed.view(-1)[random.randrange(changed.numel())] = float(way) * random.choice((1, -1))
        return way, changed
    if way == "dtype":
        dtype = random.choice(_DTYPES)
        return f"dtype {dtype}", tensor.to(dtype)
    if way == "shape":
        shape = random.choice(((*tensor.shape, 1), (1, *tensor.shape), (tensor.numel(),), (0,), (2, 2), tuple(reversed(tensor.shape)), (*tensor.shape[:-1], 1), (1,) * 60, (1,) * tensor.ndim))
        return f"shape {shape}", torch.zeros(shape, dtype=tensor.dtype)
    if way == "view":
        shape = random.choice((tuple(tensor.shape), (10**10,), (10**6, 10**6), (2**31, 2), (2**20, *tensor.shape), (2**40,)))
        return f"a view {shape} of one number", torch.zeros(1, dtype=tensor.dtype).expand(shape)
    if way == "kind":
        kind = random.choice(("sparse", "meta", "quantized", "parameter", "grad", "csr", "nested", "complex view"))
        flat = torch.zeros(2, 3)
        made = {"sparse": lambda: torch.sparse_coo_tensor([[0]], [1.0], (10**9,)), "meta": lambda: torch.zeros(10**9, device="meta"), "quantized": lambda: torch.quantize_per_tensor(flat, 0.1, 0, torch.qint8),
                "parameter": lambda: torch.nn.Parameter(flat), "grad": lambda: flat.clone().requires_grad_(), "csr": lambda: flat.to_sparse_csr(), "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "complex view": lambda: torch.zeros(2, dtype=torch.complex64).conj()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind, made[kind]()
    if way == "huge numbers" and tensor.is_floating_point():
        return way, torch.full_like(tensor, random.choice((3e38, -3e38, 1e-45, 65504.0)))
    if way == "transpose" and tensor.ndim == 2:
        return way, tensor.t()
    return ("scalar", torch.tensor(1.0)) if way == "scalar" else ("empty", tensor[:0] if tensor.ndim else torch.zeros(0))


# ---- safetensors ----

def damaged_safetensors(random: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """A safetensors file with a changed header, or with other tensors under a right header."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = data[8: 8 + length], data[8 + length:]
    way = random.choice(("header", "header", "tensors", "tensors", "tensors", "field", "field", "metadata", "length"))
    if way == "header":
        change, header = damaged_json(random, header, other)
    elif way == "length":
        return way, struct.pack("<Q", random.choice((*SIZES, length + 1, length - 1, length + 8, len(data), len(data) - 8, 10**8, 10**8 + 1))) + data[8:]
    else:
        about = json.loads(header)
        names = [name for name in about if name != "__metadata__"]
        name = random.choice(names)
        entry = about[name]
        if way == "metadata":
            args = damaged_json(random, about.get("__metadata__", {}).get("args", '{"n_head": 2}').encode(), other)[1].decode("utf-8", "replace")
            about["__metadata__"] = random.choice(({"args": args}, {"args": args}, {"args": random.choice(RAW_JSON)}, {"args": "x" * 10000}, {"x": "y"}, {"args": "[]"}, {"args": "null"}, {"format": "pt", "args": ""}))
            change = f"metadata {str(about['__metadata__'])[:100]}"
        elif way == "field":
            start, end = entry["data_offsets"]
            field, value = random.choice((("shape", [10**18]), ("shape", [2**62, 4]), ("shape", [-1]), ("shape", [0]), ("shape", []), ("shape", [1] * 5000), ("shape", list(reversed(entry["shape"]))), ("shape", [*entry["shape"], 1]), ("dtype", "F64"), ("dtype", "F16"),
                                          ("dtype", "I64"), ("dtype", "BOOL"), ("dtype", "F8_E4M3"), ("dtype", "U8"), ("dtype", "X"), ("data_offsets", [0, 2**63]), ("data_offsets", [end, start]), ("data_offsets", [start + 4, end + 4]), ("data_offsets", [0, end])))
            entry[field] = value
            change = f"{name} {field} {str(value)[:40]}"
        else:
            return _other_tensors(random, about, body)
        header = json.dumps(about).encode("utf-8", "surrogatepass")
    return f"safetensors {way}: {change}", struct.pack("<Q", len(header)) + header + body


def _other_tensors(random: Random, about: dict[str, Any], body: bytes) -> tuple[str, bytes]:
    dtypes = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "F64": np.float64}
    arrays = {}
    for name, entry in about.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            arrays[name] = np.frombuffer(body[start:end], dtypes.get(entry["dtype"], np.uint8)).reshape(entry["shape"] if entry["dtype"] in dtypes else -1)
    name = random.choice(list(arrays))
    array, way = arrays[name], random.choice(("nan", "inf", "drop", "rename", "shape", "dtype", "add", "bigger", "scalar", "empty"))
    if way in ("nan", "inf") and array.size and array.dtype.kind == "f":
        array = array.copy()
        array.reshape(-1)[random.randrange(array.size)] = float(way)
        arrays[name] = array
    elif way == "drop":
        del arrays[name]
    elif way == "rename":
        arrays[random.choice(_NAMES)] = arrays.pop(name)
    elif way == "add":
        arrays[random.choice(_NAMES)] = array
    elif way == "bigger":
        arrays[name] = np.concatenate([array.reshape(array.shape or (1,))] * 2)
    elif way == "dtype":
        arrays[name] = array.astype(random.choice((np.float16, np.float64, np.int64, np.bool_, np.int8)))
    else:
        arrays[name] = {"scalar": np.float32(1).reshape(()), "empty": np.zeros((0, 4), np.float32)}.get(way, array.reshape(1, *array.shape))
    return f"safetensors {name}: {way}", safetensors_of(arrays, about.get("__metadata__"))


def safetensors_of(arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file, without the library: it would refuse some of these."""
    letters = {"float32": "F32", "float16": "F16", "float64": "F64", "int64": "I64", "bool": "BOOL", "int8": "I8", "uint8": "U8"}
    about, body = {"__metadata__": metadata} if metadata else {}, b""
    for name, array in arrays.items():
        piece = array.tobytes()
        about[name] = {"dtype": letters[array.dtype.name], "shape": list(array.shape), "data_offsets": [len(body), len(body) + len(piece)]}
        body += piece
    header = json.dumps(about).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(header)) + header + body


# ---- npy and npz ----

def damaged_npy(random: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """A .npy file whose header says something absurd, or an array of objects."""
    way = random.choice(("descr", "shape", "shape", "text", "version", "objects", "length"))
    size = "(1,)" if len(data) < 300 else "(1, 2, 16)"  # a label or the codes of an image
    body = data[10 + struct.unpack("<H", data[8:10])[0]:] if data[6:7] == b"\1" else data[128:]
    if way == "objects":
        return "npy of objects", npy_of("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", payloads.pickle_of_call(random)[1])
    if way == "version":
        return "npy of another version", data[:6] + bytes([random.choice((0, 2, 3, 4, 255)), random.choice((0, 1, 255))]) + data[8:]
    if way == "length":
        return "npy header length", data[:8] + struct.pack("<H", random.choice((0, 1, 65535, 60, 119))) + data[10:]
    descr = random.choice(("'|O'", "'<f8'", "'|u1'", "'<u8'", "'|S1000000000'", "'<U99999999'", "'|V0'", "'<M8[ns]'", "[('a', '<i4')]", "[('a', '|O')]", "'x'", "'>i4'", "'<i4'", "None", "'<c16'", "'|b1'")) if way == "descr" else "'<i8'"
    shape = random.choice((size, "(10**18,)", f"({10**18},)", "(-1,)", "(1, -1, 16)", f"({2**62}, 4)", f"(1, {10**9}, {10**9})", "()", "(0,)", "(1,)", "(True,)", "(1.5,)", "(1, 2, 16)", "('a',)", "[1]", "(" + "1, " * 40 + ")", f"({10**30},)", "(1, 0, 16)")) if way == "shape" else size
    header = f"{{'descr': {descr}, 'fortran_order': {random.choice(('False', 'False', 'True', '1', 'None'))}, 'shape': {shape}, }}"
    if way == "text":
        header = random.choice(("{}", "", "__import__('os').system('true')", "{'descr': __import__('os')}", "[" * 2000, "(" * 200 + ")" * 200, "{" * 500, "'x'", "{'descr': '<i8'}", header + "#", header * 2, "1" * 9000, header.replace("'", '"'), "{'shape': (1,), 'shape': (2,)}", "\x1b[31m", "é"))
    return f"npy header {header[:90]!r}", npy_of(header, body)


def npy_of(header: str, body: bytes) -> bytes:
    """A .npy file, version 1.0, with any header."""
    encoded = header.encode("latin1", "replace")
    encoded += b" " * (-(11 + len(encoded)) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(encoded)) + encoded + body


def damaged_npz(random: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """An .npz whose zip file or whose arrays are damaged; checksums of the zip file fit in half of them."""
    if random.random() < 0.5:
        return damaged_zip(random, data, other)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    index = random.randrange(len(members))
    change, content = damaged_npy(random, members[index][1], other)
    members[index] = (members[index][0], content)
    return f"{members[index][0]}: {change}", zipped(members)


def with_png_checksums(data: bytes) -> bytes:
    """The PNG file with every chunk's checksum made right, as far as its chunks can be followed."""
    out, place = data[:8], 8
    while place + 12 <= len(data):
        length = struct.unpack(">I", data[place: place + 4])[0]
        if place + 12 + length > len(data):
            break
        chunk = data[place + 4: place + 8 + length]
        out += data[place: place + 4] + chunk + struct.pack(">I", zlib.crc32(chunk))
        place += 12 + length
    return out + data[place:]

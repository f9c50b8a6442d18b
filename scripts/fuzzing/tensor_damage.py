"""Damage to torch's files: the file stays well formed, the tensors and other objects in it become absurd or hostile."""

from __future__ import annotations

import argparse
import copy
import functools
import io
import warnings
import zipfile
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import torch

from scripts.fuzzing import payloads
from scripts.fuzzing.bytes_damage import damaged
from scripts.fuzzing.odd_values import TENSOR_NAMES, VALUES
from scripts.fuzzing.zip_damage import damaged_zip, zipped

_DTYPES = (
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.int32,
)


def damaged_torch(
    random: Random, data: bytes, other: bytes, damage: Callable[[Random, Any], tuple[str, Any]] | None = None
) -> tuple[str, bytes]:
    """A torch file: another object in it, saved well; or its pickle replaced; or its zip file damaged."""
    way = random.choice(
        (
            "object",
            "object",
            "object",
            "call",
            "call",
            "bomb",
            "operation",
            "operation",
            "pickle bytes",
            "zip",
            "zip",
            "old",
            "tar",
        )
    )
    if way == "object":
        change, content = (damage or damaged_weights)(random, _loaded(data))
        return change, torch_bytes(content, old=random.random() < 0.1)
    if way == "zip":
        return damaged_zip(random, data, other)
    if way in ("call", "bomb", "operation", "pickle bytes"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
        index = next(i for i, (name, _) in enumerate(members) if name.endswith("data.pkl"))
        name, content = members[index]
        ways = {
            "call": payloads.pickle_of_call,
            "bomb": payloads.bomb,
            "operation": lambda random: payloads.with_one_operation_changed(random, content),
            "pickle bytes": lambda random: damaged(random, content, other),
        }
        change, content = ways[way](random)
        if random.random() < 0.2:  # not torch's container: the pickle itself, or after the old format's numbers
            return f"bare {change}", content if random.random() < 0.5 else b"".join(_old_numbers()) + content
        members[index] = (name, content)
        return change, zipped(members)
    stream = io.BytesIO()
    torch.save({"model": {"x": torch.zeros(3)}}, stream, _use_new_zipfile_serialization=False)
    change, content = damaged(
        random,
        stream.getvalue()
        if way == "old"
        else b"sys_info".ljust(100, b"\0") + b"0000644\0".ljust(157, b"\0") + b"ustar\00000" + stream.getvalue(),
        data,
    )
    return f"{way} torch file, {change}", content


@functools.cache
def _loaded(data: bytes) -> dict[str, Any]:
    return torch.load(io.BytesIO(data), weights_only=False)  # a good one, made by ourselves


def _old_numbers() -> list[bytes]:
    """What stands before the object in torch's old format: magic number, protocol, system."""
    return [
        b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.",
        b"\x80\x02M\xe9\x03.",
        b"\x80\x02}q\x00(X\x10\x00\x00\x00protocol_versionq\x01M\xe9\x03X\r\x00\x00\x00"
        b"little_endianq\x02\x88X\n\x00\x00\x00type_sizesq\x03}q\x04u.",
    ]


def torch_bytes(content: Any, old: bool = False) -> bytes:
    """torch.save into memory."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content, stream, _use_new_zipfile_serialization=not old)
    return stream.getvalue()


def damaged_weights(random: Random, content: dict[str, Any]) -> tuple[str, Any]:
    """A checkpoint's object with something odd: in a tensor, a name, the wrapping, the training arguments."""
    way = random.choice(
        ("tensor", "tensor", "tensor", "tensor", "name", "name", "args", "args", "args", "wrap", "whole")
    )
    wrapper = next((key for key in ("model", "module", "state_dict") if isinstance(content.get(key), Mapping)), None)
    weights = dict(content[wrapper] if wrapper else content)
    rest = {key: value for key, value in content.items() if key != wrapper} if wrapper else {}
    if way == "whole":
        content = random.choice(
            (
                {},
                {"model": {}},
                [],
                None,
                3,
                "x",
                torch.zeros(3),
                {"model": 3},
                {"model": None},
                {"model": [torch.zeros(2)]},
                {"model": {"model": weights}},
                {"a": weights},
                {0: 1},
                {"model": {0: torch.zeros(1)}},
                {b"model": weights},
                {("a", 1): torch.zeros(1)},
                [weights],
                {"model": {"x": 3}},
                argparse.Namespace(model=weights),
                set(weights),
                {None: torch.zeros(1)},
                {"model": {None: torch.zeros(1)}},
            )
        )
        return f"another object: {type(content).__name__}", content
    if way == "tensor":
        name = random.choice(list(weights))
        change, weights[name] = damaged_tensor(random, weights[name])
        change = f"{name}: {change}"
    elif way == "name":
        name, new = random.choice(list(weights)), random.choice((*TENSOR_NAMES, 3, None, b"x", 1.5, (1, 2), True))
        change = f"{name} called {str(new)[:50]!r}"
        value = weights.pop(name) if random.random() < 0.5 else weights[name]
        weights[new] = value
        if random.random() < 0.3:
            change, weights = "a weight missing", {key: value for key, value in weights.items() if key != new}
    elif way == "args":
        args = {
            "gpt_model": "GPT-B",
            "gpt_type": "c2i",
            "image_size": 256,
            "downsample_size": 16,
            "vocab_size": 16384,
            "num_classes": 1000,
            "n_head": 12,
            "block_size": 256,
        }
        for _ in range(random.choice((1, 1, 2))):
            args[random.choice((*args, "x"))] = odd_value(random)
        if random.random() < 0.6:
            args = {key: args[key] for key in random.sample(list(args), random.randrange(1, len(args)))}
        rest["args"] = random.choice(
            (argparse.Namespace(**{str(key): value for key, value in args.items()}), args, args, odd_value(random))
        )
        change = f"args {str(rest['args'])[:150]!r}"
    else:
        wrapper = random.choice(("model", "module", "state_dict", "ema", None))
        rest |= {
            random.choice(("model", "module", "state_dict", "optimizer", "steps", "freqs_cis", "args")): odd_value(
                random
            )
        }
        change = f"weights under {wrapper!r}, beside {str(rest)[:80]!r}"
    return change, {**rest, wrapper: weights} if wrapper else {**weights, **rest}


def odd_value(random: Random) -> Any:
    """A nasty value that a pickle can hold."""
    odd = (
        10**400,
        -(10**30),
        float("nan"),
        float("inf"),
        b"bytes",
        (1, 2),
        {1, 2},
        torch.zeros(2),
        torch.tensor(5),
        torch.zeros(1, device="meta"),
        torch.float32,
        torch.device("cpu"),
        torch.Size([1]),
        argparse.Namespace(a=1),
        2.5,
        1j,
        bytearray(b"x"),
    )
    return copy.deepcopy(random.choice(odd)) if random.random() < 0.4 else copy.deepcopy(random.choice(VALUES))


def damaged_tensor(random: Random, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """The tensor with other numbers, dtype, shape, memory or kind."""
    way = random.choice(
        ("nan", "inf", "dtype", "shape", "view", "empty", "scalar", "kind", "huge numbers", "transpose")
    )
    if way in ("nan", "inf") and tensor.numel() and tensor.is_floating_point():
        changed = tensor.clone()
        changed.view(-1)[random.randrange(changed.numel())] = float(way) * random.choice((1, -1))
        return way, changed
    if way == "dtype":
        dtype = random.choice(_DTYPES)
        return f"dtype {dtype}", tensor.to(dtype)
    if way == "shape":
        shape = random.choice(
            (
                (*tensor.shape, 1),
                (1, *tensor.shape),
                (tensor.numel(),),
                (0,),
                (2, 2),
                tuple(reversed(tensor.shape)),
                (*tensor.shape[:-1], 1),
                (1,) * 60,
                (1,) * tensor.ndim,
            )
        )
        return f"shape {shape}", torch.zeros(shape, dtype=tensor.dtype)
    if way == "view":
        shape = random.choice(
            (tuple(tensor.shape), (10**10,), (10**6, 10**6), (2**31, 2), (2**20, *tensor.shape), (2**40,))
        )
        return f"a view {shape} of one number", torch.zeros(1, dtype=tensor.dtype).expand(shape)
    if way == "kind":
        kind = random.choice(("sparse", "meta", "quantized", "parameter", "grad", "csr", "nested", "complex view"))
        flat = torch.zeros(2, 3)
        made = {
            "sparse": lambda: torch.sparse_coo_tensor([[0]], [1.0], (10**9,)),
            "meta": lambda: torch.zeros(10**9, device="meta"),
            "quantized": lambda: torch.quantize_per_tensor(flat, 0.1, 0, torch.qint8),
            "parameter": lambda: torch.nn.Parameter(flat),
            "grad": lambda: flat.clone().requires_grad_(),
            "csr": lambda: flat.to_sparse_csr(),
            "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
            "complex view": lambda: torch.zeros(2, dtype=torch.complex64).conj(),
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind, made[kind]()
    if way == "huge numbers" and tensor.is_floating_point():
        return way, torch.full_like(tensor, random.choice((3e38, -3e38, 1e-45, 65504.0)))
    if way == "transpose" and tensor.ndim == 2:
        return way, tensor.t()
    return (
        ("scalar", torch.tensor(1.0)) if way == "scalar" else ("empty", tensor[:0] if tensor.ndim else torch.zeros(0))
    )

"""model.plain_pickle: what torch writes comes out as it went in; what a pickle can do beyond that does not happen."""

from __future__ import annotations

import argparse
import enum
import os
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from star_fast.model.bounded_file import Damaged
from star_fast.model.plain_pickle import MOST_BYTES, Foreign, PickledTensor, Storage, read_plain
from tests.model.torch_archives import Described, Run, at_most, pickled


class Settings:
    """A class that a caller may allow."""

    def __init__(self, value: object = None) -> None:
        self.value = value


class Stage(enum.IntEnum):
    """One whose members are looked up by value."""

    FIRST = 1


ALLOWED = {f"{__name__}.Settings": Settings, f"{__name__}.Stage": Stage}


def read(data: bytes, **allowed: type) -> Any:
    return read_plain(data, lambda tensor: tensor, allowed)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_comes_out_as_it_went_in(protocol: int) -> None:
    shared = [1]
    content = {
        "model": OrderedDict(a=1, b=(1, 2, 3, 4)),
        "args": argparse.Namespace(lr=1e-4, name="größe", none=None, flags=[True, False], big=2**70),
        "size": torch.Size([3, 4]),
        "deep": [[(), (1,), (1, 2)], {}, []],
        7: -1,
        "shared": (shared, shared),
        "long": list(range(3000)),
        "text": "x" * 70_000,
    }
    found = read(pickled(content, protocol))
    assert found == content and found["shared"][0] is found["shared"][1] and type(found["size"]) is torch.Size


def test_tensors_are_described() -> None:
    found = read(pickled({"w": Described(Run("7", 12, torch.BFloat16Storage), 2, (2, 3), (3, 1))}))
    assert found["w"] == PickledTensor(Storage("BFloat16", "7", 12), 2, (2, 3), (3, 1), "")


@pytest.mark.parametrize("protocol", [2, 4])
def test_allowed_classes_alone_are_made(protocol: int) -> None:
    settings = Settings(OrderedDict(x=[1]))
    data = pickled({"s": settings, "stage": Stage.FIRST}, protocol)
    found = read(data, **ALLOWED)
    assert type(found["s"]) is Settings and vars(found["s"]) == vars(settings) and found["stage"] is Stage.FIRST
    with pytest.raises(Foreign, match=r"Settings|Stage"):
        read(data)


def test_members_of_an_enumeration_take_no_state() -> None:
    stage = f"c{__name__}\nStage\n".encode() + b"K\x01\x85R"
    with pytest.raises(Damaged, match="state of Stage"):
        read(b"\x80\x02" + stage + b"}X\x01\0\0\0xK\x01sb.", **ALLOWED)
    assert not hasattr(Stage.FIRST, "x")


def test_nothing_runs(tmp_path: Path) -> None:
    witness = tmp_path / "witness"

    class Harmful:
        def __init__(self, function: Any, *arguments: Any) -> None:
            self.reduced = function, arguments

        def __reduce__(self) -> tuple:
            return self.reduced

    harmful = [
        Harmful(os.system, f"touch {witness}"),
        Harmful(eval, f"open({str(witness)!r}, 'w')"),
        Harmful(Path.touch, witness),
        Harmful(exec, "0"),
        Harmful(os.open, str(witness), os.O_CREAT),
        Harmful(getattr, 1, "real"),
        Harmful(torch.load, "x"),
        Harmful(bytearray, 10),
        Harmful(type, "x"),
    ]
    for protocol in (2, 4):
        for item in harmful:
            with pytest.raises(Foreign):
                read(pickled({"model": [item]}, protocol))
    for data in (
        b"cos\nsystem\n(X\x04\0\0\0truetR.",
        b"(cos\nsystem\nX\x04\0\0\0trueo.",
        b"(X\x04\0\0\0trueios\nsystem\n.",
        b"(S'true'\nios\nsystem\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93)R.",
        b"\x82\x01.",
        b"\x80\x02cargparse\nNamespace\n}b.",
        b"\x80\x02cargparse\nNamespace\nN}\x86b.",
        b"\x80\x02ccollections\nOrderedDict\n]\x85R.",
        b"\x80\x02cargparse\nNamespace\n]\x85R.",
        b"\x80\x04)\x8c\x01x\x93.",
    ):
        with pytest.raises(Damaged):
            read(data)
    assert not witness.exists() and not vars(argparse.Namespace()) and "pickle.find_class" not in sys.argv


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "pickle exhausted|no end|not enough"),
        (b".", "IndexError"),
        (b"\x80\x02}", "pickle exhausted|no end"),
        (b"\x80\x02h\x05.", "KeyError: 5"),
        (b"\x80\x02t.", "IndexError"),
        (b"\x80\x02}K\x01a.", "expected a list"),
        (b"\x80\x02]K\x01K\x01s.", "expected a dict"),
        (b"\x80\x02NQ.", "other than a storage"),
        (b"\x80\x02(X\x07\0\0\0storageX\x01\0\0\0xX\x01\0\0\0xX\x01\0\0\0xK\x01tQ.", "other than a storage"),
        (b"\x80\x02K\x01K\x01R.", "what has no name"),
        (b"\x80\x02ctorch\nSize\n(\x8a\x09\0\0\0\0\0\0\0\0\x01t\x85R.", "a size that is none"),
        (b"\x80\x02X\xff\xff\xff\x7fx.", "expected 2147483647 bytes"),
        (b"\xff\xfe", "opcode"),
        (b"\x80\x02}(K\x01u.", "ValueError"),
        (b"L" + b"9" * 5000 + b"L\n.", "4300 digits|LONG"),
        (b"\x80\x02}]K\x01s.", "neither text nor"),
    ],
)
def test_damage(data: bytes, message: str) -> None:
    with pytest.raises(Damaged, match=message):
        read(data)


def test_what_a_pickle_asks_for_stays_within_bounds() -> None:
    """Each takes gigabytes, or forever, when a pickle is executed."""
    name = b"cargparse\nNamespace\nq\0"
    state = b"}q\1(" + b"".join(b"J" + number.to_bytes(4, "little") + b"N" for number in range(20_000)) + b"u"
    doubled = b")" + b"q\1h\1\x86" * 200
    for data, message in (
        (b"]r\xff\xff\xff\x7f.", None),  # a memo of 2^31 places
        (b"}" * 100_000 + b".", None),
        (b"]\x94" * (MOST_BYTES // 2 - 1) + b".", None),
        (b"]" * 50_000 + b"a" * 49_999 + b".", None),  # nested fifty thousand deep
        (b"]q\0h\0a.", None),  # a list of itself
        # Twenty thousand namespaces of twenty thousand attributes
        (name + state + b"h\0)\x81h\1b" * 20_000 + b".", None),
        (doubled + b".", None),
        (b"}" + doubled + b"K\1s.", "keys are neither text nor"),  # hashing it would take 2^200 steps
        (b"}" + b")" + b"\x85" * 200_000 + b"K\1s.", "keys are neither text nor"),  # or overflow the C stack
        (b"ctorch\nSize\nq\0(" + b"K\1" * 20_000 + b"tq\1\x85q\2" + b"h\0h\2R" * 20_000 + b".", "a size that is none"),
        (b"c__builtin__\nbytearray\n\x8a\x05" + (10**10).to_bytes(5, "little") + b"\x85R.", "bytearray"),
    ):
        with at_most(300):
            if message is None:
                read(data)
            else:
                with pytest.raises(Damaged, match=message):
                    read(data)


def test_pickles_of_this_module_are_what_pickle_makes() -> None:
    assert pickle.loads(pickled({"a": [1]})) == {"a": [1]}

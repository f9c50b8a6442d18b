"""Pickles inside torch files, read without running them: the data that a file describes comes out, everything else is
refused.

A pickle is a program. Here it is walked by a machine that has no operation to import or to call what it likes: it knows
numbers, text, lists, tuples, dicts, argparse.Namespace, tensors (which the caller makes of their description), and the
classes that the caller allows. What a file can make it allocate is a fixed multiple of the file's own length, and
nothing is hashed or compared that could be nested.
"""

from __future__ import annotations

import argparse
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from star_fast.model.bounded_file import Damaged, are_sizes

# That a pickle may sensibly have: a GPT-3B with optimizer state and EMA takes 150 kB; each byte may become some 150 in
# memory
MOST_BYTES = 2**20
_MOST_KEY = 2**63
_MOST_ARGUMENTS = 8


class Foreign(Damaged):
    """The pickle names something that is neither tensor nor plain data; its argument is that name."""


class Storage(NamedTuple):
    """A run of numbers in the archive."""

    kind: str  # Float, Half ..., or Untyped, whose length is in bytes
    key: str  # of the archive's member data/KEY
    length: int


class PickledTensor(NamedTuple):
    """A tensor as a torch file describes it; nothing in it has been checked yet."""

    storage: Any
    offset: Any
    shape: Any
    stride: Any
    dtype: str  # float8_e4m3fn ... of an untyped storage, else ""


class _Name(str):
    """The dotted name of a class or function; it is never looked up."""

    __slots__ = ()


def read_plain(
    data: bytes, make_tensor: Callable[[PickledTensor], Any], allowed: Mapping[str, type[Any]] | None = None
) -> Any:
    """What a pickle holds: dicts, lists, tuples, text, bytes, numbers, None, argparse.Namespace, and what `make_tensor`
    makes of its tensors.

    Args:
        allowed: further classes by dotted name. An instance is made without arguments or of numbers and text; its state
            becomes its attributes.

    Raises:
        Foreign: it names a class or function outside the short list of those that make up plain data and tensors.
            Damaged: it is damaged.
    """
    machine = _Machine(make_tensor, {"argparse.Namespace": argparse.Namespace, **(allowed or {})})
    try:
        for operation, argument, _ in pickletools.genops(data):
            name = operation.name
            if name == "STOP":
                return machine.stack.pop()
            if name in _MAKERS:
                machine.stack.append(_MAKERS[name]())
            elif name in _LITERALS:
                machine.stack.append(argument)
            elif name in _STEPS:
                _STEPS[name](machine, argument)
            elif name not in _NOTHING:
                raise Damaged(f"operation {name} is not for plain data")
    except Damaged:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError) as error:
        # All that comes of garbage that is read as a pickle
        raise Damaged(f"{type(error).__name__}: {error}") from error
    raise Damaged("no end")


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any = False, hooks: Any = None, *more: Any
) -> PickledTensor:
    return PickledTensor(
        storage, offset, shape, stride, more[0].removeprefix("torch.") if more and isinstance(more[0], _Name) else ""
    )


def _size(sizes: Any = ()) -> torch.Size:
    if not are_sizes(sizes):
        raise Damaged("a size that is none")
    return torch.Size(sizes)


_NOTHING = {"PROTO", "FRAME"}
_LITERALS = {
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "LONG4",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "SHORT_BINSTRING",
    "BINSTRING",
    "SHORT_BINBYTES",
    "BINBYTES",
    "BINBYTES8",
}
_MAKERS: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
# What REDUCE makes of a name and arguments.
_MAKES: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,  # only ever called without arguments
    "torch.Size": _size,
    "torch.device": lambda *where: where,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
}
_STORAGES = {
    f"torch.{kind}Storage"
    for kind in (
        "Double",
        "Float",
        "Half",
        "BFloat16",
        "Long",
        "Int",
        "Short",
        "Char",
        "Byte",
        "Bool",
        "ComplexDouble",
        "ComplexFloat",
    )
} | {"torch.storage.UntypedStorage"}
_DTYPES = {
    f"torch.{name}"
    for name in (
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e4m3fnuz",
        "float8_e5m2fnuz",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint64",
        "uint32",
        "uint16",
        "uint8",
        "bool",
        "complex64",
        "complex128",
    )
}
_NAMES = {*_MAKES, *_STORAGES, *_DTYPES}


class _Machine:
    """Stack and memo of a pickle; one method a kind of operation. A missing operand is an IndexError or KeyError, which
    `read_plain` takes for damage.
    """

    def __init__(self, make_tensor: Callable[[PickledTensor], Any], classes: Mapping[str, type[Any]]) -> None:
        self.make_tensor, self.classes = make_tensor, classes
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.fresh: dict[int, Any] = {}  # instances of `classes` by id: they alone take a state

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def mark(self, _: None) -> None:
        self.marks.append(len(self.stack))

    def put(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def make_tuple(self, _: None) -> None:
        self.stack.append(tuple(self._since_mark()))

    def make_tuple_of(self, length: int) -> None:
        self.stack[-length:] = [tuple(self.stack[-length:])]

    def append(self, _: None) -> None:
        item = self.stack.pop()
        self._list().append(item)

    def appends(self, _: None) -> None:
        items = self._since_mark()
        self._list().extend(items)

    def _list(self) -> list[Any]:
        if type(self.stack[-1]) is not list:
            raise Damaged(f"expected a list to append to, got {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def setitem(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def setitems(self, _: None) -> None:
        self._set(self._since_mark())

    def _set(self, items: list[Any]) -> None:
        if type(self.stack[-1]) not in (dict, OrderedDict):
            raise Damaged(f"expected a dict to add to, got {type(self.stack[-1]).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Tuples could be nested so that hashing one takes forever, or overflows the C stack.
            if not (type(key) is str or (type(key) is int and abs(key) < _MOST_KEY)):
                raise Damaged("a dict whose keys are neither text nor ordinary numbers")
            self.stack[-1][key] = value

    def name(self, module_and_name: str) -> None:
        name = module_and_name.replace(" ", ".", 1)
        if name not in _NAMES and name not in self.classes:
            raise Foreign(name)
        self.stack.append(_Name(name))

    def name_on_stack(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(f"{module} {name}" if type(module) is str and type(name) is str else "something without a name")

    def reduce(self, _: None) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        if type(name) is not _Name or type(arguments) is not tuple or len(arguments) > _MOST_ARGUMENTS:
            raise Damaged("a call of what has no name")
        if name in self.classes:
            self._new(name, arguments)
        elif name not in _MAKES or (name == "collections.OrderedDict" and arguments):
            raise Foreign(name)
        else:
            made = _MAKES[name](*arguments)
            self.stack.append(self.make_tensor(made) if type(made) is PickledTensor else made)

    def newobj(self, _: None) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        if type(name) is not _Name or name not in self.classes or arguments != ():
            raise Foreign(name if type(name) is _Name else type(name).__name__)
        cls: Any = self.classes[name]
        made = cls.__new__(cls)
        self.fresh[id(made)] = made
        self.stack.append(made)

    def _new(self, name: str, arguments: tuple[Any, ...]) -> None:
        if not all(type(argument) in (int, float, bool, str) for argument in arguments):
            raise Foreign(name)
        self.stack.append(self.classes[name](*arguments))

    def build(self, _: None) -> None:
        state, built = self.stack.pop(), self.stack[-1]
        if id(built) in self.fresh and type(state) is dict:
            built.__dict__ = state  # not a copy: thousands of objects may share one large dict
        elif type(built) is not OrderedDict:
            # One of weights has versions of its modules as an attribute: nothing to us
            raise Damaged(f"state of {type(built).__name__}, which has none")

    def binpersid(self, _: None) -> None:
        kind = self.stack.pop()
        if (
            type(kind) is not tuple
            or [type(part) for part in kind] != [str, _Name, str, str, int]
            or kind[0] != "storage"
            or kind[1] not in _STORAGES
        ):
            raise Damaged("a reference to something other than a storage")
        self.stack.append(Storage(kind[1].rpartition(".")[2].removesuffix("Storage"), kind[2], kind[4]))


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "TUPLE": _Machine.make_tuple,
    "TUPLE1": lambda machine, _: machine.make_tuple_of(1),
    "TUPLE2": lambda machine, _: machine.make_tuple_of(2),
    "TUPLE3": lambda machine, _: machine.make_tuple_of(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.setitem,
    "SETITEMS": _Machine.setitems,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name_on_stack,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.newobj,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.binpersid,
}

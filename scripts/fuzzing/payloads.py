"""Pickles that run code when a careless reader loads them, and pickles that eat memory or time.

Each payload that runs leaves a file in the folder named by FUZZ_CANARIES. They are written opcode by opcode:
pickle.dumps could make only half of them.
"""

from __future__ import annotations

import pickletools
import struct
from random import Random

from scripts.fuzzing.bytes_damage import SIZES

CANARY_MODULE = "fuzz_canary_module"  # lies in the worker's folder: importing it alone leaves a canary
_TOUCH = 'touch "$FUZZ_CANARIES/{}"'
_PYTHON = "__import__('os').mkdir(__import__('os').environ['FUZZ_CANARIES'] + '/{}')"

# (module, name, arguments), each in the way that its misuse is known for.
CALLS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("os", "system", (_TOUCH,)),
    ("posix", "system", (_TOUCH,)),
    ("nt", "system", (_TOUCH,)),
    ("builtins", "eval", (_PYTHON,)),
    ("builtins", "exec", (_PYTHON,)),
    ("__builtin__", "eval", (_PYTHON,)),
    ("builtins", "compile", (_PYTHON, "x", "exec")),
    ("builtins", "__import__", (CANARY_MODULE,)),
    ("builtins", "getattr", ("os", "system")),
    ("builtins", "open", ("canary-open", "w")),
    ("io", "open", ("canary-open", "w")),
    ("os", "popen", (_TOUCH,)),
    ("subprocess", "getoutput", (_TOUCH,)),
    ("subprocess", "Popen", (_TOUCH,)),
    ("subprocess", "check_output", ("true",)),
    ("subprocess", "call", ("true",)),
    ("os", "execvp", ("true",)),
    ("os", "mkdir", ("canary-mkdir",)),
    ("os", "remove", ("nothing",)),
    ("shutil", "rmtree", ("nothing",)),
    ("pathlib", "Path.touch", ("canary-touch",)),
    ("runpy", "run_path", ("nothing.py",)),
    ("runpy", "run_module", (CANARY_MODULE,)),
    ("runpy", "_run_code", (_PYTHON,)),
    ("importlib", "import_module", (CANARY_MODULE,)),
    (CANARY_MODULE, "x", ()),
    ("timeit", "timeit", (_PYTHON,)),
    ("cProfile", "run", (_PYTHON,)),
    ("profile", "run", (_PYTHON,)),
    ("trace", "Trace", ()),
    ("pdb", "run", (_PYTHON,)),
    ("bdb", "Bdb", ()),
    ("code", "interact", ()),
    ("codecs", "decode", ("x", "rot13")),
    ("_codecs", "encode", ("x", "latin1")),
    ("webbrowser", "open", ("http://127.0.0.1:9",)),
    ("urllib.request", "urlopen", ("http://127.0.0.1:9",)),
    ("socket", "create_connection", ("127.0.0.1",)),
    ("pydoc", "pipepager", ("text", _TOUCH)),
    ("pty", "spawn", ("true",)),
    ("asyncio", "run", ("x",)),
    ("functools", "partial", ("x",)),
    ("operator", "attrgetter", ("system",)),
    ("operator", "methodcaller", ("system", _TOUCH)),
    ("operator", "itemgetter", ("x",)),
    ("types", "FunctionType", ("x",)),
    ("types", "CodeType", ("x",)),
    ("marshal", "loads", ("x",)),
    ("pickle", "loads", ("x",)),
    ("_pickle", "loads", ("x",)),
    ("copyreg", "_reconstructor", ("x",)),
    ("copyreg", "__newobj__", ("x",)),
    ("ctypes", "CDLL", ("libc.so.6",)),
    ("ctypes", "util.find_library", ("c",)),
    ("multiprocessing.util", "spawnv_passfds", ("true",)),
    ("multiprocessing.reduction", "ForkingPickler.loads", ("x",)),
    ("logging.config", "listen", ()),
    ("gc", "get_objects", ()),
    ("signal", "raise_signal", ("9",)),
    ("sys", "exit", ("3",)),
    ("builtins", "exit", ()),
    ("os", "_exit", ()),
    ("os", "abort", ()),
    ("faulthandler", "_sigsegv", ()),
    ("time", "sleep", ("60",)),
    ("builtins", "input", ()),
    ("builtins", "bytearray", ("x",)),
    ("numpy", "load", ("x",)),
    ("numpy.core.multiarray", "_reconstruct", ("x",)),
    ("numpy._core.multiarray", "_reconstruct", ("x",)),
    ("numpy", "dtype", ("O",)),
    ("numpy", "ndarray", ("x",)),
    ("numpy.testing._private.utils", "runstring", (_PYTHON, "x")),
    ("numpy.f2py.crackfortran", "myeval", (_PYTHON,)),
    ("numpy._core.multiarray", "scalar", ("x",)),
    ("numpy.distutils.exec_command", "exec_command", (_TOUCH,)),
    ("scipy.misc", "face", ()),
    ("PIL.Image", "open", ("x",)),
    ("yaml", "unsafe_load", ("x",)),
    ("torch", "load", ("x",)),
    ("torch.serialization", "load", ("x",)),
    ("torch.serialization", "_load", ("x",)),
    ("torch.storage", "_load_from_bytes", ("x",)),
    ("torch.hub", "load", ("x", "y")),
    ("torch.hub", "load_state_dict_from_url", ("http://127.0.0.1:9",)),
    ("torch._utils", "_rebuild_tensor", ("x",)),
    ("torch._utils", "_rebuild_tensor_v2", ("x",)),
    ("torch._utils", "_rebuild_tensor_v3", ("x",)),
    ("torch._utils", "_rebuild_parameter", ("x",)),
    ("torch._utils", "_rebuild_sparse_tensor", ("x",)),
    ("torch._utils", "_rebuild_device_tensor_from_numpy", ("x",)),
    ("torch._utils", "_rebuild_meta_tensor_no_storage", ("x",)),
    ("torch._utils", "_rebuild_qtensor", ("x",)),
    ("torch._utils", "_rebuild_nested_tensor", ("x",)),
    ("torch._utils", "_rebuild_wrapper_subclass", ("x",)),
    ("torch._tensor", "_rebuild_from_type_v2", ("x",)),
    ("torch", "FloatStorage", ("x",)),
    ("torch", "UntypedStorage", ("x",)),
    ("torch.nn.parameter", "Parameter", ()),
    ("torch", "Tensor", ()),
    ("torch", "device", ("cuda",)),
    ("torch", "Size", ("x",)),
    ("torch", "compile", ("x",)),
    ("torch.jit", "load", ("x",)),
    ("torch.utils.cpp_extension", "load_inline", ("x", "y")),
    ("torch.jit.unsupported_tensor_ops", "execWrapper", (_PYTHON, "x", "y")),
    ("torch.utils._config_module", "load_config", ("x",)),
    ("torch.utils.bottleneck.__main__", "run_autograd_prof", (_PYTHON, "x")),
    ("torch.utils.collect_env", "run", (_TOUCH,)),
    ("torch.distributed.rpc", "rpc_sync", ("x",)),
    ("torch._inductor.codecache", "compile_file", ("x",)),
    ("torch.fx._symbolic_trace", "Tracer", ()),
    ("torch._dynamo.guards", "GuardBuilder.get", (_PYTHON,)),
    ("torch.utils.data.datapipes.utils.decoder", "basichandlers", ("pickle", "x")),
    ("deepspeed.runtime.utils", "call_to_str", ("x",)),
    ("deepspeed.utils.zero_to_fp32", "x", ()),
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler", ("x",)),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum", ("x",)),
    ("collections", "OrderedDict", ("x",)),
    ("collections", "Counter", ("x",)),
    ("collections", "defaultdict", ("x",)),
    ("argparse", "Namespace", ("x",)),
    ("argparse", "FileType", ("w",)),
    ("argparse", "ArgumentParser", ("x",)),
    ("builtins", "set", ("xyz",)),
    ("builtins", "slice", ("x",)),
    ("builtins", "complex", ("x",)),
    ("builtins", "range", ("x",)),
    ("datetime", "datetime", ("x",)),
    ("decimal", "Decimal", ("1",)),
    ("pathlib", "PosixPath", ("x",)),
    ("uuid", "UUID", ("x",)),
    ("enum", "Enum", ("x",)),
    ("star_fast.cli", "main", ()),
    ("star_fast.train", "main", ()),
    ("star_fast.storage", "atomic_write_bytes", ("canary-own", "x")),
    ("scripts.fuzz", "main", ()),
    ("", "", ()),
    ("os.path", "join", ("x",)),
    ("a" * 3000, "b", ()),
    ("os\x1b[31m", "system\x1b[0m", ("x",)),
    ("builtins", "print", ("printed",)),
    ("\u00fc", "\u732b", ()),
    ("__main__", "Canary", ()),
    ("builtins", "type", ("x",)),
    ("builtins", "object", ()),
    ("types", "SimpleNamespace", ()),
    ("weakref", "finalize", ("x",)),
    ("atexit", "register", ("x",)),
)


def string(text: str) -> bytes:
    """Opcode BINUNICODE."""
    data = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def pickle_of_call(random: Random) -> tuple[str, bytes]:
    """A pickle that calls one of CALLS, in one of the ways that the pickle machine knows."""
    module, name, arguments = random.choice(CALLS)
    filled = [argument.format(f"{module or 'no'}.{name}"[:60].replace("/", "_")) for argument in arguments]
    packed = b"(" + b"".join(map(string, filled)) + b"t"
    by_line = f"{module}\n{name}\n".encode("utf-8", "surrogatepass")
    ways = {
        "REDUCE": b"\x80\x02c" + by_line + packed + b"R",
        "REDUCE of STACK_GLOBAL": b"\x80\x04" + string(module) + string(name) + b"\x93" + packed + b"R",
        "INST": b"\x80\x02(" + b"".join(map(string, filled)) + b"i" + by_line,
        "OBJ": b"\x80\x02(c" + by_line + b"".join(map(string, filled)) + b"o",
        "NEWOBJ": b"\x80\x02c" + by_line + packed + b"\x81",
        "NEWOBJ_EX": b"\x80\x04c" + by_line + packed + b"}\x92",
        "BUILD": b"\x80\x02c" + by_line + b")R}" + string("x") + b"K\1sb",
        "BUILD of two": b"\x80\x02c" + by_line + b")\x81}}" + string("__class__") + string("x") + b"s\x86b",
        "GLOBAL alone": b"\x80\x02c" + by_line,
        "protocol 0": b"c"
        + by_line
        + b"("
        + b"".join(b"V" + text.encode("raw_unicode_escape") + b"\n" for text in filled)
        + b"tR",
        "as value": b"\x80\x02}" + string("model") + b"c" + by_line + packed + b"Rs",
        "as key": b"\x80\x02}c" + by_line + packed + b"RK\1s",
        "in the memo": b"\x80\x02c" + by_line + b"q\0" + packed + b"Rq\1h\1\x86",
        "called twice": b"\x80\x02c" + by_line + packed + b"R" + packed + b"R",
        "SETITEM on it": b"\x80\x02c" + by_line + packed + b"R" + string("a") + string("b") + b"s",
        "APPEND to it": b"\x80\x02c" + by_line + packed + b"R" + string("a") + b"a",
    }
    way = random.choice(list(ways))
    return f"pickle: {module}.{name} by {way}", ways[way] + b"."


def with_one_operation_changed(random: Random, pickled: bytes) -> tuple[str, bytes]:
    """A good pickle with another number, text or operation in one place: sizes of tensors, keys of storages, names of
    classes.
    """
    operations = [(operation, argument, start) for operation, argument, start in pickletools.genops(pickled)]
    index = random.randrange(1, len(operations) - 1)
    while random.random() < 0.7 and not isinstance(operations[index][1], (int, str)):
        index = random.randrange(1, len(operations) - 1)
    operation, argument, start = operations[index]
    if isinstance(argument, int) and "BININT" in operation.name:
        number = random.choice(
            (*SIZES, -1, -2, argument + 1, argument - 1, argument * 2, -argument, 10**6, 10**10, 10**400)
        )
        new = b"\x8b" + struct.pack("<i", 200) + number.to_bytes(200, "little", signed=True)
    elif isinstance(argument, str) and "UNICODE" in operation.name:
        new = string(
            random.choice(
                (
                    "",
                    "0",
                    "1",
                    "9",
                    "cpu",
                    "cuda",
                    "cuda:99",
                    "meta",
                    "../0",
                    "x" * 5000,
                    "\x1b[31m",
                    "\ud800",
                    argument + "x",
                    argument[:-1],
                )
            )
        )
    elif operation.name == "GLOBAL":
        module, name, _ = random.choice(CALLS)
        new = b"c" + random.choice(
            (
                f"{module}\n{name}\n",
                "torch\nHalfStorage\n",
                "torch\nBoolStorage\n",
                "torch\nQInt8Storage\n",
                "torch\nComplexDoubleStorage\n",
                "collections\nOrderedDict\n",
                "torch\nfloat32\n",
                "torch._utils\n_rebuild_tensor_v2\n",
                "torch._utils\n_rebuild_parameter\n",
            )
        ).encode("utf-8", "surrogatepass")
    else:
        new = random.choice(
            (
                b"",
                pickled[start : operations[index + 1][2]] * 2,
                b"N",
                b"\x88",
                b"]",
                b"}",
                b")",
                b"K\1",
                b"G\x7f\xf0\0\0\0\0\0\0",
                b"0",
                b"2",
                b"(",
                b"t",
                b"R",
                b"b",
                b"Q",
            )
        )
    return f"pickle: {operation.name} {str(argument)[:40]} -> {new[:40]!r}", pickled[:start] + new + pickled[
        operations[index + 1][2] :
    ]


def bomb(random: Random) -> tuple[str, bytes]:
    """A small pickle that would become something huge, deep or endless."""
    name = random.choice(list(_BOMBS))
    return f"pickle bomb: {name}", b"\x80\x04" + _BOMBS[name]


def _doubled(count: int, join: bytes = b"\x86") -> bytes:
    """A tuple of two of a tuple of two ...: nothing in memory, without end when printed, compared or hashed."""
    return b")" + b"".join(b"\x94" + b"h" + bytes([i]) + join for i in range(count)) + b"."


def _in_dict(key: str, value: bytes) -> bytes:
    return b"}" + string(key) + value + b"s."


_LAUGHS = b"]\x94" + b"".join(b"](" + (b"h" + bytes([i])) * 10 + b"e\x94" for i in range(30))
_BOMBS: dict[str, bytes] = {
    "doubled tuples": _doubled(60),
    "doubled tuples as weights": _in_dict("model", _doubled(60)[:-1]),
    "doubled tuples as args": b"}" + string("model") + b"}s" + string("args") + _doubled(60)[:-1] + b"s.",
    "doubled tuples as key": b"}" + _doubled(28)[:-1] + b"K\1s.",
    "lists of lists": _LAUGHS + b".",
    "lists of lists as args": _in_dict("args", _LAUGHS),
    "a list in itself": b"]\x94h\0a.",
    "a dict in itself": b"}\x94" + string("model") + b"h\0s.",
    "args in itself": b"}" + string("args") + b"}\x94" + string("n_head") + b"h\0ss.",
    "deep lists": b"]" * 100000 + b"a" * 99999 + b".",
    "deep tuples": b")" + b"\x85" * 200000 + b".",
    "deep dicts": b"}" + (string("model") + b"}") * 30000 + b"s" * 30000 + b".",
    "deep marks": b"(" * 300000 + b"t" * 300000 + b".",
    "string of an absurd length": b"\x8d" + struct.pack("<Q", 2**62) + b"x.",
    "bytes of an absurd length": b"\x8e" + struct.pack("<Q", 2**40) + b"x.",
    "bytearray of an absurd length": b"\x96" + struct.pack("<Q", 2**33) + b"x.",
    "short string of an absurd length": b"X" + struct.pack("<I", 2**32 - 1) + b"x.",
    "bytes of 4 GB": b"B" + struct.pack("<I", 2**32 - 1) + b"x.",
    "long of an absurd length": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"\1.",
    "long of a negative length": b"\x8b" + struct.pack("<i", -1) + b".",
    "long of 100 kB": b"\x8b" + struct.pack("<i", 100000) + b"\x7f" * 100000 + b".",
    "long in letters": b"L" + b"9" * 20000 + b"L\n.",
    "int in letters": b"I" + b"9" * 20000 + b"\n.",
    "memo place of an absurd number": b"]r" + struct.pack("<I", 2**32 - 1) + b".",
    "memo place in letters": b"]p99999999999999999\n.",
    "frame of an absurd length": b"\x95" + struct.pack("<Q", 2**63) + b"].",
    "absurd protocol": b"\x80\xff].",
    "persistent id": b"Pstorage\n.",
    "binary persistent id": string("storage") + b"Q.",
    "persistent id of a storage": b"("
    + string("storage")
    + b"ctorch\nFloatStorage\n"
    + string("0")
    + string("cpu")
    + b"J\xff\xff\xff\x7ftQ.",
    "persistent id of another device": b"("
    + string("storage")
    + b"ctorch\nFloatStorage\n"
    + string("0")
    + string("cuda:9")
    + b"K\1tQ.",
    "persistent id of another file": b"("
    + string("storage")
    + b"ctorch\nFloatStorage\n"
    + string("../../../etc/passwd")
    + string("cpu")
    + b"K\1tQ.",
    "extension": b"\x82\1.",
    "next buffer": b"\x97.",
    "empty stack": b".",
    "popped stack": b"]00.",
    "no end": b"]" * 10,
    "bytearray of 8 GB by call": b"cbuiltins\nbytearray\n\x8a\5\0\0\0\0\2\x85R.",
    "OrderedDict of a self": b"ccollections\nOrderedDict\n)R\x94h\0" + string("a") + b"h\0sb.",
    "many pops": b"]" + b"]0" * 300000 + b".",
    "many memos": b"".join(b"]r" + struct.pack("<I", i) for i in range(20000)) + b"0" * 19999 + b".",
    "a huge set": b"\x8f(" + b"".join(b"J" + struct.pack("<i", i) for i in range(20000)) + b"\x90.",
    "dup of many": b"]" + b"2" * 300000 + b"0" * 300000 + b".",
}

"""model.torch_files: what torch.save wrote comes back, sharing included; an archive that lies about sizes, or hides
them, is refused before memory is taken.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from star_fast.errors import UserError
from star_fast.model.bounded_file import open_bounded
from star_fast.model.torch_files import describe, load_plain, write_archive
from star_fast.storage import StorageError
from tests.model.torch_archives import Described, Run, archive, at_most, pickled, rewritten

ONE = pickled({"w": Described(Run("0", 6), 0, (2, 3), (3, 1))})


class Scale:
    """A class of the caller's."""

    def __init__(self, value: float) -> None:
        self.value = value


def described(path: Path) -> object:
    with open_bounded(path, "") as file:
        return describe(file, "a torch checkpoint")


def refusal(path: Path) -> str:
    """Of both readers: the one that reads tensors and the one that describes them."""
    messages = set()
    for read in (load_plain, described):
        with at_most(100), pytest.raises(UserError) as caught:
            read(path)
        messages.add(str(caught.value))
    assert len(messages) == 1 and all(
        message.startswith(str(path)) and message.isprintable() for message in messages
    ), messages
    return messages.pop()


def test_what_torch_saved_comes_back(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    content = {
        "a": base[4:16],
        "b": base[8:20].view(3, 4).t(),
        "c": torch.tensor(3, dtype=torch.int64),
        "none": None,
        "empty": torch.zeros(0, 3),
        "bf16": torch.randn(5).bfloat16(),
        "f8": torch.ones(3).to(torch.float8_e4m3fn),
        "complex": torch.ones(2, dtype=torch.complex64),
        "nested": [{"x": (torch.ones(2, dtype=torch.bool), torch.nn.Parameter(torch.ones(2)))}],
        "scale": Scale(2.0),
        "args": argparse.Namespace(x=1),
        "state": torch.nn.Linear(2, 3).state_dict(),
        "sizes": OrderedDict(a=torch.Size([2, 3])),
        "dtype": "x",
    }
    torch.save(content, tmp_path / "x.pt")
    found = load_plain(tmp_path / "x.pt", allowed=[Scale])
    for name in ("a", "b", "c", "empty", "bf16", "f8", "complex"):
        assert found[name].dtype == content[name].dtype and found[name].shape == content[name].shape
        assert torch.equal(found[name].to(torch.complex128), content[name].to(torch.complex128)), name
    assert found["b"].stride() == content["b"].stride()
    assert [value.tolist() for value in found["nested"][0]["x"]] == [[True, True], [1.0, 1.0]] and found["none"] is None
    assert (
        type(found["scale"]) is Scale
        and found["scale"].value == 2.0
        and found["args"] == content["args"]
        and found["sizes"] == content["sizes"]
    )
    assert all(torch.equal(found["state"][name], value) for name, value in content["state"].items())
    found["a"][4] = -1  # they share their storage, as in the file
    assert found["b"][0, 0] == -1
    with pytest.raises(UserError, match=r"holds .*Scale, which is neither tensor nor plain data"):
        load_plain(tmp_path / "x.pt")
    assert torch.equal(
        load_plain(rewritten(tmp_path / "x.pt"), allowed=[(Scale, f"{__name__}.Scale")], map_location="cpu")["a"],
        content["a"],
    )


def test_descriptions_say_where_the_numbers_are(tmp_path: Path) -> None:
    values = torch.randn(3, 4)
    torch.save({"w": values, "t": values.t()}, tmp_path / "x.pt")
    with open_bounded(tmp_path / "x.pt", "") as file:
        for name, expected in (("w", values), ("t", values.t())):
            stored = describe(file, "")[name]
            assert (stored.dtype, stored.shape, stored.stride) == (
                torch.float32,
                tuple(expected.shape),
                expected.stride(),
            )
            file.read(stored, out := torch.empty(expected.shape))
            file.read(stored, wide := torch.empty(expected.shape, dtype=torch.float64))
            assert torch.equal(out, expected) and torch.equal(wide, expected.double())


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    """A megabyte of these unpacks to a gigabyte."""
    torch.save({"w": torch.zeros(4_000_000)}, tmp_path / "x.pt")
    assert (rewritten(tmp_path / "x.pt", zipfile.ZIP_DEFLATED)).stat().st_size < 100_000
    assert "is compressed or encrypted, which torch.save never does" in refusal(tmp_path / "x.pt")
    assert "compressed" in refusal(
        archive(tmp_path / "y.pt", ONE, {"data/0": b"\0" * 24}, compression=zipfile.ZIP_DEFLATED)
    )


@pytest.mark.parametrize(
    ("run", "offset", "shape", "stride"),
    [
        (Run("0", 6), 0, (10**9,), (0,)),
        (Run("0", 6), 0, (2, 3), (30, 10)),
        (Run("0", 6), 4, (3,), (1,)),
        (Run("0", 6), 10**12, (1,), (1,)),
        (Run("0", 6), 0, (2**62,), (1,)),
        (Run("0", 10**12), 0, (7,), (1,)),
        (Run("0", 6), 0, (10**10, 0), (1, 1)),
        (Run("0", 6), 7, (0,), (1,)),
    ],
)
def test_tensors_larger_than_their_storage_are_refused(
    tmp_path: Path, run: Run, offset: int, shape: tuple, stride: tuple
) -> None:
    path = archive(tmp_path / "x.pt", pickled({"w": Described(run, offset, shape, stride)}), {"data/0": b"\0" * 24})
    if 0 in shape and offset <= 6:
        assert load_plain(path)["w"].shape == shape
    else:
        assert "says to hold more numbers than the 6 of its storage" in refusal(path)


@pytest.mark.parametrize(
    ("run", "offset", "shape", "stride"),
    [
        (None, 0, (1,), (1,)),
        ("0", 0, (1,), (1,)),
        (Run("0", 6), -1, (1,), (1,)),
        (Run("0", 6), 0, (-1,), (1,)),
        (Run("0", 6), 0, (2,), (-1,)),
        (Run("0", 6), 0, (2,), (1, 1)),
        (Run("0", 6), 0, 2, 1),
        (Run("0", 6), 0, (1.5,), (1,)),
        (Run("0", 6), 0, (True,), (1,)),
        (Run("0", 6), None, (1,), (1,)),
        (Run("0", 6), 0, (2**70,), (0,)),
        (Run("0", 6), 0, (1,) * 9, (1,) * 9),
        (Run("0", 6), 0, ((1,),), (1,)),
    ],
)
def test_tensors_that_are_none(tmp_path: Path, run: object, offset: object, shape: object, stride: object) -> None:
    path = archive(tmp_path / "x.pt", pickled({"w": Described(run, offset, shape, stride)}), {"data/0": b"\0" * 24})
    assert "a tensor without storage, sizes or strides" in refusal(path)


def test_members_that_are_missing_or_twice(tmp_path: Path) -> None:
    assert "no archive member archive/data/0" in refusal(archive(tmp_path / "x.pt", ONE))
    assert "expected one data.pkl" in refusal(archive(tmp_path / "x.pt", ONE, {"sub/data.pkl": ONE}))
    assert "little-endian" in refusal(archive(tmp_path / "x.pt", ONE, {"byteorder": b"big", "data/0": b"\0" * 24}))
    assert "archive member byteorder of 1,000 bytes" in refusal(
        archive(tmp_path / "x.pt", ONE, {"byteorder": b"x" * 1000})
    )
    assert "archive member data.pkl of 2,000,000 bytes" in refusal(archive(tmp_path / "x.pt", b"]" * 2_000_000))
    with zipfile.ZipFile(tmp_path / "x.pt", "w"):
        pass
    assert "expected one data.pkl" in refusal(tmp_path / "x.pt")


def edited(path: Path, **fields: int) -> Path:
    """The archive's one-storage member with other numbers in its directory entry."""
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\1\2")
    for name, value in fields.items():
        kind, offset = {
            "flags": ("<H", 8),
            "method": ("<H", 10),
            "packed": ("<L", 20),
            "size": ("<L", 24),
            "place": ("<L", 42),
            "name": ("<H", 28),
        }[name]
        struct.pack_into(kind, data, at + offset, value)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "fields",
    [
        {"packed": 2**31, "size": 2**31},
        {"size": 2**31},
        {"packed": 23},
        {"place": 2**31},
        {"place": 10},
        {"flags": 1},
        {"method": 8},
        {"name": 60_000},
        {"packed": 2**32 - 1, "size": 2**32 - 1},
        {"place": 2**32 - 1},
    ],
)
def test_directories_that_lie(tmp_path: Path, fields: dict[str, int]) -> None:
    path = archive(tmp_path / "x.pt", ONE, {"data/0": b"\0" * 24})
    assert load_plain(path)["w"].tolist() == [[0.0] * 3] * 2
    assert "truncated or not a torch checkpoint" in refusal(edited(path, **fields))


def test_every_truncation_and_many_flips_are_answered(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pt", ONE, {"data/0": b"\0" * 24})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            load_plain(path)
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with contextlib.suppress(UserError):
            load_plain(path)


def test_ends_that_nobody_wrote(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pt", ONE, {"data/0": b"\0" * 24})
    whole = path.read_bytes()
    path.write_bytes(whole + b"more")
    assert "no end of a zip archive" in refusal(path)
    path.write_bytes(whole[:-2] + b"\4\0more")  # a comment, where another reader may find another end
    assert "no end of a zip archive" in refusal(path)
    path.write_bytes(b"before" + whole)
    assert "damaged zip directory" in refusal(path)
    path.write_bytes(
        whole[:-22] + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0)
    )
    assert "a damaged zip archive" in refusal(path)
    path.write_bytes(b"\0" * 3_000_000 + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 9, 9, 2_900_000, 0, 0))
    assert "a zip directory of 2,900,000 bytes" in refusal(path)
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert "a file of torch before 1.6 must be loaded and saved again" in refusal(path)


def test_large_archives_have_their_numbers_in_64_bits(tmp_path: Path) -> None:
    """As zipfile and torch write them beyond 4 GiB, and torch by its end record always."""
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as file:
        with file.open("archive/data.pkl", "w", force_zip64=True) as member:
            member.write(ONE)
        file.writestr("archive/data/0", b"\0" * 24)
    data = path.read_bytes()
    at = data.index(b"PK\1\2")
    entry = data[at : at + 46]
    _, *middle, place = struct.unpack("<4s6H3L5H2L", entry)
    size, name_length = middle[8], middle[9]
    wide = struct.pack("<2H3Q", 1, 24, size, size, place)
    middle[7] = middle[8] = 2**32 - 1
    middle[10] = len(wide)
    name = data[at + 46 : at + 46 + name_length]
    rest = data[at + 46 + name_length + struct.unpack_from("<H", entry, 30)[0] : data.index(b"PK\5\6")]
    directory = struct.pack("<4s6H3L5H2L", b"PK\1\2", *middle, 2**32 - 1) + name + wide + rest
    body = data[:at] + directory
    end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, len(directory), at) + struct.pack(
        "<4sLQL", b"PK\6\7", 0, len(body), 1
    )
    path.write_bytes(
        body + end + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0)
    )
    assert zipfile.ZipFile(path).read("archive/data.pkl") == ONE and load_plain(path)["w"].shape == (2, 3)


def test_storages_upon_each_other_are_read_once_at_most(tmp_path: Path) -> None:
    """A hundred members at one place would be read into a hundred times the file."""
    tensors = {f"w{n}": Described(Run(str(n), 250_000), 0, (250_000,), (1,)) for n in range(100)}
    path = archive(
        tmp_path / "x.pt", pickled(tensors), {"data/0": b"\0" * 1_000_000, **{f"data/{n}": b"" for n in range(1, 100)}}
    )
    data = bytearray(path.read_bytes())
    first = data.index(b"PK\1\2", data.index(b"PK\1\2") + 4)
    at = first
    for _ in range(99):
        at = data.index(b"PK\1\2", at + 4)
        data[at + 20 : at + 28], data[at + 42 : at + 46] = data[first + 20 : first + 28], data[first + 42 : first + 46]
    path.write_bytes(data)
    with at_most(50), pytest.raises(UserError, match="storages that lie upon each other"):
        load_plain(path)


def test_only_ordinary_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "zeros.pt").symlink_to("/dev/zero")
    for path, message in (
        (tmp_path / "pipe.pt", "found a pipe"),
        (tmp_path / "zeros.pt", "found a pipe"),
        (tmp_path, "found a folder"),
        (tmp_path / "absent.pt", "not found; expected a model state"),
        (Path("a\0b"), "embedded null"),
        (tmp_path / ("x" * 300), "too long"),
    ):
        with pytest.raises(StorageError, match=message):
            load_plain(path, meaning="a model state")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1000)}, tmp_path / "x.pt")
    with open_bounded(tmp_path / "x.pt", "") as file:
        stored = describe(file, "")["w"]
        os.truncate(tmp_path / "x.pt", 2000)
        with pytest.raises(UserError, match="became shorter while it was read"):
            file.read(stored, torch.empty(1000))


class Full(io.BytesIO):
    """A file on a disk that fills up."""

    def write(self, data: bytes) -> int:
        if self.tell() > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_full_disk_is_an_error_of_the_disk() -> None:
    with pytest.raises(OSError, match="No space left on device"):
        write_archive({"w": torch.zeros(100_000)}, Full())
    write_archive({"w": torch.zeros(100)}, file := io.BytesIO())
    assert torch.load(io.BytesIO(file.getvalue()), weights_only=True)["w"].shape == (100,)

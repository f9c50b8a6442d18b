"""data.tar_shards: what Python's tarfile writes is found and read; what is damaged, cut short or odd is left out and
listed.
"""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import pytest

from star_fast.data.sources import DataError, UnreadableImage, open_source
from star_fast.data.tar_shards import TarShards
from star_fast.errors import UserError
from tests.data.pictures import picture


def png(seed: int) -> bytes:
    file = io.BytesIO()
    picture(20 + seed % 7, 18, seed).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, files: list[tuple[str, bytes | tarfile.TarInfo]], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(name: str, seed: int, label: str) -> list[tuple[str, bytes]]:
    return [(f"{name}.png", png(seed)), (f"{name}.cls", label.encode())]


def entry(name: str, kind: bytes, target: str = "") -> tuple[str, tarfile.TarInfo]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return name, info


def shard_of(path: Path, first: int, count: int = 3) -> Path:
    return write_tar(path, [file for i in range(first, first + count) for file in sample(f"{i:04d}", i, str(i % 4))])


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    (tmp_path / "shards").mkdir()
    for number in range(4):
        shard_of(tmp_path / "shards" / f"train-{number:02d}.tar", 3 * number)
    return tmp_path / "shards"


def test_a_folder_a_pattern_and_a_file(shards: Path) -> None:
    source = open_source(shards, progress=False)
    assert (
        isinstance(source, TarShards)
        and len(source) == 12
        and source.class_names == ("0", "1", "2", "3")
        and source.skipped == []
    )
    assert list(source.files) == [
        f"train-{i // 3:02d}.tar/{i:04d}.png" for i in range(12)
    ] and source.labels.tolist() == [i % 4 for i in range(12)]
    for index in range(12):
        assert source.encoded(index) == png(index)
        assert (
            source[index].image.tobytes() == picture(20 + index % 7, 18, index).tobytes()
            and source[index].label == index % 4
        )
    pattern = open_source(f"{shards}/train-{{01..02}}.tar", progress=False)
    assert list(pattern.files) == [f"train-{i // 3:02d}.tar/{i:04d}.png" for i in range(3, 9)]
    assert list(open_source(f"{shards}/train-0{{3,1}}.tar", progress=False).files)[::3] == [
        "train-03.tar/0009.png",
        "train-01.tar/0003.png",
    ]
    assert list(open_source(shards / "train-03.tar", progress=False).files) == [
        f"train-03.tar/{i:04d}.png" for i in range(9, 12)
    ]
    assert open_source(shards, progress=False).description() == source.description()
    for index in (12, -13):
        with pytest.raises(IndexError):
            source.files[index]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_odd_names_in_every_format(tmp_path: Path, form: int) -> None:
    names = ["a", "d" * 90 + "/" + "n" * 90, "./dotted/x.y.z", "größe", "new\nline", "sp ace"]
    names += [] if form == tarfile.USTAR_FORMAT else ["x" * 300, "deep/" * 60 + "x", "p" * 99, "p" * 100, "p" * 101]
    write_tar(
        tmp_path / "a.tar",
        [file for seed, name in enumerate(names) for file in sample(name, seed, f"class {seed}")],
        form,
    )
    source = TarShards(tmp_path / "a.tar", progress=False)
    assert list(source.files) == [f"a.tar/{name.removeprefix('./')}.png" for name in names] and not source.skipped
    assert [source.class_names[label] for label in source.labels] == [f"class {seed}" for seed in range(len(names))]
    assert [source.encoded(index) for index in range(len(names))] == [png(seed) for seed in range(len(names))]


def test_labels_of_every_kind(tmp_path: Path) -> None:
    def labelled(name: str, **labels: bytes) -> list[tuple[str, bytes]]:
        return [*((f"{name}.{ending}", content) for ending, content in labels.items()), (f"{name}.JPG", png(1))]

    write_tar(
        tmp_path / "a.tar",
        [
            *labelled("a", cls=b" elm\n"),
            *labelled("b", json=b'{"label": "oak", "class": 3}'),
            *labelled("c", json=b'{"x": [], "class": 7}'),
            *labelled("d", txt=b"\xef\xbb\xbfash"),
            *labelled("e", cls=b"elm", json=b"{}", txt=b"a caption"),
            *labelled("f"),
            *labelled("g", cls=b" "),
            *labelled("h", json=b"[1]"),
            *labelled("i", json=b'{"label": true}'),
            *labelled("j", json=b'{"label":' + b"[" * 5000),
            *labelled("k", cls=b"\xff"),
            *labelled("l", cls=b"x" * 2000),
            *labelled("m", json=json.dumps({"label": "oak", "more": "x" * 9000}).encode()),
            ("lonely.cls", b"1"),
            ("n.png", png(1)),
            ("n.jpg", png(2)),
            ("n.cls", b"elm"),
            ("README.md", b"no sample"),
            ("._o.jpg", b"a finder's"),
        ],
    )
    source = TarShards(tmp_path / "a.tar", progress=False)
    assert {key[6:]: source.class_names[label] for key, label in zip(source.files, source.labels, strict=True)} == {
        "a.JPG": "elm",
        "b.JPG": "oak",
        "c.JPG": "7",
        "d.JPG": "ash",
        "e.JPG": "elm",
        "m.JPG": "oak",
        "n.png": "elm",
    }
    assert source.class_names == ("7", "ash", "elm", "oak")
    reasons = {skip["key"][6:]: skip["reason"] for skip in source.skipped}
    assert set(reasons) == {"f.JPG", "g.JPG", "h.JPG", "i.JPG", "j.JPG", "k.JPG", "l.JPG", "lonely", "n.jpg"}
    assert (
        reasons["f.JPG"].startswith("no class: expected a .cls")
        and "more than 1,024 bytes" in reasons["l.JPG"]
        and "a second image" in reasons["n.jpg"]
    )
    assert reasons["h.JPG"] == "no class: its .json holds no label or class that is a name or whole number"


def test_what_is_no_file_or_leads_out_is_left_out(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        [
            entry("folder", tarfile.DIRTYPE),
            *sample("folder/a", 1, "0"),
            entry("b.png", tarfile.SYMTYPE, "/etc/passwd"),
            entry("c.png", tarfile.LNKTYPE, "folder/a.png"),
            entry("d.png", tarfile.FIFOTYPE),
            entry("e.png", tarfile.CHRTYPE),
            *sample("/etc/f", 2, "0"),
            *sample("../g", 3, "0"),
            *sample("x/../../h", 4, "0"),
            entry("i.png", b"S"),
            entry("j.png", b"Z"),
            *sample("k", 5, "1"),
            *sample("folder/a", 6, "1"),
        ],
    )
    source = TarShards(tmp_path / "a.tar", progress=False)
    assert list(source.files) == ["a.tar/folder/a.png", "a.tar/k.png"] and source.labels.tolist() == [0, 1]
    assert source.encoded(0) == png(1) and source.encoded(1) == png(5)
    reasons = {skip["key"][6:]: skip["reason"] for skip in source.skipped}
    assert (
        reasons["b.png"] == reasons["c.png"] == "a link, not a file"
        and reasons["d.png"] == "a pipe, not a file"
        and "device" in reasons["e.png"]
    )
    assert (
        "sparse" in reasons["i.png"]
        and "unknown kind" in reasons["j.png"]
        and "occurs twice" in reasons["folder/a.png"]
    )
    for name in ("/etc/f.png", "../g.png", "x/../../h.png"):
        assert reasons[name] == "its name leads out of the tar file"


def test_of_a_shard_cut_anywhere_what_is_whole_is_taken(tmp_path: Path) -> None:
    whole = shard_of(tmp_path / "whole.tar", 0, 4).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        ends = {member.name: member.offset_data + member.size for member in tar}
    cut = tmp_path / "cut.tar"
    random.seed(0)
    for length in sorted({*random.sample(range(1025, len(whole)), 150), *range(1536, 12_000, 512)}):
        cut.write_bytes(whole[:length])
        expected = [f"cut.tar/{i:04d}.png" for i in range(4) if ends[f"{i:04d}.cls"] <= length]
        if not expected:
            with pytest.raises(DataError, match="no image with a class"):
                TarShards(cut, progress=False)
            continue
        source = TarShards(cut, progress=False)
        assert list(source.files) == expected
        faults = [skip for skip in source.skipped if skip["key"] == "cut.tar"]
        if length < max(ends.values()) + 512 - max(ends.values()) % 512 + 512:  # not even one block of the end mark
            assert len(faults) == 1 and ("cut short" in faults[0]["reason"]), (length, faults)
        else:
            assert not faults


def damaged(data: bytes, place: int, content: bytes, *, summed: bool = True) -> bytes:
    """The header at `place // 512 * 512` with other bytes at `place`, its sum made right."""
    start = place // 512 * 512
    header = bytearray(data[start : start + 512])
    header[place - start : place - start + len(content)] = content
    if summed:
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    return data[:start] + bytes(header) + data[start + 512 :]


@pytest.mark.parametrize(
    "content",
    [
        b"77777777777\0",
        b"\x80" + b"\xff" * 11,
        b"\xff" * 12,
        b"-0000000001\0",
        b"00000009999\0",
        b"\x80" + b"\0" * 6 + b"\xff" * 5,
    ],
)
def test_a_size_that_cannot_be(tmp_path: Path, content: bytes) -> None:
    whole = shard_of(tmp_path / "a.tar", 0).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        second = tar.getmember("0001.png").offset
    (tmp_path / "a.tar").write_bytes(damaged(whole, second + 124, content))
    source = TarShards(tmp_path / "a.tar", progress=False)
    assert list(source.files) == ["a.tar/0000.png"] and len(source.skipped) == 1
    assert (
        "damaged at byte" in source.skipped[0]["reason"] or "cut short" in source.skipped[0]["reason"]
    ) and "after 0000 " in source.skipped[0]["reason"]


def test_a_damaged_header_ends_its_shard_and_no_other(shards: Path) -> None:
    path = shards / "train-01.tar"
    with tarfile.open(path) as tar:
        place = tar.getmember("0004.cls").offset
    path.write_bytes(damaged(path.read_bytes(), place + 3, b"\xff", summed=False))
    source = TarShards(shards, progress=False)
    assert [key.split("/")[1] for key in source.files] == [f"{i:04d}.png" for i in (0, 1, 2, 3, 6, 7, 8, 9, 10, 11)]
    assert [skip["key"] for skip in source.skipped] == ["train-01.tar", "train-01.tar/0004.png"]
    assert f"is damaged at byte {place:,}" in source.skipped[0]["reason"]


def test_archives_put_together_are_not_taken_for_whole(tmp_path: Path) -> None:
    first, second = shard_of(tmp_path / "1.tar", 0).read_bytes(), shard_of(tmp_path / "2.tar", 3).read_bytes()
    (tmp_path / "1.tar").write_bytes(first + second)
    assert "put together" in TarShards(tmp_path / "1.tar", progress=False).skipped[0]["reason"]
    (tmp_path / "1.tar").write_bytes(first + bytes(70_000))  # zeros are padding
    assert TarShards(tmp_path / "1.tar", progress=False).skipped == []


def test_what_is_no_plain_tar(tmp_path: Path, shards: Path) -> None:
    packed = tmp_path / "a.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(shards / "train-00.tar", "x.png")
    (tmp_path / "b.tar").write_bytes(packed.read_bytes())
    for name in (packed, tmp_path / "b.tar"):
        with pytest.raises(DataError, match=r"a compressed tar file; .* uncompress it first"):
            open_source(name, progress=False)
    for name, message in (
        (tmp_path / "absent.tar", "not found"),
        (f"{shards}/train-{{00..05}}.tar", r"2 of its 6 files are not there, the first is .*train-04"),
        (f"{shards}/x{{5..1}}.tar", "stands for no files"),
        (f"{shards}/x{{0..9}}{{0..999999}}.tar", "more than a million files"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(name, progress=False)
    for content in (b"", b"text", bytes(10_240), b"\xff" * 5000):
        (tmp_path / "b.tar").write_bytes(content)
        with pytest.raises(DataError, match=r"no image with a class in 1 tar files; expected NAME\.jpg and NAME\.cls"):
            open_source(tmp_path / "b.tar", progress=False)
    captions = [file for i in range(1500) for file in ((f"{i}.png", b"x"), (f"{i}.txt", b"a caption %d" % i))]
    with pytest.raises(DataError, match=r"1500 different labels, such as 'a caption 0'; .* captions"):
        TarShards(write_tar(tmp_path / "c.tar", captions), progress=False)
    many = [(name, content.replace(b"a caption ", b"")) for name, content in captions]
    assert len(TarShards(write_tar(tmp_path / "c.tar", many), progress=False).class_names) == 1500


def test_the_hash_changes_with_the_files(tmp_path: Path) -> None:
    seen = set()
    for files in (
        sample("a", 1, "0") + sample("b", 2, "1"),
        sample("a", 1, "1") + sample("b", 2, "0"),
        sample("a", 1, "0") + sample("c", 2, "1"),
        [("a.png", png(1) + b"x"), ("a.cls", b"0"), *sample("b", 2, "1")],
    ):
        seen.add(json.dumps(TarShards(write_tar(tmp_path / "a.tar", files), progress=False).description()))
    assert len(seen) == 4


def test_an_image_that_is_none_and_a_shard_that_shrinks(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.png", b"no image"), ("a.cls", b"0"), ("b.png", png(1)), ("b.cls", b"1")])
    source = TarShards(tmp_path / "a.tar", progress=False)
    with pytest.raises(UnreadableImage, match=r"^a\.tar/a\.png: UnidentifiedImageError: cannot identify image file$"):
        source[0]
    os.truncate(tmp_path / "a.tar", 2600)
    with pytest.raises(UnreadableImage, match="has become shorter"):
        source[1]
    (tmp_path / "a.tar").unlink()
    with pytest.raises(UnreadableImage, match=r"^a\.tar/b\.png: cannot be read: No such file"):
        source.encoded(1)


def test_many_threads_read_with_few_open_files(tmp_path: Path) -> None:
    """In a process that may open 40 files: 60 shards, 8 threads."""
    for number in range(60):
        shard_of(tmp_path / f"{number:02d}.tar", 3 * number)
    code = (
        "import resource, sys, zlib, threading\n"
        "from concurrent.futures import ThreadPoolExecutor\nfrom star_fast.data.sources import open_source\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
        "source = open_source(sys.argv[1], progress=False)\n"
        "with ThreadPoolExecutor(8) as pool:\n"
        "    print(list(pool.map(lambda i: zlib.crc32(source.encoded(i)), [i * 7 % 180 for i in range(720)])))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    sums = [zlib.crc32(png(i)) for i in range(180)]
    assert json.loads(done.stdout) == [sums[i * 7 % 180] for i in range(720)]


def test_archives_beside_class_folders_are_not_the_images(tmp_path: Path) -> None:
    """As in an ImageNet folder whose archives were unpacked and kept."""
    (tmp_path / "n01").mkdir()
    picture(9, 9, 1).save(tmp_path / "n01" / "a.png")
    shard_of(tmp_path / "n01.tar", 0)
    assert open_source(tmp_path).files == ["n01/a.png"]


def test_sizes_in_other_notations(tmp_path: Path) -> None:
    """A size as GNU tar writes large ones, in binary; and one that stands in a pax header while the ordinary one says
    0.
    """
    whole = shard_of(tmp_path / "a.tar", 0).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        member = tar.getmember("0001.png")
    (tmp_path / "a.tar").write_bytes(damaged(whole, member.offset + 124, b"\x80" + member.size.to_bytes(11, "big")))
    source = TarShards(tmp_path / "a.tar", progress=False)
    assert len(source) == 3 and source.encoded(1) == png(1) and not source.skipped
    record = b"%d size=%d\n" % (len("12 size=123\n"), member.size)
    assert len(record) == 12
    header = bytearray(damaged(whole[member.offset : member.offset + 512], 156, b"x"))
    pax = damaged(bytes(header), 124, b"%011o\0" % len(record)) + record.ljust(512, b"\0")
    plain = damaged(whole, member.offset + 124, b"00000000000\0")
    (tmp_path / "a.tar").write_bytes(plain[: member.offset] + pax + plain[member.offset :])
    source = TarShards(tmp_path / "a.tar", progress=False)
    assert len(source) == 3 and source.encoded(1) == png(1) and source.encoded(2) == png(2) and not source.skipped


def test_gnu_tar_keeps_times_where_posix_has_a_prefix(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", sample("a", 1, "0"), tarfile.GNU_FORMAT).read_bytes()
    (tmp_path / "a.tar").write_bytes(damaged(whole, 345, b"14550000000\x0014550000001\0"))
    source = TarShards(tmp_path / "a.tar", progress=False)
    assert list(source.files) == ["a.tar/a.png"] and source.encoded(0) == png(1)


def test_an_image_that_is_cut_is_left_out_though_its_label_is_whole(tmp_path: Path) -> None:
    files = [("a.cls", b"0"), ("a.png", png(1)), ("b.cls", b"1"), ("b.png", png(2))]
    whole = write_tar(tmp_path / "a.tar", files).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        last = tar.getmember("b.png")
    (tmp_path / "a.tar").write_bytes(whole[: last.offset_data + last.size - 1])
    source = TarShards(tmp_path / "a.tar", progress=False)
    assert list(source.files) == ["a.tar/a.png"]
    assert {skip["key"] for skip in source.skipped} == {
        "a.tar",
        "a.tar/b",
    } and f"should have {last.size:,} bytes" in source.skipped[0]["reason"]

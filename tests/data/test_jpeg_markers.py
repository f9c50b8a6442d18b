"""data.jpeg_markers: a JPEG cut off anywhere is not whole, nor one with anything behind its image that a decoder may or
may not look at.
"""

from __future__ import annotations

import io

import pytest

from star_fast.data.jpeg_markers import is_whole_jpeg
from tests.data.pictures import picture


def jpeg(**options: object) -> bytes:
    file = io.BytesIO()
    picture(40, 30, 1).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"restart_marker_blocks": 2},
        {"comment": b"\xff\xd9 \xff\xda"},
        {"exif": b"Exif\0\0\xff\xd9"},
    ],
    ids=["plain", "progressive", "restarts", "markers within a comment", "markers within EXIF"],
)
def test_whole_until_a_byte_is_missing(options: dict[str, object]) -> None:
    data = jpeg(**options)
    assert is_whole_jpeg(data)
    assert is_whole_jpeg(data + b"what cameras append")
    assert not any(is_whole_jpeg(data[:length]) for length in range(len(data)))


def test_what_is_no_marker_where_one_must_be() -> None:
    data = jpeg()
    assert is_whole_jpeg(data[:2] + b"\xff\xff" + data[2:])  # padding before a marker
    assert not is_whole_jpeg(data[:2] + b"\0" + data[2:])
    assert not is_whole_jpeg(data[:2] + b"\xff\0" + data[2:])
    assert not is_whole_jpeg(data[:2] + data)  # a second beginning
    assert not is_whole_jpeg(b"\x89PNG" + data)
    scan = data.index(b"\xff\xda") + 40
    assert not is_whole_jpeg(data[:scan] + b"\xff\xe5\xff\xff" + data[scan:])  # a segment that reaches beyond the end


def test_what_only_some_decoders_look_at() -> None:
    data = jpeg()
    scan, end = data.index(b"\xff\xda"), len(data) - 2
    length = int.from_bytes(data[data.index(b"\xff\xc0") + 2 :][:2], "big") + 2
    frame = data[data.index(b"\xff\xc0") :][:length]
    assert data[end:] == b"\xff\xd9"
    assert not is_whole_jpeg(data[:end] + data[scan:])  # a second scan
    assert not is_whole_jpeg(data[:end] + frame + data[end:])  # a second frame
    # A table that nothing uses, and that is none
    assert not is_whole_jpeg(data[:end] + b"\xff\xc4\x00\x05abc" + data[end:])
    assert not is_whole_jpeg(data[:scan] + frame + data[scan:])
    assert not is_whole_jpeg(data.replace(frame, b""))
    assert not is_whole_jpeg(data.replace(frame, b"\xff\xc9" + frame[2:]))  # arithmetic coding
    assert not is_whole_jpeg(data[:scan] + b"\xff\xd9")
    one = data[scan:].replace(b"\xff\xda\x00\x0c\x03", b"\xff\xda\x00\x0c\x01", 1)
    assert one != data[scan:] and not is_whole_jpeg(data[:scan] + one)  # the scan of one component of three

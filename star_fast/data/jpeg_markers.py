"""Which JPEG files every decoder takes or refuses alike: found by a walk over their markers, without decoding.

libjpeg fills up what a truncated file lacks with gray, and finds faults behind the last row of pixels only when it is
asked to read on. Pillow refuses the first and asks for the second; other users of libjpeg do neither. In a file that
ends where it must, there is nothing left to differ on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_SOI, _EOI, _SOS, _TEM = 0xD8, 0xD9, 0xDA, 0x01
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), 0xC2
# Every way to encode an image: the other three define tables, or nothing
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_STANDALONE = {0x00, _TEM, *range(0xD0, 0xD9)}  # markers without a length; where a segment must start they are a fault
# In a scan's data 0xFF stands for itself before 0x00, and before 0xD0 ... 0xD7 marks a restart; anything else ends the
# scan.
_END_OF_SCAN = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]", re.DOTALL)


def is_whole_jpeg(data: bytes) -> bool:
    """Whether a file is one Huffman-coded image, sequential in one scan or progressive, that goes on to the marker of
    its end without a gap.
    """
    frame, components, scans, last = 0, 0, 0, 0
    for marker, place in _segments(data):
        if marker in _FRAMES:
            if frame or marker not in (*_SEQUENTIAL, _PROGRESSIVE):
                return False
            frame, components = marker, _byte(data, place + 9)
        elif marker == _SOS:
            scans += 1
            if not frame or (frame in _SEQUENTIAL and (scans > 1 or _byte(data, place + 4) != components)):
                return False
        elif marker == _EOI:
            return last == _SOS
        last = marker
    return False


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Marker and place of each segment, the end of the image last; ends early where no marker stands, or what stands
    there is not allowed.
    """
    if data[:2] != bytes((0xFF, _SOI)):
        return
    place = 2
    while place + 2 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # padding
            place += 1
            continue
        if marker in _STANDALONE:
            return
        yield marker, place
        if marker == _EOI:
            return
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == _SOS:
            end = _END_OF_SCAN.search(data, place)
            if end is None:
                return
            place = end.start()


def _byte(data: bytes, place: int) -> int:
    return data[place] if place < len(data) else -1

"""Whether a JPEG file ends where its markers say: what tells a whole file from a truncated one without decoding it."""

from __future__ import annotations

import re

_SOI, _EOI, _SOS, _TEM = 0xD8, 0xD9, 0xDA, 0x01
_STANDALONE = {0x00, _TEM, *range(0xD0, 0xD9)}  # markers without a length; where a segment must start they are a fault
# In a scan's data 0xFF stands for itself before 0x00, and before 0xD0 ... 0xD7 marks a restart; anything else ends the scan.
_END_OF_SCAN = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]", re.DOTALL)


def is_whole_jpeg(data: bytes) -> bool:
    """Whether segment follows segment from the first marker to the one that ends the image.

    libjpeg fills up what a truncated file lacks with gray and says so in a warning only; Pillow refuses such a file, other users of libjpeg may take it.
    """
    if data[:2] != bytes((0xFF, _SOI)):
        return False
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # padding
            place += 1
            continue
        if marker in _STANDALONE:
            return False
        if marker == _EOI:
            return True
        place += 2 + int.from_bytes(data[place + 2: place + 4], "big")
        if marker == _SOS:
            end = _END_OF_SCAN.search(data, place)
            if end is None:
                return False
            place = end.start()
    return data[place: place + 2] == bytes((0xFF, _EOI))

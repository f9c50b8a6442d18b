"""Damage to tar files: one field of one header becomes another, and the header's sum is made right, so that what lies
behind the check is reached.
"""

from __future__ import annotations

from random import Random

_BLOCK = 512
_FIELDS = {
    "name": (0, 100),
    "mode": (100, 108),
    "size": (124, 136),
    "time": (136, 148),
    "kind": (156, 157),
    "link": (157, 257),
    "magic": (257, 265),
    "prefix": (345, 500),
}
_NUMBERS = (
    b"0",
    b"-1",
    b"77777777777",
    b"00000001000",
    b"\x80" + b"\0" * 7 + b"\xff" * 4,
    b"\x80" + b"\xff" * 11,
    b"\xff" * 12,
    b"99999999999",
    b"1e9",
    b" ",
    b"",
)
_NAMES = (
    b"/etc/passwd.png",
    b"../../x.png",
    b"a/../../x.cls",
    b"",
    b".",
    b"./",
    b"/",
    b"././@LongLink",
    b"x" * 100,
    b"a\nb.png",
    b"\x1b[31m.png",
    b"\xff\xfe.png",
    b".png",
    b"a.PNG",
    b"a.tar",
    b"a.json",
    b"a.txt",
    "größe.cls".encode(),
    b"-x.png",
)
_PAX = (
    b"12 path=/x\n",
    b"30 size=99999999999999999999\n",
    b"99999999999 path=x\n",
    b"0 path=x\n",
    b"-5 a=b\n",
    b"20 size=-1\n",
    b"11 path=\xff\xfe\n",
    b"x",
    b"14 size=12345\n",
    b"6 a=b\n" * 80,
    b"25 GNU.sparse.size=100000\n",
)


def damaged_tar(random: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """A tar file with one to three headers changed, doubled, dropped or put in."""
    changes = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        headers = [
            start for start in range(0, len(data) - _BLOCK + 1, _BLOCK) if data[start + 257 : start + 262] == b"ustar"
        ]
        if not headers:
            break
        start = random.choice(headers)
        way = random.choice(
            ("field", "field", "field", "field", "pax", "long name", "double", "zeros", "end", "content")
        )
        header = data[start : start + _BLOCK]
        if way == "field":
            field = random.choice(("size", "size", *_FIELDS))
            first, last = _FIELDS[field]
            value = (
                random.choice(_NUMBERS)
                if field in ("mode", "size", "time")
                else random.choice(_NAMES)
                if field in ("name", "link", "prefix")
                else random.choice(
                    (
                        b"0",
                        b"\0",
                        b"1",
                        b"2",
                        b"3",
                        b"5",
                        b"6",
                        b"7",
                        b"L",
                        b"K",
                        b"x",
                        b"g",
                        b"S",
                        b"V",
                        b"\xff",
                        b"ustar  \0",
                    )
                )
            )
            changed = header[:first] + value[: last - first].ljust(last - first, b"\0") + header[last:]
            way, data = f"{field} = {value[:40]!r}", data[:start] + summed(changed) + data[start + _BLOCK :]
        elif way in ("pax", "long name"):
            content = (
                random.choice(_PAX)
                if way == "pax"
                else random.choice((b"y" * 3000 + b".png\0", b"\0", b"", b"/z.png", b"n" * 70_000))
            )
            extra = (
                header[:124]
                + b"%011o\0" % len(content)
                + header[136:156]
                + random.choice((b"x", b"g") if way == "pax" else (b"L", b"K"))
                + header[157:]
            )
            data = data[:start] + summed(extra) + content + bytes(-len(content) % _BLOCK) + data[start:]
        elif way == "double":
            data = data[:start] + header + data[start:]
        elif way == "zeros":
            data = data[:start] + bytes(_BLOCK * random.choice((1, 2, 20))) + data[start:]
        elif way == "end":
            data = data[: start + random.choice((0, 1, 300, _BLOCK, _BLOCK + 5))]
        else:
            piece = random.choice(
                (
                    b"9" * 400,
                    b'{"label": [',
                    b'{"label": "\\ud800"}',
                    b"\x1b[31m",
                    b"[" * 500,
                    b"1\n2",
                    b"-7",
                    b"\xff",
                    b"",
                )
            )
            data = data[: start + _BLOCK] + piece.ljust(_BLOCK, b"\0") + data[start + 2 * _BLOCK :]
        changes.append(f"at {start}: {way}")
    return ", ".join(changes) or "nothing to change", data


def summed(header: bytes) -> bytes:
    """The header with the sum that it should have."""
    blank = header[:148] + b" " * 8 + header[156:]
    return blank[:148] + b"%06o\0 " % (sum(blank) % 8**6) + blank[156:]

"""Making checksums fit what was damaged, as an attacker would: else they would keep every input from the code behind
them.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load as parse_safetensors

from scripts.fuzzing import goods
from star_fast.config import TokenizerConfig
from star_fast.model.tokenizer import VQTokenizer
from star_fast.records import from_dict
from star_fast.storage import sha256_of_bytes, sha256_of_file

_STORE_FILES = ("codes.bin", "labels.bin", "keys.jsonl")


class Fit(NamedTuple):
    """Which file holds the checksums, within the folder of the damaged one, and what makes them fit; that gets the
    file's folder.
    """

    file: str
    make: Callable[[Path], None]


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    about = json.loads(path.read_bytes())
    change(about)
    path.write_text(json.dumps(about))


def _classifier(folder: Path) -> None:
    _edit(
        folder / "classifier.json",
        lambda about: about.update(weights_sha256=sha256_of_file(folder / "classifier.safetensors")),
    )


def _model(folder: Path) -> None:
    hashes = {
        weights: sha256_of_file(folder / f"{name}.safetensors")
        for weights, name in (("student", "model"), ("teacher", "teacher"))
    }
    _edit(folder / "config.json", lambda about: about.update(weights_sha256=hashes))


def _tokenizer(folder: Path) -> None:
    about = json.loads((folder / "tokenizer.json").read_bytes())
    # Never a huge one
    sizes = {"base_channels": goods.TOKENIZER.base_channels, "z_channels": goods.TOKENIZER.z_channels}
    tokenizer = VQTokenizer(from_dict(TokenizerConfig, {**about["config"], **sizes}))
    tokenizer.load_state_dict(parse_safetensors((folder / "tokenizer.safetensors").read_bytes()))
    _edit(folder / "tokenizer.json", lambda about: about.update(weights_sha256=tokenizer.weights_hash()))


def _state(folder: Path) -> None:
    _edit(
        folder / "unfinished.json",
        lambda about: about.update(sha256=sha256_of_file(folder / f"unfinished-{about['step']:07d}.safetensors")),
    )


def _store(folder: Path) -> None:
    _edit(folder / "manifest.json", lambda about: about["files"].update(_described(folder, _STORE_FILES)))


def _progress(folder: Path) -> None:
    def change(about: dict[str, Any]) -> None:
        for name in _STORE_FILES:
            data = (folder / name).read_bytes()
            about["bytes"][name] = min(about["bytes"][name], len(data))
            about["sha256"][name] = sha256_of_bytes(data[: about["bytes"][name]])

    _edit(folder / "progress.json", change)


def _checkpoint(root: Path) -> None:
    _edit(root / "complete.json", lambda about: about["files"].update(_described(root, list(about["files"]))))


def _part(folder: Path) -> None:
    for part in folder.glob("batch-*.npy"):
        data = part.read_bytes()[:-4]
        part.write_bytes(data + struct.pack("<I", zlib.crc32(data)))


def _chunk(folder: Path) -> None:
    part = folder / "until-00000016"
    _, _, content = part.read_bytes().partition(b"\n")
    part.write_bytes(sha256_of_bytes(content).encode() + b"\n" + content)


def _samples(folder: Path) -> None:
    data = (folder / "done.npz").read_bytes()
    start, end = data.index(b"\x93NUMPY"), data.index(b"PK\3\4", 4)
    sums = {
        "images_crc32": zlib.crc32(data[start:end]),
        "frame_crc32": zlib.crc32(data[end:], zlib.crc32(data[:start])),
    }
    _edit(folder / "done.json", lambda about: about["run"].update({name: f"{crc:08x}" for name, crc in sums.items()}))


def _described(folder: Path, names: list[str] | tuple[str, ...]) -> dict[str, dict[str, Any]]:
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of_file(folder / name)} for name in names}


CLASSIFIER, MODEL, TOKENIZER = (
    Fit("classifier.json", _classifier),
    Fit("config.json", _model),
    Fit("tokenizer.json", _tokenizer),
)
STATE, STORE, PROGRESS = Fit("unfinished.json", _state), Fit("manifest.json", _store), Fit("progress.json", _progress)
CHECKPOINT = Fit("complete.json", _checkpoint)
CHUNK = Fit("until-00000016", _chunk)
PART, SAMPLES = Fit("batch-0000003.npy", _part), Fit("done.json", _samples)

"""The table of what is damaged: each kind of file that the command line reads, the reader, and how the input is made.
Good files: goods.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import NamedTuple

from scripts.fuzzing import (
    bytes_damage,
    checksums,
    command_lines,
    evaluation_readers,
    images,
    readers,
    small_network,
    tar_damage,
    tensor_damage,
    text_damage,
    zip_damage,
)
from scripts.fuzzing.checksums import Fit
from scripts.fuzzing.trial import HOLES, IRREGULAR, Case, Subject

Damage = Callable[[Random, bytes, bytes], tuple[str, bytes]]
_IRREGULAR_SHARE, _EMPTY_SHARE = 0.04, 0.01
# Of the rest: damage that knows the format; most other damage to a container ends at its first check
_KNOWING_SHARE, _KNOWING_OF_CONTAINERS = 0.6, 0.8
_CONTAINERS = (".pt", ".pth", ".npz", ".safetensors", ".tar")
_FITTING_SHARE = 0.7  # of files with checksums: these are made to fit

_DAMAGE: dict[str, Damage] = {
    ".json": text_damage.damaged_json,
    ".lock": text_damage.damaged_json,
    ".jsonl": text_damage.damaged_lines,
    ".yaml": text_damage.damaged_yaml,
    ".safetensors": tensor_damage.damaged_safetensors,
    ".pt": tensor_damage.damaged_torch,
    ".npy": zip_damage.damaged_npy,
    ".npz": zip_damage.damaged_npz,
    ".pth": tensor_damage.damaged_torch,
    ".csv": text_damage.damaged_table,
    ".txt": text_damage.damaged_table,
    ".tar": tar_damage.damaged_tar,
    ".bin": bytes_damage.damaged,
    ".bf16": bytes_damage.damaged,
    ".journal": bytes_damage.damaged,
}


class Row(NamedTuple):
    """A file that is damaged."""

    name: str
    file: str
    read: Callable[[Path, Case], None]
    share: float  # of all inputs, relative to the others: small where reading takes long
    clean: str = ""  # the folder that reading writes to
    fit: Fit | None = None
    damage: Damage | None = None  # None: by the file's suffix
    start: Callable[[], object] | None = None


_CHECKPOINT, _PARTS = "run/checkpoints/step-0000003", "sampling/part.npz.parts"
ROWS = (
    Row("config.yaml", "run/config.yaml", readers.config, 6),
    Row("metrics.jsonl, report", "run/metrics.jsonl", readers.metrics, 5),
    Row("metrics.jsonl, resume", "run/metrics.jsonl", readers.telemetry, 4),
    Row("report.json", "run/report.json", readers.against, 4),
    Row("classifier.json", "run/classifier/classifier.json", readers.classifier, 2, fit=checksums.CLASSIFIER),
    Row(
        "classifier.safetensors",
        "run/classifier/classifier.safetensors",
        readers.classifier,
        2,
        fit=checksums.CLASSIFIER,
    ),
    Row("lock file", "run/.lock", readers.lock, 1),
    Row("model/config.json", "run/model/config.json", readers.model, 2, fit=checksums.MODEL),
    Row("model/model.safetensors", "run/model/model.safetensors", readers.model, 2, fit=checksums.MODEL),
    Row("model/teacher.safetensors", "run/model/teacher.safetensors", readers.model, 1, fit=checksums.MODEL),
    Row(
        "model/model.safetensors, --init", "run/model/model.safetensors", readers.start_weights, 1, fit=checksums.MODEL
    ),
    Row(
        "tokenizer/tokenizer.json", "run/model/tokenizer/tokenizer.json", readers.tokenizer, 2, fit=checksums.TOKENIZER
    ),
    Row(
        "tokenizer/tokenizer.safetensors",
        "run/model/tokenizer/tokenizer.safetensors",
        readers.tokenizer,
        2,
        fit=checksums.TOKENIZER,
    ),
    Row(
        "checkpoint/complete.json",
        f"{_CHECKPOINT}/complete.json",
        readers.resume,
        2,
        fit=checksums.CHECKPOINT,
        start=readers.engine,
    ),
    Row(
        "checkpoint/teacher.safetensors",
        f"{_CHECKPOINT}/teacher-00000.safetensors",
        readers.resume,
        0.5,
        fit=checksums.CHECKPOINT,
        start=readers.engine,
    ),
    Row(
        "checkpoint/optimizer.safetensors",
        f"{_CHECKPOINT}/optimizer-00000.safetensors",
        readers.resume,
        2,
        fit=checksums.CHECKPOINT,
        start=readers.engine,
    ),
    Row(
        "checkpoint/optimizer.safetensors, convert",
        f"{_CHECKPOINT}/optimizer-00000.safetensors",
        readers.put_together,
        1,
        fit=checksums.CHECKPOINT,
    ),
    Row(
        "checkpoint/complete.json, convert",
        f"{_CHECKPOINT}/complete.json",
        readers.put_together,
        0.5,
        fit=checksums.CHECKPOINT,
    ),
    Row("store/manifest.json", "store/manifest.json", readers.store, 5, fit=checksums.STORE),
    Row("store/keys.jsonl", "store/keys.jsonl", readers.store, 2, fit=checksums.STORE),
    Row("store/labels.bin", "store/labels.bin", readers.store, 1.5, fit=checksums.STORE),
    Row("store/codes.bin", "store/codes.bin", readers.store, 1, fit=checksums.STORE),
    Row(
        "unfinished store/progress.json",
        "unfinished/progress.json",
        readers.unfinished_store,
        1,
        "unfinished",
        checksums.PROGRESS,
    ),
    Row(
        "unfinished store/keys.jsonl",
        "unfinished/keys.jsonl",
        readers.unfinished_store,
        0.3,
        "unfinished",
        checksums.PROGRESS,
    ),
    Row(
        "unfinished store/labels.bin",
        "unfinished/labels.bin",
        readers.unfinished_store,
        0.3,
        "unfinished",
        checksums.PROGRESS,
    ),
    Row(
        "unfinished store/parts",
        "unfinished/parts/until-00000016",
        readers.unfinished_store,
        0.5,
        "unfinished",
        checksums.CHUNK,
        damage=bytes_damage.damaged,
    ),
    Row("store/source.json", "store/source.json", readers.origin, 1),
    Row(
        "unfinished store/codes.bin",
        "unfinished/codes.bin",
        readers.unfinished_store,
        0.3,
        "unfinished",
        checksums.PROGRESS,
    ),
    Row(
        "unfinished tokenizer/unfinished.json",
        "halfway/tokenizer/unfinished.json",
        readers.kept_tokenizer,
        0.3,
        "halfway",
        checksums.STATE,
    ),
    Row(
        "unfinished tokenizer/unfinished.safetensors",
        "halfway/tokenizer/unfinished-0000002.safetensors",
        readers.kept_tokenizer,
        0.3,
        "halfway",
        checksums.STATE,
    ),
    Row("trained tokenizer/training.json", "trained/tokenizer/training.json", readers.kept_tokenizer, 0.5, "trained"),
    Row("samples.npz", "samples/done.npz", readers.samples, 0.3, "samples", checksums.SAMPLES),
    Row("samples.json", "samples/done.json", readers.samples, 0.3, "samples", checksums.SAMPLES),
    Row("unfinished samples/plan.json", f"{_PARTS}/plan.json", readers.samples, 0.3, "sampling"),
    Row(
        "unfinished samples/batch.npy", f"{_PARTS}/batch-0000003.npy", readers.samples, 0.3, "sampling", checksums.PART
    ),
    Row(
        "unfinished samples/unfinished.npz",
        f"{_PARTS}/unfinished.npz",
        readers.samples,
        0.3,
        "sampling",
        damage=bytes_damage.damaged,
    ),
    Row("unfinished samples/unfinished.journal", f"{_PARTS}/unfinished.journal", readers.samples, 0.3, "sampling"),
    Row("LlamaGen transformer .pt", "released/model.pt", readers.released_model, 6),
    Row("LlamaGen transformer .pt, --init", "released/model.pt", readers.start_weights, 3),
    Row("LlamaGen transformer .safetensors", "released/model.safetensors", readers.released_model, 3),
    Row("LlamaGen tokenizer .pt", "released/tokenizer.pt", readers.tokenizer, 3),
    Row("LlamaGen tokenizer .safetensors", "released/tokenizer.safetensors", readers.tokenizer, 2),
    Row("LlamaGen codes, first .npy", "llamagen/imagenet8_codes/0.npy", readers.llamagen_codes, 0.6, "llamagen"),
    Row("LlamaGen codes, other .npy", "llamagen/imagenet8_codes/1.npy", readers.llamagen_codes, 1, "llamagen"),
    Row("LlamaGen labels .npy", "llamagen/imagenet8_labels/2.npy", readers.llamagen_codes, 0.6, "llamagen"),
    Row(
        "LlamaGen sibling's codes .npy",
        "llamagen_105/imagenet8_codes/1.npy",
        readers.llamagen_siblings,
        0.6,
        "llamagen",
    ),
    Row(
        "LlamaGen sibling's labels .npy",
        "llamagen_105/imagenet8_labels/2.npy",
        readers.llamagen_siblings,
        0.4,
        "llamagen",
    ),
    Row("list of labels .csv", "listed/labels.csv", readers.labelled_folder, 4),
    Row("tar shard", "shards/a.tar", readers.tar_shards, 4),
    Row("class names, lines with ids", "names/mapping.txt", readers.class_names, 2),
    Row("class names, one a line", "names/list.txt", readers.class_names, 1.5),
    Row("reference .npz, own", small_network.REFERENCE, evaluation_readers.reference_file, 2, "out"),
    Row("reference .npz, ADM's", small_network.ADM_REFERENCE, evaluation_readers.reference_file, 2, "out"),
    Row("samples.npz, evaluate", "samples/done.npz", evaluation_readers.npz_images, 2, "out", checksums.SAMPLES),
    Row("samples.json, evaluate", "samples/done.json", evaluation_readers.npz_images, 1.5, "out", checksums.SAMPLES),
    Row("weights of Inception", small_network.WEIGHTS, evaluation_readers.inception_weights, 2),
    Row("probe.json, --against", "run/probe.json", evaluation_readers.other_probe, 1),
    Row("kept features, features.json", "kept/features.json", evaluation_readers.kept_features, 0.5, "kept"),
    Row("kept features, .bf16", "kept/train-view0-000000.bf16", evaluation_readers.kept_features, 0.5, "kept"),
    Row("model/config.json, demo", "run/model/config.json", evaluation_readers.demo, 0.7, fit=checksums.MODEL),
    Row(
        "model/model.safetensors, demo",
        "run/model/model.safetensors",
        evaluation_readers.demo,
        0.5,
        fit=checksums.MODEL,
    ),
    Row(
        "tokenizer/tokenizer.json, demo",
        "run/model/tokenizer/tokenizer.json",
        evaluation_readers.demo,
        0.5,
        fit=checksums.TOKENIZER,
    ),
)

_ODD_NAMES = (
    "a",
    "bär",
    "猫",
    "\udcff\udc80",
    "a\nb",
    "a\r\nb",
    "\x1b[31mred",
    "\x1b]0;t\x07",
    "\u202eabc",
    "\x7f",
    "\u2028",
    "-x",
    "--help",
    " ",
    ".hidden",
    "..a",
    "'",
    '"',
    "<b>&amp;",
    "%s",
    "{x}",
    "$HOME",
    "`id`",
    "~",
    "*",
    "x" * 240,
    "é" * 120,
    "a\tb",
    "null",
    "0",
    "classes",
    "\ufeff",
    "a\udc80",
    "\u0301",
    "CON",
    "a.png",
    "digits",
)


def all_subjects() -> list[Subject]:
    """Every kind of file, then every command."""
    pictures = images.good_images()
    by_format = [
        (form, {name: data for name, data in pictures.items() if name.endswith(suffix)})
        for form, suffix in images.FORMATS.items()
    ]
    return [
        *map(_subject, ROWS),
        *(
            Subject(
                f"image: {form}",
                readers.picture.__doc__ or "",
                _image_maker(of_it, list(pictures.values())),
                readers.picture,
                3,
                clean=("pictures",),
            )
            for form, of_it in by_format
        ),
        Subject(
            "image folder, evaluate",
            evaluation_readers.image_folder.__doc__ or "",
            _image_maker(pictures, list(pictures.values()), "gallery/a"),
            evaluation_readers.image_folder,
            2,
            clean=("gallery", "out"),
        ),
        Subject(
            "image folder, names, evaluate",
            evaluation_readers.image_folder.__doc__ or "",
            _odd_names("gallery"),
            evaluation_readers.image_folder,
            0.5,
            clean=("gallery", "out"),
        ),
        Subject(
            "image folder, names",
            readers.names.__doc__ or "",
            _odd_names("pictures"),
            readers.names,
            0.7,
            clean=("pictures",),
        ),
        Subject(
            "run folder, entries",
            readers.run_folder.__doc__ or "",
            _odd_entries,
            readers.run_folder,
            0.7,
            clean=("run",),
            start=readers.engine,
        ),
        *command_lines.subjects(),
    ]


def _subject(row: Row) -> Subject:
    damage = row.damage or _DAMAGE[Path(row.file).suffix or Path(row.file).name]
    checksum_files = (f"{row.file.rsplit('/', 1)[0]}/{row.fit.file}",) if row.fit else ()

    def make(random: Random, good: Path) -> Case:
        return damaged_file(
            random,
            row.file,
            _bytes_of(good / row.file),
            _bytes_of(good / "store/manifest.json"),
            damage,
            checksum_files,
        )

    return Subject(
        row.name,
        row.read.__doc__ or "",
        make,
        row.read,
        row.share,
        start=row.start,
        clean=(row.clean,) if row.clean else (),
        repair=row.fit.make if row.fit else None,
    )


def damaged_file(
    random: Random, file: str, data: bytes, other: bytes, damage: Damage, repairs: tuple[str, ...] = ()
) -> Case:
    """The file irregular, empty, or damaged by what knows its format, by what does not, or by both."""
    kind = random.random()
    if kind < _IRREGULAR_SHARE:
        return irregular(random, file)
    if kind < _IRREGULAR_SHARE + _EMPTY_SHARE:
        return Case("empty", file, b"")
    changes, knowing = [], random.random() < (_KNOWING_OF_CONTAINERS if file.endswith(_CONTAINERS) else _KNOWING_SHARE)
    for way in [damage] * knowing + [bytes_damage.damaged] * random.choice(
        (0, 0, 0, 0, 1) if knowing else (1, 1, 2, 3)
    ):
        change, data = way(random, data, other)
        changes.append(change)
    return Case("; ".join(changes), file, data, repairs=repairs if random.random() < _FITTING_SHARE else ())


def irregular(random: Random, file: str) -> Case:
    """Something else in the file's place; large files take time and are rare."""
    way = random.choice(list(HOLES) if random.random() < 0.04 else [name for name in IRREGULAR if name not in HOLES])
    return Case(way, file, irregular=way)


def _image_maker(
    pictures: dict[str, bytes], others: list[bytes], folder: str = "pictures/a"
) -> Callable[[Random, Path], Case]:
    def make(random: Random, good: Path) -> Case:
        name = random.choice(list(pictures))
        case = damaged_file(random, f"{folder}/{name}", pictures[name], random.choice(others), images.damaged_image)
        if case.content and case.content.startswith(bytes_damage.MAGIC["PNG"]) and random.random() < 0.5:
            return replace(
                case, change=f"{case.change}; checksums made right", content=images.with_png_checksums(case.content)
            )
        return case

    return make


_ODD_PLACES = (
    "run/checkpoints/step-0000009",
    "run/checkpoints/step-0000009.tmp",
    "run/checkpoints/step-0000003/x",
    "run/checkpoints/step-0000003/model/x",
    "run/checkpoints/step-99999999999999999999",
    "run/checkpoints/step-x",
    "run/checkpoints/x",
    f"{_CHECKPOINT}/model",
    "run/checkpoints",
    "run/.lock",
    "run/.config.yaml.1.tmp",
    "run/.model.1.tmp",
    "run/.model.1.old",
    "run/.checkpoints.1.tmp",
    "run/model",
    "run/model/x",
    "run/model/tokenizer",
    "run/config.yaml",
    "run/metrics.jsonl",
)


def _odd_entries(random: Random, good: Path) -> Case:
    """Something in a run folder that does not belong there, or something else than what does."""
    place = random.choice(_ODD_PLACES)
    return (
        irregular(random, place)
        if random.random() < 0.7
        else Case("a file", place, random.choice((b"", b"{}", b"\x1b[31m")))
    )


def _odd_names(root: str) -> Callable[[Random, Path], Case]:
    def make(random: Random, good: Path) -> Case:
        folders = "/".join(random.choice(_ODD_NAMES) for _ in range(random.choice((1, 1, 1, 2, 3))))
        name = random.choice(_ODD_NAMES) + random.choice((".png", ".png", ".png", ".PNG", ".jpg", ".txt", ""))
        place = random.choice((f"{folders}/{name}", f"{folders}/{name}", f"{folders}/{name}", name))
        if random.random() < 0.15:
            return irregular(random, f"{root}/{place}")
        content = _bytes_of(good / "images/7/0.png") if random.random() < 0.7 else b"\x89PNG\x1b[31m\nno"
        return Case(f"named {place!r}", f"{root}/{place}", content)

    return make


@functools.cache
def _bytes_of(path: Path) -> bytes:
    return path.read_bytes()

"""The table of what is damaged: each kind of file that the command line reads, and the reader it uses."""

from __future__ import annotations

import functools
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load as parse_safetensors

from scripts.fuzzing import bytes_damage, command_lines, formats, goods, images, text_damage
from scripts.fuzzing.trial import IRREGULAR, Case, Subject
from star_fast.config import TokenizerConfig
from star_fast.config_file import read_config
from star_fast.data.codes import CodeStore
from star_fast.data.prepare import collect_views, import_llamagen_codes, prepare, skipped_report
from star_fast.data.sources import ImageFolder
from star_fast.errors import UserError, printable
from star_fast.evaluation import plots, report_comparison
from star_fast.evaluation.classifier import Classifier
from star_fast.evaluation.runs import open_run, read_metrics
from star_fast.generation.sample import sample_images
from star_fast.locks import only_writer
from star_fast.model.llamagen import load_tokenizer
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.transformer import Transformer
from star_fast.model.weights import load_into, load_model
from star_fast.records import from_dict
from star_fast.storage import sha256_of_bytes, sha256_of_file
from star_fast.training import checkpoint
from star_fast.training.batches import Batches
from star_fast.training.engine import Engine, build_student
from star_fast.training.ranks import start_ranks
from star_fast.training.telemetry import Telemetry
from star_fast.training.tokenizer import tokenizer_for
from star_fast.training.watch import LossWatch

Damage = Callable[[Random, bytes, bytes], tuple[str, bytes]]
Make = Callable[[Random, Path], Case]
Read = Callable[[Path, Case], object]
_IRREGULAR_SHARE, _EMPTY_SHARE = 0.04, 0.01
_REPAIRED_SHARE = 0.7
_CHECKPOINT = "run/checkpoints/step-0000003"
_REAL_PLOT_SHARE = 50  # of so many reports one is drawn whole


def all_subjects() -> list[Subject]:
    """Every kind of file, then every command."""
    return [*_of_runs(), *_of_models(), *_of_stores(), *_of_samples(), *_of_released(), *_of_images(), *_of_checkpoints(), *command_lines.subjects()]


def _of_runs() -> list[Subject]:
    return [
        _file("config.yaml", "read_config", "run/config.yaml", text_damage.damaged_yaml, lambda place, case: read_config("run/config.yaml"), 6),
        _file("metrics.jsonl, report", "read_metrics and its plots", "run/metrics.jsonl", text_damage.damaged_lines, _metrics, 5),
        _file("metrics.jsonl, resume", "Telemetry", "run/metrics.jsonl", text_damage.damaged_lines, _telemetry, 4),
        _file("report.json, --against", "read_other and comparison", "run/report.json", text_damage.damaged_json, _against, 4),
        _file("classifier.json", "Classifier.load", "run/classifier/classifier.json", text_damage.damaged_json, _classifier, 2, repair=_repair_classifier, repairs=("classifier.json",)),
        _file("classifier.safetensors", "Classifier.load", "run/classifier/classifier.safetensors", formats.damaged_safetensors, _classifier, 2, repair=_repair_classifier, repairs=("classifier.json",)),
        _file("lock file", "only_writer", "run/.lock", text_damage.damaged_json, _lock, 1, content=b'{"job": "training", "holder": "process 1 on x", "pid": 1, "since": "2026-01-01"}'),
    ]


def _of_models() -> list[Subject]:
    files = [("config.json", text_damage.damaged_json), ("model.safetensors", formats.damaged_safetensors), ("teacher.safetensors", formats.damaged_safetensors)]
    return [
        *(_file(f"model/{name}", "load_model, open_run", f"run/model/{name}", damage, _model, 2 if name[0] != "t" else 1, repair=_repair_model, repairs=("config.json",)) for name, damage in files),
        _file("model/tokenizer/tokenizer.json", "load_tokenizer", "run/model/tokenizer/tokenizer.json", text_damage.damaged_json, lambda place, case: load_tokenizer("run/model/tokenizer"), 2, repair=_repair_tokenizer, repairs=("tokenizer.json",)),
        _file("model/tokenizer/tokenizer.safetensors", "load_tokenizer", "run/model/tokenizer/tokenizer.safetensors", formats.damaged_safetensors, lambda place, case: load_tokenizer("run/model/tokenizer"), 2, repair=_repair_tokenizer, repairs=("tokenizer.json",)),
        _file("model/, --init", "load_into", "run/model/model.safetensors", formats.damaged_safetensors, lambda place, case: load_into(_transformer(), "run/model"), 1, repair=_repair_model, repairs=("config.json",)),
    ]


def _of_stores() -> list[Subject]:
    files = [("manifest.json", text_damage.damaged_json, 5), ("keys.jsonl", text_damage.damaged_lines, 2), ("labels.bin", bytes_damage.damaged, 1.5), ("codes.bin", bytes_damage.damaged, 1)]
    unfinished = [("progress.json", text_damage.damaged_json, 1), ("keys.jsonl", text_damage.damaged_lines, 0.3), ("labels.bin", bytes_damage.damaged, 0.3), ("codes.bin", bytes_damage.damaged, 0.3)]
    return [
        *(_file(f"store/{name}", "CodeStore.open, keys, codes, verify", f"store/{name}", damage, _store, share, repair=_repair_store, repairs=("manifest.json",)) for name, damage, share in files),
        *(_file(f"unfinished store/{name}", "prepare, going on", f"unfinished/{name}", damage, _go_on, share, clean=("unfinished",), repair=_repair_progress, repairs=("progress.json",)) for name, damage, share in unfinished),
        _file("unfinished tokenizer/unfinished.json", "tokenizer_for, going on", "halfway/tokenizer/unfinished.json", text_damage.damaged_json, _tokenizer_for, 0.5, clean=("halfway",), repair=_repair_state,
              repairs=("unfinished.json",)),
        _file("unfinished tokenizer/unfinished.safetensors", "tokenizer_for, going on", "halfway/tokenizer/unfinished-0000002.safetensors", formats.damaged_safetensors, _tokenizer_for, 0.5, clean=("halfway",), repair=_repair_state,
              repairs=("unfinished.json",)),
        _file("trained tokenizer/training.json", "tokenizer_for", "trained/tokenizer/training.json", text_damage.damaged_json, _tokenizer_for, 0.7, clean=("trained",)),
        Subject("image folder, names", "ImageFolder and prepare", _odd_names, _names, 0.7, clean=("pictures",)),
    ]


def _of_samples() -> list[Subject]:
    parts = "sampling/part.npz.parts"
    files = [("samples/done.npz", formats.damaged_npz, 0.4), ("samples/done.json", text_damage.damaged_json, 0.4), (f"{parts}/plan.json", text_damage.damaged_json, 0.4), (f"{parts}/batch-0000003.npy", formats.damaged_npy, 0.3),
             (f"{parts}/unfinished.npz", bytes_damage.damaged, 0.3), (f"{parts}/unfinished.journal", bytes_damage.damaged, 0.3)]
    return [_file(name.replace(parts, "interrupted"), "sample_images", name, damage, _sample, share, clean=(name.split("/")[0],), repair=_repair_samples, repairs=("done.json",) if "done" in name else (name.rsplit("/")[-1],) if "batch" in name else ()) for name, damage, share in files]


def _of_released() -> list[Subject]:
    numbers = [("imagenet8_codes/1.npy", 1), ("imagenet8_codes/0.npy", 0.6), ("imagenet8_labels/2.npy", 0.6)]
    return [
        _file("LlamaGen transformer .pt", "load_model", "released/model.pt", formats.damaged_torch, lambda place, case: load_model("released/model.pt"), 6),
        _file("LlamaGen transformer .safetensors", "load_model", "released/model.safetensors", formats.damaged_safetensors, lambda place, case: load_model("released/model.safetensors"), 3),
        _file("LlamaGen transformer, --init", "load_into", "released/model.pt", formats.damaged_torch, lambda place, case: load_into(_transformer(), "released/model.pt"), 3),
        _file("LlamaGen tokenizer .pt", "load_tokenizer", "released/tokenizer.pt", formats.damaged_torch, lambda place, case: load_tokenizer("released/tokenizer.pt"), 4),
        _file("LlamaGen tokenizer .safetensors", "load_tokenizer", "released/tokenizer.safetensors", formats.damaged_safetensors, lambda place, case: load_tokenizer("released/tokenizer.safetensors"), 2),
        *(_file(f"LlamaGen codes, {name.split('_')[1]}", "import_llamagen_codes", f"llamagen/{name}", formats.damaged_npy, _import, share, clean=("llamagen",)) for name, share in numbers),
    ]


def _of_images() -> list[Subject]:
    pictures = images.good_images()
    return [Subject(f"image: {form}", "ImageFolder and collect_views", _image_maker({name: data for name, data in pictures.items() if name.endswith(suffix)}, list(pictures.values())), _picture, 3, clean=("pictures",))
            for form, suffix in images.FORMATS.items()]


def _of_checkpoints() -> list[Subject]:
    files = [("complete.json", text_damage.damaged_json, 2), ("teacher-00000.safetensors", formats.damaged_safetensors, 0.5), ("deepspeed/mp_rank_00_model_states.pt", formats.damaged_state, 1.5),
             ("deepspeed/zero_pp_rank_0_mp_rank_00_optim_states.pt", formats.damaged_state, 1.5)]
    return [_file(f"checkpoint/{name}", "checkpoint.latest and load (--resume)", f"{_CHECKPOINT}/{name}", damage, _resume, share, start=_engine, repair=_repair_checkpoint,
                  repairs=("../complete.json" if "/" in name else "complete.json",)) for name, damage, share in files]


# ---- how inputs are made ----

def _file(name: str, about: str, file: str, damage: Damage, read: Read, share: float, *, clean: tuple[str, ...] = (), repair: Callable[[Path], None] | None = None, repairs: tuple[str, ...] = (), content: bytes | None = None,
          start: Callable[[], object] | None = None) -> Subject:
    repairs = tuple(f"{file.rsplit('/', 1)[0]}/{name}" for name in repairs)

    def make(random: Random, good: Path) -> Case:
        return damaged_file(random, file, content if content is not None else _bytes_of(good / file), _bytes_of(good / "store/manifest.json"), damage, repairs)

    return Subject(name, about, make, read, share, clean=clean, repair=repair, start=start)


@functools.cache
def _bytes_of(path: Path) -> bytes:
    return path.read_bytes()


def damaged_file(random: Random, file: str, data: bytes, other: bytes, damage: Damage, repairs: tuple[str, ...] = ()) -> Case:
    """The file irregular, empty, or damaged by what knows its format, by what does not, or by both."""
    kind = random.random()
    if kind < _IRREGULAR_SHARE:
        way = random.choice(list(IRREGULAR))
        return Case(way, file, irregular=way)
    if kind < _IRREGULAR_SHARE + _EMPTY_SHARE:
        return Case("empty", file, b"")
    changes, knowing = [], random.random() < 0.6
    if knowing:
        change, data = damage(random, data, other)
        changes.append(change)
    for _ in range(random.choice((1, 1, 2, 3)) if not knowing else random.choice((0, 0, 0, 0, 1))):
        change, data = bytes_damage.damaged(random, data, other)
        changes.append(change)
    return Case("; ".join(changes), file, data, repairs=repairs if random.random() < _REPAIRED_SHARE else ())


def _image_maker(pictures: dict[str, bytes], others: list[bytes]) -> Make:
    def make(random: Random, good: Path) -> Case:
        name = random.choice(list(pictures))
        case = damaged_file(random, f"pictures/a/{name}", pictures[name], random.choice(others), images.damaged_image)
        if case.content and case.content.startswith(b"\x89PNG\r\n\x1a\n") and random.random() < 0.5:
            return Case(case.change + "; checksums made right", case.file, images.with_png_checksums(case.content))
        return case
    return make


_ODD_NAMES = ("a", "bär", "猫", "\udcff\udc80", "a\nb", "a\r\nb", "\x1b[31mred", "\x1b]0;t\x07", "\u202eabc", "\x7f", "\u2028", "-x", "--help", " ", ".hidden", "..a", "'", '"', "<b>&amp;", "%s", "{x}", "$HOME", "`id`", "~", "*", "x" * 240, "é" * 120, "a\tb", "null", "0", "classes",
              "\ufeff", "a\udc80", "\u0301", "CON", "a.png", "digits")


def _odd_names(random: Random, good: Path) -> Case:
    folders = "/".join(random.choice(_ODD_NAMES) for _ in range(random.choice((1, 1, 1, 2, 3))))
    name = random.choice(_ODD_NAMES) + random.choice((".png", ".png", ".png", ".PNG", ".jpg", ".txt", ""))
    place = random.choice((f"{folders}/{name}", f"{folders}/{name}", f"{folders}/{name}", name))
    content = _bytes_of(good / "images/7/0.png") if random.random() < 0.7 else b"\x89PNG\x1b[31m\nno"
    return Case(f"named {place!r}", f"pictures/{place}", content)


# ---- how they are read ----

@functools.cache
def _tokenizer() -> VQTokenizer:
    return VQTokenizer.load("store/tokenizer")


@functools.cache
def _transformer() -> Transformer:
    return load_model("released/model.pt").transformer


def _metrics(place: Path, case: Case) -> None:
    training, validation = read_metrics(Path("run"))
    if zlib.crc32(case.content or b"") % _REAL_PLOT_SHARE == 0:
        plots.loss_panels(training[:50], validation[:50], dark=False)


def _telemetry(place: Path, case: Case) -> None:
    telemetry = Telemetry(Path("run"), 2, 3, 4, log_every=1, main=True, tensorboard=False, watch=LossWatch(0.0))
    telemetry.validation(2, 1.0)
    telemetry.close()


def _against(place: Path, case: Case) -> None:
    other = report_comparison.read_other(Path("run"))
    figures = json.loads(_bytes_of(place / ".good/run/report.json"))
    ours = from_dict(report_comparison.Figures, figures, ignore_unknown=True)
    print(report_comparison.differences(ours, other))
    if zlib.crc32(case.content or b"") % _REAL_PLOT_SHARE == 0:
        report_comparison.comparison(figures, other)


@functools.cache
def _engine() -> tuple[Engine, CodeStore]:
    """What --resume puts a checkpoint into; starting DeepSpeed takes seconds."""
    store, config = CodeStore.open("store"), read_config("run/config.yaml")
    rank, ranks, device = start_ranks()
    batches = Batches(store, config, rank, ranks)
    return Engine(config, build_student(config), device, batches.micro_images, batches.accumulation), store


def _resume(place: Path, case: Case) -> None:
    newest = checkpoint.latest(Path("run"))
    if newest is None:
        raise UserError("nothing to resume")
    checkpoint.changed_settings(checkpoint.load(*_engine(), newest), _engine()[0].config)


def _classifier(place: Path, case: Case) -> None:
    Classifier.load(Path("run/classifier")).judge(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def _lock(place: Path, case: Case) -> None:
    with only_writer("run", "training"):
        pass


def _model(place: Path, case: Case) -> None:
    weights = "teacher" if "teacher" in case.file else "student"
    if zlib.crc32(case.content or b"") % 4 == 0:
        print(open_run("run", weights=weights).record.step)
    else:
        load_model("run", weights=weights)


def _store(place: Path, case: Case) -> None:
    store = CodeStore.open("store")
    print(printable(skipped_report(store)).replace("\\n", "\n"), printable(store.class_names), printable(store.keys()[:3]))
    store.codes(torch.arange(min(2, len(store))), [0])
    store.verify()


def _go_on(place: Path, case: Case) -> None:
    source = ImageFolder("images")
    store = prepare(source, "unfinished", _tokenizer(), goods.DATA, chunk_images=4, progress=False)
    store.verify()


def _tokenizer_for(place: Path, case: Case) -> None:
    tokenizer_for(ImageFolder("images"), case.file.split("/")[0], goods.TRAINED, goods.DATA, progress=False)


def _picture(place: Path, case: Case) -> None:
    data = goods.DATA if zlib.crc32(case.content or b"") % 2 else _TEN_CROP
    source = ImageFolder("pictures")
    collect_views(source, [0], data, goods.TOKENIZER, progress=False)


def _names(place: Path, case: Case) -> None:
    source = ImageFolder("pictures")
    store = prepare(source, "pictures/.store", _tokenizer(), goods.DATA, progress=False)
    print(skipped_report(store))
    again = CodeStore.open("pictures/.store")
    again.verify()
    if [f"pictures/{key}" for key in again.keys()] != [case.file]:
        raise AssertionError(f"keys {again.keys()!r} for {case.file!r}")


def _sample(place: Path, case: Case) -> None:
    sample_images(goods.SAMPLES if case.file.startswith("samples") else goods.PART)


def _import(place: Path, case: Case) -> None:
    import_llamagen_codes("llamagen", "llamagen/store", goods.HASH, codebook=16, image_size=8, progress=False)


# ---- how checksums are made to fit ----

def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    about = json.loads(path.read_bytes())
    change(about)
    path.write_text(json.dumps(about))


def _repair_classifier(folder: Path) -> None:
    _edit(folder / "classifier.json", lambda about: about.update(weights_sha256=sha256_of_file(folder / "classifier.safetensors")))


def _repair_model(folder: Path) -> None:
    hashes = {weights: sha256_of_file(folder / f"{name}.safetensors") for weights, name in (("student", "model"), ("teacher", "teacher"))}
    _edit(folder / "config.json", lambda about: about.update(weights_sha256=hashes))


def _repair_tokenizer(folder: Path) -> None:
    about = json.loads((folder / "tokenizer.json").read_bytes())
    tokenizer = VQTokenizer(from_dict(TokenizerConfig, {**about["config"], "base_channels": 4, "z_channels": 4}))  # never a huge one
    tokenizer.load_state_dict(parse_safetensors((folder / "tokenizer.safetensors").read_bytes()))
    _edit(folder / "tokenizer.json", lambda about: about.update(weights_sha256=tokenizer.weights_hash()))


def _repair_state(folder: Path) -> None:
    _edit(folder / "unfinished.json", lambda about: about.update(sha256=sha256_of_file(folder / f"unfinished-{about['step']:07d}.safetensors")))


def _repair_store(folder: Path) -> None:
    _edit(folder / "manifest.json", lambda about: about["files"].update(
        {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of_file(folder / name)} for name in ("codes.bin", "labels.bin", "keys.jsonl")}))


def _repair_checkpoint(folder: Path) -> None:
    root = folder if (folder / "complete.json").exists() else folder.parent
    _edit(root / "complete.json", lambda about: about["files"].update({name: {"bytes": (root / name).stat().st_size, "sha256": sha256_of_file(root / name)} for name in about["files"]}))


def _repair_progress(folder: Path) -> None:
    def change(about: dict[str, Any]) -> None:
        for name in ("codes.bin", "labels.bin", "keys.jsonl"):
            data = (folder / name).read_bytes()
            about["bytes"][name] = min(about["bytes"][name], len(data))
            about["sha256"][name] = sha256_of_bytes(data[: about["bytes"][name]])
    _edit(folder / "progress.json", change)


def _repair_samples(folder: Path) -> None:
    for part in folder.glob("batch-*.npy"):
        data = part.read_bytes()[:-4]
        part.write_bytes(data + struct.pack("<I", zlib.crc32(data)))
    for record in folder.glob("done.json"):
        data = (folder / "done.npz").read_bytes()
        start, end = data.index(b"\x93NUMPY"), data.index(b"PK\3\4", 4)
        _edit(record, lambda about: about["run"].update(images_crc32=f"{zlib.crc32(data[start:end]):08x}", frame_crc32=f"{zlib.crc32(data[end:], zlib.crc32(data[:start])):08x}"))


_TEN_CROP = goods.DATA.__class__(views="ten-crop")


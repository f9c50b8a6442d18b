"""How the command line reads each kind of file. The first line of a docstring goes into the record: which code it is.

Readers run in a folder with the good files, one of which is the input.
"""

from __future__ import annotations

import functools
import json
import shutil
import zlib
from pathlib import Path

import torch

from scripts.fuzzing import goods
from scripts.fuzzing.trial import Case
from star_fast.config import DataConfig
from star_fast.config_file import read_config
from star_fast.data.class_names import renamed_classes
from star_fast.data.codes import CodeStore
from star_fast.data.llamagen_codes import import_llamagen_codes
from star_fast.data.origin import images_of
from star_fast.data.prepare import collect_views, prepare, skipped_report
from star_fast.data.sources import ImageFolder, ImageSource, open_source
from star_fast.errors import UserError, printable
from star_fast.evaluation import plots, report_comparison
from star_fast.evaluation.classifier import Classifier
from star_fast.evaluation.runs import open_run, read_metrics
from star_fast.generation.sample import sample_images
from star_fast.locks import only_writer
from star_fast.model.class_names import read_class_names
from star_fast.model.llamagen import load_tokenizer
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.transformer import Transformer
from star_fast.model.weights import load_into, load_model
from star_fast.records import from_dict
from star_fast.storage import remove_leftovers
from star_fast.training import checkpoint
from star_fast.training.batches import Batches
from star_fast.training.conversion import ConvertCommand, convert
from star_fast.training.engine import Engine, build_student
from star_fast.training.ranks import start_ranks
from star_fast.training.telemetry import Telemetry
from star_fast.training.tokenizer import tokenizer_for
from star_fast.training.watch import LossWatch

_TEN_CROP = DataConfig(views="ten-crop")


def config(place: Path, case: Case) -> None:
    """read_config"""
    read_config(case.file)


def metrics(place: Path, case: Case) -> None:
    """read_metrics and its plots"""
    training, validation = read_metrics(Path("run"))
    if _one_in(150, case):
        plots.loss_panels(training[:50], validation[:50], dark=False)


def telemetry(place: Path, case: Case) -> None:
    """Telemetry (--resume)"""
    resumed = Telemetry(Path("run"), 2, 3, 4, log_every=1, main=True, tensorboard=False, watch=LossWatch(0.0))
    resumed.validation(2, 1.0)
    resumed.close()


def against(place: Path, case: Case) -> None:
    """read_other and comparison (--against)"""
    other = report_comparison.read_other(Path("run"))
    figures = json.loads((place / ".good/run/report.json").read_bytes())
    print(report_comparison.differences(from_dict(report_comparison.Figures, figures, ignore_unknown=True), other))
    if _one_in(150, case):
        report_comparison.comparison(figures, other)


def classifier(place: Path, case: Case) -> None:
    """Classifier.load"""
    Classifier.load(Path("run/classifier")).judge(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def lock(place: Path, case: Case) -> None:
    """only_writer"""
    with only_writer("run", "training"):
        pass


def model(place: Path, case: Case) -> None:
    """load_model, open_run"""
    weights = "teacher" if "teacher" in case.file else "student"
    if _one_in(4, case):
        print(open_run("run", weights=weights).record.step)
    else:
        load_model("run", weights=weights)


def released_model(place: Path, case: Case) -> None:
    """load_model"""
    load_model(case.file)


def start_weights(place: Path, case: Case) -> None:
    """load_into (--init)"""
    load_into(_transformer(), "run/model" if case.file.startswith("run") else case.file)


def tokenizer(place: Path, case: Case) -> None:
    """load_tokenizer"""
    load_tokenizer(case.file if case.file.startswith("released") else "run/model/tokenizer")


def store(place: Path, case: Case) -> None:
    """CodeStore.open, keys, codes, verify"""
    opened = CodeStore.open("store")
    print(skipped_report(opened), printable(opened.class_names), printable(opened.keys()[:3]))
    opened.codes(torch.arange(min(2, len(opened))), [0])
    opened.verify()


def origin(place: Path, case: Case) -> None:
    """images_of"""
    images_of(CodeStore.open("store"))


def unfinished_store(place: Path, case: Case) -> None:
    """prepare, going on"""
    prepare(ImageFolder("images"), "unfinished", _tokenizer(), goods.DATA, chunk_images=4, progress=False).verify()


def kept_tokenizer(place: Path, case: Case) -> None:
    """tokenizer_for (prepare)"""
    tokenizer_for(ImageFolder("images"), case.file.split("/")[0], goods.TRAINED, goods.DATA, progress=False)


def picture(place: Path, case: Case) -> None:
    """ImageFolder, collect_views"""
    collect_views(
        ImageFolder("pictures"), [0], goods.DATA if _one_in(2, case) else _TEN_CROP, goods.TOKENIZER, progress=False
    )


def names(place: Path, case: Case) -> None:
    """ImageFolder, prepare, CodeStore"""
    print(skipped_report(prepare(ImageFolder("pictures"), "pictures/.store", _tokenizer(), goods.DATA, progress=False)))
    again = CodeStore.open("pictures/.store")
    again.verify()
    keys = again.keys()
    if [f"pictures/{key}" for key in keys] != [case.file]:
        raise AssertionError(f"keys {keys!r} for {case.file!r}")


def samples(place: Path, case: Case) -> None:
    """sample_images"""
    sample_images(goods.SAMPLES if case.file.startswith("samples") else goods.PART)


def llamagen_codes(place: Path, case: Case) -> None:
    """import_llamagen_codes"""
    import_llamagen_codes("llamagen", "llamagen/store", goods.HASH, codebook=16, image_size=8, progress=False)


def llamagen_siblings(place: Path, case: Case) -> None:
    """import_llamagen_codes with a second crop range"""
    import_llamagen_codes(
        "llamagen", "llamagen/store", goods.HASH, sibling="llamagen_105", codebook=16, image_size=8, progress=False
    )


def labelled_folder(place: Path, case: Case) -> None:
    """LabelledFolder"""
    _look_at(open_source("listed", labels=case.file))


def tar_shards(place: Path, case: Case) -> None:
    """TarShards and its images"""
    _look_at(open_source("shards", progress=False))


def class_names(place: Path, case: Case) -> None:
    """read_class_names, renamed_classes"""
    print(printable(read_class_names(case.file)[:20]), printable(renamed_classes(goods.CLASSES, case.file)))


def resume(place: Path, case: Case) -> None:
    """checkpoint.latest and load (--resume)"""
    newest = checkpoint.latest(Path("run"))
    if newest is None:
        raise UserError("nothing to resume")
    resumed, codes = engine()
    checkpoint.changed_settings(checkpoint.load(resumed, codes, newest), resumed.config)


def put_together(place: Path, case: Case) -> None:
    """conversion.convert (star-fast convert)"""
    shutil.rmtree("converted", ignore_errors=True)
    convert(ConvertCommand("run", "converted"))


def run_folder(place: Path, case: Case) -> None:
    """clear_leftovers, checkpoint.load, open_run"""
    with only_writer("run", "training"):
        remove_leftovers("run")
        checkpoint.clear_leftovers(Path("run"))
        resume(place, case)
        open_run("run")


@functools.cache
def engine() -> tuple[Engine, CodeStore]:
    """What --resume puts a checkpoint into; starting DeepSpeed takes seconds."""
    opened, settings = CodeStore.open("store"), read_config("run/config.yaml")
    rank, ranks, device = start_ranks()
    batches = Batches(opened, settings, rank, ranks)
    return Engine(settings, build_student(settings), device, batches.micro_images, batches.accumulation), opened


def _look_at(source: ImageSource) -> None:
    print(printable((source.class_names[:20], list(source.files)[:20], source.skipped[:20], source.description())))
    collect_views(source, range(len(source))[:20], goods.DATA, goods.TOKENIZER, progress=False)


@functools.cache
def _tokenizer() -> VQTokenizer:
    return VQTokenizer.load("store/tokenizer")


@functools.cache
def _transformer() -> Transformer:
    return load_model("released/model.pt").transformer


def _one_in(count: int, case: Case) -> bool:
    """What takes longer is done for some inputs only, always the same."""
    return zlib.crc32(case.content or b"") % count == 0

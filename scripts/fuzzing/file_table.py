"""The files that are damaged: each kind that the command line reads, its reader, and how often it is taken. Good files:
goods.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

from scripts.fuzzing import bytes_damage, checksums, evaluation_readers, readers, small_network
from scripts.fuzzing.checksums import Fit
from scripts.fuzzing.trial import Case

Damage = Callable[[Random, bytes, bytes], tuple[str, bytes]]


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


CHECKPOINT, _PARTS = "run/checkpoints/step-0000003", "sampling/part.npz.parts"
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
        f"{CHECKPOINT}/complete.json",
        readers.resume,
        2,
        fit=checksums.CHECKPOINT,
        start=readers.engine,
    ),
    Row(
        "checkpoint/teacher.safetensors",
        f"{CHECKPOINT}/teacher-00000.safetensors",
        readers.resume,
        0.5,
        fit=checksums.CHECKPOINT,
        start=readers.engine,
    ),
    Row(
        "checkpoint/optimizer.safetensors",
        f"{CHECKPOINT}/optimizer-00000.safetensors",
        readers.resume,
        2,
        fit=checksums.CHECKPOINT,
        start=readers.engine,
    ),
    Row(
        "checkpoint/optimizer.safetensors, convert",
        f"{CHECKPOINT}/optimizer-00000.safetensors",
        readers.put_together,
        1,
        fit=checksums.CHECKPOINT,
    ),
    Row(
        "checkpoint/complete.json, convert",
        f"{CHECKPOINT}/complete.json",
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

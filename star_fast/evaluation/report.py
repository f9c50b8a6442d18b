"""`star-fast report --run FOLDER`: everything there is to see of a run in one HTML file, and the same figures as JSON
beside it.

This file measures; report_sections.py writes the page's sections from what was measured.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from star_fast.errors import UserError, printable
from star_fast.evaluation import attention_maps, page, report_protocol, report_sections
from star_fast.evaluation.both_weights import attention_of, held_out_loss, judge_drawn, other_weights
from star_fast.evaluation.classifier import RECORD_FILE, WEIGHTS_FILE, Classifier, ClassifierConfig, train_classifier
from star_fast.evaluation.limits import MOST_COUNT, MOST_SEED, explain_out_of_memory, option, require_ranges
from star_fast.evaluation.memorisation import MOST_TRAINING_IMAGES, SHOWN_NEIGHBOURS, memorisation, nearest
from star_fast.evaluation.probe import ProbeConfig, probe
from star_fast.evaluation.real_images import RealImages, open_real_images, why_unknown
from star_fast.evaluation.report_comparison import FORMAT_VERSION, Figures, read_other
from star_fast.evaluation.runs import Run, codes_of, only_report, open_run, read_metrics, spread
from star_fast.evaluation.samples import (
    Reconstruction,
    SampleSet,
    class_agreement,
    distances,
    distinct_sequences,
    draw_samples,
    psnr_db,
    reconstruct_held_out,
)
from star_fast.generation.device import take_device
from star_fast.generation.label_plan import find_classes
from star_fast.generation.sampling import Sampling
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.transformer import Transformer
from star_fast.records import require, to_dict
from star_fast.storage import atomic_write_bytes, atomic_write_json, remove_leftovers, sha256_of_bytes

MOST_CLASSES = 20  # shown if none are named; of more classes ten, evenly spaced
MOST_HELD_OUT = 2000  # held-out images that classifier and tokenizer are judged on
MOST_SAMPLE_BYTES = 2**33  # of the samples' pixels, which are held in memory
MOST_COMPARED_BYTES = 2**29  # of the training images that samples are compared with

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReportConfig:
    """Write report.html and report.json into a run's folder; a small classifier is trained there once."""

    run: Path  # the run folder
    weights: Literal["student", "teacher"] = "student"  # which weights of the model
    codes: str = ""  # the code store; empty: the one that the run was trained on
    source: str = ""  # the real images, as given to `star-fast prepare`; empty: from where they were then
    against: str = ""  # another run folder with a report of its own, to compare with
    classes: tuple[str, ...] = ()  # names of the classes sampled; empty: all up to 20, else ten
    samples_per_class: int = 20  # images drawn of each class
    guidance: float = 2.0  # classifier-free guidance of the samples; 1: off
    temperature: float = 1.0  # of the samples; 0: the likeliest token
    top_k: int = 0  # tokens kept; 0: all
    top_p: float = 1.0  # share of the probability kept; 1: all
    seed: int = 0  # of samples and probe
    batch_images: int = 64  # images drawn or decoded at once
    attention_images: int = 3  # held-out images with attention maps
    attention_queries: int = 4  # query positions of each
    # Views of each training image that the probe learns from; with more, every epoch draws one of them per image
    probe_train_views: int = 1
    probe_max_train_images: int = 0  # training images that the probe learns from, evenly spaced; 0: all
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    device: str = ""  # "cpu", "cuda"; empty: a GPU where there is one

    def __post_init__(self) -> None:
        require_ranges(
            self,
            {
                "samples_per_class": (1, 10_000),
                "batch_images": (1, 2**16),
                "attention_images": (1, 100),
                "attention_queries": (1, 256),
                "probe_train_views": (1, 2**16),
                "probe_max_train_images": (0, MOST_COUNT),
                "seed": (0, MOST_SEED),
            },
        )
        try:
            Sampling(
                guidance=self.guidance, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed
            )
        except ValueError as error:
            name, _, rest = str(error).removeprefix("generate: ").partition(" ")
            raise UserError(f"{option(name)} {rest}") from error


@dataclass
class Material:
    """What a report is written from: figures for page and JSON, and the images that only the page shows."""

    run: Run
    config: ReportConfig
    training: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    device: torch.device
    classes: list[int]
    rows: Tensor  # held-out rows of the store that real images and reconstructions come from
    tokenizer: VQTokenizer
    source: RealImages | None  # None where it is not known
    real: Tensor | None = None  # (N, C, H, W) uint8 of `rows`; None where the source of the images is not known
    samples: SampleSet = field(init=False, repr=False)  # these two are measured first
    reconstruction: Reconstruction = field(init=False, repr=False)
    attention: list[report_sections.AttentionExample] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    against: Figures | None = None  # of the other run's report
    classifier: Classifier | None = None
    real_features: Tensor | None = None  # (n, F) the classifier's, of the held-out real images of the sampled classes
    # Of each class: its first sample and the nearest training images, (1 + n, C, H, W) uint8
    neighbours: list[Tensor] = field(default_factory=list)

    @property
    def row_labels(self) -> Tensor:
        """(N,) int64 classes of `rows`."""
        return self.run.store.labels[self.rows]


def write_report(config: ReportConfig) -> Path:
    """Measure the run and write report.html and report.json; returns the HTML file.

    Raises:
        UserError: the run lacks its metrics, weights, tokenizer or held-out images, or the run to compare with has no
            report.
    """
    begun = time.perf_counter()
    device = take_device(config.device)
    other = read_other(Path(config.against)) if config.against else None
    run = open_run(config.run, codes=config.codes, weights=config.weights)
    with (
        only_report(run.folder, "writing a report", ("report.json", "report.html")),
        explain_out_of_memory(
            "draw fewer images at once (--batch-images) or altogether (--samples-per-class, --classes)"
        ),
    ):
        return _write(_gather(config, run, device, other), begun)


def _gather(config: ReportConfig, run: Run, device: torch.device, other: Figures | None) -> Material:
    """Everything that can be missing, before anything is computed."""
    training, validation = read_metrics(run.folder)
    store = run.store
    if run.model.tokenizer_folder is None:
        raise UserError(
            f"{run.folder}/model: holds no tokenizer, samples cannot become images; train again from a code store "
            "with its tokenizer"
        )
    judging = store.judging()
    if store.positions < 4:
        raise UserError(
            f"{store.path}: expected images of at least 4 codes, got {store.positions}; there is no attention to "
            "show between fewer"
        )
    classes = (
        find_classes(config.classes, store.class_names) if config.classes else _default_classes(len(store.class_names))
    )
    tokenizer = VQTokenizer.load(run.model.tokenizer_folder)
    store.require_tokenizer(tokenizer.weights_hash())
    made = tokenizer.config
    ours, theirs = (made.image_size, made.positions, made.codebook), (store.image_size, store.positions, store.codebook)
    if ours != theirs:
        raise UserError(
            f"{run.model.tokenizer_folder}: makes images of (pixels a side, codes, codebook) {ours}, {store.path} "
            f"has {theirs}; "
            "files of two runs are mixed"
        )
    images = len(classes) * config.samples_per_class
    source = open_real_images(store, config.source)
    require(
        images >= 2 or source is None,
        option("samples_per_class"),
        config.samples_per_class,
        "at least 2 images of a single class: a Fréchet distance needs two",
    )
    most = MOST_SAMPLE_BYTES // (made.image_channels * made.image_size**2)
    require(
        images <= most,
        option("samples_per_class"),
        config.samples_per_class,
        f"at most {max(most // len(classes), 1):,} images of {made.image_size} x {made.image_size} pixels of each "
        f"of {len(classes)} classes",
    )
    return Material(
        run,
        config,
        training,
        validation,
        device,
        classes,
        spread(judging.judge, MOST_HELD_OUT),
        tokenizer,
        source,
        against=other,
    )


def _write(material: Material, begun: float) -> Path:
    """Measure, then write both files."""
    run = material.run
    stages: dict[str, Callable[[Material], Any]] = {
        "samples": _sample,
        "tokenizer": _reconstruct,
        "classifier": _classify,
        "linear probe": _probe,
        "attention": _attend,
        "student and teacher": _weigh,
    }
    parts_s = {}
    with tqdm(stages.items(), desc="report", unit="part") as bar:
        for name, stage in bar:
            bar.set_postfix_str(name)
            since = time.perf_counter()
            stage(material)
            parts_s[name] = round(time.perf_counter() - since, 1)
    figures = {
        "format_version": FORMAT_VERSION,
        "run": run.name,
        "trained": _trained(material),
        **material.figures,
        "protocol": report_protocol.protocol(material),
        "report": {
            "device": _device_name(material.device),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "seconds": round(time.perf_counter() - begun, 1),
            "parts_s": parts_s,
            "date": time.strftime("%Y-%m-%d"),
        },
    }
    material.figures = figures
    sections = report_sections.all_sections(material)
    html = page.render(
        f"star_fast report: {run.name}",
        report_sections.lead(material),
        report_sections.tiles(figures),
        sections,
        report_sections.footer(figures),
    )
    losses = {"training": material.training, "validation": material.validation}
    atomic_write_json(run.folder / "report.json", _finite({**figures, "losses": losses}))
    atomic_write_bytes(run.folder / "report.html", page.to_bytes(html))
    return run.folder / "report.html"


def _sample(material: Material) -> None:
    config, model = material.config, material.run.model.transformer.to(material.device).eval()
    sampling = {
        "guidance": config.guidance,
        "temperature": config.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "seed": config.seed,
    }
    material.samples = draw_samples(
        model,
        material.tokenizer.to(material.device),
        material.classes,
        config.samples_per_class,
        batch_images=config.batch_images,
        **sampling,
    )
    names = material.run.store.class_names
    distinct = distinct_sequences(material.samples)
    material.figures["samples"] = {
        "settings": sampling,
        "per_class": config.samples_per_class,
        "classes": {
            key: {"distinct_code_sequences": distinct[label]} for label, key in _keys(material.classes, names).items()
        },
    }


def _reconstruct(material: Material) -> None:
    material.reconstruction = reconstruct_held_out(material.run.store, material.tokenizer, material.rows)
    figures: dict[str, Any] = {
        "held_out_images": len(material.rows),
        "codes_used": material.reconstruction.codes_used,
        "codebook": material.reconstruction.codebook,
    }
    if material.source is not None:
        material.real = material.source.read(material.rows, "held-out images")
        figures["psnr_db"] = psnr_db(material.real, material.reconstruction.images)
    material.figures["tokenizer"] = figures


def _classify(material: Material) -> None:
    sampled = torch.isin(material.row_labels, torch.tensor(material.classes))
    reason = None
    if material.source is None:
        reason = why_unknown(material.run.store)
    elif sampled.sum() < 2:
        reason = (
            "fewer than two held-out images of the sampled classes. Prepare the codes with a larger "
            "--data.held-out-share."
        )
    if reason is not None:
        material.figures |= {"classifier": None, "classifier_not_computed": reason}
        return
    assert material.source is not None and material.real is not None
    material.classifier = classifier = _classifier(material, material.source)
    samples, real, rebuilt = (
        classifier.judge(images) for images in (material.samples.images, material.real, material.reconstruction.images)
    )
    agreement = class_agreement(samples, material.samples.labels)
    for label, key in _keys(material.classes, material.run.store.class_names).items():
        material.figures["samples"]["classes"][key]["agreement"] = agreement[label]
    material.figures["samples"]["agreement"] = samples.accuracy(material.samples.labels)
    material.figures["classifier"] = {
        "held_out_accuracy": real.accuracy(material.row_labels),
        "reconstruction_accuracy": rebuilt.accuracy(material.row_labels),
        "held_out_images": len(material.rows),
        "train_images": classifier.record.train_images,
        "classifier_frechet_distance": distances(
            samples,
            _only(rebuilt, sampled),
            _only(real, sampled),
            material.row_labels[sampled],
            material.config.samples_per_class,
        ),
    }
    material.real_features = real.features[sampled]
    _compare_with_training(material, samples.features, material.real_features)


def _compare_with_training(material: Material, samples: Tensor, held_out: Tensor) -> None:
    """Samples against the training images of their classes, by the classifier's features."""
    assert material.source is not None and material.classifier is not None
    store = material.run.store
    learn = store.train_indices
    most = max(1, min(MOST_TRAINING_IMAGES, MOST_COMPARED_BYTES // (material.source.channels * store.image_size**2)))
    rows = spread(learn[torch.isin(store.labels[learn], torch.tensor(material.classes))], most)
    images = material.source.read(rows, "training images")
    training = material.classifier.judge(images).features
    found = memorisation(samples, held_out, training, material.samples.codes, store, rows)
    material.figures["memorisation"] = dataclasses.asdict(found)
    first = [int((material.samples.labels == label).nonzero()[0]) for label in material.classes]
    places = nearest(samples[first], training, SHOWN_NEIGHBOURS)[1]
    material.neighbours = [
        torch.cat([material.samples.images[sample][None], images[near]])
        for sample, near in zip(first, places, strict=True)
    ]


def _classifier(material: Material, source: RealImages) -> Classifier:
    """The run's classifier: the one that lies there if it was trained just so on these images, else a new one."""
    folder, store, config = material.run.folder / "classifier", material.run.store, material.config.classifier
    rows = spread(store.judging().learn, config.max_images)
    data = {
        "source": store.manifest["source"],
        "views": store.manifest["view_settings"],
        "image_size": store.image_size,
        "train_rows_sha256": sha256_of_bytes(rows.numpy().tobytes()),
    }
    if (folder / RECORD_FILE).exists():
        try:
            found = Classifier.load(folder)
        except UserError as error:  # it holds nothing that training it again does not give
            log.warning("%s: trained again", printable(error))
        else:
            fits = (found.record.num_classes, found.record.image_channels) == (len(store.class_names), source.channels)
            if fits and found.record.data == data and found.record.config == config:
                return found
    photographs = any(view.startswith("mirrored") for view in store.views)
    classifier = train_classifier(
        source.read(rows, "training images"),
        store.labels[rows],
        len(store.class_names),
        config,
        mirror=photographs,
        device=material.device,
    )
    classifier.record = dataclasses.replace(classifier.record, data=data)
    remove_leftovers(folder, (RECORD_FILE, WEIGHTS_FILE))
    classifier.save(folder)
    return classifier


def _probe(material: Material) -> None:
    material.figures["probe"] = _probe_of(material, material.run.model.transformer, material.config.weights)


def _probe_of(material: Material, model: Transformer, weights: Literal["student", "teacher"]) -> dict[str, Any]:
    config, run = material.config, material.run
    settings = ProbeConfig(
        run.folder,
        weights,
        train_views=config.probe_train_views,
        max_train_images=config.probe_max_train_images,
        device=config.device,
        seed=config.seed,
    )
    return {
        **probe(model, run.store, run.contrast_depth, settings).to_dict(),
        "epochs": settings.epochs,
        "train_views": settings.train_views,
    }


def _attend(material: Material) -> None:
    run, config, model = material.run, material.config, material.run.model.transformer.to(material.device).eval()
    material.figures["attention"] = attention_of(material, model)
    chosen = [
        int((material.row_labels == label).nonzero()[0])
        for label in spread(material.row_labels.unique(), config.attention_images)
    ]
    queries = attention_maps.query_positions(run.store.positions, config.attention_queries)
    for index in chosen:
        row = material.rows[index : index + 1]
        label = run.store.labels[row]
        probs = attention_maps.last_block_attention(
            model, codes_of(run.store, row, run.store.plain_view).to(material.device), label.to(material.device)
        )
        name = run.store.class_names[int(label)]
        material.attention.append(
            report_sections.AttentionExample(name, material.reconstruction.images[index], probs[0].cpu(), queries)
        )


def _weigh(material: Material) -> None:
    """Both weights by the same measures, with the report's guidance and without; what was measured above is not
    measured again.
    """
    config, figures, shown = material.config, material.figures, material.run.model.transformer
    weights = {}
    for name, model in {config.weights: shown, **other_weights(material)}.items():
        if model is shown:
            probed, attention, samples = figures["probe"], figures["attention"], _judged(figures)
        else:
            probed, attention, samples = (
                _probe_of(material, model, name),
                attention_of(material, model),
                judge_drawn(material, model, config.guidance),
            )
        without = samples if config.guidance == 1 else judge_drawn(material, model, 1.0)
        weights[name] = {
            "held_out_loss": held_out_loss(material, model),
            "attention": attention,
            "samples": {"1": without, f"{config.guidance:g}": samples},
            "probe": {key: probed[key] for key in ("positions", "held_out", "chance", "classes", "sequence")},
        }
    figures["weights"] = weights


def _judged(figures: dict[str, Any]) -> dict[str, float]:
    """What judge_drawn says of the samples that the page shows."""
    if figures["classifier"] is None:
        return {}
    return {
        "agreement": figures["samples"]["agreement"],
        "frechet_distance": figures["classifier"]["classifier_frechet_distance"]["samples"],
    }


def _trained(material: Material) -> dict[str, Any]:
    """What is known of the training: sizes, settings, duration."""
    run, record, last = material.run, material.run.record, material.training[-1]
    speeds = [row["images_per_s"] for row in material.training if row.get("images_per_s") is not None]
    return {
        "step": record.step if record.step is not None else last["step"],
        "images_seen": record.images_seen if record.images_seen is not None else last.get("images"),
        "training_time_s": last.get("time_s"),
        "images_per_s_median": statistics.median(speeds) if speeds else None,
        "last_losses": {
            key: last[key] for key in ("loss", "ar", "mim", "step_contrast", "view_contrast") if key in last
        },
        "last_val_ar": material.validation[-1]["val_ar"] if material.validation else None,
        "parameters": sum(parameter.numel() for parameter in run.model.transformer.parameters()),
        "weights": material.config.weights,
        "weights_sha256": run.model.weights_sha256,
        "tokenizer_sha256": run.store.tokenizer_hash,
        "train_images": len(run.store.train_indices),
        "held_out_images": len(run.store.held_out_indices),
        "judged_on": run.store.judging().judged_on,
        "views": len(run.store.views),
        "source": run.store.manifest["source"],
        "environment": record.environment,
        "config": to_dict(run.config),
    }


def _default_classes(count: int) -> list[int]:
    return spread(torch.arange(count), 10).tolist() if count > MOST_CLASSES else list(range(count))


def _keys(classes: list[int], names: tuple[str, ...]) -> dict[int, str]:
    """What each class is called in report.json: its name; its number and name where two of the
    classes have one name.
    """
    unique = len({names[label] for label in classes}) == len(classes)
    return {label: names[label] if unique else f"{label}: {names[label]}" for label in classes}


def _only(verdict: Any, chosen: Tensor) -> Any:
    return dataclasses.replace(verdict, features=verdict.features[chosen], probs=verdict.probs[chosen])


def _device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )


def _finite(value: Any) -> Any:
    """Infinities and NaN as null: JSON knows neither."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)

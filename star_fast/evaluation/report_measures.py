"""What a report measures of a run, part by part: each puts figures, and the images that only the page shows, into its
Material.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from star_fast.errors import UserError, printable
from star_fast.evaluation import attention_maps
from star_fast.evaluation.both_weights import attention_of, held_out_loss, judge_drawn, other_weights
from star_fast.evaluation.classifier import RECORD_FILE, WEIGHTS_FILE, Classifier, train_classifier
from star_fast.evaluation.memorisation import MOST_TRAINING_IMAGES, SHOWN_NEIGHBOURS, memorisation, nearest
from star_fast.evaluation.probe import ProbeConfig, probe
from star_fast.evaluation.real_images import RealImages, why_unknown
from star_fast.evaluation.report_material import AttentionExample, Material
from star_fast.evaluation.runs import codes_of, spread
from star_fast.evaluation.samples import (
    class_agreement,
    distances,
    distinct_sequences,
    draw_samples,
    psnr_db,
    reconstruct_held_out,
)
from star_fast.model.transformer import Transformer
from star_fast.storage import remove_leftovers, sha256_of_bytes

MOST_COMPARED_BYTES = 2**29  # of the training images that samples are compared with

log = logging.getLogger(__name__)


def _sample(material: Material) -> None:
    config, model = material.config, material.run.model.transformer.to(material.device).eval()
    material.samples = draw_samples(
        model,
        material.tokenizer.to(material.device),
        material.classes,
        config.samples_per_class,
        batch_images=config.batch_images,
        **config.sampling,
    )
    names = material.run.store.class_names
    distinct = distinct_sequences(material.samples)
    material.figures["samples"] = {
        "settings": config.sampling,
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
            AttentionExample(name, material.reconstruction.images[index], probs[0].cpu(), queries)
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


def _keys(classes: list[int], names: tuple[str, ...]) -> dict[int, str]:
    """What each class is called in report.json: its name; its number and name where two of the
    classes have one name.
    """
    unique = len({names[label] for label in classes}) == len(classes)
    return {label: names[label] if unique else f"{label}: {names[label]}" for label in classes}


def _only(verdict: Any, chosen: Tensor) -> Any:
    return dataclasses.replace(verdict, features=verdict.features[chosen], probs=verdict.probs[chosen])


# Part by part, in the order in which they need each other; progress bar and report.json call them so
_PARTS: dict[str, Callable[[Material], None]] = {
    "samples": _sample,
    "tokenizer": _reconstruct,
    "classifier": _classify,
    "linear probe": _probe,
    "attention": _attend,
    "student and teacher": _weigh,
}


def measure(material: Material) -> dict[str, float]:
    """Fill `material` with all that a report shows; returns the seconds that each part took."""
    parts_s = {}
    with tqdm(_PARTS.items(), desc="report", unit="part") as bar:
        for name, part in bar:
            bar.set_postfix_str(name)
            since = time.perf_counter()
            part(material)
            parts_s[name] = round(time.perf_counter() - since, 1)
    return parts_s

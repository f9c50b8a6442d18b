"""How a report's figures were measured, and what training and measuring cost: a number without its protocol compares
with nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from star_fast.evaluation import page
from star_fast.evaluation.page import Section
from star_fast.evaluation.report_material import Material
from star_fast.evaluation.wording import duration, number


def protocol(material: Material) -> dict[str, Any]:
    """The settings that the figures depend on, for report.json and the page. Called when everything is measured."""
    config, store, figures, model = (
        material.config,
        material.run.store,
        material.figures,
        material.run.model.transformer,
    )
    found: dict[str, Any] = {
        "samples": {
            **figures["samples"]["settings"],
            "classes": len(material.classes),
            "per_class": config.samples_per_class,
            "precision": str(next(model.parameters()).dtype).removeprefix("torch."),
            "random_streams": "image i of a set has stream i of the seed",
        },
        "images judged on": {
            "images": len(material.rows),
            "are": store.judging().judged_on,
            "view": store.views[store.plain_view],
            "pixels": f"{store.image_size} x {store.image_size}",
        },
        "tokenizer": {"sha256": store.tokenizer_hash},
        "probe": {
            "block": figures["probe"]["depth"],
            "class_fed": "null",
            "epochs": figures["probe"]["epochs"],
            "lr": figures["probe"]["lr"],
            "train_views": figures["probe"]["train_views"],
            "train_images": figures["probe"]["train_images"],
            "judged_images": figures["probe"]["held_out_images"],
        },
        "attention": {"block": model.config.blocks, "images": figures["attention"]["images"]},
    }
    if material.classifier is not None:
        found["classifier"] = {
            **dataclasses.asdict(material.config.classifier),
            "train_images": material.classifier.record.train_images,
        }
        found["Fréchet distance"] = {
            "features": figures["classifier"]["classifier_frechet_distance"]["features"],
            "real_images": figures["classifier"]["classifier_frechet_distance"]["real_images"],
        }
        found["nearest training images"] = {
            "distance": "1 - cosine of the classifier's features",
            "compared_with": figures["memorisation"]["training_images"],
        }
    return found


def sections(figures: dict[str, Any]) -> list[Section]:
    """The protocol and the cost, from report.json's figures."""
    return [_protocol(figures), _cost(figures)]


def _protocol(figures: dict[str, Any]) -> Section:
    section = Section("protocol", "How this was measured")
    rows = [
        (
            what[0].upper() + what[1:],
            ", ".join(f"{name.replace('_', ' ')} {_plain(value)}" for name, value in settings.items()),
        )
        for what, settings in figures["protocol"].items()
    ]
    section.add(
        page.text(
            "Compare figures with those of a report whose protocol is this one; --against names every condition "
            "in which two reports differ. "
            "The classifier and its Fréchet distance are made for this dataset: FID, sFID, Inception Score, "
            "precision and recall as the "
            "literature reports them come from star-fast evaluate."
        ),
        page.table(("", ""), rows, css_class="values"),
    )
    return section


def _cost(figures: dict[str, Any]) -> Section:
    trained, made, drawn = figures["trained"], figures["report"], figures["samples"]
    section = Section("cost", "What it cost")
    views = trained["config"]["method"]["views"]
    time_s, speed, images = (
        trained["training_time_s"],
        trained["images_per_s_median"],
        len(drawn["classes"]) * drawn["per_class"],
    )
    on = (trained["environment"] or {}).get("device", "a machine that was not recorded")
    rows = [
        ("Training", f"{duration(time_s)} on {on}" if time_s else "not recorded"),
        ("… speed", f"{speed:.0f} images/s, {views} view{'s' * (views > 1)} of each" if speed else "not recorded"),
        ("… images seen", number(trained["images_seen"])),
        (
            "A sample, pixels included",
            f"{made['parts_s']['samples'] / images:.3g} s ({images} at once or in batches, on {made['device']})",
        ),
        (
            "This report",
            f"{made['seconds']:.0f} s: "
            + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in made["parts_s"].items()),
        ),
    ]
    section.add(page.table(("", ""), rows, css_class="values"))
    return section


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

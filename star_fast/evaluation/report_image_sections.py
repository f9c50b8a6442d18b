"""The report's sections about images: samples, what the classifier says of them, those of training, the tokenizer."""

from __future__ import annotations

import math

from torch import Tensor

from star_fast.evaluation import page, plots
from star_fast.evaluation.memorisation import SHOWN_NEIGHBOURS
from star_fast.evaluation.page import Section
from star_fast.evaluation.report_material import Material
from star_fast.evaluation.wording import percent

COLUMNS = 10  # images in a row of a strip
SHOWN_RECONSTRUCTIONS = 20
SHARP_SIDE = 64  # pixels
TRUSTED_ACCURACY = 0.9  # below it the page warns of the classifier


def samples(material: Material) -> Section:
    """Of each class its first samples, beside real images."""
    figures, names = material.figures["samples"], material.run.store.class_names
    settings = figures["settings"]
    section = Section("samples", "Samples beside real images")
    real_images = material.real is not None
    others = "held-out real images" if real_images else "held-out images as the tokenizer gives them back"
    section.add(
        page.text(
            f"First {figures['per_class']} samples of each class, guidance {settings['guidance']:g}, temperature "
            f"{settings['temperature']:g}, top-k {settings['top_k'] or 'off'}, top-p {settings['top_p']:g}, seed "
            f"{settings['seed']}; "
            f"the first drawn, none chosen. Beside or below them the first {others} of the class. "
            "Percent: samples that the small classifier takes for the class asked for. Distinct: different code "
            "sequences among them."
        )
    )
    beside = material.real if material.real is not None else material.reconstruction.images
    for label, entry in zip(material.classes, figures["classes"].values(), strict=True):
        agreement = f"{percent(entry['agreement'])} recognised, " if "agreement" in entry else ""
        real = beside[material.row_labels == label][: figures["per_class"]]
        parts = [_strip(material.samples.of_class(label), f"{figures['per_class']} samples of class {names[label]}.")]
        if len(real):
            parts.append(
                _strip(real, f"{len(real)} {'real' if real_images else 'decoded'} images of class {names[label]}.")
            )
        distinct = f"{entry['distinct_code_sequences']} of {figures['per_class']} distinct"
        section.add(page.heading(f"{names[label]}: {agreement}{distinct}"), page.group("pairs", parts))
    return section


def classifier(material: Material) -> Section:
    """What the small classifier makes of real images, samples and reconstructions."""
    section = Section("classifier", "What a small classifier says")
    figures = material.figures["classifier"]
    if figures is None:
        section.add(page.text(f"Not computed: {material.figures['classifier_not_computed']}", "note"))
        return section
    distance = figures["classifier_frechet_distance"]
    rows = [
        ("Held-out real images, named right", percent(figures["held_out_accuracy"])),
        ("The same after the tokenizer", percent(figures["reconstruction_accuracy"])),
        ("Samples, taken for the class asked for", percent(material.figures["samples"]["agreement"])),
        ("Classifier Fréchet distance, samples to real", f"{distance['samples']:.2f}"),
        ("… real images after the tokenizer, to real", f"{distance['reconstructions']:.2f}"),
    ]
    if "real_halves" in distance:
        rows.append(("… some real images to the other real images", f"{distance['real_halves']:.2f}"))
    section.add(
        page.text(
            f"A small convolutional network, trained on {figures['train_images']:,} real images of the training "
            "split, judges "
            f"{distance['sample_images']} samples and {figures['held_out_images']:,} held-out images. Its "
            f"{distance['features']} last features "
            "carry the classifier Fréchet distance. That is not FID: it depends on this classifier and on the "
            "number of images, and "
            "compares runs on the same data only."
        ),
        page.table(("", ""), rows),
    )
    if figures["held_out_accuracy"] < TRUSTED_ACCURACY:
        section.add(
            page.text(
                f"This classifier names only {percent(figures['held_out_accuracy'])} of the real images right: "
                "what it says of samples is "
                "worth no more than that.",
                "note",
            )
        )
    return section


def memorisation(material: Material) -> list[Section]:
    """Samples and the training images nearest to them; nothing where the real images are not known."""
    if not material.neighbours:
        return []
    figures, names = material.figures["memorisation"], material.run.store.class_names
    section = Section("memorisation", "Samples and the training images nearest to them")
    section.add(
        page.text(
            f"Of each class the first sample, then the {SHOWN_NEIGHBOURS} training images that the classifier's "
            "features take for nearest, of "
            f"{figures['training_images']:,} compared with. A model that draws training images again comes nearer "
            "to them than images do "
            "that it has never seen."
        ),
        page.table(
            ("", ""),
            [
                (
                    "Samples nearer to a training image than 99 % of held-out images are",
                    percent(figures["below_limit"]),
                ),
                (
                    "Median distance to the nearest training image (1 - cosine), samples",
                    f"{figures['median_distance']:.4f}",
                ),
                ("… held-out images", f"{figures['held_out_median_distance']:.4f}"),
                (
                    "Samples whose codes are all those of a training image's view",
                    f"{figures['same_codes']} of {figures['samples']}",
                ),
            ],
        ),
        page.group(
            "pairs",
            [
                _strip(images, f"A sample of class {names[label]} and the training images nearest to it.")
                for label, images in zip(material.classes, material.neighbours, strict=True)
            ],
        ),
    )
    return [section]


def tokenizer(material: Material) -> Section:
    """Held-out images beside what the tokenizer gives back."""
    figures, reconstruction = material.figures["tokenizer"], material.reconstruction
    section = Section("tokenizer", "Tokenizer")
    quality = (
        f" Peak signal-to-noise ratio {figures['psnr_db']:.1f} dB."
        if "psnr_db" in figures and math.isfinite(figures["psnr_db"])
        else ""
    )
    section.add(
        page.text(
            "Held-out images and what is left of them after encoding and decoding: no sample can look "
            f"better.{quality} "
            f"{figures['codes_used']:,} of {figures['codebook']:,} codes occur in {figures['held_out_images']:,} "
            "held-out images."
        )
    )
    parts = [("back from their codes", reconstruction.images)]
    if material.real is not None:
        parts.insert(0, ("held-out real images", material.real))
    section.add(
        page.group(
            "pairs",
            [
                _strip(
                    images[:SHOWN_RECONSTRUCTIONS],
                    f"{len(images[:SHOWN_RECONSTRUCTIONS])} {name}.",
                    name.capitalize() + ".",
                )
                for name, images in parts
            ],
        )
    )
    return section


def _strip(images: Tensor, alt: str, caption: str = "") -> str:
    """Images in rows; the pixels of small ones stay sharp on the page."""
    return page.figure(
        plots.strip(images, COLUMNS), alt, caption, css_class="pixels" if images.shape[-1] <= SHARP_SIDE else "wide"
    )

"""The report's sections: what was measured, put into words, tables and pictures. Nothing is computed here that is not
in report.json.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from star_fast.evaluation import page, plots, report_protocol
from star_fast.evaluation.attention_maps import grid_map
from star_fast.evaluation.memorisation import SHOWN_NEIGHBOURS
from star_fast.evaluation.page import Section
from star_fast.evaluation.report_comparison import comparison
from star_fast.evaluation.wording import duration, nats, number, percent, short

if TYPE_CHECKING:
    from star_fast.evaluation.report import Material

COLUMNS = 10  # images in a row of a strip
SHOWN_RECONSTRUCTIONS = 20
MOST_HEADS = 8
SHARP_SIDE = 64  # pixels
TRUSTED_ACCURACY = 0.9  # below it the page warns of the classifier


@dataclass(frozen=True)
class AttentionExample:
    """One image with the last block's attention."""

    class_name: str
    image: Tensor  # (C, H, W) uint8, decoded from the codes that the model saw
    probs: Tensor  # (H, T, T) float32
    queries: list[int]  # query positions to show


def all_sections(material: Material) -> list[Section]:
    """Every section, in reading order."""
    sections = [
        _training(material),
        _losses(material),
        _samples(material),
        _classifier(material),
        *_memorisation(material),
        _probe(material),
        _weights(material.figures),
        _attention(material),
        _tokenizer(material),
    ]
    compared = [comparison(material.figures, material.against)] if material.against is not None else []
    return [*sections, *compared, *report_protocol.sections(material.figures)]


def lead(material: Material) -> str:
    """The line under the title."""
    trained, config = material.figures["trained"], material.run.config
    method = "ST-AR (self-guided training)" if config.method.has_teacher else "plain next-token training"
    return (
        f"A LlamaGen transformer of {short(trained['parameters'])} parameters, {method}, {trained['step']:,} steps of "
        f"{config.train.images_per_step} images on {trained['train_images']:,} training images. Shown are the "
        f"{trained['weights']}'s weights."
    )


def tiles(figures: dict[str, Any]) -> dict[str, str]:
    """The headline figures."""
    probe, samples, classifier = figures["probe"], figures["samples"], figures["classifier"]
    guidance = samples["settings"]["guidance"]
    result = (
        {f"samples of the class asked for, guidance {guidance:g}": percent(samples["agreement"])} if classifier else {}
    )
    result["linear probe, last position"] = percent(probe["held_out"][-1])
    result["linear probe, best position"] = percent(max(probe["held_out"]))
    if classifier:
        result["classifier Fréchet distance (not FID)"] = f"{classifier['classifier_frechet_distance']['samples']:.3g}"
    fewest = min(entry["distinct_code_sequences"] for entry in samples["classes"].values())
    result["fewest distinct code sequences in a class"] = f"{fewest} of {samples['per_class']}"
    if figures["trained"]["last_val_ar"] is not None:
        result["held-out next-token loss, nats"] = nats(figures["trained"]["last_val_ar"])
    return result


def footer(figures: dict[str, Any]) -> str:
    """Where and with what the report was made."""
    made = figures["report"]
    versions = f"torch {made['torch']}, Python {made['python']}"
    return (
        f"Made on {made['date']} in {made['seconds']:.0f} s on {made['device']}, {versions}. The same figures are in "
        "report.json."
    )


def _training(material: Material) -> Section:
    trained, config = material.figures["trained"], material.run.config
    model, size = config.model, material.run.model.transformer.config
    method = config.method
    losses = [
        name
        for name, on in (
            ("masked features", method.mim_weight > 0),
            ("between positions", method.contrasts and method.step_contrast),
            ("between views", method.contrasts and method.view_contrast),
        )
        if on
    ]
    time_s, speed = trained["training_time_s"], trained["images_per_s_median"]
    rows = [
        (
            "Model",
            f"{size.blocks} blocks, {size.heads} heads, width {size.width}; {trained['parameters']:,} parameters",
        ),
        ("Sequence", f"{size.positions} codes of a codebook of {size.vocab:,}; {size.num_classes:,} classes"),
        (
            "Images",
            f"{trained['train_images']:,} train, {trained['held_out_images']:,} held out, {trained['views']} "
            "views of each; "
            f"{_source(trained['source'])}",
        ),
        ("Self-supervised losses", ", ".join(losses) or "none"),
        (
            "Method",
            f"{method.views} views a step, mask ratio {method.mask_ratio:g}, K {method.contrast_positions}, τ "
            f"{method.temperature:g}, "
            f"teacher decay {method.ema_decay:g}, contrast after block {config.contrast_depth}",
        )
        if losses
        else ("Method", "LlamaGen's training"),
        (
            "Optimisation",
            f"AdamW, peak learning rate {config.lr:.2g}, {config.optim.schedule}, weight decay "
            f"{config.optim.weight_decay:g}, "
            f"dropout {model.dropout:g}, {config.train.precision}, ZeRO-{config.train.zero_stage}",
        ),
        (
            "Steps",
            f"{trained['step']:,} of {config.train.images_per_step} images; {number(trained['images_seen'])} "
            "images seen",
        ),
        ("Time", f"{duration(time_s)}; median {speed:.0f} images/s" if time_s and speed else "not recorded"),
        ("Weights", f"{trained['weights']}, sha256 {trained['weights_sha256'][:16]}…"),
        ("Tokenizer", f"sha256 {trained['tokenizer_sha256'][:16]}…"),
    ]
    rows += [(key.replace("_", " ").capitalize(), value) for key, value in (trained["environment"] or {}).items()]
    settings = [
        (f"{part}.{name}", value) for part, values in trained["config"].items() for name, value in values.items()
    ]
    section = Section("training", "What was trained")
    if not trained["held_out_images"]:
        section.add(
            page.text(
                f"No image was held out. What this page calls held-out are {trained['judged_on']}: a tenth of "
                "them, which the classifier and the "
                "linear probe did not learn from.",
                "note",
            )
        )
    section.add(
        page.table(("", ""), rows, css_class="values"),
        page.folded("Every setting", page.table(("setting", "value"), settings, css_class="values")),
    )
    return section


def _losses(material: Material) -> Section:
    section = Section("losses", "Loss curves")
    light, dark = (plots.loss_panels(material.training, material.validation, dark=dark) for dark in (False, True))
    captions = {
        "Next-token loss (nats)": "Mean cross-entropy over all positions. In training some keys are hidden "
        "and dropout is on; held-out "
        "images are "
        "predicted with neither, so the two curves cannot be compared point by point.",
        "Masked-feature loss (1 - cosine)": "1 - cosine between the masked student's last features and the "
        "unmasked teacher's.",
        "Contrastive losses (nats)": "InfoNCE over the batch: the same view at another position, and another "
        "view at the same position.",
    }
    first, last = material.training[0], material.training[-1]
    section.add(
        page.group(
            "plots",
            [
                page.figure(
                    png, f"{title} from step {first['step']} to {last['step']}.", captions[title], dark=dark[title]
                )
                for title, png in light.items()
            ],
        )
        if light
        else page.text("No loss that was logged is a finite number.", "note")
    )
    return section


def _samples(material: Material) -> Section:
    figures, samples, names = material.figures["samples"], material.samples, material.run.store.class_names
    settings = figures["settings"]
    section = Section("samples", "Samples beside real images")
    section.add(
        page.text(
            f"First {figures['per_class']} samples of each class, guidance {settings['guidance']:g}, temperature "
            f"{settings['temperature']:g}, top-k {settings['top_k'] or 'off'}, top-p {settings['top_p']:g}, seed "
            f"{settings['seed']}; "
            "the first drawn, none chosen. Beside or below them the first "
            f"{'held-out real images' if material.real is not None else 'held-out images through the tokenizer'} "
            "of the class. "
            "Percent: samples that the small classifier takes for the class asked for. Distinct: different code "
            "sequences among them."
        )
    )
    beside = material.real if material.real is not None else material.reconstruction.images
    for label, entry in zip(material.classes, figures["classes"].values(), strict=True):
        agreement = f"{percent(entry['agreement'])} recognised, " if "agreement" in entry else ""
        real = beside[material.row_labels == label][: figures["per_class"]]
        parts = [_strip(samples.of_class(label), f"{figures['per_class']} samples of class {names[label]}.")]
        if len(real):
            parts.append(_strip(real, f"{len(real)} real images of class {names[label]}."))
        distinct = f"{entry['distinct_code_sequences']} of {figures['per_class']} distinct"
        section.add(page.heading(f"{names[label]}: {agreement}{distinct}"), page.group("pairs", parts))
    return section


def _classifier(material: Material) -> Section:
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


def _memorisation(material: Material) -> list[Section]:
    """Nothing where the real images are not known."""
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


def _probe(material: Material) -> Section:
    figures = material.figures["probe"]
    section = Section("probe", "Linear probe")
    curves = {material.run.name: figures}
    light, dark = (plots.probe_curves(curves, dark=dark) for dark in (False, True))
    caption = (
        f"The model reads the codes with the null class; the output of block {figures['depth']} at each position, "
        "normalised, feeds one linear "
        f"layer, trained for {figures['epochs']} epochs on {figures['train_images']:,} training images and judged on "
        f"{figures['held_out_images']:,} held-out ones. "
        "A curve that falls at the end has forgotten what the image shows."
    )
    rows = [
        (position, percent(share), f"± {100 * error:.1f}", percent(train))
        for position, share, error, train in zip(
            figures["positions"], figures["held_out"], figures["held_out_standard_error"], figures["train"], strict=True
        )
    ]
    best = max(range(len(rows)), key=lambda index: figures["held_out"][index])
    alt = (
        f"Probe accuracy by position: {rows[0][1]} at position {rows[0][0]}, best {rows[best][1]} at {rows[best][0]}, "
        f"{rows[-1][1]} at the last, {rows[-1][0]}."
    )
    section.add(
        page.group(
            "plots",
            [
                page.figure(light, alt, caption, dark=dark),
                page.table(("position", "held-out top-1", "standard error", "training top-1"), rows),
            ],
        )
    )
    return section


def _weights(figures: dict[str, Any]) -> Section:
    weights = figures["weights"]
    names = [name for name in ("student", "teacher") if name in weights]
    section = Section("weights", "Student beside teacher" if len(names) > 1 else "With guidance and without")
    if len(names) > 1:
        section.add(
            page.text(
                "The student is what training fits; the teacher is the running average of its weights. Which of "
                "them the paper evaluates is not "
                "known, so both are measured, on the same images and with the same seed."
            )
        )
    each = [weights[name] for name in names]
    rows = [
        ("held-out next-token loss, nats", *(nats(found["held_out_loss"]) for found in each)),
        ("linear probe, last position", *(percent(found["probe"]["held_out"][-1]) for found in each)),
        ("linear probe, best position", *(percent(max(found["probe"]["held_out"])) for found in each)),
    ]
    for scale in sorted(each[0]["samples"], key=float):
        at = "no guidance" if float(scale) == 1 else f"guidance {scale}"
        judged = [found["samples"][scale] for found in each]
        if all(judged):
            rows += [
                (f"samples of the class asked for, {at}", *(percent(found["agreement"]) for found in judged)),
                (f"classifier Fréchet distance, {at}", *(f"{found['frechet_distance']:.2f}" for found in judged)),
            ]
    rows.append(
        (
            "last block, mean distance of the attention",
            *(f"{found['attention']['mean_distance']:.2f} cells" for found in each),
        )
    )
    table = page.table(("", *names), rows)
    if len(names) == 1:
        section.add(table)
        return section
    light, dark = (
        plots.probe_curves({name: weights[name]["probe"] for name in names}, dark=dark) for dark in (False, True)
    )
    last = " and ".join(
        f"{percent(found['probe']['held_out'][-1])} of the {name}" for name, found in zip(names, each, strict=True)
    )
    section.add(
        page.group(
            "plots",
            [
                page.figure(
                    light,
                    f"Linear probe by position of student and teacher; at the last position {last}.",
                    "Both linear probes.",
                    dark=dark,
                ),
                table,
            ],
        )
    )
    return section


def _attention(material: Material) -> Section:
    figures = material.figures["attention"]
    section = Section("attention", "Attention maps")
    section.add(
        page.text(
            "The last block's attention of one query position over the grid of earlier image positions, averaged "
            "over heads. Green: the cell "
            "that the query predicts. Bright: where it looks, each map scaled to its own largest share. Dimmed: "
            "not known yet. The rest "
            "of the attention goes to the class position. Images as the tokenizer gives them back, with their own "
            "class."
        ),
        page.table(
            ("", ""),
            [
                ("to the class position", percent(figures["to_class"])),
                ("to cells that touch the predicted one", percent(figures["near"])),
                ("to all other cells", percent(figures["far"])),
                ("mean distance of the attention on cells", f"{figures['mean_distance']:.2f} cells"),
            ],
            f"Averages over all query positions and heads of {figures['images']} held-out images.",
        ),
    )
    for example in material.attention:
        section.add(page.heading(f"Class {example.class_name}"))
        mean = example.probs.mean(0)
        section.add(page.group("maps", [_map(example, mean, query, f"position {query}") for query in example.queries]))
    example = material.attention[0]
    heads = example.probs[:MOST_HEADS]
    query = example.queries[len(example.queries) // 2]
    section.add(
        page.heading(f"Class {example.class_name}, position {query}, head by head"),
        page.group("maps", [_map(example, head, query, f"head {number}") for number, head in enumerate(heads, 1)]),
    )
    return section


def _map(example: AttentionExample, probs: Tensor, query: int, name: str) -> str:
    share = probs[query, 0].item()
    png = plots.attention_overlay(example.image, grid_map(probs, query), query)
    return page.figure(
        png,
        f"Attention over an image of class {example.class_name}: {name}, {percent(share)} on the class position.",
        f"{name}, class {percent(share)}",
    )


def _tokenizer(material: Material) -> Section:
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


def _source(source: dict[str, Any]) -> str:
    return str(source.get("kind", "unknown source")) + (f" {source['folder']}" if "folder" in source else "")

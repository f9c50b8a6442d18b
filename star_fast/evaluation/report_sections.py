"""The report's sections: what was measured, put into words, tables and pictures. Nothing is computed here that is not
in report.json.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from star_fast.evaluation import page, plots, report_image_sections, report_protocol
from star_fast.evaluation.attention_maps import grid_map
from star_fast.evaluation.page import Section
from star_fast.evaluation.report_comparison import comparison
from star_fast.evaluation.report_material import AttentionExample, Material
from star_fast.evaluation.wording import duration, nats, number, percent, short

MOST_HEADS = 8


def all_sections(material: Material) -> list[Section]:
    """Every section, in reading order."""
    sections = [
        _training(material),
        _losses(material),
        report_image_sections.samples(material),
        report_image_sections.classifier(material),
        *report_image_sections.memorisation(material),
        _probe(material),
        _weights(material.figures),
        _attention(material),
        report_image_sections.tokenizer(material),
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


def _source(source: dict[str, Any]) -> str:
    return str(source.get("kind", "unknown source")) + (f" {source['folder']}" if "folder" in source else "")

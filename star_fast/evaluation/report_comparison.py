"""Two reports side by side: `star-fast report RUN --against OTHER`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from star_fast.evaluation import page, plots
from star_fast.evaluation.wording import number, percent

Figures = dict[str, Any]  # a report.json

# Two reports are comparable where these agree.
_CONDITIONS: dict[str, Callable[[Figures], Any]] = {
    "tokenizer": lambda f: f["trained"]["tokenizer_sha256"],
    "images": lambda f: (f["trained"]["source"], f["trained"]["train_images"], f["trained"]["held_out_images"]),
    "weights shown (student, teacher)": lambda f: f["trained"]["weights"],
    "probed block": lambda f: f["probe"]["depth"],
    "probe settings": lambda f: (f["probe"]["epochs"], f["probe"]["train_views"], f["probe"]["train_images"]),
    "sampler settings": lambda f: (f["samples"]["settings"], f["samples"]["per_class"], list(f["samples"]["classes"])),
}

_ROWS: dict[str, Callable[[Figures], Any]] = {
    "Steps": lambda f: number(f["trained"]["step"]),
    "Images seen": lambda f: number(f["trained"]["images_seen"]),
    "Views a step": lambda f: f["trained"]["config"]["method"]["views"],
    "Held-out next-token loss, nats": lambda f: f"{f['trained']['last_val_ar']:.3f}",
    "Linear probe, last position": lambda f: percent(f["probe"]["held_out"][-1]),
    "Linear probe, best position": lambda f: percent(max(f["probe"]["held_out"])),
    "Samples of the class asked for": lambda f: percent(f["samples"]["agreement"]),
    "Classifier's held-out accuracy": lambda f: percent(f["classifier"]["held_out_accuracy"]),
    "Classifier Fréchet distance": lambda f: f"{f['classifier']['classifier_frechet_distance']['samples']:.2f}",
    "Attention to the class position": lambda f: percent(f["attention"]["to_class"]),
    "Attention to neighbouring cells": lambda f: percent(f["attention"]["near"]),
    "Attention to other cells": lambda f: percent(f["attention"]["far"]),
}


def comparison(ours: Figures, other: Figures) -> page.Section:
    """Both probe curves in one plot, the main figures in one table, and a warning where the two were not measured alike."""
    same_name = ours["run"] == other["run"]
    names = (f"{ours['run']} (this)", f"{other['run']} (other)") if same_name else (ours["run"], other["run"])
    section = page.Section("comparison", f"Against {names[1]}")
    differing = [name for name, pick in _CONDITIONS.items() if _find(pick, ours) != _find(pick, other)]
    if differing:
        section.add(page.text(f"Not measured alike: the reports differ in {', '.join(differing)}.", "note"))
    curves = dict(zip(names, (ours["probe"], other["probe"]), strict=True))
    light, dark = (plots.probe_curves(curves, dark=dark) for dark in (False, True))
    last = [percent(figures["probe"]["held_out"][-1]) for figures in (ours, other)]
    alt = f"Linear probe by position of {names[0]} (last position {last[0]}) and {names[1]} (last position {last[1]})."
    rows = [(name, _find(pick, ours), _find(pick, other)) for name, pick in _ROWS.items()]
    plot = page.figure(light, alt, "Both linear probes, each as its own report describes it.", dark=dark)
    section.add(page.group("plots", [plot, page.table(("", *names), rows)]))
    return section


def _find(pick: Callable[[Figures], Any], figures: Figures) -> Any:
    """A figure of a report that may lack it (no real images were given, no validation ran)."""
    try:
        return pick(figures)
    except (KeyError, TypeError):
        return "not measured"

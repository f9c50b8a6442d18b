"""`star-fast report --run FOLDER`: everything there is to see of a run in one HTML file, and the same figures as JSON
beside it.

report_material.py gathers what it is written from, report_measures.py measures, report_sections.py and
report_image_sections.py write the page from what was measured.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from star_fast.evaluation import page, report_protocol, report_sections
from star_fast.evaluation.limits import explain_out_of_memory
from star_fast.evaluation.report_comparison import FORMAT_VERSION, read_other
from star_fast.evaluation.report_material import Material, ReportConfig, gather
from star_fast.evaluation.report_measures import measure
from star_fast.evaluation.runs import only_report, open_run
from star_fast.generation.device import take_device
from star_fast.records import to_dict
from star_fast.storage import atomic_write_bytes, atomic_write_json


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
        return _write(gather(config, run, device, other), begun)


def _write(material: Material, begun: float) -> Path:
    """Measure, then write both files."""
    run = material.run
    parts_s = measure(material)
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


def _device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )


def _finite(value: Any) -> Any:
    """Infinities and NaN as null: JSON knows neither."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)

"""Report and probe under bad circumstances: damaged and foreign files, odd names, two at once, one killed before. The
classifier and the settings: test_report_classifier.py, test_report_settings.py.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from star_fast.evaluation import classifier as classifier_module
from star_fast.evaluation import page, plots
from star_fast.evaluation.probe import ProbeConfig, run_probe
from star_fast.evaluation.report import ReportConfig, write_report
from star_fast.evaluation.report_comparison import read_other
from star_fast.evaluation.runs import open_run, read_metrics
from tests.evaluation.conftest import finished_run as finished_run  # a fixture
from tests.evaluation.test_report import Page
from tests.reliability.reported_run import QUICK, figures_of, one_line
from tests.reliability.reported_run import reported as reported  # fixtures
from tests.reliability.reported_run import run as run


def test_real_images_are_the_stores_whatever_the_runs_settings(run: Path, reported: Path, finished_run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] |= {"views": "ten-crop", "crop_ranges": [2.0], "affine_views": 5}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.rmtree(run / "classifier")
    write_report(ReportConfig(run, source=str(finished_run / "images"), **QUICK))
    for part in ("tokenizer", "classifier", "samples"):
        assert figures_of(run)[part] == figures_of(reported)[part]


# Comparison


def test_other_steps_are_said(run: Path, reported: Path, finished_run: Path) -> None:
    other = figures_of(run)
    other["trained"] |= {"step": 30, "images_seen": 240}
    (run / "report.json").write_text(json.dumps(other))
    write_report(ReportConfig(reported, source=str(finished_run / "images"), against=str(run), **QUICK))
    html = (reported / "report.html").read_text()
    assert (
        "Not alike: the two runs differ in training steps (20 here, 30 there), images seen (160 here, 240 there)."
        in html
    )


def test_hints_name_commands_that_exist(tmp_path: Path) -> None:
    with one_line(f"run `star-fast report --run {tmp_path}` first"):
        read_other(tmp_path)
    (tmp_path / "report.json").write_text('{"format_version": 0}')
    with one_line(f"run `star-fast report --run {tmp_path}` again"):
        read_other(tmp_path)
    for file in Path(classifier_module.__file__).parent.glob("*.py"):
        assert not any(
            wrong in file.read_text()
            for wrong in ("star-fast report RUN", "star-fast report {", "star-fast report FOLDER", "method.md")
        ), file


def changed(figures: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    *way, last = place.split(".")
    part = figures
    for name in way:
        part = part[name]
    part[last] = value
    return figures


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("probe", None),
        ("probe", []),
        ("probe.held_out", []),
        ("probe.held_out", ["x"]),
        ("probe.held_out", [2.0] * 8),
        ("probe.positions", [1]),
        ("probe.chance", -1),
        ("probe.depth", 10**400),
        ("trained.step", "many"),
        ("trained.config", 3),
        ("samples.classes", [[]]),
        ("attention.near", None),
        ("classifier", "no"),
        ("classifier.classifier_frechet_distance", 1),
        ("run", None),
        ("run", {}),
        ("format_version", "1"),
    ],
)
def test_a_damaged_report_to_compare_with_is_one_line(place: str, value: Any, run: Path) -> None:
    (run / "report.json").write_text(json.dumps(changed(figures_of(run), place, value)))
    with one_line(r"report\.json.*run `star-fast report --run .*` again"):
        read_other(run)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("trained.last_val_ar", None),
        ("trained.last_val_ar", 1e308),
        ("trained.step", None),
        ("classifier", None),
        ("samples.agreement", None),
        ("run", "a$_$\x1b[31m\udc80"),
        ("run", "x" * 5000),
    ],
)
def test_what_another_report_may_lack_or_hold(place: str, value: Any, run: Path, reported: Path) -> None:
    from star_fast.evaluation.report_comparison import comparison

    (run / "report.json").write_text(json.dumps(changed(figures_of(run), place, value)))
    html = "".join(comparison(figures_of(reported), read_other(run)).body)
    Page(html)
    assert "\x1b" not in html and page.to_bytes(html)


# Metrics


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{}",
        "null",
        "7",
        '"step"',
        "[1]",
        '{"step": "1"}',
        '{"step": true}',
        '{"step": -1}',
        '{"step": 1.5}',
        '{"step": null}',
        '{"step": 1',
        "\x00",
        '{"step": ' + "9" * 5000 + "}",
        '{"step": 1' + "0" * 400 + "}",
        '{"step": 1, "ar": 1' + "0" * 400 + "}",
        '{"step": 1, "ar": 1e999}',
        '{"step": 1, "ar": [1]}',
        '{"step": 1, "time_s": -1}',
        '{"step": 1, "a": ' + "[" * 100_000,
        '{"step": 1, "ar": "x\x1b"}',
        '{"step": 1, "a": [' + "0," * 100_000 + "0]}",
    ],
    ids=lambda line: line[:20],
)
def test_a_line_of_metrics_that_training_never_wrote_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "ar": 2.0}\n' + line + "\n")
    with one_line(r"metrics\.jsonl, line 2: "):
        read_metrics(tmp_path)


def test_metrics_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": \xff\xfe}\n')
    with one_line("line 2"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    os.mkfifo(tmp_path / "metrics.jsonl")
    with one_line("expected an ordinary file"):
        read_metrics(tmp_path)


def test_losses_that_were_not_finite_are_gaps(run: Path, finished_run: Path) -> None:
    lines = [
        {"step": 5, "ar": None, "mim": None, "loss": None, "images_per_s": None},
        {"step": 10, "ar": 2.0, "mim": 0.5, "unknown": [1]},
        {"step": 15, "ar": None, "mim": 1e308},
        {"step": 15, "val_ar": None},
        {"step": 20, "ar": 1.5, "mim": None, "time_s": None},
    ]
    # As earlier versions wrote it
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 25, "ar": NaN, "loss": -Infinity}\n'
    (run / "metrics.jsonl").write_text(text)
    training, validation = read_metrics(run)
    assert (
        [row["ar"] for row in training] == [None, 2.0, None, 1.5, None]
        and training[-1]["loss"] is None
        and validation == [{"step": 15, "val_ar": None}]
    )
    assert list(plots.loss_panels(training, validation, dark=False)) == [
        "Next-token loss (nats)",
        "Masked-feature loss (1 - cosine)",
    ]
    write_report(ReportConfig(run, **QUICK))
    assert figures_of(run)["trained"]["last_val_ar"] is None and figures_of(run)["losses"]["training"][0]["ar"] is None
    (run / "metrics.jsonl").write_text('{"step": 5, "ar": null}\n')
    write_report(ReportConfig(run, **QUICK))
    assert "No loss that was logged is a finite number." in (run / "report.html").read_text()


# Folders, names, two at once


@pytest.mark.parametrize("folder", ["x" * 300, "nul\x00", "file", "file/below", "loop"])
@pytest.mark.parametrize("command", ["run", "codes", "against"])
def test_folders_that_are_none(folder: str, command: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    path = tmp_path / folder
    with one_line("not a folder|not there|holds no|not found|cannot be read"):
        open_run(path) if command == "run" else open_run(run, codes=str(path)) if command == "codes" else read_other(
            path
        )


def test_files_of_two_runs(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["blocks"] = 3
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with one_line(r"model\.blocks is 3 in config\.yaml and 2 in model/: files of two runs are mixed"):
        open_run(run)


def test_names_of_any_kind(finished_run: Path, tmp_path: Path) -> None:
    """Of the run's folder and of a class, as a folder of images may have them."""
    nasty = "_\x1b[31m$_$\u202e<i>&\"'\udcff猫\n"
    run = tmp_path / nasty
    shutil.copytree(finished_run / "run", run)
    shutil.copytree(finished_run / "codes", tmp_path / "codes")
    manifest = json.loads((tmp_path / "codes/manifest.json").read_text())
    manifest["class_names"][1] = nasty
    (tmp_path / "codes/manifest.json").write_text(json.dumps(manifest))
    with one_line("no class 'dog'.*u001b|no class 'dog'.*x1b"):
        write_report(ReportConfig(run, codes=str(tmp_path / "codes"), classes=("dog",), **QUICK))
    write_report(
        ReportConfig(run, codes=str(tmp_path / "codes"), classes=(nasty,), source=str(finished_run / "images"), **QUICK)
    )
    written = (run / "report.html").read_bytes().decode()
    Page(written)
    assert not any(char in written for char in "\x1b\u202e\udcff") and written.count("\n") == page.render(
        "", "", {}, [], ""
    ).count("\n")
    assert "\\x1b[31m" in written and "&lt;i&gt;&amp;&quot;" in written and "<i>" not in written
    figures = figures_of(run)
    assert figures["run"] == run.name and list(figures["samples"]["classes"]) == [nasty]
    run_probe(ProbeConfig(run, epochs=2, warmup_epochs=1, device="cpu"))
    assert (run / "probe.png").exists()


def test_text_of_any_kind_stays_text() -> None:
    nasty = "\"'><script>\x00\x1b]0;x\x07\u202e\ud800\n"
    html = page.render(
        nasty,
        nasty,
        {nasty: nasty},
        [
            page.Section(
                "a",
                nasty,
                [
                    page.figure(b"", nasty, nasty),
                    page.table([nasty], [[nasty, nasty]], nasty),
                    page.heading(nasty),
                    page.folded(nasty),
                ],
            )
        ],
        nasty,
    )
    Page(html)
    assert "<script" not in html and not any(char in html for char in "\x00\x1b\x07\u202e\ud800")
    assert "87.5\N{NO-BREAK SPACE}%" in page.text("87.5\N{NO-BREAK SPACE}%")


def test_heads_of_tables_wrap_on_narrow_screens() -> None:
    assert "nowrap" not in page.render("", "", {}, [], "")


@pytest.mark.parametrize(
    "job",
    [lambda run: write_report(ReportConfig(run, **QUICK)), lambda run: run_probe(ProbeConfig(run, device="cpu"))],
    ids=["report", "probe"],
)
def test_one_report_at_a_time(job: Callable[[Path], Any], run: Path) -> None:
    with open(run / ".report.lock", "w") as lock:
        lock.write(json.dumps({"job": "writing a report", "holder": "process 1 on moon", "since": "today"}))
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_SH)
        with one_line("writing a report is writing there .process 1 on moon, since today"):
            job(run)


def test_leftovers_of_a_killed_report_go(run: Path, finished_run: Path) -> None:
    dead = [
        run / ".report.json.123.tmp",
        run / ".report.html.123.tmp",
        run / "classifier/.classifier.safetensors.123.tmp",
    ]
    kept = [run / ".notes.123.tmp", run / "classifier/mine.tmp"]
    for file in (*dead, *kept):
        file.write_text("half")
    shutil.copy(run / "classifier/classifier.json", run / "classifier/.classifier.json.123.tmp")
    (run / "classifier/classifier.json").unlink()
    write_report(ReportConfig(run, source=str(finished_run / "images"), **QUICK))
    assert not any(file.exists() for file in (*dead, run / "classifier/.classifier.json.123.tmp")) and all(
        file.exists() for file in kept
    )
    probes = [run / ".probe.json.9.tmp", run / ".probe.png.9.tmp"]
    for file in probes:
        file.write_text("half")
    run_probe(ProbeConfig(run, epochs=2, warmup_epochs=1, device="cpu"))
    assert not any(file.exists() for file in probes)

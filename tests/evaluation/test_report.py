"""The report of a small run: whole, self-contained, true to its JSON; and one clear line for each thing that can be
missing.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from star_fast.data.codes import CodeStore
from star_fast.errors import UserError
from star_fast.evaluation import page, plots
from star_fast.evaluation.classifier import ClassifierConfig, Verdict
from star_fast.evaluation.probe import ProbeConfig, probe, run_probe
from star_fast.evaluation.real_images import RealImages
from star_fast.evaluation.report import ReportConfig, write_report
from star_fast.evaluation.runs import open_run, read_metrics, spread
from star_fast.evaluation.samples import SampleSet, class_agreement, distinct_sequences, psnr_db
from star_fast.model.tokenizer import VQTokenizer, to_uint8
from star_fast.model.transformer import Transformer
from star_fast.model.weights import load_model, save_model

QUICK = {
    "samples_per_class": 3,
    "attention_images": 2,
    "attention_queries": 2,
    "classifier": ClassifierConfig(epochs=2, channels=4),
    "device": "cpu",
}
SECTIONS = (
    "What was trained",
    "Loss curves",
    "Samples beside real images",
    "What a small classifier says",
    "Linear probe",
    "With guidance and without",
    "Attention maps",
    "Tokenizer",
    "How this was measured",
    "What it cost",
)
VOID = {"meta", "img", "source"}


class Page(HTMLParser):
    """Collects what the tests look at, and fails on tags that do not close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.references: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attrs)
        if tag == "img":
            self.images.append(values)
        self.references += [values[name] or "" for name in ("src", "srcset", "href") if name in values]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def reported(finished_run: Path) -> Path:
    write_report(ReportConfig(finished_run / "run", source=str(finished_run / "images"), **QUICK))
    return finished_run


def test_every_section_and_nothing_from_elsewhere(reported: Path) -> None:
    html = (reported / "run" / "report.html").read_text()
    parsed = Page(html)
    for title in SECTIONS:
        assert f"<h2>{title}</h2>" in html
    assert "<script" not in html and "@import" not in html and "url(" not in html
    assert all(reference.startswith(("data:image/png;base64,", "#")) for reference in parsed.references)
    assert all(image.get("alt") for image in parsed.images) and len(parsed.images) > 15
    for reference in parsed.references:
        if reference.startswith("data:"):
            Image.open(io.BytesIO(base64.b64decode(reference.split(",")[1]))).verify()
    assert "cat &lt;b&gt;" in html and "cat <b>" not in html
    assert set(re.findall(r'href="#([^"]+)"', html)) == set(re.findall(r'<section id="([^"]+)"', html))


def test_json_holds_the_pages_figures(reported: Path) -> None:
    figures = json.loads(
        (reported / "run" / "report.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
    )
    html = (reported / "run" / "report.html").read_text()
    assert len(figures["probe"]["positions"]) == len(figures["probe"]["held_out"]) == 8
    assert f"{100 * figures['probe']['held_out'][-1]:.1f}\N{NO-BREAK SPACE}%" in html
    # 4 of 14 of each class held out
    assert figures["probe"]["held_out_images"] == 12 and figures["probe"]["train_images"] == 30
    assert set(figures["samples"]["classes"]) == {"cat <b>", "dog", "fox"}
    shares = [entry["agreement"] for entry in figures["samples"]["classes"].values()]
    assert figures["samples"]["agreement"] == pytest.approx(sum(shares) / 3)
    assert figures["classifier"]["classifier_frechet_distance"]["sample_images"] == 9
    attention = figures["attention"]
    assert attention["to_class"] + attention["near"] + attention["far"] == pytest.approx(1, abs=1e-5)
    assert (
        figures["trained"]["step"] == 20
        and figures["trained"]["last_val_ar"] == 2.5
        and figures["losses"]["validation"][0]["val_ar"] == 2.5
    )
    store, tokenizer = CodeStore.open(reported / "codes"), VQTokenizer.load(reported / "run" / "model" / "tokenizer")
    back = to_uint8(tokenizer.decode(store.codes(store.held_out_indices, [0])[:, 0]))
    real = torch.stack(
        [
            torch.frombuffer(bytearray(Image.open(reported / "images" / key).tobytes()), dtype=torch.uint8).view(
                1, 8, 8
            )
            for key in (store.keys()[row] for row in store.held_out_indices.tolist())
        ]
    )
    assert figures["tokenizer"]["psnr_db"] == pytest.approx(psnr_db(real, back))


def test_report_repeats_and_compares(reported: Path, tmp_path: Path) -> None:
    """A second report trains no second classifier and finds the same; against itself every figure is equal."""
    run = tmp_path / "other"
    shutil.copytree(reported / "run", run)
    before = (run / "classifier" / "classifier.safetensors").stat().st_mtime_ns
    write_report(ReportConfig(run, source=str(reported / "images"), against=str(reported / "run"), **QUICK))
    assert (run / "classifier" / "classifier.safetensors").stat().st_mtime_ns == before
    ours, theirs = (json.loads((folder / "report.json").read_text()) for folder in (run, reported / "run"))
    for part in ("samples", "probe", "attention", "classifier", "tokenizer"):
        assert ours[part] == theirs[part]
    html = (run / "report.html").read_text()
    Page(html)
    assert "<h2>Against run</h2>" in html and "Not measured alike" not in html


@pytest.fixture(scope="module")
def run_with_teacher(reported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run again, with a teacher that is another model."""
    run, student = tmp_path_factory.mktemp("taught") / "run", load_model(reported / "run")
    shutil.copytree(reported / "run", run)
    shutil.rmtree(run / "model")
    teacher = Transformer(student.transformer.config)
    teacher.init_weights(torch.Generator().manual_seed(7))
    with torch.no_grad():
        teacher.output.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(8))
    save_model(
        run / "model",
        student.transformer,
        teacher=teacher,
        class_names=student.class_names,
        tokenizer=reported / "run/model/tokenizer",
        record=student.record,
    )
    return run


def test_student_beside_teacher(run_with_teacher: Path, reported: Path) -> None:
    """Whichever weights a report shows, it measures both, and finds the same; the loss is the loop's."""
    found = {}
    for weights in ("student", "teacher"):
        write_report(ReportConfig(run_with_teacher, weights=weights, source=str(reported / "images"), **QUICK))
        found[weights] = json.loads((run_with_teacher / "report.json").read_text())
        html = (run_with_teacher / "report.html").read_text()
        Page(html)
        assert "<h2>Student beside teacher</h2>" in html and f"Shown are the {weights}&#x27;s weights" in html
    assert found["student"]["weights"] == found["teacher"]["weights"]
    both = found["student"]["weights"]
    assert list(found["student"]["weights"]) == ["student", "teacher"] and both["student"] != both["teacher"]
    store = CodeStore.open(reported / "codes")
    codes, labels = store.codes(store.held_out_indices, [store.plain_view])[:, 0], store.labels[store.held_out_indices]
    for weights in both:
        model = load_model(run_with_teacher, weights=weights).transformer
        with torch.inference_mode():
            logits = model(codes[:, :-1], labels).logits.double()
        losses = [
            -torch.log_softmax(logits[image, position], 0)[codes[image, position]].item()
            for image in range(len(codes))
            for position in range(16)
        ]
        assert both[weights]["held_out_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert found[weights]["samples"]["agreement"] == both[weights]["samples"]["2"]["agreement"]
        assert (
            set(both[weights]["samples"]) == {"1", "2"}
            and both[weights]["samples"]["1"] != both[weights]["samples"]["2"]
        )
        assert found[weights]["probe"]["held_out"] == both[weights]["probe"]["held_out"]


def test_without_guidance_is_guidance_1(reported: Path, run_with_teacher: Path) -> None:
    """What stands under no guidance is what a report at guidance 1 says of its samples."""
    guided = json.loads((run_with_teacher / "report.json").read_text())["weights"]["student"]["samples"]["1"]
    write_report(ReportConfig(run_with_teacher, guidance=1.0, source=str(reported / "images"), **QUICK))
    plain = json.loads((run_with_teacher / "report.json").read_text())
    assert plain["weights"]["student"]["samples"] == {"1": guided}
    assert plain["samples"]["agreement"] == guided["agreement"]


def test_protocol_and_cost(reported: Path) -> None:
    figures = json.loads((reported / "run" / "report.json").read_text())
    protocol, html = figures["protocol"], (reported / "run" / "report.html").read_text()
    assert (
        protocol["samples"]["guidance"] == 2
        and protocol["samples"]["seed"] == 0
        and protocol["samples"]["precision"] == "float32"
    )
    assert protocol["images judged on"]["images"] == 12 and protocol["Fréchet distance"]["real_images"] == 12
    assert (
        protocol["classifier"]["epochs"] == 2
        and protocol["tokenizer"]["sha256"] == CodeStore.open(reported / "codes").tokenizer_hash
    )
    assert set(figures["report"]["parts_s"]) == {
        "samples",
        "tokenizer",
        "classifier",
        "linear probe",
        "attention",
        "student and teacher",
    }
    assert (
        "guidance 2, temperature 1, top k 0" in html
        and "30 images/s, 2 views of each" in html
        and "@media print" in html
    )


def test_nothing_held_out_trains_anything(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classifier reads training rows only; other codes of the held-out images leave the probe's weights (so its
    training predictions) as they were.
    """
    shutil.copytree(finished_run / "run", tmp_path / "run", ignore=shutil.ignore_patterns("report.*", "classifier"))
    read, reads = RealImages.read, {}
    monkeypatch.setattr(
        RealImages, "read", lambda self, rows, title: reads.update({title: rows}) or read(self, rows, title)
    )
    write_report(ReportConfig(tmp_path / "run", source=str(finished_run / "images"), **QUICK))
    run = open_run(tmp_path / "run")
    assert reads["training images"].tolist() == run.store.train_indices.tolist()
    assert reads["held-out images"].tolist() == run.store.held_out_indices.tolist()
    config = ProbeConfig(tmp_path / "run", epochs=10, warmup_epochs=2, device="cpu")
    before = probe(run.model.transformer, run.store, 1, config)
    codes = np.array(run.store._codes)
    codes[run.store.held_out_indices] = (codes[run.store.held_out_indices] + 5) % 16
    run.store._codes = codes
    after = probe(run.model.transformer, run.store, 1, config)
    assert after.train == before.train and after.held_out != before.held_out


def test_large_images_are_reduced() -> None:
    picture = Image.open(io.BytesIO(plots.strip(torch.zeros(5, 3, 256, 256, dtype=torch.uint8), 4)))
    assert picture.size == (4 * 130 - 2, 2 * 130 - 2)


def test_without_the_images_it_says_so(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run / "run", tmp_path / "run", ignore=shutil.ignore_patterns("report.*", "classifier"))
    write_report(ReportConfig(tmp_path / "run", classes=("fox",), **{**QUICK, "attention_images": 1}))
    html = (tmp_path / "run" / "report.html").read_text()
    Page(html)
    assert "the real images behind the codes are not known" in html
    assert json.loads((tmp_path / "run" / "report.json").read_text())["classifier"] is None


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("metrics.jsonl", "metrics.jsonl: not found"),
        ("model", "holds no model"),
        ("config.yaml", r"holds no config\.yaml"),
        ("model/tokenizer", "holds no tokenizer"),
        (".", "not a folder"),
    ],
)
def test_a_missing_piece_is_one_line(missing: str, says: str, finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run / "run", run)
    shutil.rmtree(run / missing) if (run / missing).is_dir() else (run / missing).unlink()
    with pytest.raises(UserError, match=says) as caught:
        write_report(ReportConfig(run, **QUICK))
    assert "\n" not in str(caught.value)


def test_other_things_that_do_not_fit(finished_run: Path, tmp_path: Path) -> None:
    run = finished_run / "run"
    with pytest.raises(UserError, match="no class 'wolf'"):
        write_report(ReportConfig(run, classes=("wolf",), **QUICK))
    with pytest.raises(UserError, match=r"holds no report\.json"):
        write_report(ReportConfig(run, against=str(tmp_path), **QUICK))
    with pytest.raises(UserError, match="give --codes"):
        write_report(ReportConfig(run, codes=str(tmp_path / "gone"), **QUICK))
    (tmp_path / "images" / "one").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "images" / "one" / "a.png")
    with pytest.raises(UserError, match="not the images that"):
        write_report(ReportConfig(run, source=str(tmp_path / "images"), **QUICK))
    with pytest.raises(UserError, match="guidance"):
        ReportConfig(run, guidance=0.5)
    with pytest.raises(ValueError, match="alt text"):
        page.figure(b"", "")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(tmp_path)


def test_a_single_sample_is_too_few(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run / "run", tmp_path / "run", ignore=shutil.ignore_patterns("report.*"))
    with pytest.raises(UserError, match=r"samples-per-class: expected at least 2 images of a single class.*, got 1"):
        write_report(
            ReportConfig(
                tmp_path / "run",
                source=str(finished_run / "images"),
                classes=("fox",),
                **{**QUICK, "samples_per_class": 1},
            )
        )


def test_probe_command_writes_its_files(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run / "run", tmp_path / "run")
    result = run_probe(ProbeConfig(tmp_path / "run", epochs=12, warmup_epochs=2, train_views=2, device="cpu"))
    written = json.loads((tmp_path / "run" / "probe.json").read_text())
    assert (
        written["positions"] == result.positions == [1, 3, 5, 7, 9, 11, 13, 15]
        and written["depth"] == 1
        and written["step"] == 20
    )
    assert result.chance == pytest.approx(1 / 3) and all(0 <= share <= 1 for share in result.held_out)
    Image.open(tmp_path / "run" / "probe.png").verify()
    with pytest.raises(UserError, match=r"block number 1 \.\.\. 2, got 3"):
        run_probe(ProbeConfig(tmp_path / "run", depths=(3,), device="cpu"))


def test_counting() -> None:
    labels = torch.tensor([4, 4, 4, 7, 7])
    samples = SampleSet(
        labels, torch.tensor([[1, 2], [1, 2], [2, 1], [5, 5], [5, 5]]), torch.zeros(5, 1, 2, 2, dtype=torch.uint8)
    )
    assert distinct_sequences(samples) == {4: 2, 7: 1}
    probs = torch.nn.functional.one_hot(torch.tensor([4, 4, 0, 7, 4]), 8).float()
    assert class_agreement(Verdict(torch.zeros(5, 3), probs), labels) == pytest.approx({4: 2 / 3, 7: 1 / 2})
    assert spread(torch.arange(10), 4).tolist() == [0, 3, 6, 9] and len(spread(torch.arange(10), 0)) == 10

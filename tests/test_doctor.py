"""`star-fast doctor`: what it says of each state that a machine can be in, and that its answers about operations are
what dispatch does.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from star_fast import cli
from star_fast.config import ModelConfig, TokenizerConfig
from star_fast.doctor import examination, machine, operations, packages, weight_files
from star_fast.doctor.findings import MISSING, OK, WIDTH, WITHOUT, Finding, shown
from star_fast.errors import UserError
from star_fast.evaluation.inception import WEIGHTS_FILE
from star_fast.model.llamagen import save_transformer
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.transformer import Transformer
from star_fast.ops import dispatch
from star_fast.ops.decode_attention import laid_out

ROOT = Path(__file__).resolve().parents[1]
TRITON_OPS = {op for op in dispatch.op_names() if "triton" in dispatch.module_paths(op)}


def absent(*names: str) -> Callable[[str], Any]:
    """find_spec of an environment in which these are not there, and all others are."""
    return lambda name: None if name in names else SimpleNamespace(name=name)


def refuse(name: str) -> Any:
    raise ImportError("undefined symbol: _ZN3c10\nmore")


def test_it_says_all_in_groups_that_fit_a_screen(capfd: pytest.CaptureFixture) -> None:
    assert cli.main(["doctor", "--need", "sample"]) == 0
    printed = capfd.readouterr().out
    groups = printed.split("\n\n")
    for group, parts in zip(
        groups,
        (
            ("This machine", "Python", "torch", "Triton", "threads", "disk"),
            ("star-fast prepare", "DALI"),
            ("To train", "deepspeed", "apex", "flash-attn"),
            ("star-fast sample", "star_fast._C"),
            ("star-fast evaluate", "Inception"),
            ("star-fast demo", "gradio"),
            ("What runs each operation", *dispatch.op_names()),
        ),
        strict=False,
    ):
        assert all(part in group for part in parts), group
    assert all(len(line) <= WIDTH for line in printed.splitlines() if "fix:" not in line)


def test_a_long_finding_is_wrapped_under_itself_and_its_fix_is_one_line() -> None:
    text = shown("Title", [Finding(MISSING, "part", "word " * 60, "command " * 30)]).splitlines()
    assert text[0] == "Title" and text[1].startswith("  !!  part  ") and all(len(line) <= WIDTH for line in text[:-1])
    column = text[1].index("word")
    assert all(line.index("word") == column for line in text[2:-1]) and text[-1].index("fix: ") == column
    assert "\x1b" not in shown("", [Finding(OK, "part", "\x1b[31m")])


@pytest.mark.parametrize(("need", "status"), [("train", 0), ("demo", 1), ("evaluate", 0)])
def test_the_exit_status_is_that_of_the_stages_that_are_needed(
    need: str, status: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(examination, "choices", lambda device: [])  # tested below
    real = machine.version
    monkeypatch.setattr(packages, "version", lambda *names: "" if names[0] == "gradio" else real(*names))
    extra = {"train": "deepspeed", "evaluate": "torch_fidelity"}.get(need)
    if extra and importlib.util.find_spec(extra) is None:
        pytest.skip(f"{extra} is not installed")
    assert cli.main(["doctor", "--need", need]) == status
    last = capfd.readouterr().out.splitlines()[-1]
    assert (last == "missing: demo: gradio") == (need == "demo")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**28))
    assert cli.main(["doctor", "--need", "sample"]) == 1  # the machine counts for every stage
    assert capfd.readouterr().out.splitlines()[-1] == "missing: machine: disk"


@pytest.mark.parametrize("backend", ["", "reference"])
def test_what_runs_an_operation_is_what_dispatch_takes(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside real calls on this CPU, whose backend is looked at as dispatch runs it."""
    if backend:
        monkeypatch.setenv("STAR_FAST_BACKEND", backend)
    found = {choice.op: choice for choice in operations.choices("cpu")}
    assert list(found) == dispatch.op_names()
    run, taken = dispatch._run, []
    monkeypatch.setattr(dispatch, "_run", lambda op, name, *rest: taken.append((op.name, name)) or run(op, name, *rest))
    for name in dispatch.op_names():
        taken.clear()
        arguments = dispatch.module_of(name).inputs("unit", torch.bfloat16, "cpu", 0)
        if name == "decode_attention":
            arguments["cache"] = laid_out(arguments["cache"], None)
        getattr(dispatch.module_of(name), name)(**arguments)
        assert taken[-1] == (name, found[name].backend)
    assert {op for op, choice in found.items() if "triton" in choice.others} == TRITON_OPS
    assert (backend == "reference") == any(
        "STAR_FAST_BACKEND=reference" in finding.told for finding in operations.operations(list(found.values()))
    )


def test_a_backend_that_is_asked_for_and_cannot_be_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAR_FAST_BACKEND", "flash")
    found = {choice.op: choice for choice in operations.choices("cpu")}
    assert {choice.backend for choice in found.values()} == {operations.NONE}
    assert "key mask" in found["masked_attention_qkv"].others["flash"]
    assert "nothing can" in shown("", operations.operations(list(found.values())))


def test_on_a_gpu_the_kernels_run_and_the_cpus_code_says_why_not() -> None:
    """On fake CUDA tensors: no GPU is needed to ask."""
    found = {choice.op: choice for choice in operations.choices("cuda")}
    assert {op for op, choice in found.items() if choice.backend == "triton"} == TRITON_OPS
    assert "on the CPU" in found["swiglu"].others["cpp"]
    assert (
        "key mask" in found["masked_attention_qkv"].others["flash"]
        and "key mask" in found["masked_attention_qkv"].others["sdpa"]
    )
    told = shown("", operations.operations(list(found.values())))
    assert told.count("not cpp") >= 1 and "Triton" in told
    assert found["int8_linear"] == ("int8_linear", operations.ELSEWHERE, {}) and "CPU alone" in told


def test_an_extension_that_is_not_built_shows_as_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in dispatch.op_names():
        if "cpp" in dispatch.module_paths(op):
            monkeypatch.setitem(dispatch._OPS[op].loaded, "cpp", ImportError("No module named 'star_fast._C'"))
    found = {choice.op: choice for choice in operations.choices("cpu")}
    assert {choice.backend for choice in found.values()} == {"reference"}
    assert "cannot be imported" in found["sample_tokens"].others["cpp"]


def test_a_backend_that_fails_is_told_and_the_others_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise RuntimeError("no kernel image is available\nmore lines")

    for name in ("fake", "run"):
        monkeypatch.setattr(importlib.import_module(dispatch.module_paths("swiglu")["cpp"]), name, fail, raising=False)
    found = {choice.op: choice for choice in operations.choices("cpu")}
    assert found["swiglu"].backend == operations.NONE
    assert {found["swiglu"].others[name] for name in ("any", "cpp")} == {
        "it fails with RuntimeError: no kernel image is available"
    }
    assert all(choice.backend != operations.NONE for op, choice in found.items() if op != "swiglu")


@pytest.mark.parametrize(
    ("capability", "built_for", "fits"),
    [
        ((9, 0), ["sm_80", "sm_90", "compute_90"], True),
        ((8, 6), ["sm_80", "sm_90"], True),
        ((12, 0), ["sm_80", "sm_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((7, 0), ["sm_80", "sm_90", "compute_90"], False),
        ((10, 0), ["sm_90", "sm_100a"], True),
    ],
)
def test_a_gpu_that_torch_has_no_code_for_is_a_complaint(
    capability: tuple[int, int], built_for: list[str], fits: bool
) -> None:
    found = machine.gpus_fit([("H100", (9, 0)), ("Other", capability)], ["sm_90", *built_for])
    assert (found.mark == OK) == fits and "2 x" in found.told
    assert fits or ("no code for Other" in found.told and found.fix.startswith("pip install"))


@pytest.mark.parametrize(
    ("found", "wanted", "gpu", "mark", "fix"),
    [
        ("3.8.0", "~=3.8.0", True, OK, ""),
        ("3.8.2", "~=3.8.0", True, OK, ""),
        ("3.9.0", "~=3.8.0", True, MISSING, "pip install 'triton~=3.8.0'"),
        ("3.9.0", "~=3.8.0", False, WITHOUT, "pip install 'triton~=3.8.0'"),
        ("3.6.0+git1", "==3.6.0", True, OK, ""),
        ("3.6.1", "==3.6.0", True, MISSING, "pip install 'triton==3.6.0'"),
        ("", "~=3.8.0", True, MISSING, "pip install 'triton~=3.8.0'"),
        ("", "~=3.8.0", False, WITHOUT, "pip install 'triton~=3.8.0'"),
        ("3.7.0", "", True, OK, ""),
    ],
)
def test_torch_and_triton_are_a_pair_or_not(found: str, wanted: str, gpu: bool, mark: str, fix: str) -> None:
    told = machine.triton_fits(found, wanted, gpu)
    assert (told.mark, told.fix) == (mark, fix)


def test_the_pair_here_is_what_torchs_package_says() -> None:
    """The pin is read from torch's own metadata: a pattern that matches nothing would call every pair a good one."""
    [pair] = [finding for finding in machine.machine() if finding.name == "Triton"]
    assert (pair.mark == OK) == ("as torch wants it" in pair.told)


def test_more_threads_than_cores_are_a_complaint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.torch, "get_num_threads", lambda: 4096)
    [threads] = [finding for finding in machine.machine() if finding.name == "threads"]
    assert threads.mark == WITHOUT and "4096" in threads.told and "OMP_NUM_THREADS" in threads.fix


@pytest.mark.parametrize(("free_gib", "mark"), [(0.5, MISSING), (5, WITHOUT), (500, OK)])
def test_little_disk_is_told(free_gib: float, mark: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=int(free_gib * 2**30)))
    assert machine.disk(tmp_path).mark == mark and str(tmp_path) in machine.disk(tmp_path).told


def test_old_versions_are_complaints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.torch, "__version__", "2.9.1+cu128")
    monkeypatch.setattr(machine.sys, "version_info", (3, 10, 4))
    found = {finding.name: finding for finding in machine.machine()}
    assert (
        found["torch"].mark == found["Python"].mark == MISSING
        and "2.11" in found["torch"].told
        and "3.11" in found["Python"].told
    )


def test_the_versions_asked_for_are_the_packages_own() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={'.'.join(map(str, machine.OLDEST_PYTHON))}"
    assert f"torch>={'.'.join(map(str, machine.OLDEST_TORCH))}" in project["dependencies"]
    major, minor = packages.DEEPSPEED_FITS
    assert f"deepspeed>={major}.{minor},<{major}.{minor + 1}" in project["optional-dependencies"]["train"]


def test_the_impostor_is_not_taken_for_apex() -> None:
    nothing = packages.apex(find=absent("amp_C", "apex"))
    impostor = packages.apex(find=absent("amp_C"))
    broken = packages.apex(find=absent(), import_module=refuse)
    real = packages.apex(find=absent(), import_module=lambda name: None)
    assert [found.mark for found in (nothing, impostor, broken, real)] == [WITHOUT, WITHOUT, WITHOUT, OK]
    assert "not installed" in nothing.told and not nothing.fix
    assert "not NVIDIA's" in impostor.told and impostor.fix.startswith("pip uninstall apex && git clone")
    assert "undefined symbol" in broken.told and "more" not in broken.told and "git clone" in broken.fix


def test_flash_attention_counts_with_its_compiled_module_only() -> None:
    part, none = (
        packages.flash_attention(find=absent("flash_attn_2_cuda")),
        packages.flash_attention(find=absent("flash_attn_2_cuda", "flash_attn")),
    )
    assert part.mark == none.mark == WITHOUT and "Python part" in part.told and "not installed" in none.told
    assert "undefined symbol" in packages.flash_attention(find=absent(), import_module=refuse).told
    assert packages.flash_attention(find=absent(), import_module=lambda name: None).mark == OK


def test_the_placeholder_is_not_taken_for_dali() -> None:
    decoy = packages.dali(find=absent(), versions=lambda *names: "1.0" if names == ("nvidia-dali",) else "")
    assert decoy.mark == WITHOUT and "placeholder" in decoy.told and decoy.fix.startswith("pip uninstall nvidia-dali")
    hollow = packages.dali(find=absent("nvidia.dali"), versions=lambda *names: "2.4.0")
    assert hollow.mark == WITHOUT and "listed as installed" in hollow.told
    assert (
        packages.dali(find=absent(), versions=lambda *names: "2.4.0" if "nvidia-dali-cuda120" in names else "").mark
        == OK
    )
    assert "not installed" in packages.dali(find=absent(), versions=lambda *names: "").told


def test_a_deepspeed_that_cannot_be_loaded_or_was_not_tried_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot() -> Any:
        raise UserError("it cannot be imported (no module named hjson)")

    def looked(version: str, load: Callable[[], Any]) -> Finding:
        monkeypatch.setattr(packages, "version", lambda *names: version)
        return packages._deepspeed(load)

    def loads(**built: bool) -> Callable[[], Any]:
        return lambda: SimpleNamespace(git_version_info=SimpleNamespace(installed_ops=built))

    assert [looked(version, loads()).mark for version in ("", "0.18.9", "0.20.0", "0.19.1")] == [
        MISSING,
        MISSING,
        MISSING,
        OK,
    ]

    def no_compiler() -> Any:
        raise RuntimeError("CUDA_HOME does not exist\nmore")

    assert (
        "CUDA_HOME does not exist" in looked("0.19.8", no_compiler).told
        and "more" not in looked("0.19.8", no_compiler).told
    )
    assert "hjson" in looked("0.19.8", cannot).told and looked("0.19.8", cannot).mark == MISSING
    assert "compiled operations: cpu_adam;" in looked("0.19.8", loads(cpu_adam=True, fused_adam=False)).told


def test_the_extension_is_absent_or_broken_or_old_or_without_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_such(name: str) -> Any:
        raise ImportError("No module named 'star_fast._C'")

    (tmp_path / "csrc").mkdir()
    source, library = tmp_path / "csrc" / "sample_cpu.cpp", tmp_path / "_C.so"
    source.touch()
    library.touch()
    os.utime(source, (1000, 1000))
    built = SimpleNamespace(__file__=str(library), has_cuda=False, archs="")

    def looked() -> Finding:
        return packages.extension(lambda name: built, tmp_path)

    assert packages.extension(no_such).mark == WITHOUT and "not built" in packages.extension(no_such).told
    assert packages.extension(refuse).mark == MISSING and "another torch" in packages.extension(refuse).told
    assert looked().mark == OK and "without CUDA" in looked().told
    os.utime(source, (library.stat().st_mtime + 10,) * 2)
    assert (
        looked().mark == WITHOUT
        and "older than its sources (sample_cpu.cpp)" in looked().told
        and "build_ext --inplace" in looked().fix
    )
    os.utime(source, (1000, 1000))
    monkeypatch.setattr(packages, "has_gpu", lambda: True)
    assert looked().mark == WITHOUT and "CUDA_HOME" in looked().fix
    built.has_cuda, built.archs = True, "8.0;9.0"
    assert looked().mark == OK and "8.0;9.0" in looked().told


def test_weights_files_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(examination, "choices", lambda device: [])
    model = Transformer(ModelConfig(2, 2, 32, vocab=64, positions=16, num_classes=7))
    model.init_weights(torch.Generator().manual_seed(0))
    save_transformer(model, tmp_path / "small.pt")
    tokenizer = VQTokenizer(
        TokenizerConfig(
            base_channels=8,
            multipliers=(1, 2),
            residual_blocks=1,
            z_channels=8,
            code_channels=4,
            codebook=64,
            image_size=8,
        )
    )
    [alone] = [finding for finding in weight_files.weight_files(tmp_path) if finding.name == "VQ tokenizer"]
    assert alone.mark == WITHOUT and "vq_ds16_c2i.pt" in alone.told
    tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "small.pt").read_bytes()[:1000])
    (tmp_path / "notes.txt").write_text("no weights")
    (tmp_path / WEIGHTS_FILE).write_bytes(b"another file")
    found = {finding.name: finding for finding in weight_files.weight_files(tmp_path)}
    assert found.keys() == {"small.pt", "cut.pt", "tokenizer/tokenizer.safetensors", WEIGHTS_FILE}
    assert "transformer, 2 blocks, width 32, 64 codes, 16 an image, 7 classes" in found["small.pt"].told
    assert "VQ tokenizer, 64 codes, 1 for 2 x 2 pixels" in found["tokenizer/tokenizer.safetensors"].told
    assert found["cut.pt"].mark == found[WEIGHTS_FILE].mark == MISSING and "sha256" in found[WEIGHTS_FILE].told
    assert str(tmp_path) not in found["cut.pt"].told
    assert cli.main(["doctor", "--need", "sample", "--weights", str(tmp_path)]) == 1
    assert f"missing: weights: cut.pt, weights: {WEIGHTS_FILE}" in capfd.readouterr().out
    for no_folder in ("nowhere", "x" * 5000):
        assert cli.main(["doctor", "--weights", str(tmp_path / no_folder)]) == 2
        assert "expected a folder of weights files" in capfd.readouterr().err


def test_names_of_weights_files_do_not_reach_the_terminal_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(examination, "choices", lambda device: [])
    folder = tmp_path / "\x1b[31mred"
    folder.mkdir()
    (folder / "a\nb.pt").write_bytes(b"nothing")
    (folder / "gone.pt").symlink_to("gone.pt")  # not a file, whatever its name: never opened
    assert cli.main(["doctor", "--need", "sample", "--weights", str(folder)]) == 1
    lines = capfd.readouterr().out.split("\n")
    assert all(line.isprintable() for line in lines) and "missing: weights: a\\nb.pt" in lines
    assert f"Weights in {tmp_path}/\\x1b[31mred" in lines


def test_a_weights_file_that_cannot_be_read_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / WEIGHTS_FILE).write_bytes(b"nothing")

    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    [found, _] = weight_files.weight_files(tmp_path)
    assert found.mark == MISSING and "Permission denied" in found.told

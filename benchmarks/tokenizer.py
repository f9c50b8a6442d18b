"""How long `star-fast prepare FOLDER` takes on 600 natural pictures, tokenizer training included, and how good the
tokenizer is.

    python benchmarks/tokenizer.py [--settings NAME ...] [--save]      NAME: preset (what a newcomer gets) or earlier
                                                                       (600 steps of 64 images at a wider shape)

The pictures are random crops of the three photographs that come inside scikit-learn and matplotlib. Held-out ones are
cut from the right edge of each, which no picture to train on reaches into. Results of earlier calls are kept beside the
table, so that a long run need not be repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
import sklearn.datasets
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import timing  # noqa: E402 (needs the path above)
from star_fast.config import DataConfig, TokenizerConfig  # noqa: E402
from star_fast.data.prepare import collect_views  # noqa: E402
from star_fast.data.sources import ImageFolder, split_indices  # noqa: E402
from star_fast.data.views import make_views  # noqa: E402
from star_fast.model.tokenizer import VQTokenizer  # noqa: E402
from star_fast.presets import FOLDER_TOKENIZER  # noqa: E402
from star_fast.training.tokenizer_report import measure_tokenizer  # noqa: E402

PHOTOGRAPHS = {
    "china": Path(sklearn.datasets.__file__).parent / "images/china.jpg",
    "flower": Path(sklearn.datasets.__file__).parent / "images/flower.jpg",
    "portrait": Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg",
}
SIDES = (64, 160)  # pixels of a picture
APART = 170  # pixels at the right edge of each photograph, for held-out pictures only
EARLIER = TokenizerConfig(
    base_channels=32,
    multipliers=(1, 2, 2),
    residual_blocks=1,
    z_channels=64,
    code_channels=8,
    codebook=1024,
    image_channels=3,
    image_size=64,
    steps=600,
    images_per_step=64,
    lr=2e-3,
)
SETTINGS = {"preset": FOLDER_TOKENIZER, "earlier": EARLIER}
RESULTS = ROOT / "benchmarks/results/tokenizer.json"


def cut(photograph: Image.Image, right: bool, generator: np.random.Generator) -> Image.Image:
    """A random square of the photograph: of its right edge, or of all the rest."""
    side = int(generator.integers(SIDES[0], SIDES[1] + 1))
    left, end = (photograph.width - APART, photograph.width) if right else (0, photograph.width - APART)
    x, y = int(generator.integers(left, end - side + 1)), int(generator.integers(0, photograph.height - side + 1))
    return photograph.crop((x, y, x + side, y + side))


def make_pictures(folder: Path, a_class: int = 200) -> None:
    """FOLDER/class/NNN.png, one class a photograph; those that `star-fast prepare` holds out come
    from the right edge.
    """
    generator = np.random.Generator(np.random.Philox(0))
    held_out = set(
        split_indices(np.repeat(np.arange(len(PHOTOGRAPHS)), a_class), DataConfig().held_out_share)[1].tolist()
    )
    for number, (name, path) in enumerate(sorted(PHOTOGRAPHS.items())):
        photograph = Image.open(path).convert("RGB")
        (folder / name).mkdir(parents=True)
        for i in range(a_class):
            cut(photograph, number * a_class + i in held_out, generator).save(folder / name / f"{i:03d}.png")


def new_pictures(count: int = 300) -> torch.Tensor:
    """(count, 3, 64, 64) uint8 views of other pictures of the same parts that are trained on: what is new in them is
    the cut.
    """
    generator, photographs = (
        np.random.Generator(np.random.Philox(1)),
        [Image.open(path).convert("RGB") for path in PHOTOGRAPHS.values()],
    )
    cuts = [cut(photographs[i % len(photographs)], False, generator) for i in range(count)]
    views = [
        make_views(image, i, DataConfig(), FOLDER_TOKENIZER.image_size, FOLDER_TOKENIZER.image_channels, only=4)
        for i, image in enumerate(cuts)
    ]
    return torch.from_numpy(np.stack(views))


def held_out_psnr(tokenizer: VQTokenizer, folder: Path) -> dict[str, float]:
    """PSNR in dB of the held-out pictures of each photograph: apart, since one whose colours no picture to train on
    shows would drown the others.
    """
    source, found = ImageFolder(folder), {}
    held_out = split_indices(source.labels, DataConfig().held_out_share)[1]
    for label, name in enumerate(source.class_names):
        indices = held_out[source.labels[held_out] == label]
        views = collect_views(source, indices, DataConfig(), tokenizer.config, plain_only=True, progress=False)
        found[name] = round(measure_tokenizer(tokenizer, views).psnr_db, 2)
    return found


def judge(codes: Path, pictures: Path) -> dict[str, object]:
    """What is kept of a tokenizer's quality."""
    report, tokenizer = (
        json.loads((codes / "tokenizer/training.json").read_text()),
        VQTokenizer.load(codes / "tokenizer"),
    )
    again = measure_tokenizer(tokenizer, new_pictures())
    return {
        "new_cuts_psnr_db": again.psnr_db,
        "new_cuts_ssim": again.ssim,
        "held_out_psnr_db": held_out_psnr(tokenizer, pictures),
        **{name: report[name] for name in ("psnr_db", "codes_used", "codebook", "perplexity")},
    }


def measure(config: TokenizerConfig) -> dict[str, object]:
    """One `star-fast prepare` with these settings, as typed."""
    asked = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if getattr(config, f.name) != getattr(FOLDER_TOKENIZER, f.name)
    }
    options = [
        word
        for name, value in asked.items()
        for word in (
            f"--new-tokenizer.{name.replace('_', '-')}",
            *map(str, value if isinstance(value, tuple) else (value,)),
        )
    ]
    with tempfile.TemporaryDirectory() as work:
        make_pictures(Path(work, "pictures"))
        load = os.getloadavg()[0]
        spent = timing.process(
            [sys.executable, "-m", "star_fast.cli", "prepare", f"{work}/pictures", "--out", f"{work}/codes", *options],
            {**os.environ, "PYTHONPATH": timing.on_path(ROOT)},
        )
        judged = judge(Path(work, "codes"), Path(work, "pictures"))
    return {
        "settings": described(config),
        **spent._asdict(),
        "load_before": load,
        **timing.environment("cpu"),
        **judged,
    }


def described(config: TokenizerConfig) -> str:
    """The settings, for the table."""
    return (
        f"width {config.base_channels} x {config.multipliers}, {config.steps} steps of {config.images_per_step}, lr "
        f"{config.lr:g}"
    )


def table(found: dict[str, dict[str, object]]) -> str:
    """The page that is kept."""
    lines = [
        "# Own pictures: `star-fast prepare` with a tokenizer trained on them",
        "",
        "600 pictures of 64 to 160 pixels (540 to train on, ten crops each; 60 held out), from the files to the "
        "codes of all 6000 views. CPU time is that",
        "of all threads; where others used the machine too, the wall time is theirs as much as ours. New cuts: "
        "300 others of the parts trained on.",
        "Held out: cuts of the right edge of each photograph, which no picture to train on shows; the portrait's "
        "blue backdrop is there alone, so that",
        "what becomes of it is chance, and so is the mean over all three, which training.json has.",
        "",
        f"| | settings | wall | CPU time | new cuts: PSNR | SSIM | held out: {' | '.join(sorted(PHOTOGRAPHS))} | "
        "all | codes in use | perplexity |",
        "|---" * (9 + len(PHOTOGRAPHS)) + "|",
    ]
    for name, row in found.items():
        apart = " | ".join(f"{row['held_out_psnr_db'][photograph]:.2f} dB" for photograph in sorted(PHOTOGRAPHS))
        lines.append(
            f"| {name} | {row['settings']} | {row['wall_s']:.0f} s | {row['cpu_s']:.0f} s | "
            f"{row['new_cuts_psnr_db']:.2f} dB | "
            f"{row['new_cuts_ssim']:.3f} | {apart} | {row['psnr_db']:.2f} dB | {row['codes_used']} of "
            f"{row['codebook']} | {row['perplexity']:.0f} |"
        )
    lines += [
        "",
        *(
            f"{name}: {row['device']}, {row['threads']} threads, load before the run {row['load_before']:.1f}, "
            f"torch {row['torch']}, {row['commit']}."
            for name, row in found.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and with --save keep."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["preset"])
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/results/tokenizer.md, beside rows kept before"
    )
    arguments = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in arguments.settings:
        found[name] = measure(SETTINGS[name])
    print(table(found))
    if arguments.save:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(table(found))


if __name__ == "__main__":
    main()

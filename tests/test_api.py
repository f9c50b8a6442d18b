"""`import star_fast` as a notebook uses it: laziness, loading, drawing, codes, features, settings, training; and what
each says of a mistake.
"""

from __future__ import annotations

import inspect
import os
import pydoc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import star_fast
from star_fast import ImageModel, Images, RunConfig, UserError, cli
from star_fast.data.codes import CodeStore
from star_fast.evaluation.probe_features import extract_features
from star_fast.evaluation.probe_training import linear_probe
from star_fast.generation import generate
from star_fast.generation.render import Renderer
from star_fast.model.llamagen import load_tokenizer, save_transformer
from star_fast.model.tokenizer import from_uint8, to_uint8
from star_fast.model.weights import load_model
from tests.generation.small_model import CLASS_NAMES, images_of, save_small_model
from tests.small_digits import make_small_digits
from tests.training.conftest import one_rank as one_rank  # a fixture

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of three classes, 16 codes an image, 16-pixel grey images."""
    where = tmp_path_factory.mktemp("api")
    save_small_model(where / "model")
    return where / "model"


@pytest.fixture(scope="module")
def model(folder: Path) -> ImageModel:
    return star_fast.load(folder, dtype=torch.float32)


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_nothing_and_every_name_is_there() -> None:
    """In a process of its own: torch comes with the first name, and every name of __all__ can be had in any order,
    `train` before and after its module.
    """
    said = run_python(
        "import sys, star_fast\nprint('torch' in sys.modules, 'numpy' in sys.modules)\n"
        "print(callable(star_fast.train))\n"
        "import star_fast.train\nfrom star_fast import train\nprint(star_fast.train is train, callable(train))\n"
        "print([name for name in star_fast.__all__ if getattr(star_fast, name) is None])"
    )
    assert said.splitlines() == ["False False", "True", "True True", "[]"]


def test_help_names_everything() -> None:
    text = pydoc.render_doc(star_fast, renderer=pydoc.plaintext)
    assert all(name in text for name in star_fast.__all__)
    assert set(star_fast.__all__) <= set(dir(star_fast)) and "help(star_fast.load)" in star_fast.__doc__
    assert (
        "resume" in inspect.signature(star_fast.train).parameters and "data.codes" in star_fast.train.__call__.__doc__
    )
    with pytest.raises(AttributeError, match="has no attribute 'lode'; it has ImageModel"):
        star_fast.lode  # noqa: B018


def test_the_drawn_images_are_those_of_generate_and_the_tokenizer(folder: Path, model: ImageModel) -> None:
    """Class by class, in the order asked for, image k of the call with random stream k; the pixels by the tokenizer's
    own decoder.
    """
    drawn = model.sample(
        ["birch", 0, "birch"], n=2, guidance=1.5, top_k=5, top_p=0.9, temperature=0.8, cfg_interval=3, seed=7
    )
    loaded = load_model(folder)
    codes = generate(
        loaded.transformer,
        torch.tensor([1, 1, 0, 0, 1, 1]),
        guidance=1.5,
        top_k=5,
        top_p=0.9,
        temperature=0.8,
        cfg_interval=3,
        seed=7,
    )
    tokenizer = load_tokenizer(folder / "tokenizer")
    plain = to_uint8(tokenizer.decode(codes)).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    away = (drawn.pixels.int() - plain.int()).abs()  # drawn in bfloat16 where the processor multiplies it
    assert away.max() <= 8 and away.float().mean() < 1
    renderer = Renderer(tokenizer, model.device)
    assert torch.equal(drawn.pixels, renderer.start(codes).wait()) and torch.equal(
        model.decode(codes).pixels, drawn.pixels
    )
    assert torch.equal(model.decode(codes[2]).pixels, renderer.start(codes[2:3]).wait())
    assert not torch.equal(model.sample("birch", n=2, seed=8).pixels, model.sample("birch", n=2, seed=7).pixels)
    alone = generate(loaded.transformer, torch.tensor([3, 3]), seed=7)  # 3: the null class
    assert torch.equal(model.sample(None, n=2, guidance=1.0, seed=7).pixels, model.decode(alone).pixels)


def test_the_same_images_as_the_command_draws(folder: Path, tmp_path: Path) -> None:
    """Precision left to the default on both sides, in batches of three."""
    words = (
        f"sample --model {folder} --out {tmp_path / 'x.npz'} --images 7 --classes birch --batch-images 3 --seed 5 "
        "--no-grid"
    )
    assert cli.main(words.split()) == 0
    ours = star_fast.load(folder).sample("birch", n=7, batch_images=3, seed=5)
    assert np.array_equal(np.asarray(ours), images_of(tmp_path / "x.npz"))


def test_weights_that_change_change_the_images(folder: Path) -> None:
    """What draws keeps copies of weights: after a step of an optimizer, or of the tokenizer's, it must not draw with
    the old ones.
    """
    model = star_fast.load(folder)
    before = model.sample(1, n=2)
    optimizer = torch.optim.SGD(model.transformer.parameters(), lr=1.0)
    for parameter in model.transformer.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(parameter.dtype)
    optimizer.step()
    drawn, expected = model.sample(1, n=2, guidance=1.0), generate(model.transformer, torch.tensor([1, 1]))
    assert torch.equal(drawn.pixels, model.decode(expected).pixels) and not torch.equal(drawn.pixels, before.pixels)
    with torch.no_grad():
        for weight in model.tokenizer.parameters():
            weight.mul_(1.5)
    assert not torch.equal(model.decode(expected).pixels, drawn.pixels)


def test_codes_of_every_kind_of_image(model: ImageModel) -> None:
    """The same picture as PIL, list, array, tensor, Images and floats has the tokenizer's own codes; one of another
    size is cropped as for training.
    """
    pixels = (
        torch.randint(0, 256, (3, 16, 16, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        .expand(-1, -1, -1, 3)
        .contiguous()
    )
    floats = from_uint8(pixels[..., :1].permute(0, 3, 1, 2))
    expected = model.tokenizer.encode(floats)
    pictures = [Image.fromarray(image) for image in pixels.numpy()]
    for images in (pictures, tuple(pictures), pixels, pixels.numpy(), Images(pixels), floats):
        got = model.codes(images)
        assert got.dtype == torch.int64 and torch.equal(got, expected)
    assert torch.equal(model.codes(pictures[1]), expected[1:2]) and torch.equal(model.codes(pixels[1]), expected[1:2])
    assert torch.equal(model.codes(pictures, batch_images=2), expected)
    # Halved by ADM's box filter, then cut
    large = Image.fromarray(pixels[0].numpy()).resize((64, 48), Image.Resampling.NEAREST)
    box = np.asarray(large.convert("L"), dtype=np.float64).reshape(24, 2, 32, 2).mean((1, 3))
    halved = (
        Image.fromarray(np.floor(box + 0.5).astype(np.uint8))
        .resize((21, 16), Image.Resampling.BICUBIC)
        .crop((2, 0, 18, 16))
    )
    assert torch.equal(model.codes(large), model.codes(Image.merge("RGB", [halved] * 3)))


def test_features_are_those_that_the_probe_reads(tmp_path: Path) -> None:
    make_small_digits(tmp_path)
    model, store = (
        star_fast.load(tmp_path / "runs/digits", dtype=torch.float32),
        CodeStore.open(tmp_path / "data/digits"),
    )
    rows = store.held_out_indices
    codes = store.codes(rows, [store.plain_view])[:, 0]
    for block in (1, 3, 6):
        expected = extract_features(
            model.transformer, store, rows, store.plain_view, [block], range(store.positions), quiet=True
        )
        torch.testing.assert_close(model.features(codes, block=block, batch_images=7), expected, rtol=1e-5, atol=1e-6)
    assert model.contrast_depth == 3 and torch.equal(model.features(codes), model.features(codes, block=3))
    told = model.features(codes, store.labels[rows].tolist(), block=2)
    for same in (store.labels[rows], store.labels[rows].numpy(), list(store.labels[rows].numpy())):
        assert torch.equal(model.features(codes, same, block=2), told)
    assert torch.equal(told[3:4], model.features(codes[3:4], model.class_names[store.labels[rows][3]], block=2))
    assert not torch.allclose(told, model.features(codes, block=2))
    images = model.decode(codes)
    assert torch.equal(model.features(images), model.features(model.codes(images)))
    model.transformer.train()
    assert torch.equal(model.features(codes), model.features(codes)) and model.transformer.training
    teacher = star_fast.load(tmp_path / "runs/digits/model", weights="teacher")
    assert teacher.transformer.output.weight.dtype == (
        torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    )


def test_a_released_file_and_its_tokenizer(folder: Path, model: ImageModel, tmp_path: Path) -> None:
    save_transformer(model.transformer, tmp_path / "c2i.pt")
    bare = star_fast.load(tmp_path / "c2i.pt", dtype=torch.float32)
    (tmp_path / "names.txt").write_text("\n".join(CLASS_NAMES))
    whole = star_fast.load(
        str(tmp_path / "c2i.pt"),
        tokenizer=folder / "tokenizer",
        class_names=str(tmp_path / "names.txt"),
        dtype=torch.float32,
    )
    assert bare.class_names == ["0", "1", "2"] and whole.class_names == CLASS_NAMES and bare.record == {}
    assert (
        "no tokenizer" in repr(bare)
        and "codebook of 32" in repr(whole)
        and "3 classes: ash" in repr(whole)
        and "float32 on cpu" in repr(whole)
    )
    assert torch.equal(whole.sample("birch", n=2).pixels, model.sample("birch", n=2).pixels)
    assert torch.equal(bare.features(model.codes(whole.sample(0)), 1), model.features(model.codes(whole.sample(0)), 1))
    for function in (
        lambda: bare.sample(0),
        lambda: bare.codes(whole.sample(0)),
        lambda: bare.decode(torch.zeros(1, 16, dtype=torch.int64)),
    ):
        with pytest.raises(
            UserError,
            match=r"^(sample|codes|decode): .*c2i\.pt came without a tokenizer; load it with tokenizer=FOLDER or FILE$",
        ):
            function()
    handed = star_fast.load(tmp_path / "c2i.pt", tokenizer=whole.tokenizer, dtype=torch.float32)
    assert torch.equal(handed.sample(1).pixels, whole.sample(1).pixels)


def codes(*shape: int, fill: int = 0, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.full(shape, fill, dtype=dtype)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.sample("beech"), r"sample: classes: no class 'beech' \(near: birch\)"),
        (lambda m: m.sample([]), "sample: expected classes by name or number, or None, got "),
        (lambda m: m.sample(1.5), "sample: expected classes by name or number, or None, got 1.5"),
        (lambda m: m.sample("ash", n=0), "sample: n must be a whole number, 1 or more, got 0"),
        (
            lambda m: m.sample("ash", batch_images=True),
            "sample: batch_images must be a whole number, 1 or more, got True",
        ),
        (lambda m: m.sample("ash", guidance=0.5), "sample: guidance must be a number from 1"),
        (lambda m: m.sample("ash", seed=-1), "sample: seed must be a whole number"),
        (lambda m: m.codes("photo.png"), "codes: expected PIL images, or pixels as one array or tensor, got str"),
        (lambda m: m.codes(m.sample("ash"), batch_images=0), "codes: batch_images must be a whole number, 1 or more"),
        (
            lambda m: m.features(codes(2, 16), batch_images=0),
            "features: batch_images must be a whole number, 1 or more",
        ),
        (lambda m: m.features("photo.png"), "features: expected PIL images, or pixels as one array or tensor, got str"),
        (
            lambda m: m.codes(np.array([Image.new("L", (16, 16))], dtype=object)),
            "codes: expected pixels as numbers, got an array of object",
        ),
        (lambda m: m.codes([]), "codes: expected PIL images, or pixels as one array or tensor, got list"),
        (
            lambda m: m.codes(torch.zeros(2, 1, 8, 8)),
            r"codes: expected PIL images, uint8 \(N, H, W, 3\), or floating point \(N, 1, 16, 16\).*got torch.float32",
        ),
        (
            lambda m: m.codes(codes(2, 16, 16, 1, dtype=torch.uint8)),
            r"codes: expected .* got torch.uint8 of shape \(2, 16, 16, 1\)",
        ),
        (lambda m: m.codes(Image.new("RGB", (10**5, 1))), "codes: image 0: 100000 x 1 pixels: too long and thin"),
        (lambda m: m.decode(codes(2, 9)), r"decode: expected codes \(N, 16\) int64, got torch.int64 of shape \(2, 9\)"),
        (lambda m: m.decode(codes(2, 16, fill=32)), r"decode: codes must lie in 0 ... 31, got 32 ... 32"),
        (lambda m: m.decode([1, 2]), r"decode: expected codes \(N, 16\) int64, got list"),
        (lambda m: m.features(codes(2, 16), block=3), r"features: block must be a number 1 ... 2 \(0: 1\), got 3"),
        (
            lambda m: m.features(codes(2, 16), ["ash"] * 3),
            "features: expected one label, or one for each of 2 images, got 3",
        ),
        (lambda m: m.features(codes(2, 16), "elm"), "features: classes: no class 'elm'"),
        (lambda m: m.features(codes(2, 9)), r"features: expected codes \(N, 16\) int64"),
        (lambda m: star_fast.load("none/such"), "none/such: not found; expected a model folder"),
        (
            lambda m: star_fast.load(m.source, dtype=torch.int64),
            "load: dtype must be a floating-point torch.dtype, or None, got torch.int64",
        ),
        (lambda m: star_fast.load(m.source, weights="best"), "weights: expected student or teacher, got 'best'"),
        (lambda m: star_fast.load(m.source, device="tpu"), "device: expected cpu, cuda or cuda:N, got 'tpu'"),
        (lambda m: star_fast.run_config("huge"), "preset: expected one of tiny, B"),
        (
            lambda m: star_fast.run_config("tiny", {"train.max_step": 3}),
            r"run_config: there is no setting 'train.max_step'; near it: train.max_steps",
        ),
        (lambda m: star_fast.run_config("tiny", {"steps": 3}), r"run_config: there is no setting 'steps'"),
        (
            lambda m: star_fast.run_config("tiny", {"train.max_steps": "many"}),
            "train.max_steps: expected a value of type int, got 'many'",
        ),
        (
            lambda m: star_fast.run_config({"train": {}}),
            "run_config: expected a preset's name or a RunConfig, got dict",
        ),
        (
            lambda m: star_fast.train("tiny"),
            r"train: expected a RunConfig, as star_fast.run_config\('tiny'\) gives, got str",
        ),
        (
            lambda m: star_fast.train(star_fast.run_config("tiny", {"data.codes": ""})),
            "data.codes: expected the folder of a code store",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_the_function(
    call: Callable[[ImageModel], object], message: str, model: ImageModel
) -> None:
    with pytest.raises(UserError, match=message) as error:
        call(model)
    assert str(error.value).startswith(message[:5]) and "\n" not in str(error.value)


def test_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    make_small_digits(tmp_path)
    with pytest.raises(UserError, match="load: the tokenizer has 16 codes, the model 32"):
        star_fast.load(folder, tokenizer=tmp_path / "runs/digits/model/tokenizer")


def test_settings_by_their_names() -> None:
    config = star_fast.run_config("tiny", {"train.max_steps": 3, "data.codes": "x", "optim.lr_per_256_images": 1})
    assert isinstance(config, RunConfig) and (
        config.train.max_steps,
        config.data.codes,
        config.optim.lr_per_256_images,
    ) == (3, "x", 1.0)
    assert config.model == star_fast.run_config("tiny").model and star_fast.run_config(config, {}) == config
    assert star_fast.run_config(config, {"method.views": 3}).train.max_steps == 3


def test_training_from_python(one_rank: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains, resumes, starts from given weights, and its errors are the command's."""
    monkeypatch.chdir(tmp_path)
    make_small_digits(tmp_path)
    config = star_fast.run_config(
        "tiny",
        {"data.codes": "data/digits", "train.max_steps": 2, "train.images_per_step": 8, "train.save_every_steps": 100},
    )
    run = star_fast.train(config, "runs/new", init="runs/digits/model", init_weights="teacher")
    assert run == Path("runs/new") and star_fast.load(run).record["step"] == 2
    before = star_fast.load("runs/digits", weights="teacher", dtype=torch.float32).transformer.state_dict()
    after = star_fast.load(run, dtype=torch.float32).transformer.state_dict()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved and all((before[name] - after[name]).abs().max() < 0.05 for name in moved)
    with pytest.raises(UserError, match="holds checkpoints up to step-0000002; add --resume"):
        star_fast.train(config, run)
    assert (
        star_fast.load(star_fast.train(star_fast.run_config(config, {"train.max_steps": 3}), run, resume=True)).record[
            "step"
        ]
        == 3
    )
    plain = star_fast.load(
        star_fast.train(star_fast.run_config(config, {"train.max_steps": 1}), "runs/plain", plain=True)
    )
    assert plain.record["method"]["views"] == 1


def test_linear_probe_reads_what_is_there() -> None:
    """Position 0 holds the class, position 1 noise."""
    generator = torch.Generator().manual_seed(0)
    labels, held = torch.arange(400) % 4, torch.arange(80) % 4
    sets = [torch.randn(len(label), 2, 8, generator=generator) for label in (labels, held)]
    for features, label in zip(sets, (labels, held), strict=True):
        features[:, 0, :4] += 6 * torch.nn.functional.one_hot(label, 4)
    shares = linear_probe(sets[0], labels, sets[1], held, epochs=30)
    assert shares[0] > 0.95 and shares[1] < 0.5
    with pytest.raises(
        ValueError,
        match=r"^linear_probe: held_out must be \(N, P, D\), with the other's P and D, got shape \(80, 1, 8\)",
    ):
        linear_probe(sets[0], labels, sets[1][:, :1], held)
    with pytest.raises(ValueError, match=r"^linear_probe: labels of train must be \(400,\) int64"):
        linear_probe(sets[0], labels[:-1], sets[1], held)

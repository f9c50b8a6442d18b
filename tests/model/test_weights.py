"""model.weights: model folders are whole, say what they hold, and answer damage with one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from star_fast.config import ModelConfig, TokenizerConfig
from star_fast.errors import UserError
from star_fast.model import weights as weights_module
from star_fast.model.llamagen import save_transformer
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.transformer import Transformer
from star_fast.model.weights import load_into, load_model, save_model
from star_fast.records import to_dict
from star_fast.storage import StorageError, sha256_of_file

SMALL = ModelConfig(blocks=2, heads=2, width=32, vocab=37, positions=16, num_classes=3, dropout=0.2)
NAMES = ["zero", "one", "größe"]
RECORD = {"step": 12, "images_seen": 384, "method": {"views": 2, "mask_ratio": 0.25}}
TOKENIZER = TokenizerConfig(
    base_channels=8,
    multipliers=(1, 2),
    residual_blocks=1,
    z_channels=8,
    code_channels=4,
    codebook=37,
    image_channels=1,
    image_size=8,
)


def model(seed: int = 0, config: ModelConfig = SMALL) -> Transformer:
    built = Transformer(config)
    built.init_weights(torch.Generator().manual_seed(seed))
    torch.nn.init.normal_(built.output.weight, generator=torch.Generator().manual_seed(seed + 100))
    return built


def same(a: Transformer, b: Transformer) -> bool:
    return a.state_dict().keys() == b.state_dict().keys() and all(
        torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items()
    )


def expect_one_line(path: Path, *parts: str, weights: str = "student") -> None:
    with pytest.raises(UserError) as caught:
        load_model(path, weights=weights)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_student_teacher_tokenizer_and_record(tmp_path: Path) -> None:
    student, teacher, tokenizer = model(0), model(1), VQTokenizer(TOKENIZER)
    save_model(tmp_path / "model", student, class_names=NAMES, teacher=teacher, tokenizer=tokenizer, record=RECORD)
    loaded, other = load_model(tmp_path / "model"), load_model(tmp_path / "model", weights="teacher")
    assert same(loaded.transformer, student) and same(other.transformer, teacher)
    assert loaded.transformer.config == SMALL and not loaded.transformer.training
    assert loaded.class_names == NAMES and loaded.record == RECORD
    assert VQTokenizer.load(loaded.tokenizer_folder).weights_hash() == tokenizer.weights_hash()
    assert loaded.weights_sha256 == sha256_of_file(tmp_path / "model" / "model.safetensors") != other.weights_sha256
    assert sorted(entry.name for entry in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
        "teacher.safetensors",
        "tokenizer",
    ]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model"] == to_dict(SMALL) and config["class_names"] == NAMES
    tokens, label = torch.arange(15)[None], torch.tensor([3])
    assert torch.equal(loaded.transformer(tokens, label).logits, student.eval()(tokens, label).logits)


def test_dtypes(tmp_path: Path) -> None:
    student = model().bfloat16()
    save_model(tmp_path / "m", student, class_names=NAMES)
    assert same(load_model(tmp_path / "m").transformer, student)
    widened = load_model(tmp_path / "m", dtype=torch.float32).transformer
    assert widened.output.weight.dtype == torch.float32 and torch.equal(
        widened.output.weight, student.output.weight.float()
    )
    assert torch.equal(widened.rotary, Transformer(SMALL).rotary)


def test_teacher_by_name_tokenizer_by_folder_and_run_folder(tmp_path: Path) -> None:
    teacher = model(1)
    VQTokenizer(TOKENIZER).save(tmp_path / "codes" / "tokenizer")
    save_model(
        tmp_path / "run" / "model",
        model(),
        class_names=NAMES,
        teacher=teacher.state_dict(),
        tokenizer=tmp_path / "codes" / "tokenizer",
    )
    assert same(load_model(tmp_path / "run", weights="teacher").transformer, teacher)
    assert (tmp_path / "run" / "model" / "tokenizer" / "tokenizer.json").read_bytes() == (
        tmp_path / "codes" / "tokenizer" / "tokenizer.json"
    ).read_bytes()
    save_model(tmp_path / "bare", model(), class_names=NAMES)
    assert load_model(tmp_path / "bare").tokenizer_folder is None and load_model(tmp_path / "bare").record == {}


def test_a_released_file_loads_too(tmp_path: Path) -> None:
    student = model()
    save_transformer(student, tmp_path / "x.pt")
    loaded = load_model(tmp_path / "x.pt")
    assert (
        same(loaded.transformer, student)
        and loaded.class_names == ["0", "1", "2"]
        and loaded.tokenizer_folder is None
        and loaded.record == {}
    )
    assert loaded.weights_sha256 == sha256_of_file(tmp_path / "x.pt")
    expect_one_line(tmp_path / "x.pt", "a LlamaGen file holds no teacher", weights="teacher")


def test_saving_again_replaces_the_whole_folder(tmp_path: Path) -> None:
    save_model(tmp_path / "m", model(0), class_names=NAMES, teacher=model(1))
    save_model(tmp_path / "m", model(2), class_names=NAMES)
    assert same(load_model(tmp_path / "m").transformer, model(2))
    expect_one_line(tmp_path / "m", "holds no teacher", "use weights student", weights="teacher")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_a_failed_save_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "m", model(0), class_names=NAMES)

    def full(path: Path, value: object) -> None:
        raise StorageError(f"{path}: the disk is full")

    monkeypatch.setattr(weights_module, "atomic_write_json", full)
    with pytest.raises(StorageError, match="the disk is full"):
        save_model(tmp_path / "m", model(1), class_names=NAMES)
    assert same(load_model(tmp_path / "m").transformer, model(0))
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_other_peoples_files_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files than a model's \(notes.txt\)"):
        save_model(tmp_path, model(), class_names=NAMES)
    with pytest.raises(UserError, match="a file; expected a folder"):
        save_model(tmp_path / "notes.txt", model(), class_names=NAMES)
    assert (tmp_path / "notes.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_save_checks_what_it_is_given(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="class_names must name 3 classes, got 2"):
        save_model(tmp_path / "m", model(), class_names=NAMES[:2])
    wider = model(config=ModelConfig(**{**vars(SMALL), "vocab": 40}))
    with pytest.raises(
        ValueError, match=r"teacher must have the student's weights.*differing: output\.weight, tok_embeddings\.weight"
    ):
        save_model(tmp_path / "m", model(), class_names=NAMES, teacher=wider)
    assert not (tmp_path / "m").exists()


def edit(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_damage_is_told_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    expect_one_line(folder, f"{folder}: not found; expected a model folder")
    (tmp_path / "empty").mkdir()
    expect_one_line(tmp_path / "empty", "config.json: not found", "expected a model folder")
    expect_one_line(tmp_path, "weights: expected student or teacher, got 'ema'", weights="ema")

    def fresh() -> Path:
        save_model(folder, model(), class_names=NAMES)
        return folder / "model.safetensors"

    file = fresh()
    expect_one_line(file, "part of a model folder; give the folder")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    expect_one_line(folder, str(file), "truncated or not a safetensors file")
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    expect_one_line(folder, str(file), "its sha256 is not the one in config.json")
    file.unlink()
    expect_one_line(folder, f"{file}: not found; a model folder holds model.safetensors and config.json")
    fresh()
    (folder / "config.json").write_text("{")
    expect_one_line(folder, "config.json: truncated or not JSON")
    for changes, message in (
        ({"format_version": 99}, "expected format_version 1, got 99"),
        ({"model": {"depth": 3}}, "model.depth: unknown setting"),
        ({"class_names": NAMES[:2]}, "expected 3 class names (model.num_classes), got 2"),
        ({"record": None}, "record: expected a mapping by name, got None"),
    ):
        fresh()
        edit(folder, **changes)
        expect_one_line(folder, f"{folder / 'config.json'}: ", message)
    fresh()
    edit(folder, model=to_dict(SMALL) | {"width": 64})
    expect_one_line(folder, "cls_embedding.embedding_table.weight: expected (4, 64), found (4, 32)")
    fresh()
    edit(folder, model=to_dict(SMALL) | {"blocks": 3})
    expect_one_line(folder, "missing: layers.2.attention.wqkv.weight")


@pytest.mark.parametrize("released", [False, True])
def test_starting_from_given_weights(tmp_path: Path, released: bool) -> None:
    source, path = model(5), tmp_path / ("x.pt" if released else "m")
    save_transformer(source, path) if released else save_model(path, source, class_names=NAMES, teacher=model(6))
    target = model(0)
    load_into(target, path)
    assert same(target, source)
    if not released:
        load_into(target, path, weights="teacher")
        assert same(target, model(6))
    load_into(half := model(0).bfloat16(), path)
    assert torch.equal(half.output.weight, source.output.weight.bfloat16())

    for changes, message in (
        ({"width": 64}, "tok_embeddings.weight: expected (37, 64), found (37, 32)"),
        ({"blocks": 1}, "unexpected: layers.1."),
        ({"heads": 4}, "heads"),
        ({"vocab": 38}, "tok_embeddings.weight: expected (38, 32), found (37, 32)"),
        ({"num_classes": 4}, "weights of 3 classes, the data here has 4"),
    ):
        other = model(0, ModelConfig(**{**vars(SMALL), **changes}))
        before = {name: value.clone() for name, value in other.state_dict().items()}
        with pytest.raises(UserError) as caught:
            load_into(other, path)
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def refused(*arguments: object, **more: object) -> str:
    """What load_into says, having changed nothing."""
    target = arguments[0]
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_into(*arguments, **more)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    return str(caught.value)


TABLE = "cls_embedding.embedding_table.weight"


@pytest.mark.parametrize("released", [False, True])
def test_starting_on_other_classes(tmp_path: Path, released: bool) -> None:
    """Rows go by name, the null class's too, the rest of the weights as they are; what no name tells stays as it was
    drawn.
    """
    source, path = model(5), tmp_path / ("x.pt" if released else "m")
    save_transformer(source, path) if released else save_model(path, source, class_names=NAMES)
    there = {"class_names_there": NAMES} if released else {}
    names = ["größe", "two", "zero", "three", "Zero"]
    target, drawn = (model(0, ModelConfig(**{**vars(SMALL), "num_classes": 5})) for _ in range(2))
    assert load_into(target, path, class_names=names, **there) == [
        "class embeddings: 2 of 5 taken by name, 3 fresh: two, three, Zero"
    ]
    ours, theirs, fresh = (part.state_dict()[TABLE] for part in (target, source, drawn))
    for row, expected in enumerate((theirs[2], fresh[1], theirs[0], fresh[3], fresh[4], theirs[3])):
        assert torch.equal(ours[row], expected), row
    assert all(
        torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items() if name != TABLE
    )

    load_into(turned := model(0), path, class_names=NAMES[::-1], **there)  # as many, in another order
    assert torch.equal(turned.state_dict()[TABLE], theirs[[2, 1, 0, 3]])
    assert load_into(same_ones := model(0), path, class_names=NAMES, **there) == []
    assert same(same_ones, source)
    load_into(half := model(0, target.config).bfloat16(), path, class_names=names, **there)
    assert (
        torch.equal(half.state_dict()[TABLE][2], theirs[0].bfloat16())
        and half.state_dict()[TABLE].dtype == torch.bfloat16
    )
    assert "has 3 classes, got 2 names of them" in refused(
        model(0), path, class_names=NAMES, class_names_there=NAMES[:2]
    )


def test_starting_on_classes_whose_names_nobody_knows(tmp_path: Path) -> None:
    source = model(5)
    save_transformer(source, tmp_path / "x.pt")
    assert load_into(target := model(0), tmp_path / "x.pt", class_names=["a", "b", "c"]) == [
        "class embeddings: all 3 taken by number, since names are not known"
    ]
    assert same(target, source)
    more = model(0, ModelConfig(**{**vars(SMALL), "num_classes": 4}))
    assert (
        "x.pt: weights of 3 classes, the data here has 4: give the names of its 3 classes with --init-class-names FILE"
        in refused(more, tmp_path / "x.pt", class_names=["a", "b", "c", "d"])
    )


def test_starting_with_another_number_of_positions(tmp_path: Path) -> None:
    source = model(5)
    save_model(tmp_path / "m", source, class_names=NAMES)
    save_transformer(source, tmp_path / "x.pt")
    torch.save({"model": source.state_dict()}, tmp_path / "untold.pt")
    torch.save({"model": source.state_dict()}, tmp_path / "c2i_own_384.pt")
    for positions in (25, 4):
        for name in ("m", "x.pt"):
            target = model(0, ModelConfig(**{**vars(SMALL), "positions": positions}))
            rotary = target.rotary.clone()
            assert load_into(target, tmp_path / name, class_names=NAMES)[-1] == (
                f"positions: trained with 16, here {positions}; the rotary table is computed anew"
            )
            assert same(target, source) and target.config.positions == positions
            assert torch.equal(target.rotary, rotary) and torch.equal(rotary, Transformer(target.config).rotary)
            assert target(torch.zeros(1, positions - 1, dtype=torch.int64), torch.tensor([0])).logits.shape == (
                1,
                positions,
                37,
            )
        # A file that tells no positions contradicts none.
        assert load_into(model(0, target.config), tmp_path / "untold.pt") == []


def test_which_weights_to_start_from(tmp_path: Path) -> None:
    plain, averaged = model(5), model(6)
    torch.save(
        {
            "model": plain.state_dict(),
            "ema": averaged.state_dict(),
            "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}},
            "steps": 9,
        },
        tmp_path / "trained.pt",
    )
    for wanted, expected in (("", plain), ("model", plain), ("ema", averaged)):
        load_into(target := model(0), tmp_path / "trained.pt", weights=wanted)
        assert same(target, expected)
    for wanted in ("teacher", "student", "optimizer", "steps", "Model"):
        assert f"trained.pt: holds no weights '{wanted}'; it has model, ema" in refused(
            model(0), tmp_path / "trained.pt", weights=wanted
        )
    torch.save(plain.state_dict(), tmp_path / "bare.pt")
    assert "bare.pt: holds no weights 'ema'; it has weights without a name" in refused(
        model(0), tmp_path / "bare.pt", weights="ema"
    )
    torch.save({"model": plain.state_dict(), "ema": {"x": torch.zeros(2)}}, tmp_path / "odd.pt")
    assert "missing: cls_embedding" in refused(model(0), tmp_path / "odd.pt", weights="ema")

    save_model(tmp_path / "both", plain, class_names=NAMES, teacher=averaged)
    save_model(tmp_path / "one", plain, class_names=NAMES)
    for wanted, expected in (("", plain), ("student", plain), ("teacher", averaged)):
        load_into(target := model(0), tmp_path / "both", weights=wanted)
        assert same(target, expected)
    assert "both: holds no weights 'ema'; it has student, teacher" in refused(
        model(0), tmp_path / "both", weights="ema"
    )
    assert "one: holds no weights 'teacher'; it has student" in refused(model(0), tmp_path / "one", weights="teacher")

"""examples/ runs as it stands, in miniature: the ten lines, the notebook's cells, and ST-AR on decoders that are not
ours.
"""

from __future__ import annotations

import ast
import importlib.util
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from star_fast import UserError
from star_fast.data.codes import CodeStore
from star_fast.method import Projector, Student, Teacher, ema_decay, masking
from tests.small_digits import make_small_digits
from tests.training.conftest import one_rank as one_rank  # a fixture

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALLER = {
    '"train.max_steps": 200': '"train.max_steps": 2, "train.images_per_step": 8',
    '"train.max_steps": 20,': '"train.max_steps": 2, "train.images_per_step": 8,',
    "n=8": "n=2",
    "learn[:1000]": "learn[:30]",
    "epochs=20": "epochs=2",
}


def module_of(name: str, where: Path = EXAMPLES) -> Any:
    """An example as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", where / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the examples are run in, with what the quickstart leaves."""
    make_small_digits(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_smaller(name: str, digits: Path) -> dict[str, Any]:
    """Run an example with smaller numbers in it; its names and what they hold."""
    text = (EXAMPLES / name).read_text()
    for large, small in SMALLER.items():
        text = text.replace(large, small)
    (digits / name).write_text(text)
    return runpy.run_path(str(digits / name), run_name="__main__")


def test_the_ten_lines_are_ten_and_run(digits: Path, one_rank: torch.device, capsys: pytest.CaptureFixture) -> None:
    assert len(ast.parse((EXAMPLES / "ten_lines.py").read_text()).body) - 1 == 10  # the docstring is no line
    made = run_smaller("ten_lines.py", digits)
    assert len(made["images"]) == 4 and made["codes"].shape == (4, 16) and made["features"].shape == (4, 16, 96)
    assert (
        torch.equal(made["again"].pixels, made["model"].decode(made["codes"]).pixels)
        and made["features"].isfinite().all()
    )
    assert (
        digits / "runs/short/model/model.safetensors"
    ).exists() and "runs/short" in capsys.readouterr().out.splitlines()[-1]
    with Image.open("digits.png") as picture:
        assert picture.size == (2 * 56 + 4, 2 * 56 + 4)


def test_the_notebook_runs_cell_by_cell(
    digits: Path, one_rank: torch.device, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    text = (EXAMPLES / "notebook.py").read_text()
    assert text.count("# %%\n") >= 6 and text.count("# %% [markdown]") >= 6
    made = run_smaller("notebook.py", digits)
    assert len(made["images"]) == 40 and len(made["shares"]) == 8 and all(0 <= share <= 1 for share in made["shares"])
    for name in ("digits.png", "guidance-1.png", "guidance-2.png", "guidance-4.png", "probe.png", "after.png"):
        with Image.open(name) as picture:
            assert len(picture.convert("RGB").getcolors(2**24)) > 5, name
    assert "there and back changes a pixel by" in capsys.readouterr().out


def body_of(store: CodeStore, name: str) -> nn.Module:
    """A fresh decoder that is not ours."""
    torch.manual_seed(0)
    sizes = store.positions, store.codebook, len(store.class_names)
    if name == "plain":
        return module_of("own_model").Decoder(*sizes)
    return module_of("hugging_face_decoder").HuggingFaceDecoder(*sizes)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers is not installed: GPT-2 as its documentation describes it, the parts that the example touches,
    in plain torch.
    """

    class Config:
        def __init__(self, **settings: Any) -> None:
            self.__dict__.update(settings)

    class Block(nn.Module):
        def __init__(self, c: Config) -> None:
            super().__init__()
            self.heads, self.ln_1, self.ln_2 = c.n_head, nn.LayerNorm(c.n_embd), nn.LayerNorm(c.n_embd)
            self.qkv, self.out = nn.Linear(c.n_embd, 3 * c.n_embd), nn.Linear(c.n_embd, c.n_embd)
            self.mlp = nn.Sequential(
                nn.Linear(c.n_embd, 4 * c.n_embd), nn.GELU("tanh"), nn.Linear(4 * c.n_embd, c.n_embd)
            )

        def forward(self, x: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(self.ln_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            x = x + self.out(
                nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2).flatten(2)
            )
            return x + self.mlp(self.ln_2(x))

    class Body(nn.Module):
        def __init__(self, c: Config) -> None:
            super().__init__()
            self.wte, self.wpe, self.ln_f = (
                nn.Embedding(c.vocab_size, c.n_embd),
                nn.Embedding(c.n_positions, c.n_embd),
                nn.LayerNorm(c.n_embd),
            )
            self.h = nn.ModuleList(Block(c) for _ in range(c.n_layer))

        def forward(
            self,
            *,
            inputs_embeds: torch.Tensor,
            attention_mask: torch.Tensor | None,
            output_hidden_states: bool,
            use_cache: bool,
        ) -> Any:
            length = inputs_embeds.shape[1]
            visible = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
            if attention_mask is not None:
                visible = visible & (attention_mask == 1)[:, None, None]
            states = [inputs_embeds + self.wpe.weight[:length]]
            for block in self.h:
                states.append(block(states[-1], visible))
            normed = self.ln_f(states[-1])
            return types.SimpleNamespace(last_hidden_state=normed, hidden_states=(*states[:-1], normed))

    class LM(nn.Module):
        def __init__(self, c: Config) -> None:
            super().__init__()
            self.transformer, self.lm_head = Body(c), nn.Linear(c.n_embd, c.vocab_size, bias=False)
            self.lm_head.weight = self.transformer.wte.weight  # tied, as GPT-2's are

    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(GPT2Config=Config, GPT2LMHeadModel=LM))


@pytest.fixture(params=["plain", "hugging face", "hugging face, stand-in"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "hugging face" and importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    if request.param.endswith("stand-in"):
        stand_in(monkeypatch)
    return request.param


def test_a_decoder_that_is_not_ours_shows_what_the_method_needs(kind: str, digits: Path) -> None:
    """Causal, blind to hidden keys, `middle` at the right block, `last` before the final norm and `hidden` after it."""
    store = CodeStore.open("data/digits")
    model = body_of(store, kind).double().eval()
    codes = store.codes(torch.arange(3), [0])[:, 0]
    tokens, label, keep = codes[:, :-1], torch.tensor([1, 2, 10]), torch.ones(3, store.positions, dtype=torch.bool)
    keep[:, [4, 9]] = False
    at = {block: model.features(tokens, label, block=block) for block in (0, 1, 2, 3)}
    whole, masked = at[2], model.features(tokens, label, keep, block=2)
    assert torch.equal(model.features(tokens, label, block=4).middle, whole.last)  # of four blocks the last
    assert (
        at[0].middle is None
        and not torch.allclose(at[1].middle, at[2].middle)
        and whole.hidden.shape == (3, store.positions, 96)
    )
    norm = model.norm if kind == "plain" else model.body.ln_f
    torch.testing.assert_close(norm(whole.last), whole.hidden)
    later = tokens.clone()
    later[:, 7] = (later[:, 7] + 1) % store.codebook  # seen from position 8 on
    torch.testing.assert_close(model.features(later, label, block=2).last[:, :8], whole.last[:, :8])
    assert not torch.allclose(model.features(later, label, block=2).last[:, 8:], whole.last[:, 8:])
    hidden = tokens.clone()
    hidden[:, [3, 8]] = (hidden[:, [3, 8]] + 5) % store.codebook  # tokens 3 and 8 stand at the hidden positions 4 and 9
    changed = model.features(hidden, label, keep, block=2)
    others = [position for position in range(store.positions) if position not in (4, 9)]
    torch.testing.assert_close(changed.last[:, others], masked.last[:, others])
    assert not torch.allclose(changed.last[:, [4, 9]], masked.last[:, [4, 9]]) and not torch.allclose(
        masked.last, whole.last
    )


def test_a_decoder_that_is_not_ours_is_trained(kind: str, digits: Path) -> None:
    """Finite losses, gradients through each of the four, and a teacher that is the running mean of the student."""
    own, store = module_of("own_model"), CodeStore.open("data/digits")
    method = own.ST_AR
    own.IMAGES = 8
    model = body_of(store, kind)
    start = [weight.detach().clone() for weight in model.parameters()]
    losses = own.train(model, store, method, steps=2)
    assert all(value.isfinite() and value > 0 for value in losses)
    assert all(not torch.equal(before, weight) for before, weight in zip(start, model.parameters(), strict=True))
    student, teacher = (
        Student(model, Projector.of_method(96, method), method, 2),
        Teacher(model, method, 2).attach_whole(),
    )
    with torch.no_grad():  # weights at which teacher and student differ
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape))
    chosen = store.train_indices[:8].numpy()
    targets = store.codes(chosen, [0, 1]).flatten(0, 1)
    label = store.labels[chosen].repeat_interleave(2)
    keep = torch.from_numpy(masking.key_mask(0, 0, chosen, 2, store.positions, 0.25)).flatten(0, 1)
    positions = torch.tensor([1, 5, 9, 15])
    last, keys = teacher.features(targets[:, :-1], label, positions)
    losses = student(targets[:, :-1], label, targets, keep, last, keys, positions)
    block = model.blocks if kind == "plain" else model.body.h
    early, late = next(block[0].parameters()), next(block[3].parameters())
    for name in ("ar", "mim", "step", "view", "total"):
        value, contrast = getattr(losses, name), name in ("step", "view")
        gradients = torch.autograd.grad(
            value, [early, late, *student.projector.parameters()], retain_graph=True, allow_unused=True
        )
        assert gradients[0] is not None and gradients[0].isfinite().all() and gradients[0].abs().sum() > 0, name
        assert (gradients[1] is None) == contrast, (
            f"{name}: contrasts are taken after block 2, so block 4 has no part in them"
        )
        assert all((gradient is not None) == (contrast or name == "total") for gradient in gradients[2:]), name
    assert not any(weight.requires_grad for weight in teacher.model.parameters())
    before, now = next(teacher.model.parameters()).double(), next(model.parameters()).double()
    teacher.update(list(model.parameters()), 3)
    expected = before + (1 - ema_decay(method, 3)) * (now - before)
    torch.testing.assert_close(next(teacher.model.parameters()).double(), expected.detach(), rtol=1e-6, atol=1e-8)
    assert not torch.equal(expected, before)


def test_own_model_as_a_program(digits: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line a method with the probe at eight positions; where codes or transformers are missing, one line that says
    so.
    """
    text = (EXAMPLES / "own_model.py").read_text()
    assert len(text.splitlines()) < 80
    (digits / "own_model.py").write_text(
        text.replace("IMAGES = 96, 4, 4, 32", "IMAGES = 96, 4, 4, 8").replace("epochs: int = 30", "epochs: int = 2")
    )
    monkeypatch.syspath_prepend(str(EXAMPLES))  # where Python looks first when the file is run there

    def run(*options: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["own_model.py", *options])
        runpy.run_path(str(digits / "own_model.py"), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    lines = run("--steps", "2")
    assert [line.split()[0] for line in lines] == ["plain", "ST-AR"] and lines[0][5:] != lines[1][5:]
    assert all(line.count("%") == 8 and "next-token loss" in line for line in lines)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        SystemExit, match=r"^--hugging-face needs transformers, which cannot be imported .*: pip install transformers$"
    ):
        run("--hugging-face")
    stand_in(monkeypatch)
    assert len(run("--steps", "2", "--hugging-face")) == 2
    sys.modules.pop("hugging_face_decoder")
    (digits / "elsewhere").mkdir()
    monkeypatch.chdir(digits / "elsewhere")
    with pytest.raises(SystemExit, match="data/digits") as end:
        run()
    assert isinstance(end.value.code, str) and "\n" not in end.value.code


def test_without_transformers_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"^--hugging-face needs transformers, which cannot be imported"):
        module_of("hugging_face_decoder")

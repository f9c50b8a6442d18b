"""ST-AR for a decoder that is not ours, trained on the digits' codes without and with it, then read by a linear probe.
First: `star-fast prepare digits --out data/digits`. What a model must show: star_fast/model/features.py.
"""

import argparse

import torch
from torch import nn

from star_fast import UserError
from star_fast.data.codes import CodeStore
from star_fast.evaluation.probe import probe_positions
from star_fast.evaluation.probe_training import linear_probe
from star_fast.method import Features, Losses, MethodConfig, Projector, Student, Teacher, batches

WIDTH, BLOCKS, HEADS, IMAGES = 96, 4, 4, 32  # IMAGES a step, two views of each
PLAIN = MethodConfig(mask_ratio=0.0, mim_weight=0.0, contrast_weight=0.0)
ST_AR = MethodConfig(ema_decay=0.99, projector_width=256)


class Decoder(nn.Module):
    def __init__(self, positions: int, vocab: int, classes: int) -> None:
        super().__init__()
        self.classes, self.tokens = nn.Embedding(classes + 1, WIDTH), nn.Embedding(vocab, WIDTH)  # one more: no class
        self.places = nn.Parameter(0.02 * torch.randn(positions, WIDTH))
        sizes, style = (WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu"), {"batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(*sizes, **style) for _ in range(BLOCKS))
        self.norm, self.output = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocab, bias=False)

    def features(self, tokens, label, keep=None, *, block=0, last=True) -> Features:
        outputs = [torch.cat([self.classes(label)[:, None], self.tokens(tokens)], dim=1) + self.places]
        future = torch.ones(len(self.places), len(self.places), dtype=torch.bool).triu(1)
        for layer in self.blocks:
            outputs.append(layer(outputs[-1], src_mask=future, src_key_padding_mask=None if keep is None else ~keep))
        return Features(self.norm(outputs[-1]), outputs[-1], outputs[block] if block else None)


def train(model: nn.Module, store: CodeStore, method: MethodConfig, steps: int) -> Losses:
    student = Student(model, Projector.of_method(WIDTH, method), method, BLOCKS // 2)
    teacher = Teacher(model, method, BLOCKS // 2).attach_whole()
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.05)
    for step, batch in batches(store, method, IMAGES, end=steps):
        last, keys = teacher.features(*batch.teacher_inputs)
        losses = student(batch.tokens, batch.label, batch.targets, batch.keep, last, keys, batch.positions)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        teacher.update(list(model.parameters()), step)
    return losses


@torch.no_grad()
def probe(model: nn.Module, store: CodeStore, epochs: int = 30) -> dict[int, float]:
    """By position: the share of held-out images whose class a linear layer reads from the middle block, told none."""
    at, read = probe_positions(store.positions), []
    for rows in store.judging()[:2]:
        tokens = store.codes(rows, [store.plain_view])[:, 0, :-1]
        no_class = torch.full_like(rows, len(store.class_names))
        read += [model.features(tokens, no_class, block=BLOCKS // 2).middle[:, at], store.labels[rows]]
    return dict(zip(at, linear_probe(*read, epochs=epochs), strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--hugging-face", action="store_true", help="GPT-2's architecture in place of our own")
    options = parser.parse_args()
    try:
        store = CodeStore.open("data/digits")
        if options.hugging_face:
            from hugging_face_decoder import HuggingFaceDecoder as Decoder
        for name, method in (("plain", PLAIN), ("ST-AR", ST_AR)):
            torch.manual_seed(0)
            model = Decoder(store.positions, store.codebook, len(store.class_names))
            losses = train(model, store, method, options.steps)
            shares = "  ".join(f"{at}: {share:.0%}" for at, share in probe(model, store).items())
            print(f"{name:5} next-token loss {losses.ar:.3f}; class read at {shares}", flush=True)
    except UserError as error:
        raise SystemExit(str(error)) from error

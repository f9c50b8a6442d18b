"""ST-AR for a decoder that is not ours: it learns the digits' codes without and with it, then a linear probe reads its
features. Once, for the codes: `star-fast prepare digits --out data/digits`. --hugging-face takes GPT-2's architecture
instead. What a model must show: star_fast/model/features.py.
"""

import argparse

import torch
from torch import nn

from star_fast import UserError
from star_fast.data.codes import CodeStore
from star_fast.evaluation.probe import probe_positions
from star_fast.evaluation.probe_training import linear_probe
from star_fast.method import Features, Losses, MethodConfig, Projector, Student, Teacher, masking

WIDTH, BLOCKS, HEADS, IMAGES = 96, 4, 4, 32  # IMAGES a step, two views of each
METHODS = {
    "plain": MethodConfig(mask_ratio=0.0, mim_weight=0.0, contrast_weight=0.0),
    "ST-AR": MethodConfig(ema_decay=0.99, projector_width=256),
}


class Decoder(nn.Module):
    def __init__(self, positions: int, vocab: int, classes: int) -> None:
        super().__init__()
        # The last class: no class
        self.classes, self.tokens = nn.Embedding(classes + 1, WIDTH), nn.Embedding(vocab, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(positions, WIDTH))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(BLOCKS)
        )
        self.norm, self.output = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocab, bias=False)

    def features(self, tokens, label, keep=None, *, block=0, last=True) -> Features:
        outputs = [torch.cat([self.classes(label)[:, None], self.tokens(tokens)], dim=1) + self.places]
        future = torch.ones(len(self.places), len(self.places), dtype=torch.bool).triu(1)
        for layer in self.blocks:
            outputs.append(layer(outputs[-1], src_mask=future, src_key_padding_mask=None if keep is None else ~keep))
        return Features(self.norm(outputs[-1]), outputs[-1], outputs[block] if block else None)


def train(model: nn.Module, store: CodeStore, method: MethodConfig, steps: int, seed: int = 0) -> Losses:
    student, teacher = (
        Student(model, Projector.of_method(WIDTH, method), method, BLOCKS // 2),
        Teacher(model, method, BLOCKS // 2).attach_whole(),
    )
    optimizer, images = (
        torch.optim.AdamW(student.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.05),
        store.train_indices.numpy(),
    )
    for step in range(steps):
        epoch, place = divmod(step, len(images) // IMAGES)
        chosen = masking.epoch_order(seed, epoch, images)[place * IMAGES : (place + 1) * IMAGES]
        targets = store.codes(
            chosen, masking.choose_views(seed, epoch, chosen, method.views, len(store.views))
        ).flatten(0, 1)
        label = store.labels[chosen].repeat_interleave(method.views)
        label[torch.from_numpy(masking.label_drop(seed, epoch, chosen, method.views, 0.1)).flatten()] = len(
            store.class_names
        )
        keep = masking.key_mask(seed, epoch, chosen, method.views, store.positions, method.mask_ratio)
        positions = torch.from_numpy(masking.position_set(seed, step, store.positions, method.contrast_positions))
        last, keys = teacher.features(targets[:, :-1], label, positions) if method.has_teacher else (None, None)
        losses = student(
            targets[:, :-1],
            label,
            targets,
            None if keep is None else torch.from_numpy(keep).flatten(0, 1),
            last,
            keys,
            positions,
        )
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        teacher.update(list(model.parameters()), step)
    return losses


@torch.no_grad()
def probe(model: nn.Module, store: CodeStore, epochs: int = 30) -> dict[int, float]:
    """Share of held-out images whose class a linear layer names, by position: from the middle block's output, the model
    being told no class.
    """
    sets, at, no_class = store.judging()[:2], probe_positions(store.positions), len(store.class_names)
    codes = [store.codes(rows, [store.plain_view])[:, 0, :-1] for rows in sets]
    features = [
        model.features(part, torch.full((len(part),), no_class), block=BLOCKS // 2).middle[:, at] for part in codes
    ]
    return dict(
        zip(
            at,
            linear_probe(features[0], store.labels[sets[0]], features[1], store.labels[sets[1]], epochs=epochs),
            strict=True,
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--hugging-face", action="store_true")
    options = parser.parse_args()
    try:
        store = CodeStore.open("data/digits")
        if options.hugging_face:
            from hugging_face_decoder import HuggingFaceDecoder as Decoder
        for name, method in METHODS.items():
            torch.manual_seed(0)
            model = Decoder(store.positions, store.codebook, len(store.class_names))
            losses = train(model, store, method, options.steps)
            print(
                f"{name:5} next-token loss {losses.ar:.3f}; class read at",
                *(f"{at}: {share:.0%}" for at, share in probe(model, store).items()),
                flush=True,
            )
    except UserError as error:
        raise SystemExit(str(error)) from error

"""ST-AR training written out by hand for one rank, without DeepSpeed and image by image: what engine, batches and loop
must agree with.

The choices come from method.masking (held against its own tests) and one forward pass from the transformer; everything
around them is here once more.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from star_fast.config import RunConfig
from star_fast.data.codes import CodeStore
from star_fast.method import masking
from star_fast.method.student import Student
from tests.method.plain_llamagen import AdamW


def sequences(store: CodeStore, config: RunConfig, step: int) -> list[dict[str, Tensor]]:
    """Every view of every image of one optimizer step, in order: tokens, label, targets, keep, and the image's row."""
    seed, images = config.train.seed, store.train_indices.tolist()
    per_epoch = len(images) // config.train.images_per_step
    epoch, within = step // per_epoch, step % per_epoch
    shuffled = masking.epoch_order(seed, epoch, np.array(images)).tolist()
    made = []
    for image in shuffled[within * config.train.images_per_step : (within + 1) * config.train.images_per_step]:
        one, views = np.array([image]), config.method.views
        chosen = masking.choose_views(seed, epoch, one, views, len(store.views))[0]
        dropped = masking.label_drop(seed, epoch, one, views, config.model.label_dropout)[0]
        keep = masking.key_mask(seed, epoch, one, views, config.model.positions, config.method.mask_ratio)
        for view in range(views):
            targets = store.codes([image], [chosen[view]])[0, 0]
            label = config.model.num_classes if dropped[view] else int(store.labels[image])
            made.append(
                {
                    "image": torch.tensor(image),
                    "tokens": targets[:-1],
                    "targets": targets,
                    "label": torch.tensor(label),
                    "true": torch.tensor(int(store.labels[image])),
                    "keep": torch.ones(len(targets), dtype=torch.bool)
                    if keep is None
                    else torch.from_numpy(keep[0, view]),
                }
            )
    return made


def micro_batches(
    store: CodeStore, config: RunConfig, step: int, rank: int = 0, ranks: int = 1
) -> list[dict[str, Tensor]]:
    """One rank's forward passes of a step: micro-batch after micro-batch, each dealt to the ranks in turn;
    `images_seen` counts all ranks' images.
    """
    rows = sequences(store, config, step)
    size = config.train.micro_batch_images or config.train.images_per_step // ranks
    found = []
    for number in range(config.train.images_per_step // size):
        if number % ranks == rank:
            part = rows[number * size * config.method.views : (number + 1) * size * config.method.views]
            seen = step * config.train.images_per_step + number // ranks * ranks * size
            found.append(
                {name: torch.stack([row[name] for row in part]) for name in part[0]}
                | {"images_seen": torch.tensor(seen)}
            )
    return found


def learning_rate(config: RunConfig, step: int, total: int) -> float:
    """Peak is lr_per_256_images scaled; step 0 of n warm-up steps gets 1/n of it, step n - 1 all; then constant or half
    a cosine.
    """
    peak, optim = config.optim.lr_per_256_images * config.train.images_per_step / 256, config.optim
    if step + 1 <= optim.warmup_steps:
        return peak / optim.warmup_steps * (step + 1)
    if optim.schedule == "constant":
        return peak
    low = peak * optim.final_lr_share
    return low + (peak - low) * math.cos(math.pi / 2 * (step - optim.warmup_steps) / (total - optim.warmup_steps)) ** 2


class PlainTrainer:
    """Student, projector and teacher, one optimizer step at a time; float32, equal initial weights with `student`,
    which is not touched.
    """

    def __init__(self, config: RunConfig, store: CodeStore, student: Student, total: int) -> None:
        self.config, self.store, self.total = config, store, total
        self.student, self.projector = copy.deepcopy(student.transformer).train(), copy.deepcopy(student.projector)
        self.teacher = copy.deepcopy(student.transformer).eval()
        self.weights = {
            **{f"transformer.{name}": value for name, value in self.student.named_parameters()},
            **{f"projector.{name}": value for name, value in self.projector.named_parameters()},
        }
        optim = config.optim
        self.optimizer = AdamW(self.weights, 0.0, optim.beta1, optim.beta2, optim.eps, optim.weight_decay)

    def losses(self, batch: dict[str, Tensor], positions: Tensor) -> Tensor:
        """(total, ar, mim, step, view) of one micro-batch, with a graph behind them."""
        method, depth = self.config.method, self.config.contrast_depth
        with torch.no_grad():
            told = batch["true"] if method.teacher_label == "kept" else batch["label"]
            seen_all = self.teacher(batch["tokens"], told, blocks=(depth,), logits=False)
        torch.manual_seed(masking.dropout_seed(self.config.train.seed, 0, int(batch["images_seen"])))
        out = self.student(batch["tokens"], batch["label"], batch["keep"], blocks=(depth,))
        ar = F.cross_entropy(out.logits.flatten(0, 1), batch["targets"].flatten())
        distance = 1 - F.cosine_similarity(out.last, seen_all.last, dim=-1)
        mim = distance.mean() if method.mim_positions == "all" else distance[~batch["keep"]].mean()
        z, k = (
            F.normalize(x, dim=-1).unflatten(0, (-1, method.views))
            for x in (self.projected(out.features[depth][:, positions]), seen_all.features[depth][:, positions])
        )

        def nce(m: int, i: int, n: int, j: int) -> Tensor:
            logits = z[:, m, i] @ k[:, n, j].T / method.temperature
            if method.negatives == "slot":
                return F.cross_entropy(logits, torch.arange(len(z)))
            rows = [
                torch.cat(
                    [logits[b, b : b + 1]]
                    + [
                        z[b, m, i] @ k[other].flatten(0, 1).T / method.temperature
                        for other in range(len(z))
                        if other != b
                    ]
                )
                for b in range(len(z))
            ]
            return F.cross_entropy(torch.stack(rows), torch.zeros(len(z), dtype=torch.int64))

        M, K = method.views, len(positions)
        step = torch.stack([nce(m, i, m, j) for m in range(M) for i in range(K) for j in range(K) if i != j]).mean()
        view = torch.stack([nce(m, i, n, i) for i in range(K) for m in range(M) for n in range(M) if m != n]).mean()
        return torch.stack(
            [ar + method.mim_weight * mim + method.contrast_weight * (step + view) / 2, ar, mim, step, view]
        )

    def projected(self, x: Tensor) -> Tensor:
        """Linear layers with SiLU between, or batch norm over all rows and SiLU, by their weights alone."""
        layers, norms = (
            [module for module in self.projector if hasattr(module, "weight") and module.weight.ndim == rank]
            for rank in (2, 1)
        )
        for number, layer in enumerate(layers):
            x = F.linear(x if number == 0 else x * torch.sigmoid(x), layer.weight, layer.bias)
            if number < len(norms):
                x = F.batch_norm(
                    x.flatten(0, 1), None, None, norms[number].weight, norms[number].bias, training=True
                ).view_as(x)
        return x

    def step(self, step: int) -> tuple[Tensor, float]:
        """Mean losses (5,) over the step's micro-batches and the gradient's norm before clipping; student and teacher
        move.
        """
        batches, config = micro_batches(self.store, self.config, step), self.config
        positions = torch.from_numpy(
            masking.position_set(config.train.seed, step, config.model.positions, config.method.contrast_positions)
        )
        gradients, losses = {name: torch.zeros_like(value) for name, value in self.weights.items()}, torch.zeros(5)
        for batch in batches:
            terms = self.losses(batch, positions)
            found = torch.autograd.grad(terms[0] / len(batches), list(self.weights.values()))
            for total, gradient in zip(gradients.values(), found, strict=True):
                total += gradient
            losses += terms.detach() / len(batches)
        norm = float(torch.cat([gradient.flatten() for gradient in gradients.values()]).norm())
        self.optimizer.lr = learning_rate(config, step, self.total)
        self.optimizer.step(gradients, config.optim.clip_norm or math.inf)
        decay = (
            min(config.method.ema_decay, (1 + step) / (10 + step))
            if config.method.ema_warmup
            else config.method.ema_decay
        )
        with torch.no_grad():
            for mean, value in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mean += (1 - decay) * (value - mean)
        return losses, norm

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean next-token loss of the student as it is used later: nothing dropped or hidden, view 0 and true label of
        every held-out image.
        """
        images = self.store.held_out_indices
        targets = self.store.codes(images, [0])[:, 0]
        logits = copy.deepcopy(self.student).eval()(targets[:, :-1], self.store.labels[images]).logits
        return float(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))

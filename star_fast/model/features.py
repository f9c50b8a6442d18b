"""What the method asks of a model, whoever wrote it: two members. transformer.py is one such model,
examples/own_model.py has two others.

Letters: N sequences (B images times M views), T positions, D width, V codebook. Position 0 holds the condition (a
class, or one learnt vector), position t >= 1 holds token t - 1; the hidden state at t predicts token t.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor, nn


class Features(NamedTuple):
    """What a forward pass shows of itself, one dtype."""

    hidden: Tensor  # (N, T, D) what the output matrix multiplies: after the final norm
    last: Tensor  # (N, T, D) output of the last block, before the final norm
    middle: Tensor | None  # (N, T, D) output of the block that was asked for; None where none was


class FeatureModel(Protocol):
    """A causal decoder as method.student.Student trains it and method.teacher.Teacher follows it: an nn.Module with
    these two.
    """

    # To the tokens' logits, without bias; weight (V, D). It is multiplied by in the loss, never in `features`
    output: nn.Linear

    def features(
        self, tokens: Tensor, label: Tensor, keep: Tensor | None = None, *, block: int = 0, last: bool = True
    ) -> Features:
        """One causal forward pass.

        Args:
            tokens: (N, T-1) int64 inputs. label: (N,) int64, as the training batches hold them.
            keep: (N, T) bool, False where a position is hidden as attention key from every query, in every block; None
                hides nothing.
            block: whose output to return as `middle`, counted from 1; 0: none.
            last: False: only `middle` will be read, so later blocks may be left out; what `hidden` and `last` then are
                does not matter.
        """
        ...

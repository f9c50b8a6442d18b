"""A Hugging Face causal LM, GPT-2's architecture, as ST-AR trains it: what own_model.py --hugging-face takes."""

import torch
from torch import nn

from star_fast import UserError
from star_fast.method import Features

try:
    from transformers import GPT2Config, GPT2LMHeadModel
except ImportError as error:
    raise UserError(
        f"--hugging-face needs transformers, which cannot be imported ({error}): pip install transformers"
    ) from error


class HuggingFaceDecoder(nn.Module):
    """The LM's body reads embeddings: the class before the tokens."""

    def __init__(
        self, positions: int, vocab: int, classes: int, width: int = 96, blocks: int = 4, heads: int = 4
    ) -> None:
        super().__init__()
        lm = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab,
                n_positions=positions,
                n_embd=width,
                n_layer=blocks,
                n_head=heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        )
        self.body, self.output = lm.transformer, lm.lm_head
        self.classes = nn.Embedding(classes + 1, width)

    def features(
        self,
        tokens: torch.Tensor,
        label: torch.Tensor,
        keep: torch.Tensor | None = None,
        *,
        block: int = 0,
        last: bool = True,
    ) -> Features:
        """See star_fast/model/features.py. The last of `hidden_states` has passed the final norm already: what goes
        into that is taken there.
        """
        x = torch.cat([self.classes(label)[:, None], self.body.wte(tokens)], dim=1)
        seen: dict[str, torch.Tensor] = {}
        hook = self.body.ln_f.register_forward_pre_hook(lambda module, inputs: seen.update(last=inputs[0]))
        try:
            out = self.body(
                inputs_embeds=x,
                attention_mask=None if keep is None else keep.long(),
                output_hidden_states=True,
                use_cache=False,
            )
        finally:
            hook.remove()
        outputs = (*out.hidden_states[:-1], seen["last"])
        return Features(out.last_hidden_state, outputs[-1], outputs[block] if block else None)

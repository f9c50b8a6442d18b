"""What backward computes anew runs on the backend of the first time, also where backward comes after the block that
chose it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from star_fast.config import ModelConfig
from star_fast.model.transformer import Transformer
from star_fast.ops import dispatch
from star_fast.ops.triton.launching import interpreting


@pytest.mark.skipif(not interpreting(), reason="the chosen backend must be one that the CPU never takes by itself")
@pytest.mark.parametrize("keep_attention", [True, False])
def test_backend_is_kept(keep_attention: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer(ModelConfig(blocks=1, heads=1, width=16, vocab=7, positions=3, num_classes=2)).train()
    model.block_checkpointing, model.keep_attention = True, keep_attention
    ran, run = [], dispatch._run

    def noted(op: Any, backend: str, *rest: Any) -> Any:
        ran.append((op.name, backend))
        return run(op, backend, *rest)

    monkeypatch.setattr(dispatch, "_run", noted)
    with dispatch.use_backend("triton"):
        out = model(torch.tensor([[1, 2]]), torch.tensor([0]))
    forward = len(ran)
    with dispatch.use_backend("reference"):  # whatever holds now
        out.logits.sum().backward()
        assert dispatch._override == ("reference", {})
    again = ran[forward:]
    assert {name for name, _ in again} == {"add_rms_norm", "swiglu"} | (
        set() if keep_attention else {"masked_attention_qkv"}
    )
    assert {backend for _, backend in ran} == {"triton"}
    assert dispatch._override is None

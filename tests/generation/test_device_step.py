"""The CUDA path of a decoding step, traced on fake CUDA tensors: backends, devices, shapes and the
number of launches.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from star_fast.config import ModelConfig
from star_fast.generation import Decoder
from star_fast.generation.launch_count import step_launches
from star_fast.generation.sampling import Sampling
from star_fast.generation.step_graph import DeviceState
from star_fast.model.transformer import Transformer
from tests.generation.test_decoder import CONFIG, LABEL, small_model

XL = ModelConfig(blocks=36, heads=20, width=1280, vocab=16384, positions=256, num_classes=1000)


@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
def test_at_most_eight_launches_a_block_all_by_kernels(cache_dtype: torch.dtype | None) -> None:
    counted = step_launches(XL, cache_dtype=cache_dtype)
    assert {name: backend for name, backend in counted.backends.items() if name != "sample_tokens"} == {
        "add_rms_norm": "triton",
        "decode_attention": "triton",
        "swiglu": "triton",
    }
    assert counted.per_block == 8
    assert counted.by_kernel["aten.mm"] == 4 * 36 + 1
    if counted.backends["sample_tokens"] == "cpp":  # built with CUDA
        assert counted.outside == 9 and counted.by_kernel["sample_tokens_kernel"] == 1
    assert counted.total == 8 * 36 + counted.outside


def test_unguided_steps_carry_half_the_rows() -> None:
    counted = step_launches(XL, sampling=Sampling(guidance=1.0))
    assert counted.per_block == 8 and "aten.lerp" not in counted.by_kernel and "aten.repeat" not in counted.by_kernel


def test_a_traced_step_keeps_devices_shapes_and_dtypes() -> None:
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        decoder = Decoder(Transformer(CONFIG).eval(), rows=6)
        state = DeviceState.empty(3, CONFIG.positions, decoder.device)
        logits = decoder.logits(decoder.embed_tokens(state.tokens, True), state.position, 2.0)
        decoder.advance(state, Sampling(guidance=2.0), True)
    assert (
        decoder.device.type == "cuda"
        and logits.device.type == "cuda"
        and logits.shape == (3, CONFIG.vocab)
        and logits.dtype == torch.float32
    )
    assert state.codes_TB.shape == (CONFIG.positions, 3) and state.tokens.device.type == "cuda"


def eager(decoder: Decoder, label: Tensor, sampling: Sampling) -> Tensor:
    """(B, T) codes of the loop on the decoder's device without graphs, on the CPU."""
    state = DeviceState.empty(len(label), decoder.config.positions, decoder.device)
    state.begin(label.to(decoder.device), torch.arange(len(label)).to(decoder.device), sampling.seed)
    with torch.no_grad():
        for position in range(decoder.config.positions):
            decoder.advance(state, sampling, sampling.guided_at(position), first=position == 0)
    return state.codes_TB.t().cpu()


@pytest.mark.parametrize(("guidance", "cfg_interval"), [(2.0, -1), (3.0, 5), (1.0, -1)])
def test_the_device_step_draws_what_the_loop_draws(guidance: float, cfg_interval: int) -> None:
    """The body that a CUDA graph captures, run on the CPU with position, seed and tokens in tensors."""
    model = small_model(torch.float64)
    expected = Decoder(model, 6).generate(LABEL, guidance=guidance, cfg_interval=cfg_interval, top_k=9, seed=4)
    assert torch.equal(eager(Decoder(model, 6), LABEL, Sampling(guidance, cfg_interval, top_k=9, seed=4)), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("guidance", "cfg_interval"), [(2.0, -1), (3.0, 5), (1.0, -1)])
def test_graphs_draw_what_eager_steps_draw_on_the_same_device(
    guidance: float, cfg_interval: int, dtype: torch.dtype
) -> None:
    """Bit for bit: a graph replays the very kernels of the eager step. (Another device rounds otherwise, which may turn
    a draw.)
    """
    model = small_model(dtype).cuda()
    decoder = Decoder(model, 6)
    for seed in (4, 5):  # capture, then replay only
        expected = eager(Decoder(model, 6), LABEL, Sampling(guidance, cfg_interval, seed=seed))
        assert torch.equal(
            decoder.generate(LABEL, guidance=guidance, cfg_interval=cfg_interval, seed=seed).cpu(), expected
        )

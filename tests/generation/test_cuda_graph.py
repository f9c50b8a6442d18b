"""The decoder's CUDA path drawn on the CPU (tests/cuda_double.py): graphs, streams and devices as on a GPU, with real
numbers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from star_fast.generation import Decoder
from star_fast.generation.sampling import Sampling, draw
from star_fast.generation.step_graph import DeviceState, StepGraphs
from star_fast.model.transformer import Transformer
from star_fast.ops import dispatch, error_flag
from tests.cuda_double import CudaDouble, needs_no_gpu
from tests.cuda_order import CaptureBroken, Dangling, WrongDevice
from tests.cuda_tensors import DeviceTensor
from tests.generation.test_decoder import small_model
from tests.generation.test_device_step import eager

pytestmark = needs_no_gpu
DEVICE = "cuda:1"  # not the current one
LABEL = torch.tensor([0, 4, 2])
MODEL = {"blocks": 2, "positions": 7}


@pytest.fixture
def cuda() -> Iterator[CudaDouble]:
    with CudaDouble() as double, dispatch.use_backend("reference"):
        yield double


def on_gpu(dtype: torch.dtype = torch.float64, **changes: int) -> Transformer:
    return small_model(dtype, **{**MODEL, **changes}).to(DEVICE)


def drawn(decoder: Decoder, label: Tensor, **settings: Any) -> Tensor:
    codes = decoder.generate(label, **settings)
    assert isinstance(codes, DeviceTensor) and str(codes.device) == DEVICE
    return codes.cpu()


@pytest.mark.parametrize(
    "settings",
    [{"guidance": 2.0}, {"guidance": 1.0, "top_k": 9}, {"guidance": 3.0, "cfg_interval": 1, "top_p": 0.9}],
    ids=["guided", "unguided", "interval"],
)
def test_whole_images_by_graphs_are_bit_equal_to_eager(cuda: CudaDouble, settings: dict[str, Any]) -> None:
    decoder, without_graphs = Decoder(on_gpu(torch.float32), 6), Decoder(on_gpu(torch.float32), 6)
    for seed in (4, 5):  # the second batch replays what the first captured
        expected = eager(without_graphs, LABEL, Sampling(**settings, seed=seed))
        assert torch.equal(drawn(decoder, LABEL, seed=seed, **settings), expected)
    assert len(decoder._graphs._graphs) == (3 if "cfg_interval" in settings else 2), (
        "the first step, and one a kind of later step"
    )
    assert len(expected.unique()) > 3


def test_batch_sizes_in_turn_and_what_the_cpu_draws(cuda: CudaDouble) -> None:
    decoder, on_cpu = Decoder(on_gpu(), 8), Decoder(small_model(torch.float64, **MODEL), 8)
    kept = []
    for size, seed in ((3, 4), (1, 5), (4, 6), (3, 7)):
        label = torch.arange(size) % 5
        kept.append((decoder.generate(label, guidance=2.0, seed=seed), on_cpu.generate(label, guidance=2.0, seed=seed)))
    assert len(decoder._graphs._graphs) == 3 * 2  # the first step and later ones of three batch sizes
    for codes, expected in kept:  # looked at last: no batch may overwrite an earlier one's codes
        assert torch.equal(codes.cpu(), expected)


def test_our_own_kernels_are_captured_and_start_on_their_tensors_device() -> None:
    with CudaDouble() as double, dispatch.use_backend("triton", sample_tokens="reference"):
        model = on_gpu(torch.float32, blocks=1, positions=4)
        decoder, label = Decoder(model, 2), LABEL[:1]
        codes = drawn(decoder, label, guidance=2.0, seed=1)
        started = len(double.launches)
        assert torch.equal(codes, drawn(decoder, label, guidance=2.0, seed=1))
        assert len(double.launches) == started, "replays only, from the first position on"
        assert torch.equal(codes, eager(Decoder(model, 2), label, Sampling(guidance=2.0, seed=1)))
        assert {name for name, _ in double.launches} == {
            "add_rms_norm_forward",
            "decode_attention_step",
            "swiglu_forward",
        }
        assert {device for _, device in double.launches} == {1} and double.current == 0


# Faults put back, one at a time.


def draws_other_codes() -> bool:
    """Whether two batches by graphs differ from the eager loop's."""
    decoder = Decoder(on_gpu(), 6)
    return any(not torch.equal(drawn(decoder, LABEL, seed=seed, guidance=2.0), on_cpu(seed)) for seed in (4, 5))


@functools.cache
def on_cpu(seed: int) -> Tensor:
    return Decoder(small_model(torch.float64, **MODEL), 6).generate(LABEL, seed=seed, guidance=2.0)


def drawing_with(change: Any) -> Any:
    """`advance` with `change(state, sampling)` giving what the draw gets instead of (seed, position)."""

    def wrong(decoder: Decoder, state: DeviceState, sampling: Sampling, guided: bool, first: bool) -> None:
        seed, position = change(state, sampling)
        embedded_RD = decoder.embed_label(state.label, guided) if first else decoder.embed_tokens(state.tokens, guided)
        logits_BV = decoder.logits(embedded_RD, position, sampling.guidance if guided else 1.0)
        draw(logits_BV, sampling, seed, state.image_index, position, state.tokens)
        state.keep_tokens()

    return wrong


def test_the_loop_without_a_fault_passes(cuda: CudaDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "advance", drawing_with(lambda state, sampling: (state.seed, state.position)))
    assert not draws_other_codes()


def test_a_position_baked_in_is_noticed(cuda: CudaDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "advance", drawing_with(lambda state, sampling: (state.seed, 1)))
    assert draws_other_codes()


def test_a_position_read_back_is_noticed(cuda: CudaDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "advance", drawing_with(lambda state, sampling: (state.seed, int(state.position))))
    with pytest.raises(CaptureBroken, match="the host waits for the device during a capture"):
        draws_other_codes()


def test_a_seed_baked_in_is_noticed(cuda: CudaDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "advance", drawing_with(lambda state, sampling: (sampling.seed, state.position)))
    assert draws_other_codes()


def test_a_tensor_made_for_the_capture_and_freed_is_noticed(cuda: CudaDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = StepGraphs._capture

    def with_a_seed_of_its_own(self: Any, advance: Any, state: DeviceState, *rest: Any) -> Any:
        seed = torch.zeros((), dtype=torch.int64, device=state.tokens.device)  # nothing holds it after the return
        wrong = drawing_with(lambda state, sampling: (seed, state.position))
        return capture(self, functools.partial(wrong, advance.__self__), state, *rest)

    monkeypatch.setattr(StepGraphs, "_capture", with_a_seed_of_its_own)
    with pytest.raises(Dangling, match="memory that was freed after the capture"):
        draws_other_codes()


def test_a_state_that_the_capture_replaces_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens land in a tensor that the capture made, and the one that the next step reads is gone."""
    right = Decoder.advance

    def wrong(decoder: Decoder, state: DeviceState, sampling: Sampling, guided: bool, first: bool) -> None:
        if first:
            return right(decoder, state, sampling, guided, first)
        logits_BV = decoder.logits(
            decoder.embed_tokens(state.tokens, guided), state.position, sampling.guidance if guided else 1.0
        )
        state.tokens = draw(logits_BV, sampling, state.seed, state.image_index, state.position, None)
        state.keep_tokens()

    monkeypatch.setattr(Decoder, "advance", wrong)
    with (
        pytest.raises(Dangling, match="memory that was freed after the capture"),
        CudaDouble(),
        dispatch.use_backend("reference"),
    ):
        draws_other_codes()


def test_memory_of_a_graph_holds_nothing_between_replays(cuda: CudaDouble) -> None:
    out, graph = torch.zeros(3, device="cuda:0"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        own = torch.empty(3, device="cuda:0")
        out.copy_(own)
        own.fill_(7.0)
        late = own + 1
    del own
    assert torch.equal(out.cpu(), torch.zeros(3)) and late.isnan().all()  # a capture runs nothing
    for _ in range(2):
        graph.replay()
    assert out.isnan().all() and torch.equal(late.cpu(), torch.full((3,), 8.0))


def test_an_output_that_is_not_copied_is_noticed(cuda: CudaDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceTensor, "clone", lambda self: self, raising=False)
    decoder = Decoder(on_gpu(), 1)
    first = decoder.generate(LABEL[:1], seed=4)
    before = first.cpu()
    decoder.generate(LABEL[:1], seed=5)
    assert not torch.equal(first.cpu(), before)


def test_a_flag_made_inside_the_capture_is_refused(cuda: CudaDouble) -> None:
    with (
        cuda.on(DEVICE),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
        pytest.raises(RuntimeError, match="must exist before a CUDA graph is captured"),
    ):
        error_flag.flag(torch.device(DEVICE))


@pytest.mark.parametrize("where", ["capture", "launch"])
def test_a_removed_guard_is_noticed(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = {"capture": "star_fast.generation.step_graph", "launch": "star_fast.ops.triton.launching"}[where]
    monkeypatch.setattr(f"{module}.on_device", lambda device: contextlib.nullcontext())
    with CudaDouble(), dispatch.use_backend("reference" if where == "capture" else "triton", sample_tokens="reference"):
        decoder = Decoder(on_gpu(torch.float32, blocks=1, positions=4), 2)
        # A capture holds the guard for the launches in it
        draw_all = {
            "capture": lambda: decoder.generate(LABEL[:1], guidance=2.0),
            "launch": lambda: eager(decoder, LABEL[:1], Sampling(guidance=2.0)),
        }
        with pytest.raises(WrongDevice):
            draw_all[where]()

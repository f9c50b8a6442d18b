"""The renderer's own stream (tests/cuda_double.py): right numbers, and an order in which nothing that is needed for it
can be left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from star_fast.generation.render import Renderer
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.tokenizer_blocks import Norm
from star_fast.ops import dispatch
from tests.cuda_double import CudaDouble, needs_no_gpu
from tests.cuda_order import Event, Memory, Race, Stream
from tests.generation.small_model import TOKENIZER

pytestmark = needs_no_gpu
CODES = torch.arange(32).view(2, 16)


@pytest.fixture(scope="module")
def tokenizer() -> VQTokenizer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VQTokenizer(TOKENIZER).eval()


@pytest.fixture
def plain_norms() -> Iterator[None]:
    """Without the norms' kernels, which decide nothing about the order and take seconds in the interpreter."""
    with dispatch.use_backend("reference"):
        yield


def two_batches(tokenizer: VQTokenizer) -> list[Tensor]:
    """As sampling does: codes drawn on the current stream, their images on the way while the next codes are drawn. Not
    on the current device.
    """
    device = torch.device("cuda:1")
    with CudaDouble() as double:
        renderer, on_their_way = Renderer(tokenizer, device), []
        assert renderer.stream.device == device
        state = CODES.to(device)
        for _ in range(2):
            codes = state.clone()
            on_their_way.append(renderer.start(codes))
            del codes
            state.add_(1).remainder_(32)  # the next batch
        images = [rendering.wait().clone() for rendering in on_their_way]
        assert double.current == 0
    return images


def test_images_are_those_of_one_stream(tokenizer: VQTokenizer) -> None:
    plain, batches = Renderer(tokenizer, torch.device("cpu"), float32=True), (CODES, (CODES + 1) % 32)
    with CudaDouble() as double:
        alone = Renderer(tokenizer, torch.device("cuda:1"))
        expected = [alone._images(codes.to("cuda:1")).cpu() for codes in batches]
    norms = sum(isinstance(module, Norm) for module in tokenizer.decoder.modules())
    assert Counter(name for name, _ in double.launches) == dict.fromkeys(
        ("group_norm_moments", "group_norm_merge", "group_norm_scaled"), 2 * norms
    )
    for got, same, codes in zip(two_batches(tokenizer), expected, batches, strict=True):
        assert torch.equal(got, same)
        in_float32 = plain.start(codes).wait()
        # bfloat16 rounds a level or two away
        assert (got.int() - in_float32.int()).abs().max() <= 4 < in_float32.float().std()


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ((Stream, "wait_stream"), "while stream 1 may not be done with it: a wait is missing"),
        ((Event, "synchronize"), "by the host uses memory .* a wait is missing"),
    ],
)
def test_a_missing_wait_is_noticed(
    tokenizer: VQTokenizer,
    removed: tuple[type, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    plain_norms: None,
) -> None:
    monkeypatch.setattr(*removed, lambda *arguments: None)
    with pytest.raises(Race, match=message):
        two_batches(tokenizer)


def test_memory_that_the_other_stream_still_reads_is_noticed(
    tokenizer: VQTokenizer, monkeypatch: pytest.MonkeyPatch, plain_norms: None
) -> None:
    monkeypatch.setattr(Memory, "record", lambda self, stream: None)
    with pytest.raises(Race, match="is freed while stream 2 may still use it"):
        two_batches(tokenizer)


def test_an_event_recorded_elsewhere_is_noticed(
    tokenizer: VQTokenizer, monkeypatch: pytest.MonkeyPatch, plain_norms: None
) -> None:
    """Recorded on the stream that decodes instead of the one that renders."""
    record = Event.record
    monkeypatch.setattr(Event, "record", lambda self, stream=None: record(self, self.double.default[1]))
    with pytest.raises(Race, match="by the host"):
        two_batches(tokenizer)

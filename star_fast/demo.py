"""`star-fast demo MODEL`: a page that draws images of a class as they are asked for. Gradio (extra `demo`) makes the
page.
"""

from __future__ import annotations

import html
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from PIL import Image
from torch import Tensor

from star_fast.errors import UserError, printable
from star_fast.generation.device import take_device
from star_fast.generation.render import Renderer
from star_fast.generation.sampling import Sampling
from star_fast.model.class_names import names_for_model
from star_fast.model.llamagen import load_tokenizer
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.weights import load_model
from star_fast.records import require

_LEAST_SIDE = 128  # pixels of an image on the page: smaller ones are enlarged by a whole factor
_MOST_IMAGES = 64
# Gradio lays the gallery's name over its first image and scrolls what has room on the page.
_STYLE = """<style>
#title * { padding: 0; margin: 0; }
#title p { margin-top: 0.5rem; opacity: 0.7; }
#images .grid-wrap { max-height: none; overflow: visible; padding-top: 2.75rem; }
</style>"""
NO_CLASS = "no class"  # the null class: what the model draws without being told


@dataclass(frozen=True)
class DemoCommand:
    """Draw images in a browser: choose a class, guidance, temperature, top-k, top-p and a seed."""

    model: tyro.conf.Positional[str]  # a run folder, a model folder, or a LlamaGen file
    tokenizer: str = ""  # tokenizer folder or LlamaGen's file; empty: the model's own
    class_names: str = ""  # names of a LlamaGen file's classes: a file with one a line, or "imagenet"
    weights: Literal["student", "teacher"] = "student"  # of a model folder
    device: str = ""  # cpu, cuda ...; empty: a GPU where there is one
    host: str = "127.0.0.1"  # 0.0.0.0: anybody who reaches this machine
    port: int = 7860

    def __post_init__(self) -> None:
        require(1 <= self.port <= 65535, "port", self.port, "1 ... 65535")


class Painter:
    """A model with its tokenizer, ready to draw.

    Args:
        batch_images: drawn together, and shown when they are done.
    """

    def __init__(self, command: DemoCommand, batch_images: int = 2) -> None:
        device = take_device(command.device)
        loaded = load_model(command.model, weights=command.weights)
        where = command.tokenizer or loaded.tokenizer_folder
        if not where:
            raise UserError(f"{command.model}: comes without a tokenizer; give --tokenizer FOLDER or FILE")
        self.tokenizer: VQTokenizer = load_tokenizer(where).eval()
        if self.tokenizer.config.codebook != loaded.transformer.config.vocab:
            raise UserError(
                f"{where}: this tokenizer has {self.tokenizer.config.codebook} codes, the model "
                f"{loaded.transformer.config.vocab}; give the one "
                "that the model was trained with"
            )
        self.model, self.device, self.batch_images = loaded.transformer.to(device).eval(), device, batch_images
        self.renderer = Renderer(self.tokenizer, device)
        self.class_names = names_for_model(loaded.class_names, command.class_names)

    def labels(self) -> list[tuple[str, int]]:
        """What can be chosen: each class, and none. Names that several classes have get their numbers."""
        names = self.class_names
        shown = (
            [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names)]
            if len(set(names)) < len(names)
            else names
        )
        return [*((name, number) for number, name in enumerate(shown)), (NO_CLASS, len(names))]

    def about(self) -> str:
        """What draws, in a line."""
        model, tokenizer = self.model.config, self.tokenizer.config
        side = math.isqrt(model.positions) * tokenizer.downsampling
        return (
            f"{len(self.class_names):,} classes; "
            f"{sum(weight.numel() for weight in self.model.parameters()) / 1e6:,.1f} M parameters, "
            f"{model.positions:,} codes an image, {side} × {side} pixels; on {self.device}"
        )

    def draw(
        self, label: int, images: int, guidance: float, temperature: float, top_k: int, top_p: float, seed: int
    ) -> Iterator[list[Image.Image]]:
        """All images so far, after each batch. The same settings and seed give the same images as `star-fast sample`
        with that seed draws of one class.

        Raises:
            UserError: a setting that makes no sense.
        """
        try:
            require(1 <= images <= _MOST_IMAGES, "images", images, f"1 ... {_MOST_IMAGES}")
            sampling = Sampling(float(guidance), -1, float(temperature), int(top_k), float(top_p), int(seed))
        except ValueError as error:
            raise UserError(str(error).removeprefix("generate: ")) from error
        from star_fast.generation import generate

        done: list[Image.Image] = []
        for start in range(0, int(images), self.batch_images):
            index = torch.arange(start, min(start + self.batch_images, int(images)), device=self.device)
            codes = generate(
                self.model,
                torch.full_like(index, int(label)),
                image_index=index,
                guidance=sampling.guidance,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                seed=sampling.seed,
            )
            done += map(_as_picture, self.renderer.start(codes).wait())
            yield list(done)


def _as_picture(image: Tensor) -> Image.Image:
    """(H, W, 3) uint8, enlarged by a whole factor where it is small."""
    picture = Image.fromarray(image.numpy())
    factor = max(1, -(-_LEAST_SIDE // picture.width))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def page(painter: Painter, title: str) -> Any:
    """The Gradio page. Raises UserError naming the extra where Gradio is missing."""
    try:
        import gradio as gr
    except ImportError as error:
        raise UserError(
            f"the demo needs Gradio, which cannot be imported ({error}): pip install 'star_fast[demo]'"
        ) from error

    def draw(*settings: Any) -> Iterator[list[Image.Image]]:
        try:
            yield from painter.draw(*settings)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    with gr.Blocks(title=title, analytics_enabled=False) as blocks:
        gr.HTML(f"{_STYLE}<h2>{html.escape(title)}</h2><p>{html.escape(painter.about())}</p>", elem_id="title")
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                label = gr.Dropdown(choices=painter.labels(), value=0, label="Class", filterable=True)
                guidance = gr.Slider(1.0, 10.0, value=2.0, step=0.05, label="Guidance (1: none)")
                images = gr.Slider(1, _MOST_IMAGES, value=8, step=1, label="Images")
                seed = gr.Number(value=0, precision=0, minimum=0, label="Seed")
                button = gr.Button("Draw", variant="primary")
                with gr.Accordion("How tokens are drawn", open=False):
                    temperature = gr.Slider(0.0, 2.0, value=1.0, step=0.05, label="Temperature (0: likeliest)")
                    top_k = gr.Number(value=0, precision=0, minimum=0, label="Top-k (0: all)")
                    top_p = gr.Slider(0.05, 1.0, value=1.0, step=0.01, label="Top-p (1: all)")
            with gr.Column(scale=3):
                gallery = gr.Gallery(
                    label="Images, as they are drawn",
                    columns=4,
                    object_fit="contain",
                    height="auto",
                    format="png",
                    elem_id="images",
                )
        button.click(
            draw,
            [label, images, guidance, temperature, top_k, top_p, seed],
            gallery,
            concurrency_limit=1,
            api_name="draw",
        )
    return blocks


def serve(blocks: Any, host: str, port: int) -> None:
    """Open the page and return; its `close` ends it. Raises UserError where the port is taken."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        blocks.queue().launch(
            server_name=host, server_port=port, quiet=True, prevent_thread_lock=True, share=False, footer_links=[]
        )
    except OSError as error:
        raise UserError(f"port: {port} at {host} cannot be opened ({error}); choose another --port") from error


def run_demo(command: DemoCommand) -> None:
    """Open the page until Ctrl-C. Raises UserError: the model cannot be loaded, Gradio is missing, or the port is
    taken.
    """
    blocks = page(Painter(command), f"star_fast: {printable(command.model)}")
    serve(blocks, command.host, command.port)
    print(f"Open http://{command.host}:{command.port} in a browser; Ctrl-C ends it", flush=True)
    blocks.block_thread()

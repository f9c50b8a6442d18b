"""The demo's page as somebody uses it, in headless Chromium: a class chosen by name, settings typed, images that appear
while others are still being drawn.
"""

from __future__ import annotations

import importlib.util
import io
import shutil
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from star_fast.demo import DemoCommand, Painter, page, serve
from star_fast.generation import generate
from star_fast.generation.render import Renderer
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.weights import load_model
from tests.generation.small_model import save_small_model

MISSING = [name for name in ("gradio", "selenium") if importlib.util.find_spec(name) is None]
MISSING += [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"the page is driven by selenium in Chromium; not here: {', '.join(MISSING)}"
)
# Of every wait for something to be seen: a bound for a machine that is busy, nothing waits so long by itself
PATIENCE_S = 120


class HeldPainter(Painter):
    """Draws a batch, then waits at a gate: what the page shows meanwhile can be looked at in peace."""

    def __init__(self, command: DemoCommand) -> None:
        super().__init__(command, batch_images=2)
        self.gate, self.asked = threading.Event(), []

    def draw(self, *settings: Any) -> Iterator[list[Image.Image]]:
        self.asked.append(settings)
        for images in super().draw(*settings):
            yield images
            assert self.gate.wait(PATIENCE_S)


@pytest.fixture
def painter(tmp_path: Path) -> HeldPainter:
    save_small_model(tmp_path / "model")
    return HeldPainter(DemoCommand(str(tmp_path / "model"), device="cpu"))


@pytest.fixture
def url(painter: HeldPainter) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    blocks = page(painter, "star_fast: small")
    serve(blocks, "127.0.0.1", port)
    yield f"http://127.0.0.1:{port}"
    painter.gate.set()
    blocks.close()


@pytest.fixture
def browser() -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.page_load_strategy = "eager"
    for argument in (
        "headless=new",
        "no-sandbox",
        "disable-dev-shm-usage",
        "window-size=1100,900",
        "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(f"--{argument}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def test_images_of_a_class_appear_while_they_are_drawn(
    painter: HeldPainter, url: str, browser: Any, tmp_path: Path
) -> None:
    browser.get(url)
    choose(browser, "Class", "birch")
    for label, value in (("Images", 5), ("Guidance", 1.5), ("Seed", 7)):
        type_into(browser, label, value)
    click(browser, "//button[normalize-space()='Draw']")
    waiting(browser).until(lambda driver: len(loaded(driver)) == 2)
    assert not painter.gate.is_set()  # three of the five are not drawn yet
    expected = images_of_sampling(tmp_path / "model")
    for source, image in zip(loaded(browser), expected, strict=False):
        np.testing.assert_array_equal(pixels(source), image)
    painter.gate.set()
    waiting(browser).until(lambda driver: len(loaded(driver)) == 5)
    assert painter.asked == [(1, 5, 1.5, 1, 0, 1, 7)]
    for source, image in zip(loaded(browser), expected, strict=True):
        np.testing.assert_array_equal(pixels(source), image)
    assert browser.save_screenshot(str(tmp_path / "demo.png"))
    assert Image.open(tmp_path / "demo.png").width == 1100
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE" and url in line["message"]]


def test_a_setting_that_makes_no_sense_is_said_on_the_page(painter: HeldPainter, url: str, browser: Any) -> None:
    browser.get(url)
    type_into(browser, "Seed", 10**19)
    click(browser, "//button[normalize-space()='Draw']")
    seen(browser, "//*[contains(text(), 'seed must be a whole number')]")


def images_of_sampling(model: Path) -> list[np.ndarray]:
    """(H, W, 3) uint8 each: what sampling draws with these settings, as large as the page shows it."""
    found = load_model(model)
    codes = generate(found.transformer, torch.ones(5, dtype=torch.int64), guidance=1.5, seed=7)
    images = Renderer(VQTokenizer.load(found.tokenizer_folder), torch.device("cpu")).start(codes).wait()
    return [image.numpy().repeat(8, 0).repeat(8, 1) for image in images]  # 16 pixels become 128


def waiting(driver: Any) -> Any:
    from selenium.common.exceptions import (
        ElementClickInterceptedException,
        NoSuchElementException,
        StaleElementReferenceException,
    )
    from selenium.webdriver.support.ui import WebDriverWait

    # What lies over an element while the page is being built will go away.
    return WebDriverWait(
        driver,
        PATIENCE_S,
        0.05,
        [ElementClickInterceptedException, NoSuchElementException, StaleElementReferenceException],
    )


def seen(driver: Any, path: str) -> Any:
    """The element at an XPath, once it is there to be used."""
    from selenium.webdriver.support import expected_conditions

    return waiting(driver).until(expected_conditions.element_to_be_clickable(("xpath", path)))


def click(driver: Any, path: str) -> None:
    """The element at an XPath, once nothing lies over it."""
    waiting(driver).until(lambda _: driver.find_element("xpath", path).click() or True)


def choose(driver: Any, label: str, value: str) -> None:
    """Of a list: typed, then taken from what is left of it."""
    field = f"//input[@aria-label='{label}']"
    click(driver, field)
    box = seen(driver, field)
    box.clear()
    box.send_keys(value)
    click(driver, f"//li[@role='option'][@aria-label='{value}']")
    waiting(driver).until(lambda _: box.get_attribute("value") == value)


def type_into(driver: Any, label: str, value: float) -> None:
    """A number into the field with this label."""
    from selenium.webdriver.common.keys import Keys

    box = seen(driver, f"//input[@type='number'][contains(@aria-label, '{label}')]")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(str(value), Keys.TAB)
    waiting(driver).until(lambda _: float(box.get_attribute("value")) == value)


def loaded(driver: Any) -> list[str]:
    """Addresses of the gallery's images that can be seen."""
    found = driver.find_elements("css selector", ".thumbnail-item img")
    return [
        image.get_attribute("src")
        for image in found
        if driver.execute_script("return arguments[0].complete && arguments[0].naturalWidth > 0", image)
    ]


def pixels(source: str) -> np.ndarray:
    """(H, W, 3) uint8 of the picture at an address of the page."""
    with urllib.request.urlopen(source) as answer:
        return np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"))

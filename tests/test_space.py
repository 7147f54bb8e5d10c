"""The Space, by clicking through it in a browser; skipped where Gradio, Playwright or a Chromium is missing."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from makers import ROOT

pytestmark = pytest.mark.slow

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")

SPACE = ROOT / "space"
WAIT = 300_000  # milliseconds; a busy machine is not an error


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the running app."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    log = tmp_path_factory.mktemp("space") / "log"
    with log.open("wb") as output:
        app = subprocess.Popen([sys.executable, SPACE / "app.py"], stdout=output, stderr=output, env=environment)
    try:
        deadline = time.monotonic() + WAIT / 1000
        while True:
            assert app.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/")
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/"
    finally:
        app.terminate()
        app.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tools:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        try:
            browser = tools.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium ({str(error).splitlines()[0]})")
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_every_control_changes_its_pictures(address: str, browser: Any, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)

    def finished(**before: str) -> dict[str, str]:
        """Where the pictures are, which depends on their contents, after those in `before` have changed."""
        page.wait_for_function(
            "before => ['plain', 'guided'].every(id => document.querySelector(`#${id} img`))"
            " && Object.entries(before).every(([id, src]) => document.querySelector(`#${id} img`).src != src)"
            " && !document.querySelector('.generating, .progress-text')",
            arg=before,
            timeout=WAIT,
        )
        return {name: page.locator(f"#{name} img").evaluate("image => image.src") for name in ("plain", "guided")}

    def calls(number: int, images: int = 36) -> bool:
        costs = [page.locator(f"#{name}-cost").inner_text() for name in ("plain", "guided")]
        return all(cost.startswith(f"{number} network call") and f" s for {images} images" in cost for cost in costs)

    def fill(slider: str, value: str) -> None:
        field = page.locator(f"#{slider} input[type=number]")
        field.fill(value)
        field.press("Tab")

    digits = finished()
    assert calls(20) and digits["plain"] != digits["guided"]
    assert not page.locator("#start").is_visible()
    page.locator("#steps label", has_text="10").click()
    fill("scale", "0")
    page.click("#generate")
    unguided = finished(**digits)
    assert calls(10) and unguided["plain"] == unguided["guided"]
    fill("scale", "1")
    fill("seed", "7")
    page.click("#generate")
    other = finished(**unguided)
    assert other["plain"] != other["guided"]

    assert not page.locator("#class").is_visible()
    page.locator("#model label", has_text="that you choose").click()
    digits = finished(**other)
    assert calls(4, images=160)  # 16 of each class
    page.locator("#class input").click()
    page.get_by_role("option", name="7").click()
    page.click("#generate")
    sevens = finished(**digits)
    assert calls(4)

    page.locator("#model label", has_text="CIFAR-10").click()
    photographs = finished(**sevens)
    assert not page.locator("#class").is_visible()
    assert calls(11) and photographs["plain"] != photographs["guided"]
    fill("start", "100")
    page.locator("#steps label", has_text="5").click()
    page.click("#generate")
    finished(**photographs)
    assert calls(6)
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert errors == []

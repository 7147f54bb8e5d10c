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
WAIT = 120_000  # milliseconds; a busy machine is not an error


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
def test_every_slider_changes_its_pictures(address: str, browser: Any, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)

    def cost(name: str) -> str:
        return page.locator(f"#{name}-cost").inner_text().strip()

    def pictures() -> dict[str, str]:
        """Where the pictures are, which is another place for every content."""
        names = ("baseline", "ot-guided", "truncated")
        return {name: page.locator(f"#{name} img").get_attribute("src") for name in names}

    def generate(slider: str, value: str, changes: str) -> dict[str, str]:
        field = page.locator(f"#{slider} input[type=number]")
        field.fill(value)
        field.press("Tab")
        before = page.locator(f"#{changes} img").get_attribute("src")
        page.click("#generate")
        page.wait_for_function(
            "([id, src]) => document.querySelector(`#${id} img`)?.src != src", arg=[changes, before], timeout=WAIT
        )
        page.wait_for_function("() => !document.querySelector('.generating, .progress-text')", timeout=WAIT)
        return pictures()

    page.wait_for_selector("#truncated img", timeout=WAIT)
    assert "11 network calls" in cost("truncated")
    few = generate("steps", "5", changes="baseline")
    assert "5 network calls" in cost("baseline") and "5 network calls" in cost("ot-guided")
    assert few["baseline"] != few["ot-guided"]
    unguided = generate("scale", "0", changes="ot-guided")
    assert unguided["baseline"] == few["baseline"]  # pictures are stored by their content
    late = generate("start", "100", changes="truncated")
    assert late["baseline"] == few["baseline"] and late["truncated"] != few["truncated"]
    other = generate("seed", "7", changes="baseline")
    assert not set(other.values()) & set(late.values())
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert errors == []

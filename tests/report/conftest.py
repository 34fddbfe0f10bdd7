"""A real headless Chromium. Without a browser these tests fail: they are the page's proof."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium() -> str:
    """The browser named by BENCH_CHROMIUM, or one on the PATH."""
    names = [os.environ.get("BENCH_CHROMIUM"), "chromium", "chromium-browser", "google-chrome"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        pytest.fail("No Chromium found: install it (apt-get install chromium) or set BENCH_CHROMIUM to its path.")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that fails its test on any console message and on any request that leaves the file."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light", accept_downloads=True)
    made = context.new_page()
    noise: list[str] = []
    requests: list[str] = []
    made.on("console", lambda message: noise.append(f"{message.type}: {message.text}"))
    made.on("pageerror", lambda error: noise.append(f"error: {error}"))
    made.on("request", lambda request: requests.append(request.url))
    yield made
    context.close()
    assert noise == []
    assert [address for address in requests if not address.startswith(("file:", "data:", "blob:"))] == []
    assert {address.partition("#")[0] for address in requests if address.startswith("file:")} == {made.url.partition("#")[0]}

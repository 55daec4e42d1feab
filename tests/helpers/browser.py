"""A real headless browser, to test what a reader sees. Without a browser these tests fail; they do not skip."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

#: no GPU, no sandbox (for containers), and no feature that uses the network by itself
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


def executable() -> str:
    for name in NAMES:
        if found := shutil.which(name):
            return found
    pytest.fail(
        f"no browser to open the report in: none of {', '.join(NAMES)} is on the PATH. Debian and Ubuntu: "
        f"'apt-get install chromium'; 'make test' does it by itself there.",
        pytrace=False,
    )


@contextmanager
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=executable(), args=FLAGS)
        yield opened
        opened.close()


@dataclass
class Heard:
    """What a page printed and requested while it was open."""

    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def listen(self, page: Any) -> None:
        page.on("console", lambda message: self.console.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.console.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (self.console.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: self.requests.append(request.url))


def open_page(opened: Any, file: Path, **options: Any) -> tuple[Any, Heard]:
    """Open a report in a new browser context, and wait until it shows an answer."""
    page = opened.new_context(**options).new_page()
    heard = Heard()
    heard.listen(page)
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready]", timeout=20_000)
    return page, heard


def shown_tokens(opened: Any) -> list[str]:
    """The tokens of the answer that is shown, as text."""
    return opened.locator("#view .token").evaluate_all("spans => spans.map(span => span.textContent)")


def kept_tokens(opened: Any) -> list[bool]:
    """Whether each token of the answer that is shown has a mark."""
    return opened.locator("#view .token").evaluate_all("spans => spans.map(span => span.classList.contains('kept'))")


def choose(opened: Any, place: int) -> None:
    """Show the answer at a place of the list."""
    from playwright.sync_api import expect

    opened.locator("#list button").nth(place).click()
    expect(opened.locator("#list button").nth(place)).to_have_attribute("aria-current", "true")


def set_ratio(opened: Any, percent: int) -> None:
    """Move the slider."""
    opened.locator("#ratio").fill(str(percent - 1))
    assert opened.locator("#ratio-value").inner_text() == f"{percent}%"

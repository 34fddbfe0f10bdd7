"""What the tests of the page in a browser share: when it is drawn, and what of it is cut off."""

from __future__ import annotations

from playwright.sync_api import Page

MARKS = '#pareto-t0 [aria-roledescription="point"]'
CLIPPED = """() => Object.fromEntries([...document.querySelectorAll("svg.marks")].map((drawing) => {
    const box = drawing.getBoundingClientRect();
    const isClipped = (item) => {
        const { left, right, bottom } = item.getBoundingClientRect();
        return item.textContent && (left < box.left || right > box.right || bottom > box.bottom);
    };
    return [drawing.closest("[id]").id, [...drawing.querySelectorAll("text")].filter(isClipped).map((item) => item.textContent)];
}))"""


def ready(page: Page, address: str) -> None:
    page.goto(address)
    page.wait_for_selector("html[data-ready]", state="attached")


def redrawn(page: Page, marks: int) -> None:
    """Waits until the Pareto plot shows this many points."""
    page.wait_for_function("([css, n]) => document.querySelectorAll(css).length === n", arg=[MARKS, marks])


def clipped(page: Page) -> dict[str, list[str]]:
    """For every chart that is drawn the texts that its edges cut off."""
    return page.evaluate(CLIPPED)

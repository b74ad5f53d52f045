"""What the tests of the playground do with its page in a browser."""

from __future__ import annotations

import re
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
Page = Any  # playwright's, which need not be there

WIDE, NARROW = (1440, 900), (360, 740)
# What a view is opened with where the defaults do not matter: fewer labels, so that less is waited for.
VIEW = "#sample=carrot&labels=carrot,rocket,strawberry&encoders=demo,demo-robust&eps=8"
# Counts events as the browser hands them out, and notes how many points the curve had after each.
COUNT_EVENTS = """
window.seen = [];
const listen = EventSource.prototype.addEventListener;
EventSource.prototype.addEventListener = function (type, handler) {
  listen.call(this, type, (event) => {
    const curve = document.querySelector('.card[data-state="running"] .curve');
    const before = curve ? Number(curve.dataset.redraws) : null;
    handler(event);
    if (curve) {
      const { redraws, points } = curve.dataset;
      window.seen.push({ type, drawn: Number(redraws) - before, points: Number(points), markup: curve.innerHTML });
    }
  });
};
"""
# Hands the page a file as a drop or a paste does.
GIVE_FILE = """([bytes, event, kind]) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([new Uint8Array(bytes)], "mine.png", { type: "image/png" }));
  const about = kind === "paste" ? { clipboardData: transfer } : { dataTransfer: transfer };
  const made = new window[event](kind, { bubbles: true, cancelable: true, ...about });
  document.body.dispatchEvent(made);
}"""


def classified(page: Page, first: str | None = None, encoders: int = 2) -> None:
    """Wait until every column has bars, with this label on top."""
    name = re.compile("." if first is None else re.escape(first))
    for i in range(encoders):
        sync_api.expect(page.locator(".card").nth(i).locator(".bars li").first).to_contain_text(name)


def attack(page: Page) -> None:
    """Attack, and wait for the end."""
    page.locator("#attack").click()  # it gives way to Cancel before this returns
    sync_api.expect(page.locator("#attack")).to_be_visible(timeout=60_000)


def axe(page: Page) -> list[Any]:
    """What axe-core finds wrong."""
    axe_playwright = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
    found = axe_playwright.Axe().run(page).response["violations"]
    return [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in found]


def too_wide(page: Page) -> list[str]:
    """What reaches over the right edge."""
    found: list[str] = page.evaluate("""() => {
      const over = (e) => e.getBoundingClientRect().right > innerWidth + 1;
      const wide = document.documentElement.scrollWidth > innerWidth ? ["the page"] : [];
      const parts = [...document.querySelectorAll("body *")].filter((e) => over(e));
      return [...wide, ...parts.map((e) => e.outerHTML.slice(0, 90))];
    }""")
    return found

"""Pictures of the report for docs/inspect.md, taken in Chromium: `python -P docs/screenshots.py STORE`.

STORE is that of `mmkd demo` (DEMO/features). Needs the extras `inspect` and `dev`, and a Chromium on the PATH. Pictures
are reduced to a palette, so that they stay small.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from pathlib import Path

import click
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from mmkd.store import FeatureStore
from mmkd.store.report.content import Options
from mmkd.store.report.page import write_report

IMAGES = Path(__file__).with_name("images")
PICTURES = {
    # name: (scheme, width, height, part of the page that is at the top)
    "report-pairs": ("light", 1200, 800, "#pairs"),
    "report-modalities": ("light", 1200, 520, "#modalities"),
    "report-map": ("light", 1200, 700, "#map"),
    "report-agreement": ("dark", 1200, 700, "#agreement"),
    "report-phone": ("dark", 390, 800, "#map"),
}


def take(page: Page, selector: str, out: Path) -> None:
    """A picture of what the window shows with `selector` at its top."""
    page.evaluate("(s) => document.querySelector(s).scrollIntoView({behavior: 'instant'})", selector)
    if selector == "#map":
        page.focus("#chart-map")
        page.keyboard.press("Home")
    page.wait_for_timeout(500)
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    shot.quantize(96, dither=Image.Dither.NONE).save(out, optimize=True)
    click.echo(f"{out}: {out.stat().st_size // 1024} KB")


def main(root: str) -> None:
    """Make the page, open it offline, take every picture."""
    IMAGES.mkdir(exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        page = Path(folder) / "report.html"
        write_report(FeatureStore.open(root), page, Options())
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (scheme, width, height, selector) in PICTURES.items():
            size = {"width": width, "height": height}
            tab = browser.new_page(color_scheme=scheme, viewport=size, offline=True)  # type: ignore[arg-type]
            tab.goto(page.as_uri())
            tab.wait_for_selector("#chart-map .scatterlayer .point")
            take(tab, selector, IMAGES / f"{name}.png")
            tab.close()
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])

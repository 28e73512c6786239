"""The documentation as a site: every page is in it, and a warning ends the build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("mkdocs", reason="the extra docs is not installed")
pytest.importorskip("mkdocstrings", reason="the extra docs is not installed")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the site is made of, so that the build writes into no folder of ours; `build/types` as `make` leaves it."""
    for name in ("docs", "base", "cli", "distill", "evaluate", "extract", "store", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "Dockerfile", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "build" / "types").mkdir(parents=True)
    (tmp_path / "build" / "types" / "mmkd").symlink_to("../..")
    (tmp_path / "environment").mkdir()
    (tmp_path / "environment" / "other.py").write_text('"""Of an environment in the checkout: not to be read."""\n')
    return tmp_path


def build(checkout: Path) -> subprocess.CompletedProcess[str]:
    """As the Makefile does it."""
    recipe = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "/mkdocs build" in line)
    options = recipe.partition("/mkdocs ")[2].split()
    return subprocess.run(
        [sys.executable, "-P", "-m", "mkdocs", *options, "--verbose"], cwd=checkout,
        capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": "build/types", "NO_MKDOCS_2_WARNING": "1"}, timeout=280,
    )  # fmt: skip


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server of this folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(checkout: Path) -> None:
    done = build(checkout)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    # It tells every file that it reads.
    assert "store/reader.py" in done.stderr
    assert "environment/other.py" not in done.stderr
    site = checkout / "build" / "site"
    pages = {path.relative_to(checkout / "docs").with_suffix(".html") for path in (checkout / "docs").rglob("*.md")}
    assert [page for page in (*pages, "index.html", "security.html") if not (site / page).is_file()] == []
    assert "FeatureStore.open" in (site / "api" / "store.html").read_text()
    inside = checkout / "build" / "api" / "mmkd"
    packages = {"base", "cli", "distill", "evaluate", "extract", "store"}
    assert {path.name for path in inside.iterdir()} == packages | {"__init__.py"}


@pytest.mark.slow
def test_a_link_to_nowhere_ends_the_build(checkout: Path) -> None:
    with (checkout / "docs" / "faq.md").open("a") as page:
        page.write("\n[nowhere](nowhere.md)\n")
    done = build(checkout)
    assert done.returncode == 1
    assert "nowhere.md" in done.stderr


REAL = (
    "export default {initialize() {}, async render(id, source) { window.drawn = source; return {svg: '<svg></svg>'}; }}"
)


@pytest.mark.slow
@pytest.mark.parametrize("network", [False, True])
def test_a_page_with_a_drawing_can_be_searched_with_and_without_a_network(
    browser: Any, checkout: Path, network: bool
) -> None:
    assert build(checkout).returncode == 0
    asked: list[str] = []

    def elsewhere(route: Any) -> None:
        asked.append(route.request.url)
        if network:
            route.fulfill(content_type="text/javascript", headers={"Access-Control-Allow-Origin": "*"}, body=REAL)
        else:
            route.abort()

    with served(checkout / "build" / "site") as address:
        tab = browser.new_page()
        tab.route(lambda url: not url.startswith(address), elsewhere)
        tab.goto(f"{address}/index.html")
        tab.click("input.md-search__input")
        tab.keyboard.type("temperature")
        tab.wait_for_selector(".md-search-result__item")
        tab.wait_for_selector("div.mermaid", state="attached")
        drawn = tab.evaluate("window.drawn")
        tab.close()
    assert (drawn or "").startswith("flowchart LR") == network
    assert asked == ["https://unpkg.com/mermaid@11/dist/mermaid.esm.min.mjs"]

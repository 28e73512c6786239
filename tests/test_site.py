"""The documentation as a site: every page is in it, and a warning ends the build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("mkdocs", reason="pip install 'mmkd[docs]'")
pytest.importorskip("mkdocstrings", reason="pip install 'mmkd[docs]'")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the site is made of, so that the build writes into no folder of ours; `build/types` as `make` leaves it."""
    for name in ("docs", "cli", "distill", "evaluate", "extract", "store", "examples"):
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
    assert {path.name for path in inside.iterdir()} == {"__init__.py", "cli", "distill", "evaluate", "extract", "store"}


@pytest.mark.slow
def test_a_link_to_nowhere_ends_the_build(checkout: Path) -> None:
    with (checkout / "docs" / "faq.md").open("a") as page:
        page.write("\n[nowhere](nowhere.md)\n")
    done = build(checkout)
    assert done.returncode == 1
    assert "nowhere.md" in done.stderr

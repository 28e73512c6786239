"""Hooks of the documentation site: pages that live elsewhere in the repository, and links that leave docs/."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# Pages made of files at the root; they are read on a repository's page too, so their links start there.
ELSEWHERE = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}
# Files that pages link to outside docs/; they are copied into the site under the same path.
COPIED = (
    "Dockerfile",
    "LICENSE",
    "examples/inspect.ipynb",
    "examples/six_tasks/run.sh",
    "examples/six_tasks/suite.yaml",
)


@event_priority(100)  # before mkdocstrings looks which of its paths are there
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Let mkdocstrings find the packages: a folder `mmkd` with a copy of them and nothing else of the checkout.

    In the project `mmkd` has no `__init__.py`; here it needs one. Without it mkdocstrings takes `mmkd` for a namespace
    and reads every folder of that name on Python's path too: by `build/types`, the checkout with its environment.
    """
    folder = ROOT / "build" / "api" / "mmkd"
    shutil.rmtree(folder, ignore_errors=True)
    for stage in ("base", "cli", "distill", "evaluate", "extract", "store"):
        shutil.copytree(ROOT / stage, folder / stage, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "__init__.py").touch()
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside docs/."""
    for name, source in ELSEWHERE.items():
        files.append(File.generated(config, name, content=_from_root((ROOT / source).read_text(encoding="utf-8"))))
    for name in COPIED:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to the root become links inside the site; what a fence says to the tests is not for readers."""
    markdown = re.sub(r'^(```[a-z]+) skip=".*"$', r"\1", markdown, flags=re.MULTILINE)
    for name, source in ELSEWHERE.items():
        markdown = re.sub(rf"\]\(\.\./{re.escape(source)}(#[^)]*)?\)", rf"]({name}\1)", markdown)
    return re.sub(rf"\]\(\.\./({'|'.join(map(re.escape, COPIED))})\)", r"](\1)", markdown)


def _from_root(text: str) -> str:
    """Links of a file at the root, as seen from docs/."""
    text = text.replace("](docs/", "](")
    for name, source in ELSEWHERE.items():
        text = re.sub(rf"\]\({re.escape(source)}(#[^)]*)?\)", rf"]({name}\1)", text)
    return text

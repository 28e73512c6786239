"""Every snippet of the documents runs: one folder and one Python session a page, its blocks in order.

`bash` runs under `set -euo pipefail` and `python` in one namespace. A `yaml` block names its file in its first line
(`# run.yaml`): it is read as that kind of file and kept for the blocks below; with `further keys` in that line it is
laid over the page's last file of that name. A block that cannot run here says why, `bash skip="needs Slurm"`;
its commands and options are checked all the same (test_docs.py). `text` is output or a tree, and is not run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fences import DOCUMENTS, ROOT, Fence, fences
from warm_mmkd import serving, write_shim

pytestmark = pytest.mark.integration

# The reader's networks and batches, and ours: the only changes that are made to a snippet.
SMALLER = {
    "ViT-B-16": "tiny-student.json",
    "batch_size: 1024": "batch_size: 24",
    "batch_size: 256": "batch_size: 24",
    "epochs: 20": "epochs: 1",
    "epochs: 10": "epochs: 1",
    "--nproc-per-node 8": "--nproc-per-node 2",
}
# Pages that extract with worker processes, or train on two ranks: each process loads torch anew.
SLOW = {"README.md", "distill.md", "recipes.md", "tutorial-extract.md", "tutorial-train.md"}
LANGUAGES = ("bash", "python", "yaml", "text", "markdown", "mermaid", "toml")


def check_run(path: Path) -> None:
    from mmkd.distill.config import load_run

    load_run(path)


def check_align(path: Path) -> None:
    from mmkd.distill.alignment.config import load_align

    load_align(path)


def check_suite(path: Path) -> None:
    from mmkd.evaluate import load_suite

    load_suite(path)


def check_rule(path: Path) -> None:
    from mmkd.store.selection import load_rule

    load_rule(path)


def check_cluster(path: Path) -> None:
    from mmkd.extract.cluster_config import load_cluster

    load_cluster(str(path))


def check_corpus(path: Path) -> None:
    from mmkd.extract.corpora import open_corpus

    open_corpus(str(path))


def check_card(path: Path) -> None:
    from mmkd.extract.teachers.published import read_card

    read_card(path)


# How a YAML file of this name is read.
KINDS: dict[str, Callable[[Path], None]] = {
    "align": check_align,
    "cluster": check_cluster,
    "corpus": check_corpus,
    "mine": check_card,
    "rule": check_rule,
    "run": check_run,
    "suite": check_suite,
}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder to copy, and the environment of snippets: `mmkd` without the wait, the hub's cache, no network."""
    root = tmp_path_factory.mktemp("snippets")
    made = subprocess.run(
        [sys.executable, ROOT / "scripts" / "docs_folder.py", root / "scene"],
        capture_output=True,
        text=True,
        check=False,
    )
    told = f"cd {root / 'scene'}\nexport HF_HOME=$PWD/hub HF_HUB_OFFLINE=1\n"
    assert (made.returncode, made.stdout) == (0, told), made.stderr
    address = root / "socket"
    environment = {
        "HF_HOME": str(root / "scene" / "hub"),
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(root / "cache"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "NO_COLOR": "1",
    }
    write_shim(root / "bin", address)
    path = os.pathsep.join([str(root / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    with serving(address, environment):
        yield root / "scene", environment | {"PATH": path}


def run_bash(fence: Fence, text: str, folder: Path, environment: dict[str, str]) -> None:
    command = ["bash", "-euo", "pipefail", "-c", text]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, f"{fence.place}\n{text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def run_python(fence: Fence, text: str, namespace: dict[str, Any]) -> None:
    code = compile("\n" * fence.line + text, str(fence.document), "exec")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, namespace)


def keep_yaml(fence: Fence, text: str, folder: Path) -> None:
    """Write the block under its name, read it as what it is."""
    named = re.match(r"# (([a-z]+)[\w.-]*\.yaml)\b", text)
    assert named, f"{fence.place}: the first line of a YAML block is a comment with its file's name"
    path = folder / named[1]
    content = yaml.safe_load(text)
    if isinstance(content, list):
        whole = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump(whole | {"datasets": content}))
    elif path.exists() and "further" in text.splitlines()[0]:
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | content))
    else:
        path.write_text(text)
    KINDS[named[2]](path)


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(path, id=path.name, marks=[pytest.mark.slow] if path.name in SLOW else [])
        for path in DOCUMENTS
        if any(fence.language in ("bash", "python", "yaml") and not fence.skip for fence in fences(path))
    ],
)
def test_the_snippets_of_a_page_run(
    document: Path, scene: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, environment = scene
    folder = tmp_path / "reader"
    shutil.copytree(whole, folder, symlinks=True)
    monkeypatch.chdir(folder)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for fence in fences(document):
        text = fence.text
        for theirs, ours in SMALLER.items():
            text = text.replace(theirs, ours)
        if fence.skip:
            continue
        if fence.language == "bash":
            run_bash(fence, text, folder, environment)
        elif fence.language == "python":
            run_python(fence, text, namespace)
        elif fence.language == "yaml":
            keep_yaml(fence, text, folder)


def test_every_block_says_what_it_is() -> None:
    blocks = [fence for document in DOCUMENTS for fence in fences(document)]
    unknown = [f"{f.place}: {f.language or 'no language'}" for f in blocks if f.language not in LANGUAGES]
    assert unknown == [], "write ```bash (it is run), ```text (it is not), or another of " + ", ".join(LANGUAGES)
    assert [f.place for f in blocks if f.skip and len(f.skip) < 8] == [], "a reason, not a word"
    assert len([f for f in blocks if f.language in ("bash", "python", "yaml") and not f.skip]) > 60
    assert ROOT / "README.md" in DOCUMENTS

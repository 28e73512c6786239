"""Extraction over TLS with certificates made as docs/cluster.md says: the same bytes, and strangers are turned away."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from extract_scene import Scene, ended, kill_session, started, wait_for

ROOT = Path(__file__).resolve().parents[1]
FILES = {"tls-ca-file": "ca.pem", "tls-cert": "cert.pem", "tls-key": "key.pem"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not here"),
]


def shell_blocks() -> list[str]:
    """The two blocks of shell commands in the chapter on encryption: certificates, then scheduler and worker."""
    chapter = (ROOT / "docs/cluster.md").read_text().partition("\n## Encryption\n")[2].partition("\n## ")[0]
    return re.findall(r"```bash[^\n]*\n(.*?)```", chapter, re.DOTALL)


def certificates(folder: Path) -> Path:
    """ca.pem, cert.pem and key.pem as the documentation makes them."""
    folder.mkdir()
    done = ended(["bash", "-ec", shell_blocks()[0]], cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def cluster_file(folder: Path, **content: object) -> Path:
    """A cluster.yaml beside the certificates."""
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(content | {"security": FILES}))
    return path


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Scheduler and worker, started as the documentation says, on the loopback; certificates in `own`."""
    own = certificates(tmp_path / "own")
    scheduler_line, worker_line = (shlex.split(line)[1:] for line in shell_blocks()[1].splitlines())
    dask, where = [sys.executable, "-P", "-m", "dask"], own / "scheduler.json"
    local = ["--host", "127.0.0.1", "--no-dashboard"]
    scheduler = started(
        [*dask, *scheduler_line, *local, "--port", "0", "--scheduler-file", str(where)], own / "scheduler.log", cwd=own
    )
    try:
        wait_for(lambda: where.exists() and bool(where.read_text()), scheduler, own / "scheduler.log")
        found = json.loads(where.read_text())["address"]
        words = [word.replace("tls://HOST:8786", found) for word in worker_line]
        worker = started([*dask, *words, *local], own / "worker.log", cwd=own)
        try:
            yield found
        finally:
            kill_session(worker)
    finally:
        kill_session(scheduler)


def test_an_extraction_over_tls(scene: Scene, tmp_path: Path, address: str) -> None:
    assert address.startswith("tls://127.0.0.1:")
    store = tmp_path / "store"
    done = ended(scene.command(store, "--scheduler", cluster_file(tmp_path / "own", scheduler=address)))
    assert done.returncode == 0, done.stderr
    assert scene.same(store)
    # Neither without a certificate nor with one of another authority.
    strange = cluster_file(certificates(tmp_path / "strange"), scheduler=address)
    for scheduler in (address, address.replace("tls://", "tcp://"), strange):
        refused = ended(scene.command(tmp_path / "refused", "--scheduler", scheduler))
        assert refused.returncode == 1
        assert "no Dask scheduler answers" in refused.stderr
        assert refused.stderr.count("\n") == 1, refused.stderr


def test_a_local_cluster_over_tls(scene: Scene, tmp_path: Path) -> None:
    path = cluster_file(certificates(tmp_path / "own"), workers=2)
    store = tmp_path / "store"
    done = ended(scene.command(store, "--scheduler", path))
    assert done.returncode == 0, done.stderr
    assert scene.same(store)

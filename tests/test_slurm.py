"""A real Slurm on this machine: jobs through dask-jobqueue, one cancelled in the middle, the bytes compared."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from extract_scene import MMKD, Scene, ended, entries, started, wait_for

from mmkd.store import FeatureStore

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "scancel", "squeue")
ABSENT = [name for name in NEEDED if shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None]

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.slow,
    pytest.mark.skipif(bool(ABSENT), reason=f"no Slurm here: {', '.join(ABSENT)} not installed"),
    pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="Slurm of one's own needs root"),
]


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which sbatch and the others find it; everything is gone afterwards."""
    folder = tmp_path / "slurm"
    up = ended([str(ROOT / "scripts/slurm-up"), str(folder), "4"])
    try:
        assert up.returncode == 0, up.stderr
        yield os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    finally:
        pids = [int(path.read_text()) for path in folder.glob("*.pid")]
        ended([str(ROOT / "scripts/slurm-up"), "--down", str(folder)])
        assert not [pid for pid in pids if _alive(pid)]


def _alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def cluster_file(folder: Path, workers: int) -> Path:
    """One core a job, scheduler and workers on the loopback."""
    job = {
        "cores": 1,
        "memory": "2GB",
        "walltime": "00:10:00",
        "interface": "lo",
        "death-timeout": 60,
        "log-directory": str(folder / "jobs"),
    }
    path = folder / "cluster.yaml"
    content = {"scheduler": "slurm", "workers": workers, "jobqueue": {"slurm": job}}
    path.write_text(yaml.safe_dump(content | {"distributed": {"deploy": {"lost-worker-timeout": "2s"}}}))
    return path


def running_jobs(environment: dict[str, str]) -> list[str]:
    """Numbers of the jobs that run now."""
    return ended(["squeue", "--noheader", "--states=R", "--format=%i"], env=environment).stdout.split()


def test_a_job_cancelled_in_the_middle(scene: Scene, slurm: dict[str, str], tmp_path: Path) -> None:
    store, log = tmp_path / "store", tmp_path / "log"
    run = started(scene.command(store, "--scheduler", cluster_file(tmp_path, 2)), log, env=slurm)
    wait_for(lambda: entries(store) >= 1, run, log)
    before = running_jobs(slurm)
    assert before, log.read_text()
    for job in before:
        subprocess.run(["scancel", job], env=slurm, check=True)
    assert entries(store) < 8, "the cancel came too late to prove anything"
    assert run.wait(timeout=600) == 0, log.read_text()
    assert "dashboard: http://" in log.read_text()
    assert scene.same(store)
    assert FeatureStore.open(store).verify(deep=True).sound
    lines = [json.loads(line) for path in store.glob("runs/*.jsonl") for line in path.read_text().splitlines()]
    # Jobs that ended were asked for anew, so more workers had a hand in it than there were places.
    assert sum(line["rows"] for line in lines) <= 2048 + 2 * 256
    assert running_jobs(slurm) == []


def test_the_sbatch_file_of_the_documentation(scene: Scene, slurm: dict[str, str], tmp_path: Path) -> None:
    """docs/extract.sbatch holds the client in a job of its own."""
    store = tmp_path / "store"
    environment = slurm | {
        "CORPUS": str(scene.table),
        "STORE": str(store),
        "TEACHERS": scene.teachers,
        "CLUSTER": str(cluster_file(tmp_path, 1)),
        "MMKD": str(tmp_path / "mmkd"),
    }
    Path(environment["MMKD"]).write_text(f'#!/bin/sh\nexec {shlex.join(MMKD)} "$@"\n')
    Path(environment["MMKD"]).chmod(0o755)
    out = tmp_path / "out"
    sent = ended(
        ["sbatch", "--wait", f"--output={out}", "--mem=0", str(ROOT / "docs/extract.sbatch")],
        env=environment,
        cwd=tmp_path,
    )
    assert sent.returncode == 0, sent.stdout + sent.stderr + (out.read_text() if out.exists() else "")
    assert scene.same(store)

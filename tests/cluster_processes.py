"""Processes of a Dask cluster: workers below a client, and a scheduler and worker as a user starts them by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from extract_scene import children, kill_session, started, wait_for


def workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    """Worker processes of a local cluster: below the client, started by multiprocessing."""
    found = []
    for pid in children(process.pid):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue
        if "spawn_main" in command:
            found.append(pid)
    return found


@contextmanager
def scheduler_and_worker(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes], subprocess.Popen[bytes]]]:
    """`dask scheduler` and `dask worker` on the loopback, as a user starts them by hand."""
    where = folder / "scheduler.json"
    where.unlink(missing_ok=True)
    base = [sys.executable, "-P", "-m"]
    loop = ["--host", "127.0.0.1", "--no-dashboard"]
    scheduler = started(
        [*base, "distributed.cli.dask_scheduler", *loop, "--port", "0", "--scheduler-file", str(where)],
        folder / "scheduler.log",
    )
    wait_for(lambda: where.exists() and bool(where.read_text()), scheduler, folder / "scheduler.log")
    address = json.loads(where.read_text())["address"]
    options = ["--nthreads", "1", "--memory-limit", "0", "--death-timeout", "10"]
    worker = started([*base, "distributed.cli.dask_worker", address, *loop, *options], folder / "worker.log")
    try:
        yield address, scheduler, worker
    finally:
        kill_session(worker)
        kill_session(scheduler)

"""`mmkd extract` in processes of its own, on a corpus small enough for many runs; shared by several test files."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from in_process import tree_digest

from mmkd.store.ledger import read_ledger

MMKD = [sys.executable, "-P", "-c", "from mmkd.cli.main import main; main()"]
ROWS = 2048  # eight shards of 256


@dataclass(frozen=True)
class Scene:
    """A corpus, a teacher, and the store of an uninterrupted run."""

    table: Path
    teacher: Path
    store: Path

    @property
    def teachers(self) -> str:
        """The value of --teachers."""
        return f"tiny=local-dir:{self.teacher}"

    def command(self, store: Path, *options: object) -> list[str]:
        """`mmkd extract` of this corpus and teacher."""
        given = ["extract", self.table, store, "--teachers", self.teachers, *options]
        return [*MMKD, *map(str, given)]

    def same(self, store: Path) -> bool:
        """True when every file has the bytes of the uninterrupted run."""
        return tree_digest(store) == tree_digest(self.store)


def mmkd(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return ended([*MMKD, *map(str, arguments)], **options)


def ended(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, **options)  # type: ignore[call-overload]


def started(command: list[str], log: Path, **options: object) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, its output in a file."""
    with log.open("wb") as file:
        return subprocess.Popen(command, start_new_session=True, stdout=file, stderr=subprocess.STDOUT, **options)  # type: ignore[call-overload]


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """kill -9 of a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, seconds: float = 400) -> None:
    """Wait until something is so while a run goes on."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s; {log.read_text()[-2000:]}"
        assert process.poll() is None, f"the run ended before: {log.read_text()[-2000:]}"
        time.sleep(0.002)


def entries(store: Path) -> int:
    """Ledger entries that are there now."""
    return len(read_ledger(store)) if (store / "zarr.json").is_file() else 0


def rows_done(store: Path) -> int:
    """Rows that the logs of all runs say were read."""
    lines = [line for path in store.glob("runs/*.jsonl") for line in path.read_text().splitlines()]
    return sum(json.loads(line)["rows"] for line in lines)


def children(pid: int) -> list[int]:
    """Processes below a process, from /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == pid:
            found += [int(path.parent.name), *children(int(path.parent.name))]
    return found


def settings(folder: Path, **content: object) -> Path:
    """A cluster.yaml."""
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(content))
    return path

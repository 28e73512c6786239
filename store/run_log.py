"""`runs/*.jsonl`: what each run did, shard by shard; nothing depends on it. `seconds` has `read` and `decode` (each
image once for all teachers, summed over threads), `await-read` and `await-decode` (the device waited for images),
`tokens`, `device` (passes were launched or waited for), `samples` (rows written), and for every teacher `image SLUG`
and `text SLUG` (of the device) and `write SLUG`. `flops`: floating-point operations of `image SLUG`, `text SLUG`."""

import io
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import IO, Any

from mmkd.base.files import disk_errors, list_folder
from mmkd.base.places.remote import RemotePath, StorePath


class RunLog:
    """A run's log file, `runs/<time>-<pid>.jsonl`; behind a URL, where nothing can be appended, written at the end."""

    def __init__(self, root: StorePath) -> None:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        self.path = root / f"runs/{stamp}-{os.getpid()}.jsonl"

    def __enter__(self) -> "RunLog":
        self.file: IO[str]
        if isinstance(self.path, RemotePath):
            self.file = io.StringIO()
            return self
        with disk_errors(self.path):
            self.path.parent.mkdir(exist_ok=True)
            self.file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if isinstance(self.file, io.StringIO):
            self.path.write_bytes(self.file.getvalue().encode())
        self.file.close()

    def write(self, shard: Any) -> None:
        """Append one shard's report, a dataclass. Raises StoreError if the disk is full or read-only."""
        with disk_errors(self.path):
            print(json.dumps(asdict(shard), sort_keys=True), file=self.file, flush=True)


@dataclass
class RunSeconds:
    """Time spent in all runs of a store."""

    runs: int = 0
    shards: int = 0
    """Shards finished; one that was done for two teachers in two runs counts twice."""
    rows: int = 0
    wall: float = 0.0
    """Seconds of all shards summed over workers; divide by their number for wall time."""
    seconds: Counter[str] = field(default_factory=Counter)
    flops: Counter[str] = field(default_factory=Counter)
    """Floating-point operations of forward passes, by the same names; of loaders that count them."""
    unreadable_lines: int = 0
    """Malformed lines, such as the last one of a run that was killed; they are passed over."""


def run_seconds(root: StorePath) -> RunSeconds:
    """Add up the seconds of `runs/*.jsonl`."""
    logs = list_folder(root / "runs", "*.jsonl")
    total = RunSeconds(runs=len(logs))
    for text in (text for log in logs for text in log.read_bytes().splitlines()):
        try:
            line = json.loads(text)
            seconds = {name: float(value) for name, value in line["seconds"].items()}
            flops = {name: float(value) for name, value in line.get("flops", {}).items() if value}
            rows, wall = int(line.get("rows", 0)), float(line.get("wall_seconds", 0))
        except (ValueError, TypeError, KeyError, AttributeError):
            total.unreadable_lines += 1
            continue
        total.shards += 1
        total.rows += rows
        total.wall += wall
        total.seconds.update(seconds)
        total.flops.update(flops)
    return total

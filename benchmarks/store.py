"""Reading features of nine teachers (both towers, 512 float16 values) from a store and from ten other layouts: random
batches, full scans, time to open, bytes and files. All layouts hold the same rows and are measured in turn in one
run; each is read as its own documentation recommends.

Warm means in the page cache. Cold means that the layout's files were dropped from it before (posix_fadvise, and mincore
tells what is left); what the disk itself keeps cannot be dropped. Layouts whose packages are not in the peers'
environment are left out. The layouts stand in peers/, the race in peers/race.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmkd.benchmarks.result import Row, main
from mmkd.benchmarks.where import peers_python
from mmkd.store.layout import FOLDED_SHARDS, MAX_ROWS_PER_SHARD, SHARDS_PER_PACK, shard_count

RACE = Path(__file__).parent / "peers" / "race.py"
MEMORY, OURS, ORIGINAL = "arrays in memory", "mmkd", "per-sample .pt (the original)"
MAPPED_ALIKE = "safetensors, shards held open"
"""Mapped and gathered as a store is, by code of the benchmark: no tool of others, so it is no peer of the goal."""
TEACHERS = 9
SHOWN = {"batch": (4096, 3), "scan": (0, 9)}
"""Rows and teachers of the contest that every layout's figure is shown for."""

Found = list[dict[str, Any]]


def run_race(rows: int, seconds: float) -> Found:
    """All findings of `peers/race.py`, run by the peers' Python where there is one."""
    python = peers_python("peers") or Path(sys.executable)
    place = Path(tempfile.mkdtemp(prefix="mmkd-bench-", dir=os.environ.get("MMKD_BENCH_DISK")))
    try:
        out = place / "found.json"
        sized = ["--rows", str(rows), "--teachers", str(TEACHERS), "--seconds", str(seconds)]
        subprocess.run([str(python), "-P", str(RACE), str(place / "layouts"), str(out), *sized], check=True)
        found: Found = json.loads(out.read_text())["found"]
        return found
    finally:
        shutil.rmtree(place, ignore_errors=True)


def of_case(found: Found, case: str, rows: int = 0, teachers: int = 0) -> dict[str, dict[str, Any]]:
    """The findings of one contest by layout."""
    wanted = {"rows": rows, "teachers": teachers} if teachers else {}
    return {
        one["layout"]: one
        for one in found
        if one["case"] == case and all(one[name] == value for name, value in wanted.items())
    }


def contest(found: Found, case: str, rows: int, teachers: int) -> Iterator[Row]:
    """One contest: against memory, against the best of the others, and against each where it is the one shown."""
    here = of_case(found, case, rows, teachers)
    ours = here[OURS]
    act = f"random batches of {rows:,} rows" if case == "batch" else "all rows in order"
    what = f"{act}, {teachers} teacher{'s' * (teachers > 1)}"
    note = f"{ours['rows_per_second']:,.0f} rows a second"
    speed = ours["gb_per_second"]

    def row(against: str, other: dict[str, Any], goal: str = "") -> Row:
        return Row(
            what=what, against=against, value=speed, reference=other["gb_per_second"], unit="GB/s", goal=goal, note=note
        )

    yield row("the same from memory", here[MEMORY], ">= 0.5" if case == "batch" else "")
    others = {name: one for name, one in here.items() if name not in (OURS, MEMORY)}
    peers = {name: one for name, one in others.items() if name != MAPPED_ALIKE}
    best = max(peers, key=lambda name: peers[name]["gb_per_second"])
    yield row(f"the best of the others: {best}", peers[best], ">= 25" if case == "batch" else "")
    if SHOWN[case] == (rows, teachers):
        for name, other in sorted(others.items(), key=lambda item: -item[1]["gb_per_second"]):
            if name != best:
                yield row(name, other)


def once(found: Found, case: str, what: str, note: str) -> Iterator[Row]:
    """Times of one act that every layout did once, in a process of its own."""
    here = of_case(found, case)
    ours = here.pop(OURS)
    for name, other in sorted(here.items(), key=lambda item: item[1]["seconds"] / item[1]["rows"]):
        # A scan that was stopped counts as if it had gone on as before.
        scale = ours["rows"] / other["rows"]
        left = max(ours["resident"], other["resident"])
        yield Row(
            what=what, against=name, value=ours["seconds"], reference=other["seconds"] * scale, unit="s",
            note=note.format(left=left),
        )  # fmt: skip


def room(found: Found) -> Iterator[Row]:
    """Bytes and files a million rows; the original has two files a row, and a store has its largest shards by then."""
    here = of_case(found, "size")
    million = 1_000_000
    shards = shard_count(million, MAX_ROWS_PER_SHARD)
    # Each shard's rows, each teacher's three packs, the folded ledger entries; documents beside them.
    packs = shard_count(shards, SHARDS_PER_PACK)
    files = shards + 3 * TEACHERS * packs + shard_count(shards, FOLDED_SHARDS) + 2 + 4 * TEACHERS
    ours = here[OURS]["bytes"] / here[OURS]["rows"] * million / 1e9
    for name, other in here.items():
        if name == OURS:
            continue
        theirs = other["bytes"] / other["rows"] * million / 1e9
        yield Row(
            what=f"bytes of a million rows, {TEACHERS} teachers", against=name, value=ours, reference=theirs, unit="GB",
            goal="<= 0.25" if name == ORIGINAL else "",
        )  # fmt: skip
    for name, other in here.items():
        if name in (ORIGINAL, "Lance", "webdataset (its shuffled stream)"):
            theirs = other["files"] / other["rows"] * million
            note = f"by the format, {MAX_ROWS_PER_SHARD:,} rows a shard; the other's scaled from {other['rows']:,} rows"
            yield Row(
                what=f"files of a million rows, {TEACHERS} teachers", against=name, value=files, reference=theirs,
                goal="<= 0.001" if name == ORIGINAL else "",
                note=note,
            )  # fmt: skip


def measure(full: bool) -> list[Row]:
    """Rows for the page."""
    found = run_race(*((131_072, 2.0) if full else (65_536, 0.5)))
    rows: list[Row] = []
    for size in sorted({one["rows"] for one in found if one["case"] == "batch"}):
        for teachers in (1, 3, 9):
            rows += contest(found, "batch", size, teachers)
    for teachers in (1, 9):
        rows += contest(found, "scan", 0, teachers)
    cold = "{left:.1%} of the files were in the page cache"
    rows += once(found, "cold batch", "open and read 4,096 random rows of one teacher, cold", cold)
    rows += once(found, "cold nine", "open and read 4,096 random rows of nine teachers, cold", cold)
    ours = of_case(found, "cold nine")[OURS]
    rows.append(
        Row(
            what="pages read for 4,096 random rows of nine teachers, cold", against="random pages, 32 reads at a time",
            value=ours["pages_a_second"], reference=ours["disk_pages_a_second"], unit="pages/s", goal=">= 0.8",
            note="opening included; the disk's own rate from the same files just before",
        )
    )  # fmt: skip
    rows += once(found, "cold scan", "open and read all rows of one teacher, cold", cold)
    rows += once(found, "open", "open and read a first row, warm", "a fresh process, its imports done")
    return [*rows, *room(found)]


if __name__ == "__main__":
    main(measure)

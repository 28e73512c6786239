"""Every layout over the same rows, in one run: written, opened, read cold, then read warm and in turn.

    python -P benchmarks/peers/race.py FOLDER OUT.json [--rows N] [--teachers T] [--seconds S]

What is in FOLDER already is not written again. OUT gets the findings, each a dict with `case`, `layout` and figures.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmkd.base.process import keep_freed_memory
from mmkd.benchmarks.peers.layouts import OVER_THE_STORE, Hdf5, Layout, Memory, Mmkd, Safetensors, place_of
from mmkd.benchmarks.peers.loaders import LOADERS

PEERS = (*OVER_THE_STORE, Hdf5, Safetensors, *LOADERS)
DIM = 512
BATCHES = (1024, 4096, 16384)
REPEATS = 9
MODES = ("open", "batch", "nine", "scan")
DEPTH = 32
SCAN_SECONDS = 4.0
"""What needs longer for all rows in order is stopped then, and its rate is that of the rows it did."""


def columns_of(teachers: int) -> list[str]:
    """Both towers of the first teachers."""
    return [f"t{number}_{tower}" for number in range(teachers) for tower in ("image", "text")]


def make_features(rows: int, teachers: int) -> dict[str, np.ndarray]:
    """Random directions, as float16."""
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((rows, DIM), np.float32).astype(np.float16) for name in columns_of(teachers)}


def available() -> list[type[Layout]]:
    """Layouts whose packages are installed."""
    return [kind for kind in (Mmkd, *PEERS) if all(importlib.util.find_spec(name) for name in kind.needs)]


def write_all(folder: Path, features: dict[str, np.ndarray]) -> None:
    """Write what is not there yet; a layout appears wholly or not at all."""
    for kind in available():
        place = place_of(kind, folder)
        if place.exists():
            continue
        print(f"writing {kind.name}", flush=True)
        temporary = place.with_name(f".{place.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        kind(temporary).write({name: values[: kind.most_rows] for name, values in features.items()})
        temporary.rename(place)
    os.sync()


def files_of(place: Path) -> list[Path]:
    """All files of a layout."""
    return [path for path in place.rglob("*") if path.is_file()]


def drop_cache(place: Path) -> float:
    """Ask the kernel to forget a layout's pages; returns the share that is still in memory, by mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    resident = pages = 0
    for path in files_of(place):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            size = os.fstat(fd).st_size
            if not size:
                continue
            mapped = mmap.mmap(fd, size, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE)
            count = -(-size // mmap.PAGESIZE)
            states = (ctypes.c_ubyte * count)()
            address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
            libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), states)
            resident += sum(state & 1 for state in states)
            pages += count
        finally:
            os.close(fd)
    return resident / max(pages, 1)


def alone(kind: type[Layout], folder: Path, mode: str, rows: int, teachers: int) -> dict[str, Any]:
    """In a process that has opened nothing yet: a first row, warm; a batch of one teacher or all, or a scan, cold."""
    place = place_of(kind, folder)
    limit = min(rows, kind.most_rows)
    resident = drop_cache(place) if mode != "open" else 1.0
    layout, columns = kind(place), columns_of(teachers if mode == "nine" else 1)
    picked = np.random.default_rng(2).integers(0, limit, 4096)
    if mode == "nine" and layout.row_by_row:
        picked = picked[:256]
    disk = pages_a_second(place, 9 * 4096) if mode == "nine" and kind is Mmkd else 0.0
    resident = drop_cache(place) if disk else resident
    started = time.perf_counter()
    layout.open()
    if mode == "scan":
        done = scan_for(layout, columns, SCAN_SECONDS)
    else:
        done = len(layout.batch(picked[:1] if mode == "open" else picked, columns)[0])
    seconds = time.perf_counter() - started
    case = "open" if mode == "open" else f"cold {mode}"
    pages = done * len(columns) / seconds
    told = {"case": case, "layout": kind.name, "seconds": seconds, "rows": done, "resident": resident}
    return told | ({"pages_a_second": pages, "disk_pages_a_second": disk} if disk else {})


def pages_a_second(place: Path, count: int) -> float:
    """What the disk gives of random pages of these files, `DEPTH` requests at a time, none of them in memory."""
    drop_cache(place)
    files = [path for path in files_of(place) if path.stat().st_size > mmap.PAGESIZE]
    fds = [os.open(path, os.O_RDONLY) for path in files]
    pages = np.array([os.fstat(fd).st_size // mmap.PAGESIZE for fd in fds])
    picked = np.random.default_rng(5).integers(0, pages.sum(), count)
    which = np.searchsorted(pages.cumsum(), picked, side="right")
    offsets = (picked - (pages.cumsum() - pages)[which]) * mmap.PAGESIZE

    def read(part: np.ndarray) -> None:
        for at in part.tolist():
            os.pread(fds[which[at]], mmap.PAGESIZE, int(offsets[at]))

    for fd in fds:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    started = time.perf_counter()
    with ThreadPoolExecutor(DEPTH) as pool:
        list(pool.map(read, np.array_split(np.arange(count), DEPTH)))
    seconds = time.perf_counter() - started
    for fd in fds:
        os.close(fd)
    return count / seconds


def all_alone(kind: type[Layout], folder: Path, rows: int, teachers: int) -> None:
    """Every mode of `alone`, each in a fork of this process, which has its imports done and has used none of them."""
    for name in kind.needs:
        importlib.import_module(name)
    for mode in MODES:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            print(json.dumps(alone(kind, folder, mode, rows, teachers)), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status == 0, (kind.name, mode)


def scan_for(layout: Layout, columns: list[str], seconds: float) -> int:
    """Read rows in order until all are read or the time is over; returns how many that were."""
    done, started = 0, time.perf_counter()
    for step in layout.scan(columns):
        done += len(step[0])
        if time.perf_counter() - started > seconds:
            break
    return done


def run_alone(folder: Path, rows: int, teachers: int) -> Iterator[dict[str, Any]]:
    """`alone` for every layout and mode."""
    for kind in available():
        command = [sys.executable, "-P", __file__, str(folder), "-", "--rows", str(rows)]
        command += ["--teachers", str(teachers), "--alone", kind.__name__]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        assert len(lines) == len(MODES), done.stdout
        yield from map(json.loads, lines)


def sizes(folder: Path, rows: int, teachers: int) -> Iterator[dict[str, Any]]:
    """Bytes (length of files, and room on disk) and files of every layout."""
    for kind in available():
        if kind in OVER_THE_STORE:
            continue
        stats = [path.stat() for path in files_of(place_of(kind, folder))]
        there = min(rows, kind.most_rows)
        yield {
            "case": "size", "layout": kind.name, "rows": there, "teachers": teachers, "files": len(stats),
            "bytes": sum(stat.st_size for stat in stats), "room": sum(stat.st_blocks * 512 for stat in stats),
        }  # fmt: skip


def check(layout: Layout, features: dict[str, np.ndarray], rows: int, teachers: int) -> None:
    """Fast is of no use when it is wrong."""
    picked = np.random.default_rng(3).integers(0, rows, 64)
    columns = columns_of(teachers)
    found = layout.batch(picked, columns)
    for name, values in zip(columns, found, strict=True):
        if layout.stream_only:
            assert np.shape(values) == (64, DIM)
        else:
            assert np.array_equal(np.asarray(values), features[name][picked]), (layout.name, name)
    first = [np.asarray(values) for values in next(iter(layout.scan(columns[:2])))]
    assert np.array_equal(first[0], features[columns[0]][: len(first[0])]), layout.name


def race(layouts: list[Layout], limits: dict[str, int], seconds: float, teachers: int) -> Iterator[dict[str, Any]]:
    """Warm batches, then warm scans: in turn, other rows each time, until the repeats or the seconds are used up."""
    rng = np.random.default_rng(1)
    counts = [count for count in (1, 3, 9) if count <= teachers]
    for size in (*BATCHES, 0):
        for count in counts:
            columns = columns_of(count)
            rates: dict[str, list[float]] = {layout.name: [] for layout in layouts}
            spent = dict.fromkeys(rates, 0.0)
            most = {layout.name: affordable(layout, columns, limits[layout.name], seconds) for layout in layouts}
            for turn in range(REPEATS):
                for layout in layouts:
                    # The first turn of what is fast is its warm-up; of what is slow it is the measurement.
                    if turn and spent[layout.name] > seconds:
                        continue
                    rows = rng.integers(0, limits[layout.name], min(size, most[layout.name]))
                    started = time.perf_counter()
                    if size:
                        layout.batch(rows, columns)
                    done = len(rows) if size else scan_for(layout, columns, 2 * seconds)
                    taken = time.perf_counter() - started
                    spent[layout.name] += taken
                    rates[layout.name].append(done / taken)
            for layout in layouts:
                counted = rates[layout.name][1:] or rates[layout.name]
                yield {
                    "case": "batch" if size else "scan", "layout": layout.name, "rows": size, "teachers": count,
                    "rows_at_once": min(size, most[layout.name]), "repeats": len(counted),
                    "rows_per_second": statistics.median(counted),
                    "gb_per_second": statistics.median(counted) * len(columns) * DIM * 2 / 1e9,
                }  # fmt: skip


def affordable(layout: Layout, columns: list[str], limit: int, seconds: float) -> int:
    """Rows that a layout reads in this time, if it reads row by row and so is as fast with fewer; else any number."""
    if not layout.row_by_row:
        return sys.maxsize
    rows = np.random.default_rng(4).integers(0, limit, 64)
    layout.batch(rows, columns)
    started = time.perf_counter()
    layout.batch(rows, columns)
    return max(64, int(64 * seconds / (time.perf_counter() - started)))


def main() -> None:
    """Run it all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--teachers", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="for one layout in one contest")
    parser.add_argument("--write-only", action="store_true")
    parser.add_argument("--alone", help="internal")
    given = parser.parse_args()
    keep_freed_memory()  # as the trainer does
    if given.alone:
        kind = next(kind for kind in available() if kind.__name__ == given.alone)
        all_alone(kind, given.folder, given.rows, given.teachers)
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    features = make_features(given.rows, given.teachers)
    write_all(given.folder, features)
    if given.write_only:
        return
    found = [*sizes(given.folder, given.rows, given.teachers), *run_alone(given.folder, given.rows, given.teachers)]
    layouts: list[Layout] = [Memory(given.folder, features)]
    for kind in available():
        layout = kind(place_of(kind, given.folder))
        layout.open()
        layouts.append(layout)
    limits = {layout.name: min(given.rows, layout.most_rows) for layout in layouts}
    for layout in layouts[1:]:
        check(layout, features, limits[layout.name], given.teachers)
    found += race(layouts, limits, given.seconds, given.teachers)
    given.out.write_text(json.dumps({"threads": torch.get_num_threads(), "found": found}, indent=1))


if __name__ == "__main__":
    main()

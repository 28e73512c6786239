"""Processor, memory, limits of the kernel, disks, and what torch and Dask see."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mmkd.base.install import install_command
from mmkd.base.process import usable_cores
from mmkd.base.text import bytes_text
from mmkd.cli.doctor import Check

OLDEST_PYTHON = (3, 11)
MAPPED_FILES = 65_530
"""Linux's default of vm.max_map_count. A store of 2.9 million rows and nine teachers maps about 3,200 chunk files."""
OPEN_FILES = 1024

_ASK_TORCH = """
import json, torch, torchvision
cuda = torch.cuda.is_available()
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if cuda else []
bf16 = cuda and torch.cuda.is_bf16_supported()
devices = [[device.name, device.total_memory] for device in devices]
print(json.dumps({"torch": torch.__version__, "built": torch.version.cuda, "bf16": bf16, "devices": devices}))
"""


_ASK_DASK = """
import importlib.util, json, sys
try:
    import dask, distributed
except ImportError:
    raise
except Exception as error:
    print(json.dumps({"broken": f"{type(error).__name__}: {error}"}))
    sys.exit()
from distributed.utils import format_dashboard_link
faults = []
try:
    format_dashboard_link("localhost", 8787)
except KeyError as error:
    faults.append(f"distributed.dashboard.link names the variable {error}, which is not set")
for role in ("scheduler", "worker", "nanny"):
    preloads = dask.config.get(f"distributed.{role}.preload", None) or []
    for name in [preloads] if isinstance(preloads, str) else preloads:
        top, *_ = parts = name.split(".")
        if all(part.isidentifier() for part in parts) and importlib.util.find_spec(top) is None:
            faults.append(f"distributed.{role}.preload names the module {name!r}, which is not installed")
tls = dask.config.get("distributed.comm.tls.ca-file", None)
if dask.config.get("distributed.comm.require-encryption", None) and not tls:
    faults.append("distributed.comm.require-encryption is set without files under distributed.comm.tls")
print(json.dumps({"version": dask.__version__, "faults": faults, "folders": dask.config.paths}))
"""


def machine_checks(seconds: float) -> Iterator[Check]:
    """Yield checks of the machine. `seconds`: how long torch may take to load and to find its devices; a broken driver
    can block it forever."""
    version = platform.python_version()
    if sys.version_info >= OLDEST_PYTHON:
        yield Check("machine", "python", "ok", f"{version} on {platform.platform()}")
    else:
        yield Check("machine", "python", "fault", version, "mmkd needs Python 3.11 or newer")
    yield Check("machine", "processor", "ok", f"{usable_cores()} of {os.cpu_count()} cores may be used")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Check("machine", "memory", "ok", bytes_text(total))
    yield from _limits()
    yield _torch(seconds)
    yield _dask(seconds)


def _limits() -> Iterator[Check]:
    maps = Path("/proc/sys/vm/max_map_count")
    if maps.is_file():
        count = int(maps.read_text())
        low = count < MAPPED_FILES
        step = f"raise it for large stores: sysctl vm.max_map_count={MAPPED_FILES}" if low else ""
        yield Check("machine", "mapped files", "warning" if low else "ok", f"{count:,} a process", step)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = 0 <= soft < OPEN_FILES
    step = f"raise it: ulimit -n {OPEN_FILES}" if low else ""
    allowed = "any number" if hard < 0 else f"{hard:,}"
    yield Check("machine", "open files", "warning" if low else "ok", f"{soft:,} a process (up to {allowed})", step)


def _dask(seconds: float) -> Check:
    """In a process of its own: importing Dask reads the user's configuration, and a broken one is an exception."""
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and a constant
            [sys.executable, "-c", _ASK_DASK], capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return Check("machine", "dask", "warning", f"no answer within {seconds:g} s", "try a longer --timeout")
    if done.returncode:
        if "No module named 'dask" in done.stderr or "No module named 'distributed" in done.stderr:
            return Check("machine", "dask", "note", "not installed", install_command("extract"))
        last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        return Check("machine", "dask", "fault", last[:300], "install dask and distributed again")
    dask = json.loads(done.stdout.strip().splitlines()[-1])
    if "broken" in dask:
        step = "correct the YAML files in ~/.config/dask, or name another folder in DASK_CONFIG"
        return Check("machine", "dask", "fault", " ".join(dask["broken"].split())[-300:], step)
    if dask["faults"]:
        step = f"correct Dask's configuration (YAML files in {', '.join(dask['folders'])}, variables DASK_...)"
        return Check("machine", "dask", "warning", "; ".join(dask["faults"]), step)
    return Check("machine", "dask", "ok", f"{dask['version']}, configuration sound")


def _torch(seconds: float) -> Check:
    """In a process of its own: a driver that hangs, or a torch that does not fit torchvision, must not end the look."""
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and a constant
            [sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        step = "a GPU driver that hangs? try `nvidia-smi`, or a longer --timeout"
        return Check("machine", "torch", "warning", f"did not answer within {seconds:g} s", step)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        if "No module named 'torch" in last:
            return Check(
                "machine",
                "torch",
                "note",
                "not installed: stores can be read, not made",
                install_command("extract", "distill"),
            )
        step = "torch and torchvision must be of one build: install both together in a fresh environment"
        return Check("machine", "torch", "fault", last[:200], step)
    torch = json.loads(done.stdout.strip().splitlines()[-1])
    built = f"built for CUDA {torch['built']}" if torch["built"] else "built for CPUs"
    devices = ", ".join(f"{name} ({bytes_text(size)})" for name, size in torch["devices"])
    found = f"{torch['torch']} {built}; " + (
        f"{devices}, bf16 {'yes' if torch['bf16'] else 'no'}"
        if devices
        else "no GPU: teachers and training run on the CPU"
    )
    return Check("machine", "torch", "ok" if devices else "note", found)


LITTLE = 10 * 1024**3
"""Bytes: the nine teachers' weights take about 6 GB, features of 100,000 pairs by all nine about 2 GB."""


def disk_checks(folder: Path, cache: Path) -> Iterator[Check]:
    """Free room in the folder for stores, the hub's cache and the folder for temporary files."""
    for name, place in (("stores", folder), ("weights", cache), ("temporary", Path(tempfile.gettempdir()))):
        yield _room(name, place)


def _room(name: str, place: Path) -> Check:
    there = place.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        return Check(
            "disk", name, "warning", f"{place} cannot be written", "choose another folder, or change its rights"
        )
    if free < LITTLE:
        return Check("disk", name, "warning", f"{bytes_text(free)} free in {place}", "make room, or use another disk")
    return Check("disk", name, "ok", f"{bytes_text(free)} free in {place}")

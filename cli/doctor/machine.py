"""What a check says; and the machine: processor, memory, limits of the kernel, disks, what torch and Dask see."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmkd.base.install import install_command
from mmkd.base.process import usable_cores
from mmkd.base.text import bytes_text

Status = Literal["ok", "note", "warning", "fault"]
"""`note`: something optional is missing. `warning`: some work will fail. `fault`: correct it first."""


@dataclass(frozen=True)
class Check:
    """One line of `mmkd doctor`."""

    part: Literal["machine", "packages", "hub", "teachers", "disk"]
    name: str
    status: Status
    found: str
    next_step: str = ""
    """Next step; empty where none is needed."""


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
import json, logging, os
try:
    import dask, distributed
except ImportError:
    raise
except Exception as error:
    print(json.dumps({"broken": f"{type(error).__name__}: {error}"}), flush=True)
    os._exit(0)
logging.disable()
own, fault = dask.config.collect().get("distributed"), ""
try:
    if own:
        options = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "memory_limit": 0}
        with distributed.LocalCluster(n_workers=1, threads_per_worker=1, **options) as cluster:
            cluster.dashboard_link
except Exception as error:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    fault = f"no worker starts with {json.dumps(own, default=str)}: {type(error).__name__}: {error}"
answer = {"version": dask.__version__, "fault": fault, "folders": dask.config.paths}
print(json.dumps(answer), flush=True)
os._exit(0)
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
    yield _torch(seconds)
    yield _dask(seconds)


def _ask(name: str, program: str, seconds: float, *, hung: str, broken: str) -> dict[str, Any] | Check:
    """Return what a Python program prints as JSON, or why it does not. In a process of its own: a driver that hangs, or
    libraries that do not fit each other, must not end the look."""
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and a constant
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return Check("machine", name, "warning", f"did not answer within {seconds:g} s", hung)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        return Check("machine", name, "fault", last[:300], broken)
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def _dask(seconds: float) -> Check:
    hung, broken = "try a longer --timeout", "install dask and distributed again"
    dask = _ask("dask", _ASK_DASK, seconds, hung=hung, broken=broken)
    if isinstance(dask, Check):
        if "No module named 'dask" in dask.found or "No module named 'distributed" in dask.found:
            return Check("machine", "dask", "note", "not installed", install_command("extract"))
        return dask
    if "broken" in dask:
        step = "correct the YAML files in ~/.config/dask, or name another folder in DASK_CONFIG"
        return Check("machine", "dask", "fault", " ".join(dask["broken"].split())[-300:], step)
    if dask["fault"]:
        step = f"correct Dask's configuration (YAML files in {', '.join(dask['folders'])}, variables DASK_...)"
        return Check("machine", "dask", "warning", " ".join(dask["fault"].split())[:500], step)
    return Check("machine", "dask", "ok", f"{dask['version']}, configuration sound")


def _torch(seconds: float) -> Check:
    hung = "a GPU driver that hangs? try `nvidia-smi`, or a longer --timeout"
    broken = "torch and torchvision must be of one build: install both together in a fresh environment"
    torch = _ask("torch", _ASK_TORCH, seconds, hung=hung, broken=broken)
    if isinstance(torch, Check):
        if "No module named 'torch" in torch.found:
            step = install_command("extract", "distill")
            return Check("machine", "torch", "note", "not installed: stores can be read, not made", step)
        return torch
    built = f"built for CUDA {torch['built']}" if torch["built"] else "built for CPUs"
    found = f"{torch['torch']} {built}; "
    if not torch["devices"]:
        return Check("machine", "torch", "note", f"{found}no GPU: teachers and training run on the CPU")
    devices = ", ".join(f"{name} ({bytes_text(size)})" for name, size in torch["devices"])
    return Check("machine", "torch", "ok", f"{found}{devices}, bf16 {'yes' if torch['bf16'] else 'no'}")


LITTLE = 10 * 1024**3
"""Bytes: the nine teachers' weights take about 6 GB, features of 100,000 pairs by all nine about 2 GB."""


def disk_checks(folder: Path, cache: Path) -> Iterator[Check]:
    """Free room in the folder for stores, the hub's cache and the folder for temporary files."""
    for name, place in (("stores", folder), ("weights", cache), ("temporary", Path(tempfile.gettempdir()))):
        there = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        found = f"{bytes_text(free)} free in {place}"
        if not os.access(there, os.W_OK):
            step = "choose another folder, or change its rights"
            yield Check("disk", name, "warning", f"{place} cannot be written", step)
        elif free < LITTLE:
            yield Check("disk", name, "warning", found, "make room, or use another disk")
        else:
            yield Check("disk", name, "ok", found)

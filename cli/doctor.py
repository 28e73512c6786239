"""`mmkd doctor`: what this machine has and lacks for each stage."""

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from itertools import chain
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import click
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mmkd.base.arithmetic import PEAK
from mmkd.base.install import install_command
from mmkd.base.notes import write_note
from mmkd.base.process import usable_cores
from mmkd.base.text import bytes_text
from mmkd.extract.teachers.published import the_nine

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


MAPPED_FILES = 65_530
"""Linux's default of vm.max_map_count. A store of 2.9 million rows and nine teachers maps about 3,200 chunk files."""
OPEN_FILES = 1024

_ASK_TORCH = """
import json, time, torch, torchvision
cuda = torch.cuda.is_available()
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if cuda else []
bf16 = cuda and torch.cuda.is_bf16_supported()
devices = [[device.name, device.total_memory] for device in devices]
def peak(device, dtype, size):
    a = torch.randn(size, size, device=device).to(dtype)
    for turn in range(8):
        if turn == 3:
            torch.cuda.synchronize() if cuda else None
            started = time.perf_counter()
        a @ a
    torch.cuda.synchronize() if cuda else None
    return 5 * 2 * size**3 / (time.perf_counter() - started) / 1e12
torch.set_num_threads(1)
name, half = (devices[0][0] if cuda else "cpu"), torch.bfloat16 if bf16 else torch.float16
peaks = {"fp32": peak("cuda" if cuda else "cpu", torch.float32, 8192 if cuda else 1024)}
if cuda:
    peaks["half"] = peak("cuda", half, 8192)
found = {"torch": torch.__version__, "built": torch.version.cuda, "bf16": bf16, "devices": devices, "name": name}
print(json.dumps(found | {"peaks": peaks}))
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
    yield Check("machine", "python", "ok", f"{platform.python_version()} on {platform.platform()}")
    yield Check("machine", "processor", "ok", f"{usable_cores()} of {os.cpu_count()} cores may be used")
    yield Check("machine", "memory", "ok", bytes_text(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
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
    return json.loads(done.stdout.strip().splitlines()[-1])


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
    found, peaks = f"{torch['torch']} {built}; ", torch.get("peaks", {})
    for kind, tflops in peaks.items():
        write_note(PEAK, [torch["name"], kind], tflops)
    speed = "".join(f", {tflops:.3g} TFLOP/s in {kind}" for kind, tflops in peaks.items())
    if not torch["devices"]:
        core = speed and f"{speed} a core"
        return Check("machine", "torch", "note", f"{found}no GPU: teachers and training run on the CPU{core}")
    devices = ", ".join(f"{name} ({bytes_text(size)})" for name, size in torch["devices"])
    return Check("machine", "torch", "ok", f"{found}{devices}, bf16 {'yes' if torch['bf16'] else 'no'}{speed}")


CORE = ""

WHOLE = "demo"
"""The extra with which every stage runs."""


_MODULES = {
    "PIL": "pillow", "faiss": "faiss-cpu", "open_clip": "open-clip-torch",
    "openslide": "openslide-python", "skimage": "scikit-image", "sklearn": "scikit-learn", "umap": "umap-learn",
}  # fmt: skip
"""Modules whose packages have other names."""

_STAGE = {
    "align": ("distill",), "distill": ("distill",), "evaluate": ("evaluate", "extract"), "export": ("distill",),
    "extract": ("extract",), "select": ("extract",), "store": ("inspect", "extract"), "teachers": ("extract",),
}  # fmt: skip
"""Extras in which a command looks first for what several have."""


def package_checks() -> Iterator[Check]:
    """Yield one line for the core, one for each extra, from what the installed mmkd says it needs."""
    wanted, extras = _declared()
    for extra in (CORE, *extras):
        yield extra_check(extra, needed(wanted, extra))


def _declared() -> tuple[list[Requirement], list[str]]:
    """Return what the installed mmkd needs, and its extras by name."""
    extras = metadata("mmkd").get_all("Provides-Extra") or ()
    return [Requirement(text) for text in requires("mmkd") or ()], sorted(extras)


def needed(wanted: Iterable[Requirement], extra: str) -> list[Requirement]:
    """Return requirements of the core (an empty name) or of an extra, those of extras that it names included."""
    wanted = list(wanted)
    own = [one for one in wanted if _belongs(one, extra)]
    named = [other for one in own if one.name == "mmkd" for other in sorted(one.extras)]
    return [one for one in own if one.name != "mmkd"] + [one for other in named for one in needed(wanted, other)]


def _belongs(one: Requirement, extra: str) -> bool:
    if one.marker is None:
        return extra == CORE
    return one.marker.evaluate({"extra": extra}) and (extra == CORE or not one.marker.evaluate({"extra": CORE}))


def missing_package(module: str, command: str = "") -> str:
    """Return the package or extra to install for `module` in `mmkd COMMAND`, preferring the one of its stage."""
    package = canonicalize_name(_MODULES.get(module, module))
    wanted, extras = _declared()
    having = [
        extra
        for extra in extras
        if extra not in (WHOLE, "dev", "docs")
        and any(canonicalize_name(one.name) == package and _belongs(one, extra) for one in wanted)
    ]
    of_stage = [extra for extra in _STAGE.get(command, ()) if extra in having] or (having if len(having) == 1 else [])
    return install_command(of_stage[0] if of_stage else WHOLE)


def extra_check(extra: str, wanted: Iterable[Requirement]) -> Check:
    missing: list[str] = []
    old: list[str] = []
    there: list[str] = []
    for one in wanted:
        try:
            found = version(canonicalize_name(one.name))
        except PackageNotFoundError:
            missing.append(one.name)
        else:
            fits = one.specifier.contains(found, prereleases=True)
            (there if fits else old).append(f"{one.name} {found}" + ("" if fits else f" (needs {one.specifier})"))
    name, step = extra or "core", install_command(*filter(None, [extra]))
    if old:
        return Check("packages", name, "warning" if extra else "fault", "wrong version: " + ", ".join(old), step)
    if missing:
        return Check("packages", name, "note" if extra else "fault", "not installed: " + ", ".join(missing), step)
    return Check("packages", name, "ok", ", ".join(dict.fromkeys(there)))


HUB = "https://huggingface.co"


def hub_check(seconds: float) -> Check:
    """Ask the hub (or the mirror that HF_ENDPOINT names) for one small file, for at most `seconds`. Runs in a thread,
    because a name lookup has no timeout."""
    place = os.environ.get("HF_ENDPOINT", HUB)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return Check("hub", place, "note", "HF_HUB_OFFLINE is set: only what is in the cache is used")
    if not place.startswith(("http://", "https://")):
        return Check("hub", place, "warning", "HF_ENDPOINT is no http(s) address", f"unset it, or write {HUB}")
    answer: list[str] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{place}/robots.txt", timeout=seconds) as reply:  # noqa: S310 - http(s), above
                answer.append(f"answers ({reply.status})")
        except urllib.error.HTTPError as error:
            answer.append(f"answers ({error.code})")
        except (OSError, ValueError) as error:
            answer.append(f"! {getattr(error, 'reason', error)}")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    said = answer[0] if answer else f"! no answer within {seconds:g} s"
    if said.startswith("!"):
        step = "set HF_ENDPOINT to a mirror, or give teachers as NAME=local-dir:/path"
        return Check("hub", place, "warning", f"cannot be reached: {said[2:]}", step)
    return Check("hub", place, "ok", said)


def cache_folder() -> Path:
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def teacher_checks() -> Iterator[Check]:
    """Yield one line for each of the nine: local files and license. Asks no network."""
    for teacher in the_nine():
        repository = teacher.spec.repository
        held = cached_bytes(repository) if repository else 0
        if repository is None:
            found = "not on the hub"
            step = f"fetch and unpack {teacher.source}, then --teachers {teacher.slug}=local-dir:/folder"
        elif held:
            found, step = f"{bytes_text(held)} in the cache", f"mmkd teachers check {teacher.slug}"
        else:
            kind = "--repo-type dataset " if repository.startswith("datasets/") else ""
            found = "not in the cache"
            step = f"fetched when it is first used, or: hf download {kind}{repository.removeprefix('datasets/')}"
        status: Status = "ok" if held else "note"
        yield Check("teachers", teacher.slug, status, f"{found}; license {teacher.license}", step)


def cached_bytes(repository: str) -> int:
    """Return bytes that the cache holds of a repository (`org/name`, `datasets/org/name`); 0 when it is not there."""
    place = repository if repository.startswith("datasets/") else f"models/{repository}"
    folder = cache_folder() / place.replace("/", "--") / "snapshots"
    # A snapshot's files are links to blobs; one that was cut off has no link yet.
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def disk_checks(folder: Path, cache: Path) -> Iterator[Check]:
    """Free room in the folder for stores, the hub's cache and the folder for temporary files."""
    for name, place in (("stores", folder), ("weights", cache), ("temporary", Path(tempfile.gettempdir()))):
        there = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        found = f"{bytes_text(free)} free in {place}"
        if not os.access(there, os.W_OK):
            step = "choose another folder, or change its rights"
            yield Check("disk", name, "warning", f"{place} cannot be written", step)
        elif free < 10 * 1024**3:
            # The nine teachers' weights take about 6 GB, features of 100,000 pairs by all nine about 2 GB.
            yield Check("disk", name, "warning", found, "make room, or use another disk")
        else:
            yield Check("disk", name, "ok", found)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default=".")
@click.option(
    "--timeout", type=click.FloatRange(min=1), default=60.0, help="Seconds to wait for torch; for the hub, at most 10."
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def doctor(folder: Path, timeout: float, as_json: bool) -> None:
    """Check the machine, packages, hub, teachers' weights and licenses, and the free space in FOLDER for stores.

    Needs no network, and keeps nothing but the measured speed of the device, for the MFU that other commands print.
    Exit status 1 when something must be corrected before mmkd can work.
    """
    hub, disks = map(hub_check, [min(timeout, 10)]), disk_checks(folder, cache_folder())
    found: list[Check] = []
    for check in chain(machine_checks(timeout), package_checks(), hub, teacher_checks(), disks):
        if not as_json:
            if not found or found[-1].part != check.part:
                click.echo(check.part)
            click.echo(f"  {check.status:7}  {check.name}: {shorten(check.found, 160, placeholder=' ...')}")
            if check.next_step and check.status != "ok":
                click.echo(f"           next: {check.next_step}")
        found.append(check)
    if as_json:
        click.echo(json.dumps([asdict(check) for check in found], indent=1))
    if any(check.status == "fault" for check in found):
        sys.exit(1)

"""The machine and the package versions that figures belong to."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from mmkd.base.process import usable_cores

PACKAGES = (
    "numpy", "zarr", "pyarrow", "torch", "open_clip_torch", "transformers", "dask", "distributed", "tensorstore",
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]
# Other stores and tools live apart from ours, so that neither side holds the other's versions back: a list of packages
# in this folder each, and an environment of its name in build/ (`make bench` makes them).
PEERS = ("peers", "clip-retrieval")


class Machine(BaseModel):
    """What a figure depends on besides the code."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    processor: str
    cores: int
    memory_gb: int
    system: str
    gpus: tuple[str, ...]
    versions: dict[str, str]
    peers: dict[str, str]

    def same(self, other: Machine) -> bool:
        """Whether figures of both may stand on one page."""
        mine, theirs = (found.model_dump(exclude={"peers"}) for found in (self, other))
        return mine == theirs


def peers_python(name: str) -> Path | None:
    """The Python of the environment that `make bench` builds from benchmarks/`name`.txt, where there is one."""
    python = ROOT / "build" / name / "bin" / "python"
    return python if python.is_file() else None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _peers(name: str) -> dict[str, str]:
    """Versions of what benchmarks/`name`.txt lists before what it lists for their sake, as installed there."""
    python = peers_python(name)
    if python is None:
        return {}
    measured = (ROOT / "benchmarks" / f"{name}.txt").read_text().partition("# Needed by these")[0].splitlines()
    names = [line.partition("==")[0] for line in measured if line and not line.startswith("#")]
    listed = subprocess.run([str(python), "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout
    found = {package.lower(): version for package, _, version in (line.partition("==") for line in listed.splitlines())}
    return {package: found[package.lower()] for package in names if package.lower() in found}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def describe_machine() -> Machine:
    """This machine and this environment."""
    return Machine(
        processor=_processor(),
        cores=usable_cores(),
        memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        gpus=tuple(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())),
        versions={name: _version(name) for name in PACKAGES},
        peers={package: version for name in PEERS for package, version in _peers(name).items()},
    )

"""The machine and the package versions that figures belong to."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from mmkd.store.cores import usable_cores

PACKAGES = (
    "numpy", "zarr", "pyarrow", "torch", "open_clip_torch", "transformers", "dask", "distributed", "tensorstore",
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]
# Other stores and tools live apart from ours, so that neither side holds the other's versions back.
PEERS = Path(os.environ.get("MMKD_PEERS", ROOT / "build" / "peers"))


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


def peers_python() -> Path | None:
    """The Python of the peers' environment, where there is one (`make bench` builds it from benchmarks/peers.txt)."""
    python = PEERS / "bin" / "python"
    return python if python.is_file() else None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _peers() -> dict[str, str]:
    """Versions of what peers.txt names, as installed there."""
    python, wanted = peers_python(), ROOT / "benchmarks" / "peers.txt"
    if python is None or not wanted.is_file():
        return {}
    lines = (line.partition("#")[0].strip() for line in wanted.read_text().splitlines())
    names = [line.partition("=")[0].partition("[")[0].strip() for line in lines if line]
    listed = subprocess.run([str(python), "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout
    found = {name.lower(): version for name, _, version in (line.partition("==") for line in listed.splitlines())}
    return {name: found[name.lower()] for name in names if name.lower() in found}


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
        peers=_peers(),
    )

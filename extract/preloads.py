"""Preload modules of the user's Dask configuration, tried in a process of their own before a cluster starts: one that
ends its process would take the run along without a word, one that waits would stop it forever."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from tempfile import TemporaryFile
from typing import Any

import dask

from mmkd.base.errors import UserError
from mmkd.extract.cluster_config import DASK_PLACES, LOCAL

_ROLES = {LOCAL: ("worker", "nanny", "scheduler", "client"), "batch": ("scheduler", "client"), "address": ("client",)}
"""What runs on this machine, by kind of cluster."""

_MARK = "mmkd tries "
_TRY = f"""
import json, logging, os, sys
sys.path[:], preloads, config, whole = json.loads(sys.argv[1])
import dask
from distributed import Client, LocalCluster
from distributed.preloading import process_preloads

dask.config.set(config)
logging.disable()  # the last line on standard error is the reason
for role, names in preloads.items():
    for name in names:
        print("\\n{_MARK}" + f"distributed.{{role}}.preload: {{name}}", flush=True)
        process_preloads(None, [name], [])
if whole:
    print("\\n{_MARK}" + ", ".join(f"distributed.{{role}}.preload: {{names}}" for role, names in preloads.items()))
    sys.stdout.flush()
    options = {{"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "memory_limit": 0}}
    with LocalCluster(n_workers=1, **options) as cluster, Client(cluster):
        pass
os._exit(0)
"""


def try_preloads(kind: str, seconds: float = 120) -> None:
    """Load all preload modules that a cluster of this kind (of `_ROLES`) loads on this machine; for a local one, start
    a worker with them. Raises UserError if one fails, ends its process, or takes longer than `seconds`."""
    preloads: dict[str, list[str]] = {}
    for role in _ROLES[kind]:
        named: Any = dask.config.get(f"distributed.{role}.preload", None) or []
        names = [named] if isinstance(named, str) else named
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise UserError(f"distributed.{role}.preload is {named!r}, expected module names; correct {DASK_PLACES}")
        preloads |= {role: list(names)} if names else {}
    if not preloads:
        return
    config = {"distributed": dask.config.get("distributed")}
    given = json.dumps([sys.path, preloads, config, kind == LOCAL], default=str)
    with TemporaryFile("w+", errors="replace") as output, TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and a constant
            [sys.executable, "-P", "-c", _TRY, given],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        except subprocess.TimeoutExpired:
            how = f"did not end within {seconds:g} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if how == "ended with status 0":
            return
        output.seek(0), errors.seek(0)
        tried = [line.removeprefix(_MARK) for line in output.read().splitlines() if line.startswith(_MARK)]
        said = [line.strip() for line in errors.read().splitlines() if line.strip()]
    ends = [line for line in said if line.startswith(("SystemExit", "KeyboardInterrupt"))]
    why = f" ({(ends or said)[-1][:300]})" if said else ""
    raise UserError(f"Dask's {(tried or ['preload modules'])[-1]} {how}{why}; correct the module, or {DASK_PLACES}")

"""Clusters: processes of this machine, jobs of a batch system, or a Dask scheduler that is already there."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import resource_tracker
from typing import Any

import dask
import torch
from distributed import Client, LocalCluster, WorkerPlugin
from distributed.comm import CommClosedError
from distributed.utils import LoopRunner

from mmkd.base.errors import UserError
from mmkd.base.process import repeated, usable_cores
from mmkd.extract.cluster_config import BATCH_SYSTEMS, LOCAL, ClusterConfig, cluster_class_of

# Settings of Dask that a run needs; what the user's YAML says of `distributed` goes above them.
_DASK: dict[str, object] = {
    # A worker gets its next shard when it has finished one: a crash then blames the shard in hand and no other.
    "distributed.scheduler.worker-saturation": 1.0,
    # Twice is enough to know: the shard is done again with every image decoded in a process of its own.
    "distributed.scheduler.allowed-failures": 1,
    # A process imports PyTorch before it answers; on a busy machine or a cold network disk that takes minutes.
    "distributed.comm.timeouts.connect": "120s",
}
_REFILL_SECONDS = 10.0
_ATTEMPTS = 5


@contextmanager
def dask_client(cluster: ClusterConfig) -> Iterator[Client]:
    """Yield a client of the cluster; what was started for it lives as long as the block. Raises UserError if nothing
    answers at the address, or the batch system refuses."""
    with dask.config.set(_DASK), dask.config.set(_flat("distributed", cluster.distributed)):
        _check_encryption(cluster)
        if cluster.scheduler in BATCH_SYSTEMS:
            opened = _batch_client(cluster)
        elif cluster.scheduler == LOCAL:
            opened = _local_client(cluster)
        else:
            opened = _connect(cluster)
        address = cluster.scheduler
        # What Dask would log about a lost connection, with tracebacks, is said in one line below. The logger of its
        # client has a level of its own.
        names = ("asyncio", "distributed", "distributed.client")
        quiet = {logging.getLogger(name): logging.getLogger(name).level for name in names}
        for logger in quiet:
            logger.setLevel(logging.CRITICAL)
        try:
            with opened as client:
                address = client.scheduler.address
                yield client
        except (CancelledError, TimeoutError, OSError) as error:
            if isinstance(error, OSError) and not _is_connection_loss(error):
                raise
            raise UserError(
                f"the Dask scheduler at {address} went away ({type(error).__name__}); what was finished is "
                "kept: run the same command again to go on"
            ) from error
        finally:
            for logger, level in quiet.items():
                logger.setLevel(level)


def _check_encryption(cluster: ClusterConfig) -> None:
    required = dask.config.get("distributed.comm.require-encryption", None)
    if required and cluster.security is None and not dask.config.get("distributed.comm.tls.ca-file", None):
        raise UserError(
            "Dask's configuration sets distributed.comm.require-encryption and names no TLS files; name them under "
            "distributed.comm.tls or under `security:` in the YAML of --scheduler, or set it to false"
        )


def _is_connection_loss(error: OSError) -> bool:
    # A full disk and a closed terminal have a number; what distributed raises has none, or is a ConnectionError.
    if isinstance(error, BrokenPipeError):
        return False
    return isinstance(error, CommClosedError | ConnectionError | TimeoutError) or error.errno is None


class ScopedClient(Client):  # type: ignore[misc]  # dask has no type hints
    """A client that its `with` block closes, and nothing else. Dask's own also closes itself when garbage-collected, in
    any thread, for up to twice its timeout, under a lock that deadlocks a thread starting the next client."""

    def __del__(self) -> None:
        """Nothing: a client that never connected has nothing to close."""


def start_workers(client: Client, plugin: WorkerPlugin) -> None:
    """Set up the plugin on every current and later worker. A worker that dies meanwhile is replaced and does not count.
    Raises CommClosedError if workers keep dying."""
    for attempt in range(_ATTEMPTS):
        try:
            client.register_plugin(plugin)
        except CommClosedError:
            if attempt == _ATTEMPTS - 1:
                raise
        else:
            return


def default_workers(cluster: ClusterConfig) -> int:
    """Return workers of a run that names no number: one per GPU or core here, one elsewhere."""
    if cluster.scheduler != LOCAL:
        return 1
    return len(gpus()) or usable_cores()


def gpus() -> list[str]:
    """Return this machine's GPUs as CUDA_VISIBLE_DEVICES names them, without waking a device."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(index) for index in range(count)])[:count]


class GpuCluster(LocalCluster):  # type: ignore[misc]  # dask has no type hints
    """A local cluster whose n-th worker process sees the n-th GPU only. Used if dask-cuda is not installed."""

    def __init__(self, devices: list[str], **options: Any) -> None:
        self._devices = devices
        super().__init__(n_workers=0, **options)
        self.scale(len(devices))

    def new_worker_spec(self) -> dict[Any, Any]:
        """Dask's own description of the next worker, with its GPU in the environment."""
        described: dict[Any, Any] = super().new_worker_spec()
        return {
            name: worker | {"options": worker["options"] | {"env": {"CUDA_VISIBLE_DEVICES": self._device(name)}}}
            for name, worker in described.items()
        }

    def _device(self, name: int) -> str:
        return self._devices[name % len(self._devices)]


@contextmanager
def _local_client(cluster: ClusterConfig) -> Iterator[Client]:
    devices = gpus()[: cluster.workers]
    # Loopback only. No memory limit of Dask's own: it counts memory-mapped pages and would kill workers for them.
    options = {
        "threads_per_worker": cluster.worker.shards_at_once or (2 if devices else 1),
        "host": "127.0.0.1",
        "dashboard_address": "127.0.0.1:0",
        "memory_limit": 0,
        "silence_logs": logging.CRITICAL,
        "security": cluster.dask_security(),
    }
    with _loop_without_interrupts() as loop:
        yield from _opened_local(cluster, devices, options | {"loop": loop.loop})


@contextmanager
def _loop_without_interrupts() -> Iterator[LoopRunner]:
    """Dask's thread with SIGINT blocked, which the processes that it starts inherit: Ctrl-C is for the client alone."""
    runner = LoopRunner()
    resource_tracker.ensure_running()  # started by the first process otherwise, and that lets SIGINT through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        runner.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield runner
    finally:
        runner.stop()


def _opened_local(cluster: ClusterConfig, devices: list[str], options: dict[str, Any]) -> Iterator[Client]:
    try:
        opened = _local_cluster(cluster, devices, options)
    except TimeoutError as error:
        raise UserError(
            "the worker processes did not start in two minutes; is this machine busy, or its memory full? "
            "try fewer with --workers"
        ) from error
    except (RuntimeError, OSError, ValueError, TypeError, ImportError) as error:
        raise UserError(f"the worker processes did not start: {_cause(error)}; see `mmkd doctor`") from error
    with opened as started, ScopedClient(started, security=options["security"]) as client:
        yield client


def _cause(error: BaseException) -> str:
    """Return the first error of a chain in one line; distributed's wrappers say less."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _local_cluster(
    cluster: ClusterConfig, devices: list[str], options: dict[str, Any]
) -> AbstractContextManager[LocalCluster]:
    if not devices:
        plain: AbstractContextManager[LocalCluster] = LocalCluster(
            n_workers=cluster.workers or default_workers(cluster), **options
        )
        return plain
    try:
        from dask_cuda import LocalCUDACluster  # noqa: PLC0415 (an extra that only machines with a GPU can use)
    except ImportError:
        return GpuCluster(devices, **options)
    started: AbstractContextManager[LocalCluster] = LocalCUDACluster(CUDA_VISIBLE_DEVICES=devices, **options)
    return started


@contextmanager
def _batch_client(cluster: ClusterConfig) -> Iterator[Client]:
    security = cluster.dask_security()
    with (
        batch_cluster(cluster) as started,
        ScopedClient(started, security=security) as client,
        _kept_full(started, cluster),
    ):
        yield client


def batch_cluster(cluster: ClusterConfig) -> Any:
    """dask-jobqueue's object for this batch system: its scheduler runs, no job has been asked for. Raises UserError if
    it does not take the settings."""
    keywords = cluster.batch_keywords()
    dashboard = {"dashboard_address": "127.0.0.1:0"}
    keywords["scheduler_options"] = dashboard | (keywords.get("scheduler_options") or {})
    # The batch system holds a job to its memory; Dask's own limit would count memory-mapped pages too.
    keywords["worker_extra_args"] = ["--memory-limit", "0", *(keywords.get("worker_extra_args") or [])]
    security = cluster.dask_security()
    try:
        return cluster_class_of(cluster.scheduler)(security=security, **keywords)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{cluster.scheduler}: {reason}; see `jobqueue: {cluster.scheduler}:` in the YAML") from error


@contextmanager
def _kept_full(started: Any, cluster: ClusterConfig) -> Iterator[None]:
    """Ask for the jobs, and ask again for those that ended: at their time limit, by a dead node, by a cancel."""

    def ask() -> None:
        if cluster.workers is None:
            started.scale(jobs=1)
        else:
            started.scale(cluster.workers)

    ask()
    with repeated(ask, _REFILL_SECONDS, "mmkd-jobs"):
        yield


@contextmanager
def _connect(cluster: ClusterConfig) -> Iterator[Client]:
    security = cluster.dask_security()
    try:
        client = ScopedClient(cluster.scheduler, timeout="10s", security=security)
    except (OSError, TimeoutError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"no Dask scheduler answers at {cluster.scheduler!r}; name `local`, an address such as tcp://HOST:8786 "
            "(tls://HOST:8786 with `security:` in a YAML file where it asks for TLS), slurm, pbs or sge"
        ) from error
    with client:
        yield client


def _flat(name: str, settings: Any) -> dict[str, Any]:
    """Return nested settings under dotted names, so that other settings are kept."""
    if not isinstance(settings, dict) or not settings:
        return {name: settings} if settings != {} else {}
    return {key: value for step, below in settings.items() for key, value in _flat(f"{name}.{step}", below).items()}

"""Clusters: processes of this machine, jobs of a batch system, or a Dask scheduler that is already there."""

import logging
import os
import signal
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from typing import Any

import dask
import torch
from distributed import Client, LocalCluster, WorkerPlugin
from distributed.comm import CommClosedError
from distributed.utils import LoopRunner

from mmkd.base.errors import UserError, cause
from mmkd.base.process import repeated, usable_cores
from mmkd.extract.cluster_config import (
    BATCH_SYSTEMS,
    DASK_PLACES,
    LOCAL,
    ClusterConfig,
    cluster_class_of,
    leaves,
    own_settings,
    values_for_sections,
)
from mmkd.extract.preloads import try_preloads

# Settings of Dask that a run needs; what the user's YAML says of `distributed` goes above them.
_DASK: dict[str, object] = {
    # A worker gets its next shard when it has finished one: a crash then blames the shard in hand and no other.
    "distributed.scheduler.worker-saturation": 1.0,
    # Twice is enough to know: the shard is done again with every image decoded in a process of its own.
    "distributed.scheduler.allowed-failures": 1,
    # The run decides when its scheduler ends; one that ended while the first worker starts would hang the client.
    "distributed.scheduler.idle-timeout": None,
    # A process imports PyTorch before it answers; on a busy machine or a cold network disk that takes minutes.
    "distributed.comm.timeouts.connect": "120s",
}
_START_ERRORS = (RuntimeError, OSError, ValueError, TypeError, ImportError, LookupError, AttributeError)


@contextmanager
def dask_client(cluster: ClusterConfig) -> Iterator[Client]:
    """Yield a client of the cluster; what was started for it lives as long as the block. Raises UserError if nothing
    answers at the address, or the batch system refuses."""
    for given in (*own_settings(), cluster.distributed):
        if wrong := next(values_for_sections(given), None):
            raise UserError(f"Dask's {wrong} is one value, expected a section of settings; correct {DASK_PLACES}")
    own = leaves(cluster.distributed)
    settings = {".".join(("distributed", *path)): value for path, value in own if value != {}}
    with dask.config.set(_DASK), dask.config.set(settings):
        required = dask.config.get("distributed.comm.require-encryption", None)
        if required and cluster.security is None and not dask.config.get("distributed.comm.tls.ca-file", None):
            raise UserError(
                "Dask's configuration sets distributed.comm.require-encryption and names no TLS files; name them under "
                "distributed.comm.tls or under `security:` in the YAML of --scheduler, or set it to false"
            )
        kinds = dict.fromkeys(BATCH_SYSTEMS, "batch") | {LOCAL: LOCAL}
        try_preloads(kinds.get(cluster.scheduler, "address"))
        clients = dict.fromkeys(BATCH_SYSTEMS, _batch_client) | {LOCAL: _local_client}
        opened, address = clients.get(cluster.scheduler, _connect)(cluster), cluster.scheduler
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


def _is_connection_loss(error: OSError) -> bool:
    # A full disk and a closed terminal have a number; what distributed raises has none, or is a ConnectionError.
    lost = isinstance(error, CommClosedError | ConnectionError | TimeoutError) or error.errno is None
    return lost and not isinstance(error, BrokenPipeError)


class ScopedClient(Client):  # type: ignore[misc]  # dask has no type hints
    """A client that its `with` block closes, and nothing else. Dask's own also closes itself when garbage-collected, in
    any thread, for up to twice its timeout, under a lock that deadlocks a thread starting the next client."""

    def __del__(self) -> None:
        """Nothing: a client that never connected has nothing to close."""


def _client_of(cluster: Any, **options: Any) -> ScopedClient:
    try:
        return ScopedClient(cluster, **options)
    except (LookupError, AttributeError) as error:  # of a setting that does not parse; faults of a connection differ
        raise UserError(f"no Dask client starts: {first_cause(error)}; {settings_advice()}") from error


def start_workers(client: Client, plugin: WorkerPlugin) -> None:
    """Set up the plugin on every current and later worker. A worker that dies meanwhile is replaced and does not count.
    Raises CommClosedError if workers keep dying."""
    for _ in range(4):
        with suppress(CommClosedError):
            client.register_plugin(plugin)
            return
    client.register_plugin(plugin)


def default_workers(cluster: ClusterConfig) -> int:
    """Return workers of a run that names no number: one per GPU or core here, one elsewhere."""
    return (len(gpus()) or usable_cores()) if cluster.scheduler == LOCAL else 1


def shards_in_hand(cluster: ClusterConfig) -> int:
    """Return shards that all workers of a run have in hand at once, as far as this configuration says."""
    here = cluster.scheduler == LOCAL
    return (cluster.workers or default_workers(cluster)) * (_shards_at_once(cluster) if here else 1)


def _shards_at_once(cluster: ClusterConfig) -> int:
    return cluster.worker.shards_at_once or (2 if gpus() else 1)


def workers_beside(cluster: ClusterConfig) -> int:
    """Return worker processes that share the cores which each of them sees, as far as this configuration says."""
    if cluster.scheduler == LOCAL:
        return cluster.workers or default_workers(cluster)
    processes = cluster.batch_keywords().get("processes")
    return processes if isinstance(processes, int) and processes > 0 else 1


def gpus() -> list[str]:
    """Return this machine's GPUs as CUDA_VISIBLE_DEVICES names them, without waking a device."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(index) for index in range(count)])[:count]


def worker_gpus(cluster: ClusterConfig) -> list[str]:
    """Return the GPU of each local worker process; nothing without a GPU. More processes than GPUs share them: the
    interpreter's lock bounds what one process prepares."""
    found = gpus()
    return [found[number % len(found)] for number in range(cluster.workers or len(found))] if found else []


class GpuCluster(LocalCluster):  # type: ignore[misc]  # dask has no type hints
    """A local cluster whose n-th worker process sees the n-th of these GPUs only. Used if dask-cuda is not installed,
    or if processes share a GPU."""

    def __init__(self, devices: list[str], **options: Any) -> None:
        self._devices = devices
        super().__init__(n_workers=0, **options)
        self.scale(len(devices))

    def new_worker_spec(self) -> dict[Any, Any]:
        """Dask's own description of the next worker, with its GPU in the environment."""
        described: dict[Any, Any] = super().new_worker_spec()
        devices = {name: self._devices[name % len(self._devices)] for name in described}
        return {
            name: worker | {"options": worker["options"] | {"env": {"CUDA_VISIBLE_DEVICES": devices[name]}}}
            for name, worker in described.items()
        }


@contextmanager
def _local_client(cluster: ClusterConfig) -> Iterator[Client]:
    devices = worker_gpus(cluster)
    # Loopback only. No memory limit of Dask's own: it counts memory-mapped pages and would kill workers for them.
    options = {
        "threads_per_worker": _shards_at_once(cluster),
        "host": "127.0.0.1",
        "dashboard_address": "127.0.0.1:0",
        "memory_limit": 0,
        "silence_logs": logging.CRITICAL,
        "security": cluster.dask_security(),
    }
    with _loop_without_interrupts() as loop:
        try:
            opened = _local_cluster(cluster, devices, options | {"loop": loop.loop})
        except TimeoutError as error:
            raise UserError(
                "the worker processes did not start in two minutes; is this machine busy, or its memory full? "
                "try fewer with --workers"
            ) from error
        except _START_ERRORS as error:
            raise UserError(f"the worker processes did not start: {first_cause(error)}; {settings_advice()}") from error
        with opened as started, _client_of(started, security=options["security"]) as client:
            yield client


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


def first_cause(error: BaseException) -> str:
    """Return the first error of a chain in one line; distributed's wrappers say less."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return f"{type(error).__name__}: {cause(error)}"


def settings_advice() -> str:
    """Return the next step after a fault that the user's own Dask settings may cause: what they are, where they lie."""
    # No others: they can hold passwords.
    shown_sections = ("distributed", "temporary-directory", "temporary_directory")
    settings = [item for item in leaves(dask.config.collect()) if item[0][0] in shown_sections]
    if not (own := [f"{'.'.join(path)}: {value!r}" for path, value in settings if value not in (None, {})]):
        return "see `mmkd doctor`"
    shown = ", ".join(own[:5]) + (f" and {len(own) - 5} more" if len(own) > 5 else "")
    return f"your Dask settings are {shown[:300]}; correct {DASK_PLACES}"


def _local_cluster(cluster: ClusterConfig, devices: list[str], options: dict[str, Any]) -> Any:
    if not devices:
        return LocalCluster(n_workers=cluster.workers or default_workers(cluster), **options)
    if len(set(devices)) < len(devices):
        return GpuCluster(devices, **options)
    try:
        from dask_cuda import LocalCUDACluster  # noqa: PLC0415 (an extra that only machines with a GPU can use)
    except ImportError:
        return GpuCluster(devices, **options)
    return LocalCUDACluster(CUDA_VISIBLE_DEVICES=devices, **options)


@contextmanager
def _batch_client(cluster: ClusterConfig) -> Iterator[Client]:
    wanted = {"jobs": 1} if cluster.workers is None else {"n": cluster.workers}
    with batch_cluster(cluster) as started, _client_of(started, security=cluster.dask_security()) as client:
        ask_for_jobs = partial(started.scale, **wanted)
        ask_for_jobs()
        # Again for jobs that ended: at their time limit, by a dead node, by a cancel.
        with repeated(ask_for_jobs, 10.0, "mmkd-jobs"):
            yield client


def batch_cluster(cluster: ClusterConfig) -> Any:
    """Return dask-jobqueue's object for this batch system: its scheduler runs, no job has been asked for. Raises
    UserError if it does not take the settings."""
    keywords = cluster.batch_keywords()
    options = {"dashboard_address": "127.0.0.1:0"} | (keywords.pop("scheduler_options", None) or {})
    # The batch system holds a job to its memory; Dask's own limit would count memory-mapped pages too.
    arguments = ["--memory-limit", "0", *(keywords.pop("worker_extra_args", None) or [])]
    try:
        return cluster_class_of(cluster.scheduler)(
            security=cluster.dask_security(), scheduler_options=options, worker_extra_args=arguments, **keywords
        )
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{cluster.scheduler}: {reason}; see `jobqueue: {cluster.scheduler}:` in the YAML") from error


@contextmanager
def _connect(cluster: ClusterConfig) -> Iterator[Client]:
    try:
        client = _client_of(cluster.scheduler, timeout="10s", security=cluster.dask_security())
    except (OSError, TimeoutError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"no Dask scheduler answers at {cluster.scheduler!r}; name `local`, an address such as tcp://HOST:8786 "
            "(tls://HOST:8786 with `security:` in a YAML file where it asks for TLS), slurm, pbs or sge"
        ) from error
    with client:
        yield client

"""Where tasks run: a local cluster by default, or a Dask scheduler that is already there."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from distributed import Client, LocalCluster

from mmkd.store.errors import UserError


@contextmanager
def dask_client(scheduler: str, workers: int | None) -> Iterator[Client]:
    """Yield a client of the named scheduler; a local cluster lives as long as the block.

    Args:
        scheduler: `local` or an address such as `tcp://10.0.0.1:8786`.
        workers: processes of a local cluster; default one per core.

    Raises:
        UserError: nothing answers at the address.
    """
    if scheduler == "local":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Loopback only. No memory limit of Dask's own: it counts memory-mapped pages and would kill workers for them.
        with (
            LocalCluster(
                n_workers=workers or cores,
                threads_per_worker=1,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                memory_limit=0,
                silence_logs=logging.ERROR,
            ) as cluster,
            Client(cluster) as client,
        ):
            yield client
        return
    try:
        client = Client(scheduler, timeout="10s")
    except (OSError, TimeoutError, ValueError) as error:
        raise UserError(
            f"no Dask scheduler answers at {scheduler!r}; name `local` or an address such as tcp://HOST:8786"
        ) from error
    with client:
        yield client

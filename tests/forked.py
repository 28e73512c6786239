"""Ranks and commands as children of the test: they need not import torch again, and can be killed for real."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any


def _as_rank(rank: int, ranks: int, port: int, act: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """As torchrun would start it."""
    os.environ |= {"WORLD_SIZE": str(ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    act(*arguments)


def forked_ranks(ranks: int, act: Callable[..., Any], *arguments: Any) -> list[BaseProcess]:
    """Start `act` in every one of so many ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    children: list[BaseProcess] = [
        context.Process(target=_as_rank, args=(rank, ranks, port, act, arguments)) for rank in range(ranks)
    ]
    for child in children:
        child.start()
    return children


def peaceful(children: Sequence[BaseProcess]) -> None:
    """Wait for them; each must end well."""
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * len(children)


def _as_command(log: Path, arguments: Sequence[str]) -> None:
    from mmkd.cli.main import main

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.argv = ["mmkd", *arguments]
    main()


def forked_command(log: Path, *arguments: object) -> BaseProcess:
    """`mmkd ARGUMENTS` with its output in `log`; its exit status is the child's."""
    child = multiprocessing.get_context("fork").Process(target=_as_command, args=(log, list(map(str, arguments))))
    child.start()
    return child


def under_torchrun(*arguments: str) -> list[str]:
    """A command line of `mmkd` for two ranks, as the documentation has it."""
    launcher = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*launcher, "--no-python", str(Path(sys.executable).parent / "mmkd"), *arguments]


def ranks_of(launcher: subprocess.Popen[bytes]) -> list[int]:
    """Process ids of a launcher's ranks."""
    return [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]


@contextmanager
def launched(path: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A run under torchrun, which says all it says in `log`. Nothing of it outlives the test, also one that fails:
    ranks have sessions of their own, and would train on."""
    with log.open("w") as file:
        process = subprocess.Popen(under_torchrun("distill", str(path)), stdout=file, stderr=file)
    try:
        yield process
    finally:
        if process.poll() is None:
            for pid in [*ranks_of(process), process.pid]:
                os.kill(pid, signal.SIGKILL)
            process.wait()

"""`mmkd` without the wait: a process that has imported everything forks for each command that a snippet runs.

Started as `python -P warm_mmkd.py SOCKET`, it serves until its standard input ends. `write_shim` makes the `mmkd` that
snippets find first on their PATH: it hands over its arguments, folder, environment and the three standard files, and
ends with the command's exit status. What runs is `mmkd.cli.main:main`, as in the console script.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

SHIM = """#!{python} -SE
import array, json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
server.sendall(request)
sys.exit(int(server.makefile().read() or 70))
"""
HEAVY = ("torch", "open_clip", "transformers", "distributed", "sklearn.linear_model", "matplotlib.figure", "zarr")
OURS = ("store.report", "distill.trainer", "distill.prepare", "evaluate", "extract.run", "extract.dispatch", "cli.main")


def write_shim(folder: Path, address: Path) -> None:
    """An executable `mmkd` in `folder` that asks the server at `address`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mmkd").write_text(SHIM.format(python=sys.executable, address=str(address)))
    (folder / "mmkd").chmod(0o755)


@contextlib.contextmanager
def serving(address: Path, environment: dict[str, str]) -> Iterator[None]:
    """The server as a process of its own; it ends with the block."""
    command = [sys.executable, "-P", __file__, str(address)]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        assert server.stdout.readline() == "ready\n"
        yield
    finally:
        server.stdin.close()
        server.wait(timeout=20)
        server.stdout.close()


def _child(files: list[int], arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["mmkd", *arguments]
    # A reader's own modules and entry points, as a fresh interpreter would find them.
    sys.path[:0] = [
        path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path
    ]
    status = 1
    try:
        importlib.import_module("mmkd.cli.main").main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _answer(connection: socket.socket, files: list[int], process: int) -> None:
    _, status = os.waitpid(process, 0)
    with contextlib.suppress(OSError):
        connection.sendall(str(os.waitstatus_to_exitcode(status) & 255).encode())
    connection.close()
    for file in files:
        os.close(file)


def serve(address: str) -> None:
    """Accept and fork; one command is one child."""
    gc.disable()
    for name in HEAVY + tuple(f"mmkd.{name}" for name in OURS):
        importlib.import_module(name)
    gc.freeze()  # a child that looks for garbage in what is imported would copy all of it
    gc.enable()
    os.fsync = lambda file: None  # no snippet cuts the power
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    # Not by sys.stdin: a child would inherit its lock, held for good, and a data worker that closes it would wait.
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start()
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        head, files, _, _ = socket.recv_fds(connection, 4, 3)
        request = b""
        while len(request) < int.from_bytes(head, "big"):
            request += connection.recv(1 << 16)
        arguments, folder, environment = json.loads(request)
        process = os.fork()
        if process == 0:
            listener.close()
            _child(files, arguments, folder, environment)
        threading.Thread(target=_answer, args=(connection, files, process), daemon=True).start()


if __name__ == "__main__":
    serve(sys.argv[1])

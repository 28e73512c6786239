"""A terminal for `mmkd`: a pseudo terminal of 80 columns that answers queries as real ones do."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import sys
import termios


def in_terminal(arguments: list[str], answers: dict[bytes, bytes]) -> tuple[int, bytes]:
    """Run `mmkd` with these arguments in it; exit status and everything it wrote.

    Args:
        arguments: of the command.
        answers: escape sequence that begins a query, to what the terminal answers; each once. Others are ignored.
    """
    run = "import sys; from mmkd.cli.main import main; sys.argv[0] = 'mmkd'; main()"
    child, terminal = pty.fork()
    if child == 0:
        colours = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
        os.execve(sys.executable, [sys.executable, "-P", "-c", run, *arguments], os.environ | colours)
    # 40 lines, 80 columns, cells of 10 x 20 pixels.
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 800, 800))
    said, left = b"", dict(answers)
    while True:
        ready, _, _ = select.select([terminal], [], [], 60)
        try:
            part = os.read(terminal, 65536) if ready else b""
        except OSError:  # the other end is closed: how Linux tells the end
            part = b""
        if not part:
            break
        said += part
        for query in [query for query in left if query in said]:
            os.write(terminal, left.pop(query))
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said

"""Decode images in a process of their own: one that crashes or hangs its decoder costs its own row only.

Slow, so only for shards that took their worker down. Run as a module it is the child. Not a `ProcessPoolExecutor`:
Dask's workers are daemons, and multiprocessing gives daemons no children.
"""

import faulthandler
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from multiprocessing.connection import Connection, Pipe

from mmkd.base.images.source import ImageSource
from mmkd.extract.decoding import DecodedImage, cut, decode_pictures, image_windows, read_image
from mmkd.extract.teachers.geometry import Geometry


def isolated_windows(
    sources: Sequence[ImageSource],
    geometries: Sequence[Geometry],
    window: int,
    *,
    seconds: float,
    keep: int | None,
    beat: Callable[[], None],
) -> Iterator[list[DecodedImage]]:
    """As `decoding.decode_windows`, with the same pixels; an image that takes its process down, or more than `seconds`,
    says so in its reason. `beat` is called while waiting. Raises RuntimeError if the child does not start."""
    with closing(_Decoder(seconds, beat)) as decoder:
        decoded = (
            [one for of in some for one in decoder.decode(of, (tuple(geometries), keep))]
            for some in image_windows(sources, window)
        )
        yield from cut(decoded, window)


class _Decoder:
    """A child process that decodes; it is replaced when it dies."""

    def __init__(self, seconds: float, beat: Callable[[], None]) -> None:
        self._seconds, self._beat = seconds, beat
        self._child: tuple[subprocess.Popen[bytes], Connection] | None = None

    def decode(self, pictures: list[ImageSource], settings: tuple[object, ...]) -> list[DecodedImage]:
        """Return the pictures of one image."""
        if self._child is None:
            ours, theirs = Pipe()
            fd = theirs.fileno()
            command = [sys.executable, "-P", "-m", "mmkd.extract.isolated_decoding", str(fd), str(2 * self._seconds)]
            silent = subprocess.DEVNULL
            child = subprocess.Popen(command, stdin=silent, stdout=silent, stderr=silent, pass_fds=[fd])  # noqa: S603
            theirs.close()
            self._child = child, ours
            # It imports PyTorch before it is ready; on a cold network disk that takes a while.
            ready = self._answer(120.0)
            if isinstance(ready, str):
                self.close()
                raise RuntimeError(f"a decoding process did not start: {ready}")
        self._child[1].send((pictures, *settings))
        answer = self._answer(self._seconds)
        if isinstance(answer, list):
            return answer
        self.close()
        return [DecodedImage(reason=f"image: {answer}") for _ in pictures]

    def _answer(self, seconds: float) -> list[DecodedImage] | str:
        """Return the child's message, or the reason there is none."""
        assert self._child is not None
        child, connection = self._child
        deadline = time.monotonic() + seconds
        try:
            while not connection.poll(0.5):
                self._beat()
                if time.monotonic() > deadline:
                    return f"reading or decoding takes more than {seconds:g} seconds"
            return connection.recv()
        except (EOFError, OSError):
            code = child.wait()
            ending = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            return f"the decoder crashed on it ({ending})"

    def close(self) -> None:
        if self._child is not None:
            child, connection = self._child
            child.kill()
            child.wait()
            connection.close()
            self._child = None


def main() -> None:
    """The child: answer until the parent hangs up."""
    connection = Connection(int(sys.argv[1]))
    os.set_inheritable(connection.fileno(), False)
    connection.send([])
    while True:
        try:
            pictures, geometries, keep = connection.recv()
        except EOFError:
            return
        # The parent may be dead when the time is up.
        faulthandler.dump_traceback_later(float(sys.argv[2]), exit=True)
        read = read_image(pictures[0])
        connection.send(decode_pictures(*read, [one.picture for one in pictures], geometries, keep))
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()

"""Decode images in a process of their own: one that crashes or hangs its decoder costs its own row only.

Slow (one image at a time, through pipes), so only for shards that took their worker down. Run as a module it is the
child: pickled (source, geometries) in, pickled `DecodedImage` out, each behind its length. Both ends are this program.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO

from mmkd.base.images.source import ImageSource
from mmkd.extract.decoding import DecodedImage, decode_image, read_image
from mmkd.extract.teachers.geometry import Geometry

_LENGTH_BYTES = 8
_TICK_SECONDS = 0.5
_START_SECONDS = 120.0
"""A child imports PyTorch before it is ready; on a cold network disk that takes a while."""


def guarded_windows(
    sources: Sequence[ImageSource],
    geometries: Sequence[Geometry],
    window: int,
    limits: tuple[float, int | None],
    beat: Callable[[], None],
) -> Iterator[list[DecodedImage]]:
    """As `decoding.decode_windows`, with the same pixels; an image that takes its process down says so in its reason.

    Args:
        sources, geometries, window: as there.
        limits: seconds that one image may take, and pixels of the JPEG to keep, if any.
        beat: called while waiting for the child, which has a time limit of its own.
    """
    with _Decoder(geometries, limits, beat) as decoder:
        for start in range(0, len(sources), window):
            yield [decoder(source) for source in sources[start : start + window]]


class _Decoder:
    """A child process that decodes; a new one takes its place when it dies."""

    def __init__(
        self, geometries: Sequence[Geometry], limits: tuple[float, int | None], beat: Callable[[], None]
    ) -> None:
        self._geometries = tuple(geometries)
        self._seconds, self._keep = limits
        self._beat = beat
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def __call__(self, source: ImageSource) -> DecodedImage:
        child = self._child or self._start()
        assert child.stdin is not None
        _send(child.stdin, (source, self._geometries, self._keep))
        answer = self._answer(child, self._seconds)
        if isinstance(answer, DecodedImage):
            return answer
        self._end()
        return DecodedImage(reason=answer or "image: the decoder said nothing")

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", "mmkd.extract.isolated_decoding", str(2 * self._seconds)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # noqa: S603
        self._child = child
        ready = self._answer(child, _START_SECONDS)
        if ready is not None:
            self._end()
            raise RuntimeError(f"a decoding process did not start: {ready}")
        return child

    def _answer(self, child: subprocess.Popen[bytes], seconds: float) -> DecodedImage | str | None:
        """What the child sends, or the reason why it sends nothing."""
        assert child.stdout is not None
        deadline = time.monotonic() + seconds
        data = b""
        wanted = _LENGTH_BYTES
        while len(data) < wanted:
            left = deadline - time.monotonic()
            self._beat()
            if left > 0 and not select.select([child.stdout], [], [], min(left, _TICK_SECONDS))[0]:
                continue
            if left <= 0:
                return f"image: reading or decoding takes more than {seconds:g} seconds"
            part = os.read(child.stdout.fileno(), wanted - len(data))
            if not part:
                return f"image: the decoder crashed on it ({_ending(child.wait())})"
            data += part
            if len(data) == _LENGTH_BYTES == wanted:
                wanted += int.from_bytes(data, "little")
        answer: DecodedImage | None = pickle.loads(data[_LENGTH_BYTES:])  # noqa: S301 (our own child's)
        return answer

    def _end(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _send(pipe: IO[bytes], content: object) -> None:
    data = pickle.dumps(content)
    pipe.write(len(data).to_bytes(_LENGTH_BYTES, "little") + data)
    pipe.flush()


def main() -> None:
    """The child: answer until the parent hangs up."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a decoder prints must not look like an answer
    _send(answers, None)
    questions = sys.stdin.buffer
    while head := questions.read(_LENGTH_BYTES):
        # The parent may be dead when the time is up.
        faulthandler.dump_traceback_later(float(sys.argv[1]), exit=True)
        source, geometries, keep = pickle.loads(questions.read(int.from_bytes(head, "little")))  # noqa: S301 (our parent's)
        _send(answers, decode_image(read_image(source), geometries, keep))
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()

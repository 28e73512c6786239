"""The process itself: usable cores, free memory, allocator settings, periodic work in a thread, and a watchdog."""

import ctypes
import faulthandler
import gc
import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def usable_cores() -> int:
    """Return cores that this process may run on: Slurm and containers give fewer than there are, by affinity or by a
    quota of its control groups, of which a part of a core counts as one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"), "cpu"):
        with suppress(OSError, ValueError):  # without a quota it is `max`, or -1
            if (group / "cpu.max").is_file():
                quota, period = map(int, (group / "cpu.max").read_text().split())
            else:
                quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            cores = min(cores, -(-quota // period)) if quota > 0 else cores
    return cores


def free_memory() -> int:
    """Return free memory in bytes (page cache counts as free), at most the job's limit; 0 where unknown."""
    return min(_spare(Path("/proc/meminfo")), *_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))


def _spare(meminfo: Path) -> int:
    """Return MemAvailable of proc(5); elsewhere all memory that there is."""
    with suppress(OSError):
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    with suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 0


def _limits(own: Path, cgroups: Path) -> list[int]:
    """Return memory limits of the control groups that a scheduler put this process into."""
    limits = [1 << 63]
    for group in _groups(own, cgroups, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):  # `max` is no limit
                limits.append(int((group / name).read_text()))
    return limits


def _groups(own: Path, cgroups: Path, controller: str) -> list[Path]:
    """Return the folders of this process' control groups (cgroups(7), both versions) that limit what `controller`
    counts, with those above them: each of them limits."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        lines = []
    found = []
    for number, controllers, path in lines:
        if number == "0" or controller in controllers.split(","):
            top = cgroups if number == "0" else cgroups / controller
            group = top / path.lstrip("/")
            found += [group, *(above for above in group.parents if above.is_relative_to(top))]
    return found


def keep_freed_memory() -> bool:
    """Let this process reuse the memory of its last forward pass; return True if that could be set. Every batch
    allocates the same activations again. Measured on two cores, EfficientNet-Lite0 at 96 px, batches of 32,
    milliseconds per image: 20.4 under Dask's setting (MALLOC_TRIM_THRESHOLD_=65536), 7.8 under glibc's, 4.5 with
    this."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3  # as glibc's malloc.h numbers them
    # The largest threshold that mallopt accepts is half a heap: 32 MiB on 64 bits.
    return bool(libc.mallopt(trim_threshold, (1 << 31) - 1) and libc.mallopt(mmap_threshold, 32 << 20))


def freeze_loaded_objects() -> None:
    """Leave everything that is loaded by now out of garbage collection. A full collection of a process with PyTorch and
    Dask holds the interpreter's lock for 0.2 to 0.5 s, in which nothing is decoded or launched (seen as gaps of a
    simulated device, benchmarks/device.py)."""
    gc.collect()
    gc.freeze()


@contextmanager
def loaded_objects_frozen() -> Iterator[None]:
    """`freeze_loaded_objects` for a while, unless the caller has frozen what is loaded: a notebook may train often."""
    if gc.get_freeze_count():
        yield
        return
    freeze_loaded_objects()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def repeated(work: Callable[[], object], seconds: float, name: str) -> Iterator[None]:
    """Call `work` every `seconds` while the block runs; the last call has returned when the block exits. The first call
    comes after the first wait; an exception ends the repetition, not the block. `seconds` run from the end of a call to
    the next; `name` is the thread's."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(seconds):
            work()

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Watch:
    """One alarm for the process, however many shards it has in hand. It rings in a thread of C, so that a library that
    hangs with Python's lock held is ended too. A stopped process, or one that waits for a dead disk inside the kernel,
    is noticed by the scheduler's `worker-ttl` instead. `seconds`: without a beat, until the process ends."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._lock = threading.Lock()
        self._in_hand = 0
        # Traces of all threads are useless at a terminal.
        self._nowhere = os.open(os.devnull, os.O_WRONLY)

    @contextmanager
    def over_shard(self) -> Iterator[None]:
        """End the process if `beat` is not called for too long inside this block."""
        with self._lock:
            self._in_hand += 1
        self.beat()
        try:
            yield
        finally:
            with self._lock:
                self._in_hand -= 1
                if not self._in_hand:
                    faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Report progress and restart the timer."""
        with self._lock:
            if self._in_hand:
                faulthandler.dump_traceback_later(self.seconds, exit=True, file=self._nowhere)

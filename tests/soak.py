"""`make soak`: random kill -9 of workers, schedulers, clients, trainers and writers until a number of kills or hours.

    PYTHONPATH=tests python -P -m soak --kills 300 --hours 2 --seed 0

Each episode interrupts one job again and again, lets it finish, and compares every file with an uninterrupted run.
A failure prints its kind and seed, which repeat it: `--only KIND --seed SEED --kills 1`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from cluster_processes import scheduler_and_worker, workers_of
from extract_scene import ROWS, Scene, children, ended, entries, kill_session, started
from forked import forked_command
from in_process import load, run, tree_digest
from timm.models import save_for_hf
from tiny_corpus import write_table_corpus
from tiny_run import quiet, write_run, write_scene
from tiny_teachers import write_tiny_teacher

from mmkd.base.files import remove_abandoned
from mmkd.distill.checkpoint import find_checkpoint
from mmkd.distill.config import load_run
from mmkd.store import FeatureStore

KINDS = ("client", "worker", "views", "scheduler", "trainer", "writer")
INPUTS, VIEWS = ("--keep-inputs", 32), ("--views", 2)
PATIENCE = 300.0
"""Seconds after which a job that was restarted counts as hanging."""


class Soak:
    """Jobs with the files they must end with. An episode returns how often it killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        table = write_table_corpus(folder / "corpus", ROWS)
        self.scene = Scene(table, write_tiny_teacher(folder / "teacher", seed=1, embed_dim=64), folder / "whole")
        done = ended([*self.scene.command(self.scene.store, "--workers", 2, "--keep-inputs", 32)])
        assert done.returncode == 0, done.stderr
        self.pictures = self._pictures(folder / "pictures")
        self.training = write_scene(folder / "training")
        quiet(write_run(self.training, "whole", checkpoints={"every_steps": 1}))
        self.checkpoint = find_checkpoint(load_run(self.training / "whole.yaml").out).read_bytes()
        self.more = write_table_corpus(folder / "more", 300)
        self.teachers = load({"one": folder / "training/one", "two": folder / "training/two"}, "one", "two")
        self._write(folder / "written")
        self.written = tree_digest(folder / "written")

    def _pictures(self, folder: Path) -> Scene:
        """Images with further captions and views, seen by a teacher with both towers and by one without texts."""
        table = write_table_corpus(folder / "corpus", 512)
        (table.parent / "corpus.yaml").write_text(
            "{kind: table, path: pairs.csv, captions: further, further: {modality: kind, site: place}}"
        )
        save_for_hf(timm.create_model("test_vit", num_classes=0), folder / "seer")
        seer = f"{self.scene.teacher},seer=local-dir:{folder / 'seer'}"
        scene = Scene(table.parent / "corpus.yaml", Path(seer), folder / "whole")
        done = ended(scene.command(scene.store, "--workers", 2, *VIEWS))
        assert done.returncode == 0, done.stderr
        return scene

    def client(self, chance: random.Random, here: Path) -> int:
        """Kill the client of a local cluster, several times over one store."""
        return self._extract(chance, here, self.scene, INPUTS, lambda job: job.pid)

    def worker(self, chance: random.Random, here: Path) -> int:
        """Kill a worker of two up to three times; the run goes on without being started again."""
        return self._extract(chance, here, self.scene, INPUTS, lambda job: next(iter(workers_of(job)), None))

    def views(self, chance: random.Random, here: Path) -> int:
        """Kill the client while images, their views and further captions are extracted."""
        return self._extract(chance, here, self.pictures, VIEWS, lambda job: job.pid)

    def _extract(
        self, chance: random.Random, here: Path, scene: Scene, options: tuple[Any, ...], victim: Callable[..., Any]
    ) -> int:
        store, kills = here / "store", 0
        command = scene.command(store, "--workers", 2, *options)
        for number in range(6):
            job = started(command, here / f"log{number}")
            job_pids = {job.pid}
            for _ in range(3 if number < 5 else 0):
                wanted = entries(store) + chance.randint(0, 2)
                deadline = time.monotonic() + PATIENCE
                while job.poll() is None and entries(store) < wanted and time.monotonic() < deadline:
                    time.sleep(0.01)
                job_pids.update(children(job.pid))
                time.sleep(chance.random())
                pid = victim(job)
                if job.poll() is not None:
                    break
                if pid is not None:
                    with suppress(ProcessLookupError):  # it ended between the two lines
                        os.kill(pid, signal.SIGKILL)
                        kills += 1
                if pid == job.pid:
                    break
            code = job.wait(timeout=PATIENCE)
            _wait_for_end(job_pids)
            if code == 0:
                break
            assert code == -signal.SIGKILL, (here / f"log{number}").read_text()[-2000:]
        assert scene.same(store), "bytes differ from the uninterrupted run"
        assert "Traceback" not in "".join(path.read_text() for path in here.glob("log*"))
        return kills

    def scheduler(self, chance: random.Random, here: Path) -> int:
        """Kill a scheduler that was started by hand; the client ends in one line, and another run finishes."""
        store = here / "store"
        with scheduler_and_worker(here) as (address, process, _):
            job = started(self.scene.command(store, "--scheduler", address, "--keep-inputs", 32), here / "log")
            wanted = chance.randint(0, 4)
            while job.poll() is None and entries(store) < wanted:
                time.sleep(0.01)
            time.sleep(chance.random())
            killed = job.poll() is None
            kill_session(process)
            job.wait(timeout=PATIENCE)
        log = (here / "log").read_text()
        assert "Traceback" not in log, log
        assert not killed or job.returncode == 0 or log.count("Error: ") == 1, log
        done = ended(self.scene.command(store, "--workers", 1, "--keep-inputs", 32))
        assert done.returncode == 0, done.stderr
        assert self.scene.same(store), "bytes differ from the uninterrupted run"
        return int(killed)

    def trainer(self, chance: random.Random, here: Path) -> int:
        """Kill a training run that writes a checkpoint after every step."""
        path = write_run(self.training, f"killed-{here.name}", checkpoints={"every_steps": 1})
        kills = _kill_until_done(chance, lambda: quiet(path), attempts=20, longest=0.4)
        out = load_run(path).out
        assert find_checkpoint(out).read_bytes() == self.checkpoint, "another checkpoint than the uninterrupted run's"
        assert not list(out.rglob("*.mmkd-tmp"))
        shutil.rmtree(out)
        return kills

    def writer(self, chance: random.Random, here: Path) -> int:
        """Kill whatever writes a store: extraction shard by shard, an append, a selection."""
        kills = _kill_until_done(chance, lambda: self._write(here / "store"), attempts=20, longest=0.4)
        time.sleep(1.1)  # what a writer that died within the last second left might still be its own
        remove_abandoned(here / "store")  # as `mmkd extract` does at its end
        assert tree_digest(here / "store") == self.written, "bytes differ from the uninterrupted run"
        assert FeatureStore.open(here / "store").verify(deep=True).sound
        return kills

    def _write(self, store: Path) -> None:
        torch.set_num_threads(1)
        run(self.training / "corpus/pairs.csv", store, self.teachers)
        for words in (
            ("store", "append", store, self.more),
            ("select", store, "--name", "half", "--rule", self._rule()),
        ):
            if words[0] == "store" and len(FeatureStore.open(store)) > 512:
                continue
            if words[0] == "select" and (store / "selections/half").is_dir():
                continue
            child = forked_command(store.parent / f"{store.name}.log", *words)
            child.join()
            assert child.exitcode == 0, (store.parent / f"{store.name}.log").read_text()
            run(self.more, store, self.teachers)

    def _rule(self) -> Path:
        path = self.folder / "half.yaml"
        path.write_text("keep: {cosine: {quantile: 0.5}}\n")
        return path


def _kill_until_done(chance: random.Random, work: Callable[[], object], attempts: int, longest: float) -> int:
    """Run `work` in forked children that are killed at random moments; the last one is left alone."""
    for attempt in range(attempts + 1):
        child = multiprocessing.get_context("fork").Process(target=_in_own_session, args=(work,))
        child.start()
        if attempt < attempts:
            child.join(chance.uniform(0.02, longest))
            if child.exitcode is None:
                _kill_session_of(child.pid)
        child.join(PATIENCE)
        assert child.exitcode is not None, "a restarted job hangs"
        if child.exitcode == 0:
            return attempt  # every attempt before this one was killed
        assert child.exitcode == -signal.SIGKILL, f"exit status {child.exitcode}"
    raise AssertionError("the job did not come to its end")


def _in_own_session(work: Callable[[], object]) -> None:
    os.setsid()
    work()


def _kill_session_of(pid: int | None) -> None:
    assert pid is not None
    for one in [pid, *children(pid)]:
        with suppress(ProcessLookupError):  # a child of a killed process may end by itself first
            os.kill(one, signal.SIGKILL)


def _wait_for_end(pids: set[int]) -> None:
    deadline = time.monotonic() + PATIENCE
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_text() for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its client"
        time.sleep(0.1)


def main() -> int:
    """Kill until the bound; exit status 1 when an episode failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, action="append")
    wanted = parser.parse_args()
    kinds = wanted.only or KINDS
    kills: Counter[str] = Counter()
    failed = 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mmkd-soak-") as name:
        soak = Soak(Path(name))
        seed = wanted.seed
        while kills.total() < wanted.kills and time.monotonic() - began < 3600 * wanted.hours:
            kind = kinds[(seed - wanted.seed) % len(kinds)]  # in turn: quick kinds do not crowd out slow ones
            here = Path(name) / f"{kind}-{seed}"
            here.mkdir()
            try:
                kills[kind] += getattr(soak, kind)(random.Random(seed), here)
                shutil.rmtree(here)
            except AssertionError as error:
                failed += 1
                kills[kind] += 1
                print(f"FAILED {kind} --seed {seed}: {error}", flush=True)
            seed += 1
            done = ", ".join(f"{one} {kills[one]}" for one in kinds)
            print(f"{kills.total()} kills in {time.monotonic() - began:.0f} s: {done}; {failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""On a real GPU: what the other tests prove on a CPU or on a simulated device. Run by `make gpu`."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import teacher_snapshots as snapshots
import torch
from in_process import run
from teacher_parts import sealed  # noqa: F401
from tiny_corpus import write_table_corpus
from tiny_run import quiet, write_run, write_scene
from tiny_teachers import write_tiny_teacher

from mmkd.distill.config import load_run
from mmkd.distill.prepare import prepare
from mmkd.distill.trainer import train
from mmkd.distill.world import World, join_ranks
from mmkd.extract.decoding import Threads
from mmkd.extract.device import Cuda, open_device
from mmkd.extract.encode import Workbench
from mmkd.extract.forward import BatchSizes
from mmkd.extract.plan import plan_tasks
from mmkd.extract.shard import extract_shard
from mmkd.extract.teachers import Teacher, describe_teacher, load_teacher, parse_teachers
from mmkd.extract.teachers.loaded import LoadedTeacher
from mmkd.extract.teachers.spec import TeacherSpec
from mmkd.store import FeatureStore
from mmkd.store.inputs import shards_without_inputs
from mmkd.store.record import Store
from mmkd.store.writer import add_teacher

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
CPU = torch.device("cpu")
ROWS = 512


def loaded(spec: TeacherSpec, device: torch.device) -> LoadedTeacher:
    teacher = load_teacher(spec, describe_teacher(spec), device)
    assert isinstance(teacher, LoadedTeacher)
    return teacher


def smallest_cosine(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(ours.double().cpu(), theirs.double().cpu()).min())


@pytest.mark.usefixtures("sealed")
@pytest.mark.parametrize("form", snapshots.NINE)
def test_a_teacher_gives_on_the_gpu_what_it_gives_on_the_cpu(form: str, tmp_path: Path) -> None:
    make: Callable[[Path], snapshots.Snapshot] = snapshots.NINE[form]
    spec = make(tmp_path).spec
    host, gpu = loaded(spec, CPU), loaded(spec, torch.device("cuda"))
    half = gpu.in_precision("bf16")
    channels = 1 if host.card.preprocessing.color == "L" else 3
    pixels = torch.randint(0, 256, (32, channels, *host.card.preprocessing.image_size), dtype=torch.uint8)
    tokens, _ = host.tokenize([f"a chest X-ray {number}" for number in range(32)])
    for encode, inputs in (("encode_images", pixels), ("encode_texts", tokens)):
        expected = getattr(host, encode)(inputs)
        assert smallest_cosine(getattr(gpu, encode)(inputs.cuda()), expected) >= 0.99999
        assert smallest_cosine(getattr(half, encode)(inputs.cuda()), expected) >= 0.999


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 512 pairs, a teacher, and its features of the CPU."""
    root = tmp_path_factory.mktemp("gpu")
    write_table_corpus(root / "c", ROWS)
    (spec,) = parse_teachers(f"one=local-dir:{write_tiny_teacher(root / 'one', seed=1)}")
    run(root / "c" / "pairs.csv", root / "host", {"one": loaded(spec, CPU)})
    return root


def teacher_of(folder: Path) -> LoadedTeacher:
    (spec,) = parse_teachers(f"one=local-dir:{folder / 'one'}")
    return loaded(spec, torch.device("cuda"))


def assert_close(root: Path, expected: Path) -> None:
    for tower in ("image", "text"):
        ours, theirs = (
            torch.from_numpy(np.asarray(getattr(FeatureStore.open(place), tower)("one")[:], np.float32))
            for place in (root, expected)
        )
        assert smallest_cosine(ours, theirs) >= 0.99999


def test_two_shards_in_hand(folder: Path) -> None:
    device, teacher = open_device(), teacher_of(folder)
    assert isinstance(device, Cuda)
    store = run(folder / "c" / "pairs.csv", folder / "two", {})
    add_teacher(store, teacher.card)
    bench = Workbench(Threads(4, 4), device=device, sizes=BatchSizes(64))
    reports = []
    hands = [
        threading.Thread(target=lambda n=n: reports.append(extract_shard(store, n, {"one": teacher}, bench)))
        for n in range(store.shards)
    ]
    for hand in hands:
        hand.start()
    for hand in hands:
        hand.join()
    assert len(reports) == 2
    assert all(report.seconds["image one"] > 0 and report.flops["image one"] > 0 for report in reports)
    assert_close(folder / "two", folder / "host")


class Hungry:
    """A teacher whose passes take 64 MB for each row beside their own."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher, self.card, self.device = teacher, teacher.card, teacher.device
        self.tokenize, self.encode_texts = teacher.tokenize, teacher.encode_texts

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        torch.empty(len(pixels), 64 << 20, dtype=torch.uint8, device=pixels.device)
        return self.teacher.encode_images(pixels)


def test_too_little_memory_halves_the_passes(folder: Path) -> None:
    device, teacher = open_device(), Hungry(teacher_of(folder))
    store = run(folder / "c" / "pairs.csv", folder / "halved", {})
    add_teacher(store, teacher.card)
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + (3 << 30)) / total)
    try:
        bench = Workbench(device=device, sizes=BatchSizes(256))
        for shard in range(store.shards):
            extract_shard(store, shard, {"one": teacher}, bench)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert bench.sizes.halved == {("one", "image"): 32}  # 64 rows want 4 GB
    assert_close(folder / "halved", folder / "host")


def test_a_training_step_is_that_of_the_cpu(training_scene: Path) -> None:
    path = write_run(training_scene, "gpu-step", compute={"precision": "fp32"})
    totals = []
    for device in (CPU, torch.device("cuda", 0)):
        ready = prepare(load_run(path), World(device))
        totals.append(ready.update(next(ready.batches.from_step(0))).total.item())
    assert totals[1] == pytest.approx(totals[0], rel=1e-3)


@pytest.mark.parametrize("features", ["mapped", "resident"])
def test_training_resumes(training_scene: Path, features: str) -> None:
    changes = {"data": {"workers": 1, "features": features}, "checkpoints": {"every_steps": 3}}
    whole = quiet(write_run(training_scene, f"gpu-whole-{features}", **changes))
    path = write_run(training_scene, f"gpu-stopped-{features}", **changes)
    assert train(load_run(path), say=lambda _: os.kill(os.getpid(), signal.SIGTERM)).stopped == "SIGTERM"
    resumed = quiet(path)
    assert resumed.resumed_at > 0
    assert resumed.losses == pytest.approx(whole.losses, rel=1e-2)
    teachers = prepare(load_run(path), World(torch.device("cuda", 0))).batches.teachers
    assert teachers is not None
    assert (teachers.resident_bytes > 0) is (features == "resident")


def first_pictures(root: Path, decode: str) -> torch.Tensor:
    config = load_run(write_run(root, f"on-{decode}", epochs=1, data={"decode": decode}))
    with join_ranks(1) as world, closing(prepare(config, world).batches.from_step(0)) as batches:
        return next(batches).images.float().cpu()


def test_jpegs_are_decoded_on_the_device(tmp_path: Path) -> None:
    root = write_scene(tmp_path / "scene")
    store = FeatureStore.open(root / "features")
    lacking = shards_without_inputs(Store.open(store.root), 40)
    for task in plan_tasks(store.record, [], store.ledger, lacking, 40):
        extract_shard(store, task.shard, {}, Workbench(keep_inputs=task.inputs))
    workers, device = first_pictures(root, "workers"), first_pictures(root, "device")
    assert (workers - device).abs().mean() < 2
    assert (workers - device.roll(1, 0)).abs().mean() > 20

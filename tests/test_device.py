"""Extraction on an accelerator: order of work, memory, faults; on a simulated one, whose results are exact."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process import run, tree_digest
from simulated_device import SimulatedDevice
from tiny_corpus import write_table_corpus
from tiny_store import make_card
from tiny_teachers import write_tiny_teacher

from mmkd.base.errors import DeviceError, TeacherError, UserError
from mmkd.extract.decoding import Threads
from mmkd.extract.device import Accelerator, Host, Pass, open_device
from mmkd.extract.encode import Workbench
from mmkd.extract.forward import BatchSizes
from mmkd.extract.shard import extract_shard
from mmkd.extract.teachers import Teacher, describe_teacher, load_teacher, parse_teachers
from mmkd.extract.teachers.loaded import LoadedTeacher
from mmkd.store import FeatureStore, Preprocessing, TeacherCard
from mmkd.store.writer import add_teacher

ROWS = 300
PIXELS = 3 * 32 * 32


class Exact:
    """A teacher whose features are sums of integers: the same bits in a pass of any size."""

    device = torch.device("cpu")

    def __init__(self, slug: str, image_size: int = 32, fails_at: int = 1 << 30) -> None:
        self.card: TeacherCard = make_card(slug, 8).model_copy(
            update={
                "preprocessing": Preprocessing(image_size=(image_size, image_size), mean=(0.5,) * 3, std=(0.5,) * 3)
            }
        )
        self.fails_at, self.rows = fails_at, 0

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        self.rows += len(pixels)
        if self.rows > self.fails_at:
            self.rows = 0
            raise RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")
        return pixels.flatten(1)[:, : 8 * 100].reshape(len(pixels), 8, 100).sum(2).float()

    def tokenize(self, captions: list[str]) -> tuple[torch.Tensor, list[int]]:
        ids = [[len(caption), *caption.encode()[-15:].ljust(15, b"\0")] for caption in captions]
        return torch.tensor(ids), [16] * len(captions)

    def encode_texts(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[:, 8:].float() + 1


class Recorded(SimulatedDevice):
    """Writes down what happens in which order, with the thread that asked for it."""

    def __init__(self, **stated: Any) -> None:
        super().__init__(**stated)
        self.events: list[tuple[str, int, str]] = []
        self.images: list[int] = []

    def launch(self, encode: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> Pass:
        one, number = super().launch(encode, inputs), self.launched
        self.events.append(("launch", number, threading.current_thread().name))
        self.images += [number] if inputs.ndim == 4 else []

        def over() -> None:
            self.events.append(("wait", number, threading.current_thread().name))
            one.over()

        return replace(one, over=over)

    def copy_in(self, host: torch.Tensor) -> tuple[torch.Tensor, Callable[[], object]]:
        self.events.append(("copy", host.nbytes, ""))
        return super().copy_in(host)


def bench_of(device: Accelerator, rows: int = 64) -> Workbench:
    return Workbench(Threads(2, 2), device=device, sizes=BatchSizes(rows))


def extracted(table: Path, root: Path, teachers: dict[str, Teacher], bench: Workbench) -> FeatureStore:
    """A new store with these teachers, shard by shard."""
    store = run(table, root, {})
    for teacher in teachers.values():
        add_teacher(store, teacher.card)
    for shard in range(store.shards):
        extract_shard(store, shard, teachers, bench)
    return FeatureStore.open(root)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_table_corpus(tmp_path / "c", ROWS)


def test_an_accelerator_gives_the_bytes_of_the_host(tmp_path: Path, table: Path) -> None:
    teachers = {"a": Exact("a"), "b": Exact("b"), "c": Exact("c", image_size=48)}
    run(table, tmp_path / "host", teachers)
    for name, rows in (("one", 64), ("two", 7), ("three", 1000)):
        device = Recorded(row_seconds=1e-6, launch_seconds=1e-4)
        extracted(table, tmp_path / name, teachers, bench_of(device, rows))
        assert tree_digest(tmp_path / name) == tree_digest(tmp_path / "host")


def test_windows_are_launched_before_the_ones_before_are_collected(tmp_path: Path, table: Path) -> None:
    teachers = {"a": Exact("a"), "b": Exact("b"), "c": Exact("c", image_size=48)}
    device = Recorded(row_seconds=1e-5)
    extracted(table, tmp_path / "s", teachers, bench_of(device))
    order = {(what, number): place for place, (what, number, _) in enumerate(device.events)}
    # The first shard of 256: four windows, each with three passes over images, and captions before some of them.
    windows = [device.images[start : start + 3] for start in range(0, 12, 3)]
    for oldest, _, newest in (windows[:3], windows[1:]):
        assert order["launch", newest[-1]] < order["wait", oldest[0]], "two more windows when one is collected"
    assert order["wait", windows[0][-1]] < order["launch", windows[3][0]], "and no more"
    # Of each window one copy for both teachers of a geometry.
    copies = [size for what, size, _ in device.events if what == "copy"]
    assert copies.count(64 * PIXELS) == 4
    assert copies.count(64 * 3 * 48 * 48) == 4


def test_of_two_shards_in_hand_one_has_the_device(tmp_path: Path, table: Path) -> None:
    teachers = {"a": Exact("a")}
    store = run(table, tmp_path / "host", teachers)
    store = run(table, tmp_path / "s", {})
    add_teacher(store, teachers["a"].card)
    device = Recorded(row_seconds=1e-4)
    bench = bench_of(device, 16)
    threads = [
        threading.Thread(target=extract_shard, args=(store, shard, teachers, bench), name=str(shard))
        for shard in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    launched = [name for what, _, name in device.events if what == "launch"]
    assert sorted(set(launched)) == ["0", "1"]
    assert launched in (sorted(launched), sorted(launched, reverse=True))
    assert tree_digest(tmp_path / "s") == tree_digest(tmp_path / "host")


def test_too_little_memory_halves_the_passes_of_that_teacher(tmp_path: Path, table: Path) -> None:
    teachers = {"a": Exact("a"), "b": Exact("b")}
    run(table, tmp_path / "host", teachers)
    # Three staged windows and the activations of 20 rows.
    device = SimulatedDevice(memory=3 * 64 * PIXELS + 20 * 100_000, row_bytes=100_000)
    bench = bench_of(device)
    extracted(table, tmp_path / "s", teachers, bench)
    assert bench.sizes.halved == dict.fromkeys((("a", "image"), ("b", "image"), ("a", "text"), ("b", "text")), 16)
    assert tree_digest(tmp_path / "s") == tree_digest(tmp_path / "host")
    assert device._staged == 0
    device.memory = 100
    store = run(table, tmp_path / "t", {})
    add_teacher(store, teachers["a"].card)
    with pytest.raises(
        UserError, match=r"has no memory for 64 inputs of .* set worker.batch_rows to less than 64"
    ) as caught:
        extract_shard(store, 0, {"a": teachers["a"]}, bench_of(device))
    assert "\n" not in str(caught.value)
    device.memory, device.row_bytes = 1 << 20, 1 << 30
    with pytest.raises(TeacherError, match=r"too little memory for one (text|image)"):
        extract_shard(store, 0, {"a": teachers["a"]}, bench_of(device))


def test_a_teacher_that_raises_costs_its_shard_only(tmp_path: Path, table: Path) -> None:
    teachers = {"a": Exact("a"), "b": Exact("b", fails_at=100)}
    run(table, tmp_path / "host", {"a": Exact("a"), "b": Exact("b")})
    store = run(table, tmp_path / "s", {})
    for teacher in teachers.values():
        add_teacher(store, teacher.card)
    bench = bench_of(SimulatedDevice())
    with pytest.raises(RuntimeError, match="CUDNN_STATUS_EXECUTION_FAILED"):
        extract_shard(store, 0, teachers, bench)
    assert FeatureStore.open(tmp_path / "s").ledger == {}
    extract_shard(store, 1, teachers, bench)
    teachers["b"] = Exact("b")
    extract_shard(store, 0, teachers, bench)
    assert tree_digest(tmp_path / "s") == tree_digest(tmp_path / "host")


def test_half_precision_that_overflows_is_mended_when_it_is_collected(tmp_path: Path, table: Path) -> None:
    torch.set_num_threads(1)
    (spec,) = parse_teachers(f"one=local-dir:{write_tiny_teacher(tmp_path / 'one', seed=1)}")
    half = spec.model_copy(update={"precision": "fp16"})
    plain, overflowing = (load_teacher(one, describe_teacher(one), torch.device("cpu")) for one in (spec, half))
    assert isinstance(plain, LoadedTeacher)
    assert isinstance(overflowing, LoadedTeacher)
    for teacher in (plain, overflowing):
        scaled = teacher._model.visual.ln_post
        scaled.weight.mul_(4e4)
        scaled.bias.mul_(4e4)
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    assert not torch.isfinite(overflowing.launch("image", pixels)).all()
    store = extracted(table, tmp_path / "s", {"one": overflowing}, bench_of(SimulatedDevice()))
    assert overflowing.half_precision_failures > ROWS / 2
    # float16 storage cannot hold all of them, and says so; what it holds is what float32 gives.
    exact = extracted(table, tmp_path / "t", {"one": plain}, bench_of(SimulatedDevice()))
    ours, theirs = (found.image("one")[:].astype(np.float32) for found in (store, exact))
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
    both = np.isfinite(theirs)
    np.testing.assert_allclose(ours[both], theirs[both], rtol=0.02, atol=200)


@pytest.mark.parametrize(
    ("usable", "count", "warning", "message"),
    [
        (False, 0, "", None),
        (
            False,
            1,
            "The NVIDIA driver on your\nsystem is too old (found version 11040).",
            "is too old (found version",
        ),
        (False, 8, "", "the driver does not answer"),
    ],
)
def test_a_gpu_that_is_visible_and_unusable_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, usable: bool, count: int, warning: str, message: str | None
) -> None:
    def available() -> bool:
        if warning:
            warnings.warn(warning, stacklevel=2)
        return usable

    monkeypatch.setattr(torch.cuda, "is_available", available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if message is None:
        assert isinstance(open_device(), Host)
        return
    with pytest.raises(DeviceError) as caught:
        open_device()
    assert message in str(caught.value)
    assert "CUDA_VISIBLE_DEVICES" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            "no room for the teachers: 20.0 MB of 80.0 GB are free; end",
        ),
        (
            RuntimeError("CUDA error: no kernel image is available\nmore"),
            "cannot be used (CUDA error: no kernel",
        ),
    ],
)
def test_a_gpu_that_others_fill_or_that_is_too_new(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (20 << 20, 80 << 30))
    monkeypatch.setattr(torch, "zeros", refuse)
    with pytest.raises(DeviceError) as caught:
        open_device()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)

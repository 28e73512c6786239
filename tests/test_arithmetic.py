"""What a run says of its speed: FLOPs against formulas, peaks, the limit, rows of a pass, threads."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_device import SimulatedDevice
from tiny_teachers import TINY, write_tiny_teacher

from mmkd.base.arithmetic import PEAK, arithmetic_text, peak_tflops
from mmkd.base.notes import read_note, write_note
from mmkd.base.process import loaded_objects_frozen, usable_cores
from mmkd.distill.config import StudentConfig
from mmkd.distill.student import Towers, build_student
from mmkd.distill.train_step import count_arithmetic
from mmkd.extract import dispatch
from mmkd.extract.cluster import workers_beside
from mmkd.extract.cluster_config import ClusterConfig, WorkerConfig
from mmkd.extract.dispatch import TeachersPlugin
from mmkd.extract.forward import search_rows
from mmkd.extract.report import limit_line
from mmkd.extract.teachers import describe_teacher, load_teacher, parse_teachers
from mmkd.extract.teachers.loaded import LoadedTeacher


@pytest.fixture(autouse=True)
def own_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def teacher(tmp_path: Path) -> LoadedTeacher:
    (spec,) = parse_teachers(f"one=local-dir:{write_tiny_teacher(tmp_path / 'one', seed=1)}")
    loaded = load_teacher(spec, describe_teacher(spec), torch.device("cpu"))
    assert isinstance(loaded, LoadedTeacher)
    return loaded


def block(tokens: int, width: int) -> int:
    """One layer of a transformer: queries, keys and values, output, two layers of four widths, attention."""
    return 2 * tokens * width * (3 * width + width + 8 * width) + 4 * tokens * tokens * width


VISION, TEXT, DIM = TINY["vision_cfg"], TINY["text_cfg"], TINY["embed_dim"]
PATCHES = (VISION["image_size"] // VISION["patch_size"]) ** 2
IMAGE = (
    2 * PATCHES * 3 * VISION["patch_size"] ** 2 * VISION["width"]
    + VISION["layers"] * block(PATCHES + 1, VISION["width"])
    + 2 * VISION["width"] * DIM
)


def caption(tokens: int) -> int:
    return TEXT["layers"] * block(tokens, TEXT["width"]) + 2 * TEXT["width"] * DIM


def test_flops_are_those_of_the_formulas(teacher: LoadedTeacher) -> None:
    assert teacher.flops("image", torch.zeros(5, 3, 32, 32)) == 5 * IMAGE
    lengths = teacher.text_lengths
    for length in (lengths[0], lengths[-1]):
        assert teacher.flops("text", torch.zeros(3, length)) == pytest.approx(3 * caption(length))
    assert torch.backends.mha.get_fastpath_enabled()
    teacher.row_flops = {("text", 8): 8.0 * (10 + 8), ("text", 16): 16.0 * (10 + 16)}
    assert teacher.flops("text", torch.zeros(2, 12)) == pytest.approx(2 * 12 * (10 + 12))
    teacher.row_flops = {}
    assert teacher.flops("text", torch.zeros(2, 12)) == teacher.flops("image", torch.zeros(2, 3)) == 0


def test_a_training_step_counts_its_towers_three_times(tmp_path: Path) -> None:
    (tmp_path / "student.json").write_text(json.dumps(TINY))
    towers = Towers(build_student(StudentConfig(model=str(tmp_path / "student.json"))))
    counted = count_arithmetic(towers, TEXT["context_length"], 2, half=False)
    assert counted.sample_flops == 3 * (IMAGE + caption(TEXT["context_length"]))
    assert counted.rates(1e6) == {"tflops": pytest.approx(counted.sample_flops / 2 / 1e6)}
    towers.student.visual.requires_grad_(False)
    write_note(PEAK, ["cpu", "fp32"], 2.0)
    locked = count_arithmetic(towers, TEXT["context_length"], 1, half=False)
    assert locked.sample_flops == IMAGE + 3 * caption(TEXT["context_length"])
    assert locked.peak == 2.0 * torch.get_num_threads()
    assert locked.rates(1e12 / locked.sample_flops)["mfu"] == pytest.approx(1 / locked.peak)
    assert "mfu" not in locked.rates(1.01e12 * locked.peak / locked.sample_flops)
    learned = {name.split(".")[0] for name, one in towers.student.named_parameters() if one.requires_grad}
    assert "visual" not in learned
    assert "transformer" in learned


class Shifted(torch.nn.Module):
    """An image tower that calls a module with a view of a parameter, as attention pooling does with its queries."""

    def __init__(self, visual: torch.nn.Module) -> None:
        super().__init__()
        self.visual, self.mixer = visual, torch.nn.Linear(DIM, DIM, bias=False)
        self.query = torch.nn.Parameter(torch.ones(1, DIM))
        self.image_size, self.preprocess_cfg = visual.image_size, visual.preprocess_cfg

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.visual(pixels) + self.mixer(self.query.expand(len(pixels), -1))


def test_a_module_that_is_called_with_a_parameter_is_counted(tmp_path: Path) -> None:
    (tmp_path / "student.json").write_text(json.dumps(TINY))
    student = build_student(StudentConfig(model=str(tmp_path / "student.json")))
    student.visual = Shifted(student.visual)
    counted = count_arithmetic(Towers(student), TEXT["context_length"], 1, half=False)
    assert counted.sample_flops == 3 * (IMAGE + 2 * DIM * DIM + caption(TEXT["context_length"]))


def test_a_peak_is_what_doctor_measured_or_what_is_stated() -> None:
    assert peak_tflops("NVIDIA H200", half=True) == (989.0, "by its data sheet")
    assert peak_tflops("NVIDIA L40S", half=True)[0] == 362
    assert peak_tflops("NVIDIA H200", half=False)[0] == peak_tflops("cpu", half=True)[0] == 0
    write_note(PEAK, ["NVIDIA H200", "half"], 640.0)
    assert peak_tflops("NVIDIA H200", half=True) == (640.0, "measured by mmkd doctor")
    assert arithmetic_text(160e12, 640.0, "measured") == "160 TFLOP/s, MFU 25.0% of 640 measured"
    expected = "0.2 TFLOP/s, above the peak of 0.07 measured; run `mmkd doctor` on the idle machine"
    assert arithmetic_text(2e11, 0.07, "measured") == expected
    assert arithmetic_text(1.5e9, 0.0, "") == "0.0015 TFLOP/s; `mmkd doctor` measures the peak"


def test_a_damaged_note_is_no_note(tmp_path: Path) -> None:
    write_note("kind", ["a", 1], 5)
    assert read_note("kind", ["a", 1]) == 5
    (file,) = (tmp_path / "cache" / "mmkd" / "kind").iterdir()
    for text in ("", "[]", "5", '{"about": ["b"], "found": 6}'):
        file.write_text(text)
        assert read_note("kind", ["a", 1]) is None


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"await-decode": 7, "await-read": 1, "device": 2}, "limited by decoding: 70% of the time; raise worker.dec"),
        ({"await-read": 6, "await-decode": 4}, "limited by reading: 60% of the time; raise worker.read_threads"),
        ({"device": 9, "write a": 1, "decode": 99, "image a": 8}, "limited by forward passes: 90% of the time; use"),
        ({"write a": 2, "write b": 2, "samples": 1, "device": 4}, "limited by writing: 56% of the time; use a faster"),
        ({"tokens": 3, "device": 1}, "limited by tokenizing: 75% of the time; raise worker.shards_at_once"),
    ],
)
def test_the_limit_is_named(seconds: dict[str, float], expected: str) -> None:
    assert limit_line(seconds).startswith(expected)


def test_rows_grow_until_throughput_does_not_and_are_remembered(teacher: LoadedTeacher) -> None:
    # Rows a second: 12,300 of 32 rows, 15,200, 17,300, 18,550 of 256; 512 give 3.8 % more.
    device = SimulatedDevice(pass_seconds=1e-3, row_seconds=5e-5)
    expected = {("one", "image"): 256, ("one", "text"): 256}
    assert search_rows(teacher, device, []) == expected
    launched = device.launched
    assert search_rows(teacher, device, []) == expected
    assert device.launched == launched
    assert search_rows(teacher, SimulatedDevice(pass_seconds=1e-3, memory=100 << 20, row_bytes=1 << 20), ["other"]) == {
        ("one", "image"): 64,
        ("one", "text"): 64,
    }


def test_rows_are_searched_for_anew_beside_other_workers(
    teacher: LoadedTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[object]] = []
    monkeypatch.setattr(dispatch, "search_rows", lambda _teacher, _device, settings: asked.append(settings) or {})
    monkeypatch.setattr(dispatch, "_load", lambda *_: teacher)
    monkeypatch.setattr(dispatch, "freeze_loaded_objects", lambda: None)
    spec: Any = None
    for beside in (1, 3):
        TeachersPlugin([(spec, teacher.card)], WorkerConfig(), beside, SimulatedDevice).setup(None)
    assert asked == [[True, False, 1], [True, False, 3]]


@pytest.mark.parametrize(
    ("decode", "read", "beside", "expected"), [(None, None, 1, 0), (None, None, 999, 1), (3, 5, 1, 3)]
)
def test_threads_are_the_cores_of_a_worker(decode: int | None, read: int | None, beside: int, expected: int) -> None:
    plugin = TeachersPlugin([], WorkerConfig(decode_threads=decode, read_threads=read), beside)
    plugin.setup(None)
    assert plugin.bench is not None
    assert plugin.bench.threads.decode == (expected or usable_cores())
    assert plugin.bench.threads.read == (read or max(4, 2 * plugin.bench.threads.decode))


def test_what_a_worker_has_loaded_is_left_out_of_garbage_collection() -> None:
    loaded = []

    class Holder(TeachersPlugin):
        def setup(self, worker: Any) -> None:
            loaded.append([object() for _ in range(1000)])
            super().setup(worker)

    gc.unfreeze()
    Holder([], WorkerConfig(), 1).setup(None)
    try:
        assert gc.get_freeze_count() > 1000
        assert not any(found is loaded[0] for found in gc.get_objects())
        frozen = gc.get_freeze_count()
        with loaded_objects_frozen():
            assert gc.get_freeze_count() == frozen
        gc.unfreeze()
        with loaded_objects_frozen():
            assert gc.get_freeze_count() > 1000
        assert gc.get_freeze_count() == 0
    finally:
        gc.freeze()  # as conftest.py has it


def test_workers_that_share_their_cores() -> None:
    assert workers_beside(ClusterConfig(workers=3)) == 3
    assert workers_beside(ClusterConfig(scheduler="tcp://host:1")) == 1
    assert workers_beside(ClusterConfig(scheduler="slurm", jobqueue={"slurm": {"processes": 4}})) == 4

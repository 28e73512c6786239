"""On a GPU: extraction by nine teachers of ViT-B/16's size in bf16 and by one, against the bare forward passes of the
same models; then stage 2 of a ViT-B/16 student with nine teachers. Random weights, JPEGs of 500 pixels, captions of 8
to 40 words. `make gpu` runs it and writes this section.
"""

from __future__ import annotations

import datetime
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file

from mmkd.base.arithmetic import PEAK, peak_tflops
from mmkd.base.notes import write_note
from mmkd.base.process import usable_cores
from mmkd.benchmarks.device import in_hand
from mmkd.benchmarks.distill import make_store as make_training_store
from mmkd.benchmarks.extract import shards_of, write_corpus
from mmkd.benchmarks.page import with_section
from mmkd.benchmarks.result import Row
from mmkd.benchmarks.where import describe_machine
from mmkd.extract.corpora import open_corpus
from mmkd.extract.decoding import Threads, decode_windows
from mmkd.extract.device import Device, open_device
from mmkd.extract.encode import Workbench, text_windows
from mmkd.extract.forward import BatchSizes, search_rows
from mmkd.extract.run import make_store
from mmkd.extract.teachers import TeacherSpec, describe_teacher, load_teacher
from mmkd.extract.teachers.geometry import geometry_of
from mmkd.extract.teachers.loaded import LoadedTeacher
from mmkd.store import FeatureStore
from mmkd.store.writer import add_teacher

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
ROWS, SHARD, TRAINED, STEPS = 8192, 2048, 256, 12
VIT = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
}
WORDS = ("lesion", "of", "the", "left", "lower", "lobe", "axial", "ct", "with", "contrast", "normal", "heart")


def measured_peak(place: torch.device) -> float:
    """TFLOP/s of a large product in bf16."""
    factor = torch.randn(8192, 8192, device=place).to(torch.bfloat16)
    spent = []
    for _ in range(12):
        torch.cuda.synchronize(place)
        started = time.perf_counter()
        _ = factor @ factor
        torch.cuda.synchronize(place)
        spent.append(time.perf_counter() - started)
    return 2 * 8192**3 / statistics.median(spent) / 1e12


def write_corpus_of_figures(folder: Path) -> Path:
    """Pairs with captions as short as those of figures."""
    table = write_corpus(folder, ROWS)
    rng = np.random.default_rng(0)
    captions = [" ".join([str(row), *rng.choice(WORDS, rng.integers(8, 41))]) for row in range(ROWS)]
    lines = [f"k{row},{row}.jpg,{caption}" for row, caption in enumerate(captions)]
    table.write_text("\n".join(["key,image,caption", *lines]) + "\n")
    return table


def load(folder: Path, device: Device, number: int) -> dict[str, LoadedTeacher]:
    """The same weights under `number` names: loaded and computed as often."""
    loaded = {}
    for index in range(number):
        spec = TeacherSpec(slug=f"t{index}", source=f"local-dir:{folder}", precision="bf16")
        teacher = load_teacher(spec, describe_teacher(spec), device.place)
        assert isinstance(teacher, LoadedTeacher)
        loaded[spec.slug] = teacher
    return loaded


def bare_seconds(teachers: dict[str, LoadedTeacher], sizes: BatchSizes, captions: list[str], device: Device) -> float:
    """Every image and caption through every teacher, in the same passes, on tensors that are on the device."""
    seconds = 0.0
    for teacher in teachers.values():
        rows, (tokens, _) = sizes.window(teacher, "image"), teacher.tokenize(captions)
        pixels = torch.randint(0, 256, (rows, 3, 224, 224), dtype=torch.uint8, device=device.place)
        windows = text_windows(tokens, teacher, sizes.window(teacher, "text"))
        texts = [tokens[here, :length].to(device.place) for length, here in windows]
        for warm in (True, False):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(0, rows if warm else ROWS, rows):
                teacher.launch("image", pixels)
            for text in texts:
                teacher.launch("text", text)
            torch.cuda.synchronize()
        seconds += time.perf_counter() - started
    return seconds


def extraction_rows(folder: Path, device: Device) -> list[Row]:
    """Nine teachers, and one."""
    corpus, rows = write_corpus_of_figures(folder / "corpus"), []
    config = VIT
    weights = {name: value.contiguous() for name, value in open_clip.CLIP(**config).state_dict().items()}
    place = folder / "teacher"
    place.mkdir()
    save_file(weights, place / "open_clip_model.safetensors")
    (place / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    captions = [line.split(",", 2)[2] for line in corpus.read_text().splitlines()[1:]]
    cores, peak = usable_cores(), peak_tflops(device.name, half=True)[0]
    for number in (9, 1):
        teachers = load(place, device, number)
        sizes = BatchSizes(device.start_rows)
        for teacher in teachers.values():
            sizes.found |= search_rows(teacher, device, [])
        bare = bare_seconds(teachers, sizes, captions, device)
        bench = Workbench(Threads(cores, 2 * cores), device=device, sizes=sizes)
        store = make_store(open_corpus(str(corpus)), folder / f"features{number}")
        for teacher in teachers.values():
            add_teacher(store, teacher.card)
        shards = FeatureStore.open(store.root).shards
        taken, reports = in_hand(store, shards, teachers, bench)
        busy = sum(report.seconds[name] for report in reports for name in report.flops)
        tflops = sum(sum(report.flops.values()) for report in reports) / taken / 1e12
        what = f"{number} x ViT-B/16 in bf16, {ROWS:,} pairs, passes of {max(sizes.found.values())} rows"
        note = f"busy {busy / taken:.1%}, {tflops:.0f} TFLOP/s, MFU {tflops / peak:.1%} of {peak:.0f} measured"
        rows.append(
            Row(
                what=f"extraction by {what}",
                against="bare forward passes on ready tensors",
                value=ROWS / taken,
                reference=ROWS / bare,
                unit="pairs/s",
                note=note,
                device="gpu",
            )
        )
        if number == 1:
            sources = [f"{row}.jpg" for row in range(2048)]
            rows.append(preparation(corpus.parent, sources, teachers["t0"], cores, ROWS / taken))
    return rows


def preparation(folder: Path, names: list[str], teacher: LoadedTeacher, cores: int, reached: float) -> Row:
    """What all cores prepare when the device has nothing to do: the bound of the row above where it is lower."""
    from mmkd.base.images.uri import image_source

    geometry, threads = geometry_of(teacher.card.image_preprocessing), Threads(cores, 2 * cores)
    sources = [image_source(str(folder), name) for name in names]
    started = time.perf_counter()
    for _ in decode_windows(sources, (geometry,), 256, threads):
        pass
    rate = len(names) / (time.perf_counter() - started)
    what = f"extraction by 1 x ViT-B/16, {cores} cores"
    against = "reading, decoding and resizing alone"
    return Row(what=what, against=against, value=reached, reference=rate, unit="pairs/s", device="gpu")


def training_row(folder: Path, device: Device) -> Row:
    """Stage 2 with nine teachers, features on the device."""
    from mmkd.distill.config import RunConfig
    from mmkd.distill.prepare import prepare
    from mmkd.distill.world import World

    root = folder / "training" / "store"
    make_training_store(root, 20_000, 9, 512)
    (folder / "student.json").write_text(json.dumps(VIT))
    content: dict[str, Any] = {"store": root, "out": folder / "run", "student": {"model": str(folder / "student.json")}}
    run = prepare(RunConfig.model_validate(content | {"batch_size": TRAINED, "epochs": 100}), World(device.place))
    waited = started = 0.0
    with closing(run.batches.from_step(0)) as batches:
        for step in range(2 * STEPS):
            if step == STEPS:
                torch.cuda.synchronize()
                started, waited = time.perf_counter(), 0.0
            began = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - began
            run.update(batch)
        torch.cuda.synchronize()
    taken = time.perf_counter() - started
    rate = STEPS * TRAINED / taken
    rates = run.arithmetic.rates(rate)
    mfu = f", MFU {rates['mfu']:.1%}" if "mfu" in rates else ""
    note = f"{rates['tflops']:.0f} TFLOP/s{mfu}, {waited / taken:.1%} waiting for data"
    what = f"stage 2 of ViT-B/16, batch {TRAINED}, 9 teachers of 512"
    return Row(what=what, value=rate, unit="samples/s", note=note, device="gpu")


def driver() -> str:
    """Version of the driver, as nvidia-smi tells it."""
    smi = shutil.which("nvidia-smi")
    command = [smi or "", "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split() if smi else []
    return told[0] if told else "of unknown version"


def main() -> int:
    """Measure, print, and write the section of the page."""
    device = open_device()
    if device.place.type != "cuda":
        print(f"gpu: PyTorch {torch.__version__} sees no GPU: nothing was measured")
        return 1
    torch.set_num_threads(1)
    write_note(PEAK, [device.name, "half"], measured_peak(device.place))
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        shards_of(SHARD)
        rows = [*extraction_rows(Path(name), device), training_row(Path(name), device)]
    for row in rows:
        print(row, flush=True)
    machine = describe_machine()
    where = f"{device.name}, driver {driver()}, CUDA {torch.version.cuda}; {machine.processor}, {machine.cores} cores"
    versions = ", ".join(f"{package} {version}" for package, version in machine.versions.items())
    when = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {(time.perf_counter() - began) / 60:.1f} minutes"
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(with_section(page, rows, f"{when}. {where}; {machine.system}; {versions}."), encoding="utf-8")
    print(f"wrote the GPU section of {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

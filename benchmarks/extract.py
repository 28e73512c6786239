"""Extraction by nine ViT-B/32 (random weights) from JPEGs of 500 pixels, with captions that fill the context: compared
with the bare forward passes of the same models, with one run per teacher, and with clip-retrieval; views of images with
as many bare passes; one worker against several; peak memory at 1x and 10x rows. Models are loaded before timing starts.

clip-retrieval wants older packages than ours, so it lives apart, in an environment that `make bench` builds; where
that is missing its row is left out.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

import mmkd.store.layout
import mmkd.store.record
import mmkd.store.writer
from mmkd.base.images.views import Views
from mmkd.base.process import keep_freed_memory
from mmkd.benchmarks.result import Row, main
from mmkd.benchmarks.where import peers_python
from mmkd.extract.cluster import dask_client, default_workers, start_workers
from mmkd.extract.cluster_config import ClusterConfig
from mmkd.extract.corpora import open_corpus
from mmkd.extract.derived import append_pictures
from mmkd.extract.dispatch import TeachersPlugin, gather
from mmkd.extract.plan import plan_tasks
from mmkd.extract.report import ShardReport
from mmkd.extract.run import make_store
from mmkd.extract.teachers import TeacherSpec, describe_teacher, load_teacher
from mmkd.store import FeatureStore, TeacherCard
from mmkd.store.writer import add_teacher

Described = Sequence[tuple[TeacherSpec, TeacherCard]]

# Words of which none is one token: 50 of them fill a context of 77.
WORDS = ("pneumothorax", "cardiomegaly", "adenocarcinoma", "immunohistochemistry", "hematoxylin", "echocardiogram")

ROUNDS = 3
"""Of bare passes and extractions in turn: on a machine that is shared, one of each differs by a tenth."""
VIEWS = 4
MEMORY_ROWS = (1_000, 10_000)
MEMORY_PROBE = """
import json, resource, sys
from pathlib import Path
import torch
from mmkd.extract.corpora import open_corpus
from mmkd.extract.run import make_store
from mmkd.extract.shard import extract_shard
from mmkd.extract.teachers import TeacherSpec, describe_teacher, load_teacher
from mmkd.extract.encode import Workbench
from mmkd.store import FeatureStore
from mmkd.store.writer import add_teacher
torch.set_num_threads(1)
corpus, root, folder = sys.argv[1:]
spec = TeacherSpec(slug="one", source=f"local-dir:{folder}")
card = describe_teacher(spec)
teacher = load_teacher(spec, card, torch.device("cpu"))
store = make_store(open_corpus(corpus), Path(root))
add_teacher(store, card)
bench = Workbench()
for shard in range(FeatureStore.open(root).shards):
    extract_shard(store, shard, {"one": teacher}, bench)
print(json.dumps([store.record.rows_per_shard, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def write_teacher(folder: Path, seed: int, layers: int, small: bool = False, resnet: bool = False) -> Path:
    """A ViT-B/32 of open_clip with random weights; small: one that costs next to nothing; or a ResNet-50."""
    folder.mkdir(parents=True)
    width, image_size, context = (64, 32, 16) if small else (768, 224, 77)
    vision: dict[str, Any] = {"image_size": image_size, "layers": layers, "width": width, "patch_size": 32}
    if resnet:
        vision = {"image_size": image_size, "layers": [3, 4, 6, 3], "width": 64, "patch_size": None}
    text = {"context_length": context, "vocab_size": 49408, "width": width * 2 // 3 // 8 * 8, "heads": 8}
    text["layers"] = layers
    config = {"embed_dim": 512, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(seed)
    weights = {name: value.contiguous() for name, value in open_clip.CLIP(**config).state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return folder


def write_corpus(folder: Path, rows: int, side: int = 500, distinct: int = 64) -> Path:
    """A table of `rows` pairs, each its own: the pictures are links to `distinct` JPEGs, for one file is read once."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(distinct):
        coarse = Image.fromarray(rng.integers(0, 256, size=(25, 25, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
    for row in range(distinct, rows):
        os.link(folder / f"{row % distinct}.jpg", folder / f"{row}.jpg")
    lines = [f"k{row},{row}.jpg,{caption(row)}" for row in range(rows)]
    (folder / "pairs.csv").write_text("\n".join(["key,image,caption", *lines]) + "\n")
    return folder / "pairs.csv"


def caption(row: int) -> str:
    """A caption longer than the context."""
    return " ".join([str(row), *np.random.default_rng(row).choice(WORDS, 50)])


def shards_of(rows: int) -> None:
    """Let a store of this process have shards so small that a run takes minutes and every worker has one."""
    mmkd.store.layout.MIN_ROWS_PER_SHARD = mmkd.store.record.MIN_ROWS_PER_SHARD = rows  # type: ignore[attr-defined]
    mmkd.store.writer.rows_per_shard = lambda _: rows  # type: ignore[attr-defined, assignment, misc]


def bare_seconds(described: Described, rows: int, texts: bool = True) -> float:
    """Forward passes of every teacher on tensors that are ready, with all cores, in batches of 32."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    pixels = torch.randint(0, 256, (32, 3, 224, 224), dtype=torch.uint8)
    total = 0.0
    for spec, card in described:
        teacher = load_teacher(spec, card, torch.device("cpu"))
        tokens, _ = teacher.tokenize([caption(row) for row in range(32)])
        # Every weight is touched once; the kernels of all teachers are the same.
        teacher.encode_images(pixels[:2]), teacher.encode_texts(tokens[:2])
        started = time.perf_counter()
        for _ in range(0, rows, 32):
            teacher.encode_images(pixels)
            if texts:
                teacher.encode_texts(tokens)
        total += time.perf_counter() - started
    return total


def extraction_seconds(corpus: Path, root: Path, described: Described, workers: int, views: int = 0) -> float:
    """From the first task handed out to the last one reported; of so many views of each image alone, if any."""
    made = make_store(open_corpus(str(corpus)), root)
    if views:
        made = append_pictures(made, Views(count=views, flip=True, brightness=0.2, contrast=0.2, saturation=0.2), print)
    for _, card in described:
        add_teacher(made, card)
    store = FeatureStore.open(root)
    tasks = plan_tasks(store.record, [card for _, card in described], store.ledger)
    tasks = [task for task in tasks if task.shard in made.record.spans()[-1].shards]
    cluster = ClusterConfig(workers=workers)
    with dask_client(cluster) as client:
        client.wait_for_workers(workers)
        start_workers(client, TeachersPlugin(described, cluster.worker, workers))
        started = time.perf_counter()
        for report in gather(client, made, tasks, print):
            assert isinstance(report, ShardReport)
        return time.perf_counter() - started


def in_turn(bare: Callable[[], float], extraction: Callable[[int], float]) -> tuple[float, float]:
    """The medians of both, taken in turn; each extraction gets its number."""
    rounds = [(bare(), extraction(number)) for number in range(ROUNDS)]
    first, second = zip(*rounds, strict=True)
    return statistics.median(first), statistics.median(second)


def memory(folder: Path) -> list[Row]:
    """Peak memory of a process that extracts a small and a ten times larger corpus."""
    teacher = write_teacher(folder / "small", 0, layers=1, small=True)
    peaks = []
    for rows in MEMORY_ROWS:
        corpus = write_corpus(folder / f"memory{rows}", rows, side=64)
        command = [sys.executable, "-P", "-c", MEMORY_PROBE, corpus, folder / f"m{rows}", teacher]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        per_shard, peak = json.loads(done.stdout)
        peaks.append((per_shard, peak))
    (small, first), (large, last) = peaks
    what = f"peak memory of extracting {MEMORY_ROWS[1]:,} rows in shards of {large:,}"
    against = f"{MEMORY_ROWS[0]:,} rows in shards of {small:,}"
    return [Row(what=what, against=against, value=last, reference=first, unit="MB")]


# Their own command in their own environment, and the figures of its own log. A webdataset with an archive for each of
# its readers: with `files` it looks an image up under its caption's name, fails, and waits for its logger for ever.
PEER = """
import sys
from clip_retrieval.clip_inference import clip_inference
if __name__ == "__main__":
    archives, out, model, workers, rows = sys.argv[1:]
    clip_inference(input_dataset=archives, input_format="webdataset", output_folder=out, clip_model=model,
                   batch_size=32, num_prepro_workers=int(workers), wds_number_file_per_input_file=int(rows))
"""


def write_archives(corpus: Path, folder: Path, rows: int, number: int) -> str:
    """The same pairs in `number` tar files of whole batches; gives their names as clip-retrieval takes them."""
    folder.mkdir(parents=True)
    share = rows // number
    for index in range(number):
        with tarfile.open(folder / f"{index}.tar", "w", dereference=True) as archive:
            for row in range(index * share, (index + 1) * share):
                archive.add(corpus.parent / f"{row}.jpg", f"{row}.jpg")
                data = caption(row).encode()
                member = tarfile.TarInfo(f"{row}.txt")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return f"{folder}/{{0..{number - 1}}}.tar"


def peer_seconds(corpus: Path, out: Path, weights: Path, rows: int) -> float | None:
    """Seconds that `clip-retrieval inference` of one model spends on forward passes and writing of these pairs, as if
    its start, reading and decoding took none; None where it is not here.
    """
    python = peers_python("clip-retrieval")
    if python is None:
        return None
    readers = len(os.sched_getaffinity(0))
    archives = write_archives(corpus, out / "in", rows, readers)
    script = out / "peer.py"
    script.write_text(PEER)
    command = [python, script, archives, out / "out", f"open_clip:ViT-B-32/{weights}", readers, rows // readers]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    subprocess.run(list(map(str, command)), check=True, capture_output=True, env=environment, timeout=900)
    stats = [json.loads(path.read_text()) for path in (out / "out" / "stats").glob("[0-9]*.json")]
    assert sum(part["sample_count"] for part in stats) == rows
    return float(sum(part["inference_duration"] + part["write_duration"] for part in stats))


def measure(full: bool) -> list[Row]:
    """Rows for the page. Two cores: few pairs, of full depth."""
    rows, number, layers = (16_384, 9, 12) if full else (64, 9, 12)
    keep_freed_memory()
    workers = default_workers(ClusterConfig())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place = write_teacher(folder / "teacher", 0, layers)
        # The same file under nine names: loaded nine times, computed nine times.
        specs = [TeacherSpec(slug=f"t{index}", source=f"local-dir:{place}") for index in range(number)]
        described = [(spec, describe_teacher(spec)) for spec in specs]
        corpus = write_corpus(folder / "corpus", rows)
        found = memory(folder)
        shards_of(2048 if full else rows // workers)
        bare, together = in_turn(
            partial(bare_seconds, described, rows),
            lambda number: extraction_seconds(corpus, folder / f"all{number}", described, workers),
        )
        alone = extraction_seconds(corpus, folder / "alone", described[:1], workers)
        single = extraction_seconds(corpus, folder / "single", described[:1], 1)
        plain, views = in_turn(
            lambda: bare_seconds(described[:1], VIEWS * rows, texts=False),
            lambda number: extraction_seconds(corpus, folder / f"v{number}", described[:1], workers, VIEWS),
        )
        peer = peer_seconds(corpus, folder / "peer", place / "open_clip_model.safetensors", rows)
    what = f"extraction of {rows:,} pairs, {number} teachers of {layers} layers, {workers} workers"
    ready = "bare forward passes on ready tensors"
    each = f"a run for each teacher: one measured, times {number}"
    one = f"extraction of {rows:,} pairs, 1 teacher, {workers} workers"
    return [
        Row(what=what, against=ready, value=together, reference=bare, unit="s", goal="<= 1.05"),
        Row(what=what, against=each, value=together, reference=number * alone, unit="s"),
        *peer_rows(what, together, None if peer is None else number * peer, number),
        Row(
            what=f"extraction of {VIEWS} views of {rows:,} images, 1 teacher, {workers} workers",
            against=f"{VIEWS * rows:,} bare forward passes",
            value=views,
            reference=plain,
            unit="s",
            goal="<= 1.05",
        ),
        Row(what=one, against="one worker", value=alone, reference=single, unit="s"),
        *found,
    ]


def peer_rows(what: str, ours: float, theirs: float | None, number: int) -> list[Row]:
    """The comparison with clip-retrieval, where there is one."""
    if theirs is None:
        return []
    against = f"forward passes and writing of clip-retrieval for each model: one measured, times {number}"
    return [Row(what=what, against=against, value=ours, reference=theirs, unit="s", goal="< 0.9")]


if __name__ == "__main__":
    main(measure)

"""Faults inside one process: too little device memory, failed images tried again, limits; and the run log."""

from __future__ import annotations

import json
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch
from in_process import run, tree_digest
from tiny_corpus import png, write_table_corpus
from tiny_teachers import write_tiny_teacher

from mmkd.base.errors import ConfigError, CorpusError, StoreError, TeacherError, UserError
from mmkd.extract.cluster import shards_in_hand
from mmkd.extract.cluster_config import ClusterConfig, WorkerConfig
from mmkd.extract.config import ExtractConfig, FailureLimit, parse_failures
from mmkd.extract.corpora import corpus_rows, open_corpus
from mmkd.extract.dispatch import finished_report
from mmkd.extract.encode import Workbench
from mmkd.extract.forward import BatchSizes
from mmkd.extract.limited_corpus import LimitedCorpus
from mmkd.extract.plan import ShardTask, plan_retries, plan_tasks
from mmkd.extract.run import extract, make_store, shard_rows
from mmkd.extract.shard import extract_shard, retry_shard
from mmkd.extract.teachers import Teacher, describe_teacher, load_teacher, parse_teachers
from mmkd.store import TeacherCard
from mmkd.store.layout import IMAGE_SOUND
from mmkd.store.run_log import run_seconds
from mmkd.store.writer import add_teacher


class SmallDevice:
    """A real teacher on a device whose memory does not suffice for the first few image batches."""

    def __init__(self, teacher: Teacher, refusals: int) -> None:
        self.teacher = teacher
        self.refusals = refusals
        self.passes: set[int] = set()

    @property
    def card(self) -> TeacherCard:
        return self.teacher.card

    @property
    def device(self) -> torch.device:
        return self.teacher.device

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        self.passes.add(len(pixels))
        self.refusals -= 1
        if self.refusals >= 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return self.teacher.encode_images(pixels)

    def tokenize(self, captions: list[str]) -> tuple[torch.Tensor, list[int]]:
        return self.teacher.tokenize(captions)

    def encode_texts(self, tokens: torch.Tensor) -> torch.Tensor:
        self.passes.add(len(tokens))
        return self.teacher.encode_texts(tokens)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Teacher]:
    """Two loaded teachers."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("teachers")
    places = [f"{name}=local-dir:{write_tiny_teacher(root / name, seed)}" for name, seed in (("one", 1), ("two", 2))]
    specs = parse_teachers(",".join(places))
    return {spec.slug: load_teacher(spec, describe_teacher(spec), torch.device("cpu")) for spec in specs}


def test_too_little_device_memory_halves_the_batch_and_keeps_the_bytes(
    tmp_path: Path, teachers: dict[str, Teacher]
) -> None:
    table = write_table_corpus(tmp_path / "c", 150)
    one = {"one": teachers["one"]}
    run(table, tmp_path / "a", one)
    store = run(table, tmp_path / "b", {})

    add_teacher(store, teachers["one"].card)
    bench = Workbench(sizes=BatchSizes(128))
    small = SmallDevice(teachers["one"], refusals=4)
    report = extract_shard(store, 0, {"one": small}, bench)
    assert report.batch_rows == {"image one": 8}
    assert tree_digest(tmp_path / "b") == tree_digest(tmp_path / "a")
    assert small.passes == {32}  # whatever the batch was, or a product could round differently
    # Remembered: the next shard of this process starts where this one ended.
    assert bench.sizes.rows(small, "image") == 8
    assert bench.sizes.rows(small, "text") == 128
    with pytest.raises(TeacherError, match="too little memory for one image") as caught:
        extract_shard(store, 0, {"one": SmallDevice(teachers["one"], 99)}, bench)
    assert "\n" not in str(caught.value)


class Gossip(SmallDevice):
    """A teacher whose tokenizer quotes what it cannot read."""

    def tokenize(self, captions: list[str]) -> tuple[torch.Tensor, list[int]]:
        raise ValueError(f"cannot encode {captions[0]!r}")


def test_no_log_quotes_a_caption(tmp_path: Path, teachers: dict[str, Teacher]) -> None:
    store = run(write_table_corpus(tmp_path / "c", 5), tmp_path / "s", {})
    with pytest.raises(RuntimeError) as caught:
        extract_shard(store, 0, {"one": Gossip(teachers["one"], 0)}, Workbench())
    # What Dask would send to the client and print in the worker's log.
    told = "".join(traceback.format_exception(caught.value))
    assert "its tokenizer raised ValueError on a caption" in told
    assert "finding" not in told


def break_images(table: Path, *numbers: int) -> dict[Path, bytes]:
    """Cut images off; what they were."""
    whole = {}
    for number in numbers:
        path = table.parent / "images" / f"{number}.png"
        whole[path] = path.read_bytes()
        path.write_bytes(whole[path][:200])
    return whole


def test_failed_images_are_read_again_and_nothing_else(tmp_path: Path, teachers: dict[str, Teacher]) -> None:
    table = write_table_corpus(tmp_path / "c", 300)
    run(table, tmp_path / "whole", teachers)
    whole = break_images(table, 3, 40, 299)
    store = run(table, tmp_path / "s", teachers)
    assert store.summary().reasons == {"image: truncated": 3}
    cards = [teacher.card for teacher in teachers.values()]
    tasks = plan_retries([0, 1], cards, store.ledger)
    assert [(task.shard, set(task.teachers), task.retry) for task in tasks] == [
        (0, {"one", "two"}, True),
        (1, {"one", "two"}, True),
    ]
    # Still broken: nothing is written.
    before = tree_digest(tmp_path / "s")
    assert retry_shard(store, 0, teachers, Workbench()).rows == 2
    assert tree_digest(tmp_path / "s") == before
    for path, data in whole.items():
        path.write_bytes(data)
    for task in tasks:
        report = retry_shard(store, task.shard, teachers, Workbench())
        assert report.status == {"ok": report.rows}
    assert tree_digest(tmp_path / "s") == tree_digest(tmp_path / "whole")
    with pytest.raises(UserError, match="two also has; name every teacher"):
        plan_retries([0], cards[:1], store.ledger)


def test_a_shard_whose_worker_died_before_it_told_is_counted_as_it_told(
    tmp_path: Path, teachers: dict[str, Teacher]
) -> None:
    table = write_table_corpus(tmp_path / "c", 300)
    break_images(table, 3, 40, 299)
    store = make_store(open_corpus(str(table)), tmp_path / "s")
    for teacher in teachers.values():
        add_teacher(store, teacher.card)
    for shard, rows, broken in ((0, 256, 2), (1, 44, 1)):
        told = extract_shard(store, shard, teachers, Workbench())
        found = finished_report(tmp_path / "s", ShardTask(shard, tuple(teachers)))
        assert (told.rows, told.reasons) == (rows, {"image: truncated": broken})
        assert (found.rows, found.status, found.reasons) == (told.rows, told.status, told.reasons)
    assert finished_report(tmp_path / "s", ShardTask(0, tuple(teachers), retry=True)).rows == 0  # no row was read again


def test_a_kill_while_failed_images_are_written_costs_the_shard_only(
    tmp_path: Path, teachers: dict[str, Teacher]
) -> None:
    table = write_table_corpus(tmp_path / "c", 40)
    run(table, tmp_path / "whole", teachers)
    whole = break_images(table, 7)
    run(table, tmp_path / "s", teachers)
    for path, data in whole.items():
        path.write_bytes(data)
    # What is on disk when the kill comes right after the entries were taken back: rows and chunks of before.
    for entry in (tmp_path / "s" / "ledger").iterdir():
        entry.unlink()
    store = run(table, tmp_path / "s", teachers)
    assert plan_tasks(store.record, [teacher.card for teacher in teachers.values()], store.ledger) == []
    assert tree_digest(tmp_path / "s") == tree_digest(tmp_path / "whole")


def test_the_first_rows_are_a_corpus_of_their_own(tmp_path: Path) -> None:
    corpus = open_corpus(str(write_table_corpus(tmp_path / "c", 20)))
    store = make_store(LimitedCorpus(corpus, 5), tmp_path / "s")
    assert (store.record.rows, store.record.corpus.location) == (5, f"{tmp_path / 'c' / 'pairs.csv'} (first 5 rows)")
    assert [row.key for row in corpus_rows(LimitedCorpus(corpus, 5))] == [f"k{number}" for number in range(5)]
    with pytest.raises(CorpusError, match="first 5 rows"):
        make_store(corpus, tmp_path / "s")


def test_rows_per_shard_follow_the_workers_or_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = str(write_table_corpus(tmp_path / "c", 20))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    teachers = tuple(parse_teachers(f"one=local-dir:{write_tiny_teacher(tmp_path / 'one', 1)}"))
    config = ExtractConfig(corpus=table, store=tmp_path / "s", teachers=teachers, cluster=ClusterConfig(workers=3))
    assert shards_in_hand(config.cluster) == 6  # two for each GPU
    assert shards_in_hand(ClusterConfig(worker=WorkerConfig(shards_at_once=1))) == 4
    assert shards_in_hand(ClusterConfig(scheduler="slurm", workers=64)) == 64
    assert shards_in_hand(ClusterConfig(scheduler="tcp://host:8786")) == 1
    assert [shard_rows(config, rows) for rows in (20, 20_000, 2_900_000)] == [256, 512, 16384]
    wanted = config.model_copy(update={"rows_per_shard": 1024})
    assert make_store(config.opened, config.store, partial(shard_rows, wanted)).record.rows_per_shard == 1024
    with pytest.raises(UserError, match=r"^--rows-per-shard is 512, but .*/s was made with 1024 for good; leave it"):
        extract(config.model_copy(update={"rows_per_shard": 512}))


def test_of_two_that_make_a_store_the_first_wins(tmp_path: Path) -> None:
    corpus = open_corpus(str(write_table_corpus(tmp_path / "c", 20)))
    store = make_store(corpus, tmp_path / "s")
    part = tmp_path / "s" / "samples" / "00000.parquet"
    part.write_bytes(part.read_bytes() + b" ")  # what the first has done since
    changed = part.read_bytes()
    assert make_store(corpus, tmp_path / "s").record == store.record
    assert part.read_bytes() == changed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "s"]
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "mine").write_text("")
    with pytest.raises(StoreError, match="not empty"):
        make_store(corpus, tmp_path / "t")


@pytest.mark.parametrize(
    ("text", "failed", "seen", "total", "passed"),
    [
        ("1%", 10, 500, 5000, False),  # of the first thousand rows
        ("1%", 11, 500, 5000, True),
        ("1%", 20, 2000, 5000, False),
        ("1%", 21, 2000, 5000, True),
        ("1%", 3, 100, 300, False),
        ("1%", 4, 100, 300, True),
        ("0%", 1, 10, 10, True),
        ("7", 7, 10, 10, False),
        ("7", 8, 10, 10, True),
    ],
)
def test_too_many_failures(text: str, failed: int, seen: int, total: int, passed: bool) -> None:
    assert FailureLimit.parse(text).passed(failed, seen, total) is passed


@pytest.mark.parametrize("text", ["1.5", "-1", "101%", "-1%", "many", "", "%", "nan%"])
def test_a_limit_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a share such as 1%"):
        FailureLimit.parse(text)


def test_the_values_of_failures() -> None:
    assert parse_failures(()) == (None, False)
    assert parse_failures(("retry",)) == (None, True)
    assert parse_failures(("retry", "1%")) == (FailureLimit(share=0.01), True)
    with pytest.raises(ConfigError, match="has the limits 1% and 20 rows; name one"):
        parse_failures(("1%", "20"))
    with pytest.raises(ConfigError, match="'again', expected a share such as 1%, a number of rows, or retry"):
        parse_failures(("again",))


def test_seconds_are_added_up_over_runs(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    line = {"teachers": ["a", "b"], "rows": 10, "wall_seconds": 4.0}
    line["seconds"] = {"read": 1.0, "decode": 2.0, "image a": 3.0, "text b": 0.5, "write a": 0.25, "samples": 0.125}
    (tmp_path / "runs" / "1.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(line)}\n{json.dumps(line)[:40]}")
    (tmp_path / "runs" / "2.jsonl").write_text(f"{json.dumps(line | {'teachers': ['b']})}\nnot JSON\n[1]\n")
    total = run_seconds(tmp_path)
    assert (total.runs, total.shards, total.rows, total.wall) == (2, 3, 30, 12.0)
    assert total.seconds == {
        "read": 3.0,
        "decode": 6.0,
        "samples": 0.375,
        "image a": 9.0,
        "text b": 1.5,
        "write a": 0.75,
    }
    assert total.unreadable_lines == 3
    assert run_seconds(tmp_path / "nowhere").runs == 0


def test_an_image_that_appears_twice_decodes_to_equal_features(tmp_path: Path, teachers: dict[str, Teacher]) -> None:
    """Wherever in a pass a row lies, and whatever lies beside it, its bits are the same."""
    table = write_table_corpus(tmp_path / "c", 100)
    for number in (0, 31, 32, 67, 99):
        (table.parent / "images" / f"{number}.png").write_bytes(png(500))
    store = run(table, tmp_path / "s", teachers)
    for slug in teachers:
        assert len({store.image(slug)[number].tobytes() for number in (0, 31, 32, 67, 99)}) == 1


def test_an_image_of_several_rows_is_decoded_and_encoded_once(tmp_path: Path, teachers: dict[str, Teacher]) -> None:
    """Questions about one image, not beside each other: 3 images and a missing one in 80 rows."""
    (tmp_path / "a").mkdir()
    for number in range(3):
        (tmp_path / "a" / f"{number}.png").write_bytes(png(number))
    lines = ["key,image,caption", *(f"k{row},{row % 4}.png,question {row}" for row in range(80))]
    (tmp_path / "a" / "pairs.csv").write_text("\n".join(lines))
    (tmp_path / "b").mkdir()
    for row in range(80):
        if row % 4 < 3:
            (tmp_path / "b" / f"{row}.png").write_bytes(png(row % 4))
    own = ["key,image,caption", *(f"k{row},{row}.png,question {row}" for row in range(80))]
    (tmp_path / "b" / "pairs.csv").write_text("\n".join(own))
    counted = Counted(teachers["one"])
    store = run(tmp_path / "a" / "pairs.csv", tmp_path / "s", {"one": counted})
    apart = run(tmp_path / "b" / "pairs.csv", tmp_path / "t", {"one": teachers["one"]})
    assert (counted.images, counted.texts) == (1, 3)  # passes of 32 rows
    assert store.image("one")[:].tobytes() == apart.image("one")[:].tobytes()
    assert [(store.valid("one")[row] & IMAGE_SOUND) != 0 for row in range(8)] == [True, True, True, False] * 2
    reasons = store.sample_table(columns=["reason"])["reason"].to_pylist()
    assert [reason is None for reason in reasons] == [row % 4 < 3 for row in range(80)]


class Counted(SmallDevice):
    """A teacher that counts its forward passes."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__(teacher, 0)
        self.images = self.texts = 0

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        self.images += 1
        return super().encode_images(pixels)

    def encode_texts(self, tokens: torch.Tensor) -> torch.Tensor:
        self.texts += 1
        return super().encode_texts(tokens)

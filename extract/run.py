"""The whole of `mmkd extract`: index, plan, submit, gather, report."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from distributed import Client, KilledWorker, as_completed
from tqdm import tqdm

from mmkd.extract.cluster import dask_client
from mmkd.extract.config import ExtractConfig
from mmkd.extract.corpora import open_corpus
from mmkd.extract.index import check_same_corpus, create_indexed_store, restore_parts
from mmkd.extract.plan import ShardTask, plan_tasks
from mmkd.extract.shard import ShardReport
from mmkd.extract.teachers import describe_teacher
from mmkd.extract.worker import TeachersPlugin, run_task
from mmkd.store import FeatureStore, MmkdError
from mmkd.store.errors import StoreError
from mmkd.store.inputs import shards_without_inputs
from mmkd.store.record import StoreRecord
from mmkd.store.writer import add_teacher


@dataclass
class RunReport:
    """What one run did."""

    store: Path
    rows: int
    shards_total: int
    shards_done: int = 0
    """Shards that this run finished; those that were there before are not counted."""
    status: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    """Summed over workers and threads; see `ShardReport.seconds`."""
    truncated: Counter[str] = field(default_factory=Counter)
    not_finite: Counter[str] = field(default_factory=Counter)
    changed: int = 0
    lost_shards: tuple[int, ...] = ()
    """Shards whose task killed its worker again and again; everything else went on."""

    def add(self, shard: ShardReport) -> None:
        """Count one finished shard."""
        self.shards_done += 1
        self.changed += shard.changed
        for name in ("status", "reasons", "seconds", "truncated", "not_finite"):
            getattr(self, name).update(getattr(shard, name))


def extract(config: ExtractConfig, say: Callable[[str], None] = print) -> RunReport:
    """Bring every shard of the store to every teacher asked for. Running it again does what is left.

    Args:
        config: what to do.
        say: receives one line at a time for the user.

    Raises:
        CorpusError, TeacherError, StoreError, UserError: see `mmkd.store.errors`.
    """
    corpus = open_corpus(config.corpus)
    described = [(spec, describe_teacher(spec)) for spec in config.teachers]
    cards = [card for _, card in described]
    if (config.store / "zarr.json").is_file():
        record = FeatureStore.open(config.store).record
        check_same_corpus(corpus, record, config.store)
        restored = restore_parts(corpus, config.store, record)
        if restored:
            say(f"{restored} sample parts were missing and are listed again from the corpus")
    else:
        record = create_indexed_store(corpus, config.store)
    for card in cards:
        add_teacher(config.store, record, card)
    store = FeatureStore.open(config.store)
    size = config.keep_inputs
    without_inputs = shards_without_inputs(config.store, store.shards, size) if size is not None else frozenset()
    tasks = plan_tasks(store.shards, cards, store.ledger, without_inputs)
    report = RunReport(config.store, len(store), store.shards)
    say(f"{len(store):,} rows in {store.shards} shards of {record.rows_per_shard}; {len(tasks)} shards to do")
    if tasks:
        needed = {slug for task in tasks for slug in task.teachers}
        with dask_client(config.scheduler, config.workers) as client:
            say(f"dashboard: {client.dashboard_link}")
            client.register_plugin(TeachersPlugin([pair for pair in described if pair[1].slug in needed]))
            _gather(client, config, record, tasks, report)
    return report


def _gather(
    client: Client, config: ExtractConfig, record: StoreRecord, tasks: Sequence[ShardTask], report: RunReport
) -> None:
    root = config.store.resolve()
    futures = {
        client.submit(
            run_task,
            root,
            record,
            task,
            config.decode_threads,
            config.keep_inputs if task.inputs else None,
            key=f"shard-{task.shard:05d}",
            pure=False,
        ): task
        for task in tasks
    }
    lost: list[int] = []
    # Results are taken as they come and let go: the scheduler holds one small report per running task.
    with tqdm(total=len(tasks), unit="shard", disable=None) as bar, _RunLog(root) as log:
        for future in as_completed(futures):
            try:
                shard = future.result()
            except KilledWorker:
                lost.append(futures[future].shard)
                continue
            finally:
                bar.update()
            if isinstance(shard, MmkdError):
                raise shard
            report.add(shard)
            log.write(shard)
            future.release()
    report.lost_shards = tuple(sorted(lost))


class _RunLog:
    """`runs/<time>-<pid>.jsonl`: one line a shard with its seconds. A log; nothing depends on it."""

    def __init__(self, root: Path) -> None:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        self.path = root / "runs" / f"{stamp}-{os.getpid()}.jsonl"

    def __enter__(self) -> _RunLog:
        try:
            self.path.parent.mkdir(exist_ok=True)
            self.file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise StoreError(f"cannot write {self.path}: {error.strerror}; the store must be writable") from error
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, shard: ShardReport) -> None:
        """Append one shard's report."""
        print(json.dumps(asdict(shard), sort_keys=True), file=self.file, flush=True)


def summary_lines(report: RunReport) -> Iterator[str]:
    """The run's end as a user reads it."""
    yield f"extracted {report.shards_done} of {report.shards_total} shards into {report.store}"
    if report.status:
        yield "rows: " + ", ".join(f"{count:,} {status}" for status, count in sorted(report.status.items()))
    for reason, count in report.reasons.most_common(10):
        yield f"  {count:,} x {reason}"
    for slug, count in sorted(report.truncated.items()):
        if count:
            yield f"  {count:,} captions are longer than the context of {slug} and were cut"
    for slug, count in sorted(report.not_finite.items()):
        yield f"  {count:,} features of {slug} are zero or not finite: marked as missing"
    if report.changed:
        yield f"  {report.changed:,} images changed since the store was made: marked as missing for the new teachers"
    if report.seconds:
        yield "seconds, summed over workers: " + ", ".join(
            f"{name} {seconds:.1f}" for name, seconds in sorted(report.seconds.items())
        )
    if report.lost_shards:
        numbers = ", ".join(map(str, report.lost_shards))
        yield f"lost: shards {numbers} killed their worker each time; the others are done"

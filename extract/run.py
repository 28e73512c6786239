"""The whole of `mmkd extract`: index, plan, submit, gather, report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import pyarrow.compute as pc
from distributed import Client
from tqdm import tqdm

from mmkd.base.errors import UserError
from mmkd.base.files import remove_abandoned
from mmkd.base.lock import only_writer
from mmkd.base.places.remote import StorePath
from mmkd.base.text import counted
from mmkd.extract.cluster import dask_client, start_workers
from mmkd.extract.config import ExtractConfig
from mmkd.extract.corpora import Corpus
from mmkd.extract.corpora.row import IMAGE_FAULT
from mmkd.extract.corpus_parts import read_overview
from mmkd.extract.dispatch import gather
from mmkd.extract.index import restore_parts
from mmkd.extract.new_store import make_store
from mmkd.extract.plan import ShardTask, plan_retries, plan_tasks
from mmkd.extract.report import RunReport, ShardReport
from mmkd.extract.teachers import TeacherSpec
from mmkd.extract.worker import TeachersPlugin
from mmkd.store import FeatureStore, TeacherCard
from mmkd.store.inputs import shards_without_inputs
from mmkd.store.record import Store
from mmkd.store.run_log import RunLog
from mmkd.store.writer import add_teacher, note_encoding_error

Say = Callable[[str], None]


def extract(config: ExtractConfig, say: Say = print) -> RunReport:
    """Extract every shard of the store for every requested teacher. Running it again finishes what is left. Raises
    CorpusError, TeacherError, StoreError, UserError (see `mmkd.base.errors`). Raises BusyStoreError if another process
    writes to the store. `config`: what to do. `say`: receives one line at a time for the user."""
    corpus = config.opened
    described = config.described()
    # On a disk a new store is renamed to its place whole, so there is nothing to lock before.
    made = (
        _found_or_made(corpus, config.store, say) if isinstance(config.store, Path) and _is_new(config.store) else None
    )
    with only_writer(config.store, "mmkd extract"):
        return _extracted(config, described, made or _found_or_made(corpus, config.store, say), say)


def _is_new(root: StorePath) -> bool:
    return not (root / "zarr.json").is_file()


def _extracted(
    config: ExtractConfig, described: Sequence[tuple[TeacherSpec, TeacherCard]], target: Store, say: Say
) -> RunReport:
    cards = [card for _, card in described]
    for card in cards:
        add_teacher(target, card)
    store = FeatureStore.open(config.store)
    report = RunReport(config.store, len(store), store.shards)
    retries = plan_retries(_shards_with_failed_images(store), cards, store.ledger) if config.retry_failed else []
    keep = config.keep_inputs
    lacking = shards_without_inputs(config.store, store.shards, keep) if keep is not None else frozenset()
    tasks = plan_tasks(store.shards, cards, store.ledger, lacking, keep)
    for line in overview.lines() if (overview := read_overview(config.store)) else ():
        say(line)
    rows, shards, to_do = counted(len(store), "row"), counted(store.shards, "shard"), counted(len(tasks), "shard")
    say(f"{rows} in {shards} of {store.record.rows_per_shard}; {to_do} to do")
    if config.retry_failed:
        say(f"{counted(len(retries), 'shard')} with images that failed, to be tried again")
    if tasks or retries:
        with dask_client(config.cluster) as client:
            _announce(client, say)
            start_workers(client, TeachersPlugin(_needed(described, [*tasks, *retries]), config.cluster.worker))
            if retries:
                _do(client, target, retries, report, config, say)
                tasks = plan_tasks(store.shards, cards, FeatureStore.open(config.store).ledger, lacking, keep)
            _do(client, target, tasks, report, config, say)
    for card in cards:
        note_encoding_error(store, card.slug)
    remove_abandoned(config.store)
    return report


def _found_or_made(corpus: Corpus, root: StorePath, say: Say) -> Store:
    if _is_new(root):
        return make_store(corpus, root)
    store = Store.open(root)
    restored = restore_parts(corpus, store)
    if restored:
        say(f"{restored} sample parts were missing and are listed again from the corpus")
    return store


def _needed(
    described: Sequence[tuple[TeacherSpec, TeacherCard]], tasks: Sequence[ShardTask]
) -> list[tuple[TeacherSpec, TeacherCard]]:
    wanted = {slug for task in tasks for slug in task.teachers}
    return [pair for pair in described if pair[1].slug in wanted]


def _shards_with_failed_images(store: FeatureStore) -> list[int]:
    rows = store.sample_table(columns=["row", "reason"])
    failed = rows.filter(pc.starts_with(rows["reason"], IMAGE_FAULT))["row"].to_pylist()
    return sorted({row // store.record.rows_per_shard for row in failed})


def _announce(client: Client, say: Say) -> None:
    try:
        say(f"dashboard: {client.dashboard_link}")
    except KeyError as error:
        say(f"dashboard: no link: distributed.dashboard.link names {error}, which is not set")
    if not client.scheduler_info()["workers"]:
        say("no worker has joined yet; the run starts with the first one")


def _do(
    client: Client, store: Store, tasks: Sequence[ShardTask], report: RunReport, config: ExtractConfig, say: Say
) -> None:
    store = Store(store.root.resolve(), store.record)
    with (
        tqdm(total=len(tasks), unit="shard", disable=None) as bar,
        RunLog(store.root) as log,
        closing(gather(client, store, tasks, say)) as results,
    ):
        for result in results:
            bar.update()
            if isinstance(result, ShardReport):
                report.add(result)
                log.write(result)
            else:
                report.lose(result.shard, result.reason, len(store.record.shard_rows(result.shard)))
            _stop_at_too_many(config, report)


def _stop_at_too_many(config: ExtractConfig, report: RunReport) -> None:
    limit = config.max_failures
    lost = report.lost_rows.total()
    failed, seen = report.failed + lost, report.rows_read + lost
    if limit is not None and limit.passed(failed, seen, report.rows):
        reasons = (report.reasons + report.lost_rows).most_common(3)
        worst = "; ".join(f"{count:,} x {reason}" for reason, count in reasons)
        raise UserError(
            f"{failed:,} of {seen:,} rows failed, more than --failures {limit} ({worst}); correct "
            "the corpus and run with --failures retry, or raise the limit and run again: what was done is kept"
        )

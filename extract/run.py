"""The whole of `mmkd extract`: index, plan, submit, gather, report."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import pyarrow.compute as pc
from distributed import Client
from tqdm import tqdm

from mmkd.base.errors import StoreError, UserError
from mmkd.base.files import TEMPORARY_SUFFIX, disk_errors, remove_abandoned
from mmkd.base.lock import only_writer
from mmkd.base.places.remote import StorePath
from mmkd.base.text import counted
from mmkd.extract.cluster import dask_client, shards_in_hand, start_workers, workers_beside
from mmkd.extract.config import ExtractConfig
from mmkd.extract.corpora import Corpus
from mmkd.extract.corpora.row import IMAGE_FAULT
from mmkd.extract.corpus_parts import read_overview
from mmkd.extract.derived import append_pictures, restore_pictures
from mmkd.extract.dispatch import TeachersPlugin, gather
from mmkd.extract.index import check_same_corpus, create_indexed_store, restore_parts
from mmkd.extract.plan import ShardTask, plan_retries, plan_tasks
from mmkd.extract.report import RunReport, ShardReport
from mmkd.store import FeatureStore
from mmkd.store.fold import fold
from mmkd.store.inputs import shards_without_inputs
from mmkd.store.layout import rows_per_shard
from mmkd.store.ledger import unfold_entries
from mmkd.store.record import Store, StoreRecord
from mmkd.store.run_log import RunLog
from mmkd.store.writer import add_teacher, note_encoding_error

Say = Callable[[str], None]


def extract(config: ExtractConfig, say: Say = print) -> RunReport:
    """Extract every shard for every requested teacher; running it again finishes what is left. `say` receives lines for
    the user. Raises CorpusError, TeacherError, StoreError, UserError; BusyStoreError if another process writes."""
    corpus = config.opened
    described = config.described()
    # On a disk a new store is renamed to its place whole, so there is nothing to lock before.
    is_new = not (config.store / "zarr.json").is_file()
    choose = partial(shard_rows, config)
    made = make_store(corpus, config.store, choose) if is_new and isinstance(config.store, Path) else None
    cards = [card for _, card in described]
    keep = config.keep_inputs
    with only_writer(config.store, "mmkd extract"):
        target = made or _prepared_store(corpus, config.store, choose, say)
        refuse_other_shards(config, target.record)
        for recipe in config.recipes:
            target = append_pictures(target, recipe, say)
        for card in cards:
            add_teacher(target, card)
        store = FeatureStore.open(config.store)
        report = RunReport(config.store, len(store), store.shards)
        retries: list[ShardTask] = []
        if config.retry_failed:
            samples = store.sample_table(columns=["row", "reason"])
            failed = samples.filter(pc.starts_with(samples["reason"], IMAGE_FAULT))["row"].to_pylist()
            retries = plan_retries(sorted({row // store.record.rows_per_shard for row in failed}), cards, store.ledger)
        lacking = shards_without_inputs(target, keep) if keep is not None else frozenset()
        tasks = plan_tasks(store.record, cards, store.ledger, lacking, keep)
        overview = read_overview(config.store)
        for line in (*(overview.lines(cards) if overview else ()), *_size_lines(store, len(tasks), config)):
            say(line)
        if config.retry_failed:
            say(f"{counted(len(retries), 'shard')} with images that failed, to be tried again")
        if tasks or retries:
            wanted = {slug for task in (*tasks, *retries) for slug in task.teachers}
            needed = [pair for pair in described if pair[1].slug in wanted]
            plugin = TeachersPlugin(needed, config.cluster.worker, workers_beside(config.cluster))
            with dask_client(config.cluster) as client:
                try:
                    say(f"dashboard: {client.dashboard_link}")
                except KeyError as error:
                    say(f"dashboard: no link: distributed.dashboard.link names {error}, which is not set")
                if not client.scheduler_info()["workers"]:
                    say("no worker has joined yet; the run starts with the first one")
                start_workers(client, plugin)
                if retries:
                    # Their files change: no folded file may vouch for them meanwhile.
                    unfold_entries(config.store, {task.shard for task in retries})
                    _do(client, target, retries, report, config, say)
                    tasks = plan_tasks(store.record, cards, FeatureStore.open(config.store).ledger, lacking, keep)
                _do(client, target, tasks, report, config, say)
        for card in cards:
            note_encoding_error(store, card.slug)
        for damage in fold(target).damaged:
            say(f"not packed: {damage}")
        remove_abandoned(config.store)
    return report


def _size_lines(store: FeatureStore, tasks: int, config: ExtractConfig) -> Iterator[str]:
    own, hands = store.record.rows_per_shard, shards_in_hand(config.cluster)
    yield f"{counted(len(store), 'row')} in {counted(store.shards, 'shard')} of {own}; {counted(tasks, 'shard')} to do"
    if tasks and store.shards < hands and (smaller := rows_per_shard(len(store), hands)) < own:
        yield f"{hands - store.shards} of {hands} workers get no shard; a new store would have {smaller} rows in each"


def _prepared_store(corpus: Corpus, root: StorePath, per_shard: Callable[[int], int], say: Say) -> Store:
    """Return the store at `root`, with the sample parts that a repair dropped; a new one if there is none."""
    if not (root / "zarr.json").is_file():
        return make_store(corpus, root, per_shard)
    store = Store.open(root)
    if restored := restore_parts(corpus, store) + restore_pictures(store, say):
        say(f"{restored} sample parts were missing and are listed again from the corpus")
    return store


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
                report.lost[result.shard] = result.reason
                report.lost_rows[f"shard lost: {result.reason}"] += len(store.record.shard_rows(result.shard))
            limit, lost = config.max_failures, report.lost_rows.total()
            failed, seen = report.failed + lost, report.rows_read + lost
            if limit is not None and limit.passed(failed, seen, report.rows):
                reasons = (report.reasons + report.lost_rows).most_common(3)
                worst = "; ".join(f"{count:,} x {reason}" for reason, count in reasons)
                raise UserError(
                    f"{failed:,} of {seen:,} rows failed, more than --failures {limit} ({worst}); correct "
                    "the corpus and run with --failures retry, or raise the limit and run again: what was done is kept"
                )


def shard_rows(config: ExtractConfig, rows: int) -> int:
    """Return the rows of a shard of a new store for `rows` rows: what the user says, or what keeps all workers busy."""
    return config.rows_per_shard or rows_per_shard(rows, shards_in_hand(config.cluster))


def refuse_other_shards(config: ExtractConfig, record: StoreRecord) -> None:
    """Raise UserError if the user asks for shards that the store does not have."""
    if config.rows_per_shard not in (None, record.rows_per_shard):
        raise UserError(
            f"--rows-per-shard is {config.rows_per_shard}, but {config.store} was made with {record.rows_per_shard} "
            "for good; leave it out, or name a new store"
        )


def make_store(corpus: Corpus, root: StorePath, per_shard: Callable[[int], int] | None = None) -> Store:
    """Index the corpus beside `root`, then move the whole to its place: of several runs that start at once the first
    wins. Behind a URL one run makes the store before others join. `per_shard`: as in `create_indexed_store`. Raises
    CorpusError if the corpus cannot be read, or the first run had another one; StoreError if `root` holds something
    else or cannot be written."""
    if not isinstance(root, Path):
        return create_indexed_store(corpus, root, per_shard)
    strangers = sorted(path.name for path in root.iterdir() if path.name != "samples") if root.is_dir() else []
    if root.is_file() or (strangers and "zarr.json" not in strangers):
        found = strangers[0] if strangers else "a file"
        raise StoreError(f"{root} is not empty (found {found}) and not an mmkd store; name a new folder for the store")
    beside = folder_beside(root)
    try:
        made = create_indexed_store(corpus, beside, per_shard)
        with disk_errors(root):
            try:
                if not (root / "zarr.json").is_file() and (root / "samples").is_dir():
                    shutil.rmtree(root / "samples")  # of an import that was interrupted before its record
                beside.rename(root)
            except OSError:
                if not (root / "zarr.json").is_file():
                    raise
            else:
                return Store(root, made.record)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    store = Store.open(root)
    check_same_corpus(corpus, store)
    return store


def folder_beside(root: StorePath) -> Path:
    """Return a new name in the same folder, its parents made; a kill leaves it behind, and nothing looks at it then.
    Beside a URL it is a temporary folder of this machine. Raises StoreError if the parent cannot be made."""
    name = f".{root.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
    parent = root.absolute().parent if isinstance(root, Path) else Path(tempfile.gettempdir())
    with disk_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
    return parent / name

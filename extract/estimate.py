"""`--dry-run`: cost of a run, measured on a few of its rows; nothing is left where the store would be."""

import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import pyarrow.dataset as pads

from mmkd.base.errors import UserError
from mmkd.base.text import counted, seconds_text
from mmkd.extract.cluster import dask_client, default_workers, start_workers, workers_beside
from mmkd.extract.config import ExtractConfig
from mmkd.extract.corpora import Corpus
from mmkd.extract.corpus_parts import read_overview
from mmkd.extract.derived import append_pictures, pictures_of
from mmkd.extract.dispatch import LostShard, TeachersPlugin, gather
from mmkd.extract.index import check_same_corpus, create_indexed_store, list_corpus
from mmkd.extract.limited_corpus import LimitedCorpus
from mmkd.extract.plan import plan_tasks
from mmkd.extract.report import ShardReport
from mmkd.extract.run import folder_beside, refuse_other_shards, shard_rows
from mmkd.store import FeatureStore, TeacherCard
from mmkd.store.encoding import VALID, ArraySpec
from mmkd.store.layout import TOWERS, Tower, shard_count, shards_per_pack, teacher_group
from mmkd.store.stored_array import index_bytes
from mmkd.store.writer import add_teacher

PROBE_ROWS = 64
"""Rows that are really extracted, twice: the first time warms the worker up, the second is measured."""


@dataclass(frozen=True)
class Estimate:
    rows: int
    shards: int
    rows_per_shard: int
    tasks: int
    """Shards that at least one teacher lacks."""
    workers: int
    arrays: dict[str, int]
    """Bytes on disk of each array of the whole store, by its path inside the store."""
    seconds: dict[str, float]
    """Measured seconds of a full shard by step on one worker; see `ShardReport.seconds`."""
    shard_seconds: float
    """Wall seconds of a full shard of all teachers on one worker."""

    @property
    def run_seconds(self) -> float:
        """With all workers busy, and as fast together as alone."""
        return self.shard_seconds * -(-self.tasks // self.workers)


def estimate(config: ExtractConfig, say: Callable[[str], None] = print) -> Estimate:
    """Plan the run and measure a few rows on one worker of its cluster. Raises what `run.extract` would. `say`:
    receives the lines of the corpus' overview, before a teacher is loaded."""
    corpus = config.opened
    described = config.described()
    cards = [card for _, card in described]
    if (config.store / "zarr.json").is_file():
        store = FeatureStore.open(config.store)
        check_same_corpus(corpus, store)
        refuse_other_shards(config, store.record)
        overview, per_pack = read_overview(config.store), store.record.shards_per_pack
        rows, per_shard, spans = len(store), store.record.rows_per_shard, store.record.spans()
        parts = [(len(span.shards), span.corpus.towers) for span in spans]
        tasks = len(plan_tasks(store.record, cards, store.ledger))
        images = len(store.sample_table(["row"], pads.field("uri").is_valid() & pads.field("view_number").is_null()))
        recipes = [recipe for recipe in config.recipes if not pictures_of(store, recipe)]
    else:
        overview, recipes = list_corpus(corpus), list(config.recipes)
        rows, per_shard, images = overview.rows, shard_rows(config, overview.rows), overview.images
        per_pack = shards_per_pack(rows, per_shard)
        parts = [(shard_count(rows, per_shard), TOWERS), (shard_count(overview.further, per_shard), ("text",))]
        rows, tasks = rows + overview.further, sum(count for count, _ in parts)
    for line in overview.lines() if overview else ():
        say(line)
    for pictures in (recipe.count * images for recipe in recipes):
        parts.append((shard_count(pictures, per_shard), ("image",)))
        rows, tasks = rows + pictures, tasks + parts[-1][0]
    shards = sum(count for count, _ in parts)
    packs = shard_count(shards, per_pack) * index_bytes(per_pack)
    plugin = TeachersPlugin(described, config.cluster.worker, workers_beside(config.cluster))
    probe = _probe(config, corpus, plugin, cards)
    scale = min(rows, per_shard) / probe.rows
    return Estimate(
        rows=rows,
        shards=shards,
        rows_per_shard=per_shard,
        tasks=tasks,
        workers=config.cluster.workers or default_workers(config.cluster),
        # The last chunk of every array is stored at full size.
        arrays={
            f"{teacher_group(card.slug)}/{array.name}": packs
            + array.chunk_bytes(per_shard) * sum(count for count, towers in parts if _is_asked(array, card, towers))
            for card in cards
            for array in card.arrays
        },
        seconds={name: seconds * scale for name, seconds in probe.seconds.items()},
        shard_seconds=probe.wall_seconds * scale,
    )


def _is_asked(array: ArraySpec, card: TeacherCard, towers: Collection[Tower]) -> bool:
    """Return True if shards with inputs of these towers have a chunk of the array."""
    return bool(set(towers) & (set(card.towers) if array == VALID else {array.name.partition("_")[0]}))


def estimate_lines(plan: Estimate) -> Iterator[str]:
    shards, tasks = counted(plan.shards, "shard"), counted(plan.tasks, "shard")
    yield f"{counted(plan.rows, 'row')} in {shards} of {plan.rows_per_shard:,}; {tasks} to do"
    width = max(map(len, plan.arrays))
    for name, size in [*plan.arrays.items(), ("all arrays", sum(plan.arrays.values()))]:
        yield f"  {name:{width}}  {size:>15,} bytes"
    yield f"one shard on one worker: {plan.shard_seconds:.1f} s, measured on {min(PROBE_ROWS, plan.rows)} rows"
    yield "  " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in sorted(plan.seconds.items()))
    whole = seconds_text(plan.run_seconds)
    yield f"{whole} on {counted(plan.workers, 'worker')}, if each is as fast beside the others as alone"
    yield "dry run: nothing was kept"


def _probe(config: ExtractConfig, corpus: Corpus, plugin: TeachersPlugin, cards: Sequence[TeacherCard]) -> ShardReport:
    """Return the report of the second of two extractions of the first rows and of their pictures by the recipes, in a
    store that is removed again."""
    measured = ShardReport(0, ())
    with dask_client(config.cluster.model_copy(update={"workers": 1})) as client:
        start_workers(client, plugin)
        for _ in range(2):
            # Beside the store: the workers of a cluster see it there.
            root = folder_beside(config.store)
            try:
                store = create_indexed_store(LimitedCorpus(corpus, PROBE_ROWS, count_rest=False), root)
                for recipe in config.recipes:
                    store = append_pictures(store, recipe, lambda _: None)
                for card in cards:
                    add_teacher(store, card)
                results = list(gather(client, store, plan_tasks(store.record, cards, {}), lambda _: None))
            finally:
                shutil.rmtree(root, ignore_errors=True)
            measured, seconds = ShardReport(0, ()), Counter[str]()
            for result in results:
                if isinstance(result, LostShard):
                    raise UserError(f"the first {PROBE_ROWS} rows cannot be extracted: {result.reason}")
                measured.rows += result.rows
                measured.wall_seconds += result.wall_seconds
                seconds.update(result.seconds)
            measured.seconds = dict(seconds)
    return measured

"""Plan of the remaining work: shards and the teachers that each lacks. Pure: reads and writes nothing."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mmkd.base.errors import TeacherMismatchError, UserError
from mmkd.store import TeacherCard
from mmkd.store.layout import shard_count
from mmkd.store.ledger import LedgerEntry
from mmkd.store.record import StoreRecord


@dataclass(frozen=True)
class ShardTask:
    """One unit of work: idempotent, and atomic for each teacher."""

    shard: int
    teachers: tuple[str, ...]
    """Slugs that have no entry for this shard yet; for a retry, those that have one."""
    retry: bool = False
    """Only the rows whose image failed, of a shard that is finished."""
    inputs: int | None = None
    """Pixels of the training inputs to write."""
    isolated: bool = False
    """Decode in separate processes, because this shard crashed its worker."""


def plan_tasks(
    record: StoreRecord,
    cards: Sequence[TeacherCard],
    ledger: Mapping[tuple[int, str], LedgerEntry],
    without_inputs: Collection[int] = (),
    keep_inputs: int | None = None,
) -> list[ShardTask]:
    """List the shards with the teachers of `cards` that are asked there and that it still lacks by the `ledger`, or
    without training inputs of `keep_inputs` pixels. Raises TeacherMismatchError if a finished shard's teacher has
    another digest."""
    tasks, asked = [], {card.slug: frozenset(record.asked_shards(card)) for card in cards}
    for shard in range(shard_count(record.rows, record.rows_per_shard)):
        missing = []
        for card in (card for card in cards if shard in asked[card.slug]):
            if (entry := ledger.get((shard, card.slug))) is None:
                missing.append(card.slug)
            elif entry.teacher_digest != card.digest:
                raise TeacherMismatchError(
                    f"shard {shard} of {card.slug} was made with digest {entry.teacher_digest}, now it is "
                    f"{card.digest}; use the old teacher, another name, or a new store"
                )
        if missing or shard in without_inputs:
            tasks.append(ShardTask(shard, tuple(missing), inputs=keep_inputs if shard in without_inputs else None))
    return tasks


def plan_retries(
    failed: Sequence[int], cards: Sequence[TeacherCard], ledger: Mapping[tuple[int, str], LedgerEntry]
) -> list[ShardTask]:
    """List the `failed` shards, those that hold failed images, with every teacher that has them by the `ledger`. Raises
    UserError if such a teacher is not among `cards`: its rows would say that the image is there."""
    present = {card.slug for card in cards}
    tasks = []
    for shard in failed:
        finished = tuple(slug for number, slug in ledger if number == shard)
        if absent := sorted(set(finished) - present):
            raise UserError(
                f"--failures retry rewrites the rows of shard {shard}, which {', '.join(absent)} also has; name every "
                "teacher of the store in --teachers"
            )
        if finished:
            tasks.append(ShardTask(shard, finished, retry=True))
    return tasks

"""What is left to do: shards and the teachers each of them lacks. Pure; reads and writes nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mmkd.store import TeacherCard
from mmkd.store.errors import TeacherMismatchError
from mmkd.store.ledger import LedgerEntry


@dataclass(frozen=True)
class ShardTask:
    """One unit of work: idempotent, and atomic for each teacher."""

    shard: int
    teachers: tuple[str, ...]
    """Slugs that have no entry for this shard yet."""
    inputs: bool = False
    """Training inputs are to be written too."""


def plan_tasks(
    shards: int,
    cards: Sequence[TeacherCard],
    ledger: Mapping[tuple[int, str], LedgerEntry],
    without_inputs: Collection[int] = (),
) -> list[ShardTask]:
    """List the shards in order with the teachers that each still lacks.

    Args:
        shards: of the store.
        cards: teachers asked for.
        ledger: what is there.
        without_inputs: shards whose training inputs are to be written.

    Raises:
        TeacherMismatchError: a finished shard was made by the same name with another digest.
    """
    tasks = []
    for shard in range(shards):
        missing = []
        for card in cards:
            entry = ledger.get((shard, card.slug))
            if entry is None:
                missing.append(card.slug)
            elif entry.teacher_digest != card.digest:
                raise TeacherMismatchError(
                    f"shard {shard} of {card.slug} was made with digest {entry.teacher_digest}, now it is "
                    f"{card.digest}; use the old teacher, another name, or a new store"
                )
        if missing or shard in without_inputs:
            tasks.append(ShardTask(shard, tuple(missing), shard in without_inputs))
    return tasks

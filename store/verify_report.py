"""What `verify` found: problems that name one file each, and how much was looked at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one file."""

    file: str
    """Path inside the store."""
    what: str
    shard: int | None = None
    """Shard whose entries cannot be kept; None when no shard is to blame."""
    teacher: str | None = None
    """Teacher whose entry (or, without a shard, all of whose entries) cannot be kept; None for all teachers."""

    def __str__(self) -> str:
        place = f"shard {self.shard}" if self.shard is not None else ""
        of = f"{' of ' if place else 'teacher '}{self.teacher}" if self.teacher else ""
        return f"{place}{of}: {self.what}" if place or of else self.what


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found."""

    entries: int
    """Ledger entries that were checked."""
    findings: tuple[Problem, ...]
    """Empty for a sound store."""
    temporary: tuple[str, ...]
    """Left-overs of interrupted writes: harmless."""
    orphans: tuple[str, ...]
    """Files that nothing vouches for: interrupted shards and strangers. Readers do not look at them."""
    deep: bool
    """Values were looked at too, not only checksums."""
    shards: int
    """Shards whose bytes were looked at."""
    all_shards: int
    """Shards of the store; more than `shards` when a sample was asked for."""

    @property
    def problems(self) -> tuple[str, ...]:
        """One line each: where, which file, what is wrong."""
        return tuple(map(str, self.findings))

    @property
    def sound(self) -> bool:
        """True when there is no problem."""
        return not self.findings

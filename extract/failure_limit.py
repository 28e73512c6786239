"""How many inputs may fail before a run stops: `1%` of what was read, or a number of rows."""

from __future__ import annotations

from dataclasses import dataclass

from mmkd.base.errors import ConfigError

_ENOUGH_ROWS = 1000
"""A share is not judged on fewer rows: two bad images among the first thirty say nothing."""


@dataclass(frozen=True)
class FailureLimit:
    """One of the two is set."""

    share: float | None = None
    rows: int | None = None

    @classmethod
    def parse(cls, text: str) -> FailureLimit:
        """Read `1%`, `0.5 %` or `200`.

        Raises:
            ConfigError: it is neither a percentage from 0 to 100 nor a whole number of rows.
        """
        number = text.strip()
        try:
            if number.endswith("%"):
                share = float(number[:-1]) / 100
                if 0 <= share <= 1:
                    return cls(share=share)
            elif int(number) >= 0:
                return cls(rows=int(number))
        except ValueError:
            pass
        raise ConfigError(f"--max-failures is {text!r}, expected a share such as 1% or a number of rows such as 200")

    def passed(self, failed: int, seen: int, total: int) -> bool:
        """True when `failed` of `seen` rows, of a run of `total`, are too many."""
        if self.rows is not None:
            return failed > self.rows
        assert self.share is not None
        return failed > self.share * max(seen, min(_ENOUGH_ROWS, total))

    def __str__(self) -> str:
        return f"{100 * self.share:g}%" if self.share is not None else f"{self.rows} rows"

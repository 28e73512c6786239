"""A condition over the sample table, in the words of SQL's WHERE, as an Arrow expression. Nothing is ever evaluated.

    modality in ('CT', 'MRI') and width >= 224 and caption is not null
    not (site = 's1' or caption like '%figure%') and row between 0 and 4095

`and`, `or`, `not`, parentheses, `= != <> < <= > >=`, `in`, `like` (`%` and `_`), `between`, `is null`, each with `not`.
Text stands in single quotes (`''` is one of them), column names bare or in double quotes. A comparison with a missing
value is neither true nor false, and such a row does not match, as in SQL.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmkd.base.errors import ConfigError

MAX_LENGTH = 10_000
"""Characters of a condition; longer ones are refused (and cannot exhaust the stack)."""
_MAX_DEPTH = 50
MAX_DIGITS = 30
"""Digits of a number that may be a 64-bit integer."""

_TOKEN = re.compile(
    r"\s*(?:(?P<number>-?\d+(?:\.\d+)?)|'(?P<text>(?:[^']|'')*)'|\"(?P<quoted>[^\"]+)\"|(?P<word>[^\W\d]\w*)"
    r"|(?P<sign><>|!=|<=|>=|==|[=<>(),]))"
)
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq, "==": operator.eq, "!=": operator.ne, "<>": operator.ne,
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_WORDS = frozenset(("and", "or", "not", "in", "like", "between", "is", "null"))

Token = tuple[str, str]
"""Kind (`number`, `text`, `quoted`, `word`, `sign`, `end`) and content."""


def parse_condition(text: str, schema: pa.Schema) -> pc.Expression:
    """Read a condition over the columns of `schema`. Raises ConfigError if it cannot be read, names a column that is
    not there, or compares text with a number."""
    if len(text) > MAX_LENGTH:
        raise ConfigError(f"a condition has {MAX_LENGTH} characters at most, this one has {len(text)}")
    return _Parser(text, schema).whole()


class _Parser:
    """Recursive descent: `or` over `and` over `not` over one comparison."""

    def __init__(self, text: str, schema: pa.Schema) -> None:
        self.text, self.schema = text, schema
        self.tokens = self._split()
        self.place = self.depth = 0

    def whole(self) -> pc.Expression:
        """Return the condition, with nothing left over."""
        found = self.either()
        if self.peek() != ("end", ""):
            raise self.fault("`and`, `or` or the end")
        return found

    def either(self) -> pc.Expression:
        """Return terms with `or` between."""
        found = self.both()
        while self.taken("or"):
            found = found | self.both()
        return found

    def both(self) -> pc.Expression:
        """Return terms with `and` between."""
        found = self.term()
        while self.taken("and"):
            found = found & self.term()
        return found

    def term(self) -> pc.Expression:
        """Return a negation, something in parentheses, or a comparison."""
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise ConfigError(f"condition {self.text[:60]!r}... is nested more than {_MAX_DEPTH} deep")
        if self.taken("not"):
            found = ~self.term()
        elif self.taken("("):
            found = self.either()
            self.need(")")
        else:
            found = self.comparison()
        self.depth -= 1
        return found

    def comparison(self) -> pc.Expression:
        """Return a column and its condition."""
        kind, name = self.take()
        if kind not in ("word", "quoted") or (kind == "word" and name.lower() in _WORDS):
            self.place -= 1
            raise self.fault("a column's name")
        field = pc.field(name)
        column = self._column(name)
        sign = self.peek()[1]
        if self.peek()[0] == "sign" and sign in _COMPARE:
            self.take()
            return _COMPARE[sign](field, self.literal(column))
        if self.taken("is"):
            negative = self.taken("not")
            self.need("null")
            return field.is_valid() if negative else field.is_null()
        negative = self.taken("not")
        found = self._membership(field, column)
        return ~found if negative else found

    def _membership(self, field: pc.Expression, column: pa.Field) -> pc.Expression:
        if self.taken("in"):
            self.need("(")
            values = [self.literal(column)]
            while self.taken(","):
                values.append(self.literal(column))
            self.need(")")
            # Not `isin`: it casts 7.5 to the column's integers, and takes a missing value for "not in the list".
            return reduce(operator.or_, (field == value for value in values))
        if self.taken("between"):
            low = self.literal(column)
            self.need("and")
            return (field >= low) & (field <= self.literal(column))
        if self.taken("like"):
            if not pa.types.is_string(column.type):
                raise ConfigError(f"condition: `like` needs text, column {column.name!r} holds {column.type}")
            # SQL's LIKE names no escape character; Arrow's has the backslash.
            return pc.match_like(field, str(self.literal(column)).replace("\\", "\\\\"))
        raise self.fault("a comparison such as `= 'CT'`, `in (...)`, `like '...'` or `is null`")

    def literal(self, column: pa.Field) -> str | int | float:
        """Return a text or a number, as the column wants it."""
        kind, content = self.take()
        if kind not in ("text", "number"):
            self.place -= 1
            raise self.fault("a number or a text in single quotes")
        is_text = pa.types.is_string(column.type)
        if is_text != (kind == "text"):
            wanted = "a text in single quotes" if is_text else "a number"
            raise ConfigError(f"condition: column {column.name!r} holds {column.type}, compare it with {wanted}")
        if kind == "text":
            return content
        # Beyond 64 bits an integer is compared as a float, infinity at the far end: no column holds such a value.
        whole = "." not in content and -(2**63) <= int(content[:MAX_DIGITS]) < 2**63 and len(content) < MAX_DIGITS
        return int(content) if whole else float(content)

    def _column(self, name: str) -> pa.Field:
        if name not in self.schema.names:
            nearest = difflib.get_close_matches(name, self.schema.names, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"the store has {', '.join(self.schema.names)}"
            raise ConfigError(f"condition: no sample column {name!r}; {hint}")
        return self.schema.field(name)

    def _split(self) -> list[Token]:
        tokens: list[Token] = []
        place = 0
        while self.text[place:].strip():
            match = _TOKEN.match(self.text, place)
            if match is None:
                raise ConfigError(f"condition: cannot read {self.text[place:].strip()[:40]!r} in {self.text[:200]!r}")
            kind = match.lastgroup or ""
            content = match[kind]
            tokens.append((kind, content.replace("''", "'") if kind == "text" else content))
            place = match.end()
        return [*tokens, ("end", "")]

    def peek(self) -> Token:
        """Return the next token."""
        return self.tokens[self.place]

    def take(self) -> Token:
        """Return the next token, used up."""
        token = self.tokens[self.place]
        self.place += 1
        return token

    def taken(self, word: str) -> bool:
        """Use up a keyword or sign if it is the next token."""
        kind, content = self.peek()
        if kind in ("word", "sign") and content.lower() == word:
            self.place += 1
            return True
        return False

    def need(self, word: str) -> None:
        """Use up a keyword or sign that must come now."""
        if not self.taken(word):
            raise self.fault(f"`{word}`")

    def fault(self, expected: str) -> ConfigError:
        """Return the unexpected token."""
        kind, content = self.peek()
        found = "it ends" if kind == "end" else f"{content!r} stands"
        return ConfigError(f"condition {self.text[:200]!r}: {found} where {expected} was expected")

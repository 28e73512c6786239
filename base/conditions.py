"""A condition over the sample table, in the words of SQL's WHERE, as an Arrow expression. Nothing is ever evaluated.

    modality in ('CT', 'MRI') and width >= 224 and caption is not null
    not (site = 's1' or caption like '%figure%') and row between 0 and 4095

`and`, `or`, `not`, parentheses, `= != <> < <= > >=`, `in`, `like` (`%` and `_`), `between`, `is null`, each with `not`.
Text stands in single quotes (`''` is one of them), column names bare or in double quotes. A comparison with a missing
value is neither true nor false, and such a row does not match, as in SQL.
"""

import operator
import re
from collections.abc import Callable
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmkd.base.errors import ConfigError, did_you_mean

MAX_LENGTH = 10_000
"""Characters of a condition; longer ones are refused (and cannot exhaust the stack)."""
_MAX_DEPTH = 50
MAX_DIGITS = 30
"""Digits of a number that may be a 64-bit integer."""

_TOKEN = re.compile(
    r"(?P<number>-?\d+(?:\.\d+)?)|'(?P<text>(?:[^']|'')*)'|\"(?P<quoted>[^\"]+)\"|(?P<word>[^\W\d]\w*)"
    r"|(?P<sign><>|!=|<=|>=|==|[=<>(),])|(?P<space>\s+)|(?P<unknown>.)"
)
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq, "==": operator.eq, "!=": operator.ne, "<>": operator.ne,
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_WORDS = frozenset(("and", "or", "not", "in", "like", "between", "is", "null"))


def parse_condition(text: str, schema: pa.Schema) -> pc.Expression:
    """Read a condition over the columns of `schema`. Raises ConfigError if it cannot be read, names a column that is
    not there, or compares text with a number."""
    if len(text) > MAX_LENGTH:
        raise ConfigError(f"a condition has {MAX_LENGTH} characters at most, this one has {len(text)}")
    parser = _Parser(text, schema)
    condition = parser.disjunction()
    if parser.peek() != ("end", ""):
        raise parser.fault("`and`, `or` or the end")
    return condition


class _Parser:
    """Recursive descent: `or` over `and` over `not` over one comparison."""

    def __init__(self, text: str, schema: pa.Schema) -> None:
        self.text, self.schema = text, schema
        self.place = self.depth = 0
        self.tokens: list[tuple[str, str]] = []
        """Kind (a group of `_TOKEN`, or `end`) and content."""
        for match in _TOKEN.finditer(text):
            kind = match.lastgroup or ""
            if kind == "unknown":
                raise ConfigError(f"condition: cannot read {text[match.start() :].strip()[:40]!r} in {text[:200]!r}")
            if kind != "space":
                self.tokens.append((kind, match[kind].replace("''", "'") if kind == "text" else match[kind]))
        self.tokens.append(("end", ""))

    def disjunction(self) -> pc.Expression:
        condition = self.conjunction()
        while self.accept("or"):
            condition = condition | self.conjunction()
        return condition

    def conjunction(self) -> pc.Expression:
        condition = self.term()
        while self.accept("and"):
            condition = condition & self.term()
        return condition

    def term(self) -> pc.Expression:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise ConfigError(f"condition {self.text[:60]!r}... is nested more than {_MAX_DEPTH} deep")
        if self.accept("not"):
            condition = ~self.term()
        elif self.accept("("):
            condition = self.disjunction()
            self.expect(")")
        else:
            condition = self.comparison()
        self.depth -= 1
        return condition

    def comparison(self) -> pc.Expression:
        kind, name = self.peek()
        if kind not in ("word", "quoted") or (kind == "word" and name.lower() in _WORDS):
            raise self.fault("a column's name")
        self.place += 1
        if name not in self.schema.names:
            hint = did_you_mean(name, self.schema.names, f"the store has {', '.join(self.schema.names)}")
            raise ConfigError(f"condition: no sample column {name!r}; {hint}")
        field, column = pc.field(name), self.schema.field(name)
        kind, sign = self.peek()
        if kind == "sign" and sign in _COMPARE:
            self.place += 1
            return _compared(_COMPARE[sign], field, self.literal(column))
        if self.accept("is"):
            negative = self.accept("not")
            self.expect("null")
            return field.is_valid() if negative else field.is_null()
        negative = self.accept("not")
        condition = self.membership(field, column)
        return ~condition if negative else condition

    def membership(self, field: pc.Expression, column: pa.Field) -> pc.Expression:
        if self.accept("in"):
            self.expect("(")
            values = [self.literal(column)]
            while self.accept(","):
                values.append(self.literal(column))
            self.expect(")")
            # Not `isin`: it casts 7.5 to the column's integers, and takes a missing value for "not in the list".
            return reduce(operator.or_, (_compared(operator.eq, field, value) for value in values))
        if self.accept("between"):
            low = self.literal(column)
            self.expect("and")
            return _compared(operator.ge, field, low) & _compared(operator.le, field, self.literal(column))
        if self.accept("like"):
            if not pa.types.is_string(column.type):
                raise ConfigError(f"condition: `like` needs text, column {column.name!r} holds {column.type}")
            # SQL's LIKE names no escape character; Arrow's has the backslash.
            return pc.match_like(field, str(self.literal(column)).replace("\\", "\\\\"))
        raise self.fault("a comparison such as `= 'CT'`, `in (...)`, `like '...'` or `is null`")

    def literal(self, column: pa.Field) -> str | int | float:
        """Read a text or a number, as the column wants it."""
        kind, content = self.peek()
        if kind not in ("text", "number"):
            raise self.fault("a number or a text in single quotes")
        self.place += 1
        is_text = pa.types.is_string(column.type)
        if is_text != (kind == "text"):
            wanted = "a text in single quotes" if is_text else "a number"
            raise ConfigError(f"condition: column {column.name!r} holds {column.type}, compare it with {wanted}")
        if kind == "text":
            return content
        # Beyond 64 bits an integer is compared as a float, infinity at the far end: no column holds such a value.
        whole = "." not in content and -(2**63) <= int(content[:MAX_DIGITS]) < 2**63 and len(content) < MAX_DIGITS
        return int(content) if whole else float(content)

    def peek(self) -> tuple[str, str]:
        return self.tokens[self.place]

    def accept(self, word: str) -> bool:
        """Consume a keyword or sign if it is the next token."""
        kind, content = self.peek()
        accepted = kind in ("word", "sign") and content.lower() == word
        self.place += accepted
        return accepted

    def expect(self, word: str) -> None:
        if not self.accept(word):
            raise self.fault(f"`{word}`")

    def fault(self, expected: str) -> ConfigError:
        kind, content = self.peek()
        found = "it ends" if kind == "end" else f"{content!r} stands"
        return ConfigError(f"condition {self.text[:200]!r}: {found} where {expected} was expected")


def _compared(compare: Callable[[Any, Any], pc.Expression], field: pc.Expression, value: str | float) -> pc.Expression:
    # Arrow would turn 32-bit integers into 32-bit floats for it, and fail on those beyond 2^24.
    return compare(field.cast(pa.float64(), safe=False) if isinstance(value, float) else field, value)

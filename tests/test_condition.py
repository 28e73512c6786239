"""Conditions mean what SQL means: DuckDB, asked the same thing, finds the same rows."""

from __future__ import annotations

from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as pads
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkd.base.conditions import parse_condition
from mmkd.base.errors import ConfigError

TABLE = pa.table(
    {
        "row": pa.array(range(12), pa.int64()),
        "modality": ["CT", "MRI", None, "CT", "x'ray", "a_b", "a\\b", "", "a\nb", "ct", None, "CT"],
        "width": pa.array([10, 20, None, 0, 2**31 - 1, 20, -5, 1, 2, None, 7, 20], pa.int32()),
        "two words": ["a", "b", "c", None, "a", "b", "c", "a", "a", "a", "b", "c"],
    }
)

columns = st.sampled_from([("modality", "text"), ("width", "number"), ('"two words"', "text"), ("row", "number")])
texts = st.sampled_from(["'CT'", "'MRI'", "'x''ray'", "'a_b'", "''", "'nowhere'", "'a'"])
numbers = st.one_of(
    st.sampled_from(
        [
            "0",
            "20",
            "-5",
            "7.5",
            "0.1",
            "16777217.5",
            "11",
            "2147483648",
            "-2147483649",
            "9223372036854775808",
            "1" + "0" * 30,
        ]
    ),
    st.integers(-(10**30), 10**30).map(str),
    st.integers(-40, 40).map(str),
)
patterns = st.text("%_\\aCTr'\n", max_size=5).map(lambda text: "'" + text.replace("'", "''") + "'")


@st.composite
def comparisons(draw: st.DrawFn) -> str:
    """One comparison of a column."""
    column, kind = draw(columns)
    literal = texts if kind == "text" else numbers
    negation = draw(st.sampled_from(["", "NOT "]))
    forms = [
        f"{column} {draw(st.sampled_from(['=', '!=', '<>', '<', '<=', '>', '>=']))} {draw(literal)}",
        f"{column} IS {negation}NULL",
        f"{column} {negation}IN ({', '.join(draw(st.lists(literal, min_size=1, max_size=3)))})",
        f"{column} {negation}BETWEEN {draw(literal)} AND {draw(literal)}",
    ]
    if kind == "text":
        forms.append(f"{column} {negation}LIKE {draw(patterns)}")
    return draw(st.sampled_from(forms))


conditions = st.recursive(
    comparisons(),
    lambda below: st.one_of(
        below.map(lambda one: f"NOT {one}"),
        below.map(lambda one: f"({one})"),
        st.tuples(below, st.sampled_from(["and", "OR"]), below).map(" ".join),
    ),
    max_leaves=6,
)


def found(text: str) -> list[int]:
    """Rows that a condition finds in the table."""
    expression = parse_condition(text, TABLE.schema)
    return pads.dataset(TABLE).to_table(filter=expression)["row"].to_pylist()


@settings(max_examples=120)
@given(conditions)
def test_the_same_rows_as_duckdb(text: str) -> None:
    samples = TABLE  # noqa: F841  (DuckDB finds it by its name)
    expected = duckdb.sql(f"SELECT row FROM samples WHERE {text} ORDER BY row").fetchall()
    assert found(text) == [row for (row,) in expected]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("modalty = 'CT'", "no sample column 'modalty'; did you mean 'modality'"),
        ("zzz = 'CT'", "the store has row, modality, width, two words"),
        ("modality = 3", "column 'modality' holds string, compare it with a text in single quotes"),
        ("width = 'CT'", "column 'width' holds int32, compare it with a number"),
        ("width like 'C%'", "`like` needs text"),
        ("modality = 'CT' and", "it ends where a column's name was expected"),
        ("modality 'CT'", "'CT' stands where a comparison"),
        ("(modality = 'CT'", r"it ends where `\)` was expected"),
        ("modality = 'CT' width = 2", "'width' stands where `and`, `or` or the end"),
        ("modality = CT", "'CT' stands where a number or a text in single quotes"),
        ("modality in ()", r"'\)' stands where a number or a text"),
        ("", "it ends where a column's name"),
        ("modality = 'CT'; drop table samples", "cannot read '; drop table samples'"),
        ("__import__('os').system('true')", "cannot read"),
        ("(" * 60 + "width = 1" + ")" * 60, "nested more than 50 deep"),
        ("width = 1 or " * 2000, "10000 characters at most"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        parse_condition(text, TABLE.schema)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("digits", [19, 20, 40, 400, 5000])
def test_a_number_of_any_length_is_compared(digits: int) -> None:
    assert found(f"width >= {'9' * digits}") == []
    assert found(f"width > -{'9' * digits}") == [0, 1, 3, 4, 5, 6, 7, 8, 10, 11]


def test_nothing_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("evaluated")

    monkeypatch.setattr("builtins.eval", refuse)
    assert found("width = 20 and modality = 'CT'") == [11]

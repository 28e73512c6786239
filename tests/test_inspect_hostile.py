"""Names that a terminal, HTML, Plotly or JSON would read as something else, in every inspection command."""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from tiny_store import make_card

from mmkd.cli.main import cli, main
from mmkd.store import FeatureStore
from mmkd.store.inspect.pairs import OTHERS, modalities
from mmkd.store.inspect.statistics import store_statistics
from mmkd.store.inspect.tables import statistics_html
from mmkd.store.record import CorpusRecord
from mmkd.store.samples import read_part, sample_schema, with_columns, write_part
from mmkd.store.writer import (
    ShardFeatures,
    add_teacher,
    append_rows,
    create_store,
    first_new_row,
    iter_shards,
    write_shard,
)

NAMES = (
    "<script>alert(1)</script>", "</script><b>", "<img src=x onerror=alert(1)>", "&lt;", "a|b", "line\nbreak", "tab\t",
    "\x1b[31mred", "\x00", "\u202ertl", "\u2028", "\ufeff", "\r\nx", "$x^2$", "%{x}", "{{7*7}}", "it's", '"', "", "  ",
    "row:3", "12", "None", "not stated", "all others", "other", "__proto__", "日本", "a" * 2000,
)  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Two corpora with hostile labels, values, keys, captions, modalities, reasons, location and folder."""
    root = tmp_path_factory.mktemp("hostile") / "we$ird <b> it's"
    rows, made = 200, None
    for number, labels in enumerate((("<b>", "teachers"), ("<b>", "$y$"))):
        first = 0 if made is None else first_new_row(made.record)
        columns: dict[str, list[object]] = {name: [None] * rows for name in sample_schema(labels).names}
        columns |= {
            "row": list(range(first, first + rows)),
            "key": [
                NAMES[i] + "x" * number if i < len(NAMES) else f"{NAMES[i % len(NAMES)]}{first + i}"
                for i in range(rows)
            ],
            "caption": [NAMES[i % len(NAMES)] for i in range(rows)],
            "modality": [NAMES[i % len(NAMES)] for i in range(rows)],
            "status": ["pending"] * rows,
            **{label: [NAMES[i % (2 + n)] if i % 5 else None for i in range(rows)] for n, label in enumerate(labels)},
        }
        table = pa.table(columns, schema=sample_schema(labels))
        corpus = CorpusRecord(
            kind="te$t", location="we<i>rd\n\x1b[31m", root="/img", rows=rows, labels=labels, digest=f"{number}"
        )
        made = create_store(root, corpus, table) if made is None else append_rows(made, corpus, table)
    cards, rng = [make_card("t0", 6), make_card("t-1", 5)], np.random.default_rng(0)
    for card in cards:
        add_teacher(made, card)
    for shard, span in enumerate(iter_shards(made.record)):
        states = {
            "status": ["partial" if i % 3 == 0 else "ok" for i in range(len(span))],
            "reason": [f"image: {NAMES[i // 3 % len(NAMES)]}" if i % 3 == 0 else None for i in range(len(span))],
        }
        sha = write_part(root, shard, with_columns(read_part(root, shard)[0], states))
        for card in cards:
            image, text = (rng.normal(size=(len(span), card.dim)).astype(np.float16) for _ in range(2))
            write_shard(made, card, shard, ShardFeatures(image, text, np.full(len(span), 3, dtype=np.uint8)), sha)
    return FeatureStore.open(root)


def said(*arguments: object) -> str:
    """Output of a command that succeeded, with the colors that a terminal would get."""
    result = CliRunner().invoke(cli, ["store", *map(str, arguments)], color=True)
    assert result.exception is None, result.exception
    return result.stdout


def tags(page: str) -> Counter[str]:
    """How often each element is opened; no element may have an event handler."""
    counts: Counter[str] = Counter()

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert not [name for name, _ in attrs if name.startswith("on")]
            counts[tag] += 1

    Reader().feed(page)
    return counts


@pytest.mark.parametrize(
    "arguments",
    [
        ["info"],
        ["stats"],
        ["show", "shard:0"],
        *(["show", f"row:{row}"] for row in range(len(NAMES))),
        ["neighbors", "row:1", "--teacher", "t0", "--top", "400"],
        ["verify"],
    ],
    ids=" ".join,
)
def test_no_name_reaches_the_terminal_as_control(store: FeatureStore, arguments: list[str]) -> None:
    text = said(arguments[0], store.root, *arguments[1:])
    assert {
        char for char in text if char != "\n" and unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp", "Cs")
    } == set()
    # No name begins a line of its own: `line\nbreak`, `\r\nx`.
    assert not [line for line in text.split("\n") if line.startswith(("break", "x"))]


def test_every_key_finds_its_row(store: FeatureStore) -> None:
    for row, key in enumerate(NAMES):
        if key != "row:3":  # this one always means a row
            assert json.loads(said("show", store.root, "--json", "--", key))["row"] == row
    assert json.loads(said("show", store.root, "--json", "row:3"))["row"] == 3


def test_names_are_text_on_the_page_and_in_a_notebook(store: FeatureStore, tmp_path: Path) -> None:
    said("report", store.root, tmp_path / "p.html")
    page = (tmp_path / "p.html").read_text("utf-8")
    found = tags(page)
    assert found["script"] == 3
    assert (found["b"], found["i"], found["img"]) == (0, 0, 0)
    data = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[0])
    # A label that is named as a coloring of every map is told apart.
    assert list(data["map"]["colors"]) == [
        "modality",
        "status",
        "teachers",
        "best teacher",
        "<b>",
        "label teachers",
        "$y$",
    ]
    assert set(tags(statistics_html(store_statistics(store)))) <= {
        "p", "strong", "table", "caption", "thead", "tr", "th", "tbody", "td"
    }  # fmt: skip


def test_rows_for_other_tools_keep_every_name(store: FeatureStore, tmp_path: Path) -> None:
    said("atlas", store.root, "--teacher", "t0", "--out", tmp_path / "rows.parquet")
    expected = store.sample_table(["key", "caption", "modality", "<b>", "teachers", "$y$", "status"]).to_pylist()
    rows = pq.read_table(tmp_path / "rows.parquet").drop_columns(["projection_x", "projection_y"])
    assert rows.select(list(expected[0])).to_pylist() == [row for row in expected if row["status"] != "absent"]


def test_blank_modalities_are_not_stated_and_none_is_counted_twice() -> None:
    found = modalities([pa.chunked_array([["", "  ", None, "not stated", "CT"]])])
    assert (found.names, found.codes.tolist()) == (("not stated", "CT"), [0, 0, 0, 0, 1])
    many = modalities([pa.chunked_array([[f"m{i:02}" for i in range(20)] + [OTHERS] * 3])])
    assert many.names[-1] == OTHERS
    assert len(set(many.names)) == len(many.names)


def test_an_absent_row_has_no_key_and_a_seed_is_not_negative(store: FeatureStore) -> None:
    result = CliRunner().invoke(cli, ["store", "show", str(store.root), "row:201", "--json"])
    assert json.loads(result.stdout)["sample"]["status"] == "absent"
    assert json.loads(said("show", store.root, "--json", ""))["sample"]["status"] != "absent"
    for command in (["stats"], ["show", "row:0"], ["verify"], ["atlas", "--teacher", "t0"], ["report", "p.html"]):
        result = CliRunner().invoke(cli, ["store", command[0], str(store.root), *command[1:], "--seed", "-1"])
        assert (result.exit_code, "-1 is not in the range x>=0" in result.output) == (2, True)


def test_an_error_is_one_line_whatever_it_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mmkd", "store", "info", "/no\nsuch\u2028\rstore"])
    with pytest.raises(SystemExit):
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(r"Error: /no\nsuch\u2028\rstore")

"""Several captions of an image in training: drawn by the weights of their kinds, and the features of those."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import torch
from caption_corpus import write_jsonl
from in_process import load, run
from rich_scene import SLUGS, kind
from tiny_run import assert_equal_ends, in_ranks, quiet, stopped_at_first_step, write_run, write_scene

from mmkd.base.errors import ConfigError, IncompleteStoreError, UserError
from mmkd.distill import further_captions
from mmkd.distill.captions import tokenize_captions
from mmkd.distill.config import load_run
from mmkd.distill.further_captions import TrainingCaptions, find_captions
from mmkd.distill.policies import drawn_teacher
from mmkd.distill.prepare import prepare
from mmkd.distill.world import World
from mmkd.store import FeatureStore

ALONE = World(torch.device("cpu"))
TOKENIZER = open_clip.tokenizer.SimpleTokenizer(context_length=16)
ROWS = np.array([0, 1, 2, 5])
FURTHER = [
    (256, "two", "synthetic", [0, 1, 3], "ok"),
    (257, "three", None, [0], "ok"),
    (258, "four", "report", [1, 5], "ok"),
    (259, "damaged", "synthetic", [2], "failed"),
]


def store_of(rows: list[tuple[Any, ...]]) -> Any:
    """What is asked of a store whose second corpus has these further captions."""
    names = ("row", "caption", "caption_kind", "image_rows", "status")
    table = pa.table({name: [row[i] for row in rows] for i, name in enumerate(names)})
    corpora = [SimpleNamespace(towers=("image", "text")), SimpleNamespace(towers=("text",))]
    spans = [SimpleNamespace(corpus=corpus, rows=range(256 * i, 256 * i + 60)) for i, corpus in enumerate(corpora)]
    record = SimpleNamespace(spans=lambda: spans[: 2 if rows else 1])
    return SimpleNamespace(root="s", record=record, sample_table=lambda columns, filter: table)  # noqa: A006


def frequencies(found: TrainingCaptions, epochs: int = 4000) -> dict[int, dict[int, float]]:
    """How often each row has the caption of which row."""
    chosen = np.stack([found.choose(7, epoch, ROWS)[0] for epoch in range(epochs)])
    return {
        row: {int(k): c / epochs for k, c in zip(*np.unique(chosen[:, i], return_counts=True), strict=True)}
        for i, row in enumerate(ROWS.tolist())
    }


def test_captions_are_drawn_by_the_weights_of_their_kinds() -> None:
    found = find_captions(store_of(FURTHER), ROWS, {"own": 1.0, "synthetic": 2.0, "further": 1.0}, TOKENIZER)
    assert frequencies(found) == {
        0: pytest.approx({0: 0.25, 256: 0.5, 257: 0.25}, abs=0.03),
        1: pytest.approx({1: 1 / 3, 256: 2 / 3}, abs=0.03),
        2: {2: 1.0},
        5: {5: 1.0},
    }
    assert [part.tolist() for part in found.of_rows(np.array([5, 1, 3, 0, 2]))] == [[1, 0, 0], [256, 256, 257]]
    report = find_captions(store_of(FURTHER), ROWS, {"report": 1.0}, TOKENIZER)
    assert frequencies(report, 20) == {0: {0: 1.0}, 1: {258: 1.0}, 2: {2: 1.0}, 5: {258: 1.0}}
    rows, chosen = report.choose(7, 0, np.array([5, 3, 0, 1]))  # row 3 has no caption
    assert rows.tolist() == [258, 3, 0, 258]
    assert chosen.tolist() == [0, -1, -1, 0]
    assert torch.equal(report.captions.tokens(np.array([0])), TOKENIZER(["four"]))
    assert report.numbers.tolist() == tokenize_captions(["four"], TOKENIZER).numbers().tolist()


def test_a_draw_that_rounds_up_stays_with_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_captions(store_of(FURTHER), ROWS, {"own": 1.0, "synthetic": 1.0, "further": 1.0}, TOKENIZER)
    for drawn, expected in ((1 - 2.0**-53, [257, 256, 2, 5]), (0.0, [0, 1, 2, 5])):
        monkeypatch.setattr(
            further_captions, "draws", lambda s, e, rows, c, d=drawn: torch.full((len(rows), c), d, dtype=torch.float64)
        )
        assert found.choose(0, 0, ROWS)[0].tolist() == expected


def test_what_the_store_does_not_have_ends_in_one_line(training_scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = r"^data.captions: s has no captions of kind 'draft'; it has own, synthetic, further, report$"
    with pytest.raises(UserError, match=line):
        find_captions(store_of(FURTHER), ROWS, {"draft": 1.0}, TOKENIZER)
    with pytest.raises(IncompleteStoreError, match="s: further captions are not extracted yet; finish `mmkd extract`"):
        find_captions(store_of([(256, "two", None, [0], "pending")]), ROWS, {"own": 1.0}, TOKENIZER)
    with pytest.raises(UserError, match="has no further captions of the run's images; leave it out"):
        quiet(write_run(training_scene, "no-captions", data={"captions": {"further": 1}}))
    with pytest.raises(ConfigError, match=r"captions: every weight of \{own\} is 0; give one of them more"):
        load_run(write_run(training_scene, "zero", data={"captions": {"own": 0}}))
    line = r"^data.captions: teacher one has no features of them; .* with it, or set data.captions to \{own: 1\}$"
    teachers = prepare(load_run(write_run(training_scene, "unread")), ALONE).batches.teachers
    assert teachers is not None
    teachers.check_rows("captions", "text", np.empty(0, np.int64))
    monkeypatch.setattr(teachers, "_taught", np.zeros_like(teachers._taught))
    with pytest.raises(UserError, match=line):
        teachers.check_rows("captions", "text", np.array([0]))


def test_a_step_reads_the_drawn_captions_and_their_features(training_scene: Path) -> None:
    ready = prepare(load_run(write_run(training_scene, "drawn")), ALONE)
    store, own = FeatureStore.open(training_scene / "features"), ready.batches.pairs.rows
    # Every other row has two further captions, whose features are those of rows 1 and 2.
    captions = tokenize_captions(["another finding of the same", "seen"], TOKENIZER)
    owners = own[::2]
    upto = np.stack([np.arange(len(owners)) + 0.5, np.arange(len(owners)) + 1.0], axis=1).ravel()
    choice_rows, choices = np.tile([1, 2], len(owners)), np.tile([0, 1], len(owners))
    further = TrainingCaptions(owners, upto, choice_rows, choices, captions, captions.numbers())
    plain, seen = list(ready.batches.from_step(0)), set()
    for before, batch in zip(plain, replace(ready.batches, choices=further).from_step(0), strict=True):
        rows, chosen = further.choose(0, batch.epoch, batch.rows)
        for place, (row, number) in enumerate(zip(rows.tolist(), chosen.tolist(), strict=True)):
            assert (number < 0) == (batch.rows[place] not in owners)
            tokens = before.tokens[place] if number < 0 else captions.tokens(np.array([number]))[0]
            assert torch.equal(batch.tokens[place], tokens)
            assert batch.columns[place] == (before.columns[place] if number < 0 else 8)
            group = before.groups[place, 0] if number < 0 else captions.numbers()[number]
            assert batch.groups[place].tolist() == [group, before.groups[place, 1]]
            for slug, target, unchanged in zip(("one", "two"), batch.targets, before.targets, strict=True):
                assert np.array_equal(target.text[place].numpy(), store.text(slug)[row])
                assert torch.equal(target.image[place], unchanged.image[place])
            seen.add(number)
    assert seen == {-1, 0, 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scene of tiny runs, with `several-features` of 24 rows, which have two further captions each."""
    root, said = write_scene(tmp_path_factory.mktemp("captions"), rows=2), "seen in many images"
    rows = [{"key": f"k{i}", "image": f"{i % 4}.png", "caption": [f"own {i}", said, f"more {i}"]} for i in range(24)]
    corpus = write_jsonl(root / "several", rows, further={}, kind_column=None)
    run(corpus, root / "several-features", load({name: root / name for name in ("one", "two")}, "one", "two"))
    return root


def test_a_held_out_pair_that_is_trained_on_as_a_further_caption_is_refused(root: Path) -> None:
    rows = [
        {"key": f"h{i}", "image": f"{i}.png", "caption": text} for i, text in enumerate(["more 0", "other", "more"])
    ]
    held = write_jsonl(root / "held", rows, further={}, kind_column=None)
    run(held, root / "held-features", load({"one": root / "one"}, "one"))
    sets = [{"name": "held", "store": "held-features", "where": "key != ''"}]
    given: dict[str, Any] = {"store": "several-features", "where": "", "batch_size": 12, "monitor": {"sets": sets}}
    with pytest.raises(ConfigError, match=r"^monitor set 'held': row 0 and 0 more are trained on too"):
        prepare(load_run(write_run(root, "leak", **given)), ALONE)
    prepare(load_run(write_run(root, "no-leak", data={"captions": {"own": 1}}, **given)), ALONE)


def test_captions_that_no_row_of_the_run_has_are_none() -> None:
    for further, rows in ((FURTHER[3:], ROWS), (FURTHER, ROWS[:0]), ([], ROWS)):
        assert find_captions(store_of(further), rows, None, TOKENIZER) is None


def test_a_run_reads_the_captions_that_were_extracted(root: Path) -> None:
    store = FeatureStore.open(root / "several-features")
    data = {"captions": {"own": 1, "further": 3}}
    path = write_run(root, "several", store="several-features", where="", batch_size=12, epochs=4, data=data)
    ready, table = prepare(load_run(path), ALONE), store.sample_table(["caption", "image_rows"])
    assert ready.batches.choices is not None
    assert ready.batches.choices.rows is ready.batches.pairs.rows  # mapped, not copied
    seen = []
    for batch in ready.batches.from_step(0):
        drawn, _ = ready.batches.choices.choose(0, batch.epoch, batch.rows)
        for place, (row, chosen) in enumerate(zip(batch.rows.tolist(), drawn.tolist(), strict=True)):
            caption, owners = (table[name][chosen].as_py() for name in ("caption", "image_rows"))
            assert row in (owners or [chosen])
            assert torch.equal(batch.tokens[place], TOKENIZER([caption])[0])
            seen.append(caption.split()[0])
            for slug, target in zip(("one", "two"), batch.targets, strict=True):
                assert target.present[place].all()
                assert np.array_equal(target.text[place].numpy(), store.text(slug)[chosen])
                assert np.array_equal(target.image[place].numpy(), store.image(slug)[row])
    share = {name: seen.count(name) / len(seen) for name in ("own", "seen", "more")}
    assert share == pytest.approx({"own": 1 / 7, "seen": 3 / 7, "more": 3 / 7}, abs=0.15)
    plain: dict[str, Any] = {"store": "several-features", "where": "", "batch_size": 12, "epochs": 4}
    settings: dict[str, dict[str, Any]] = {
        "given": {},
        "alike": {"data": {"captions": {"own": 1, "further": 1}}},
        "own": {"data": {"captions": {"own": 1}}},
    }
    runs = [prepare(load_run(write_run(root, name, **plain, **asked)), ALONE) for name, asked in settings.items()]
    given, alike, own = (one.batches.choices for one in runs)
    assert given is not None
    assert alike is not None
    assert own is None
    assert np.array_equal(given.upto, alike.upto)
    assert np.array_equal(given.choice_rows, alike.choice_rows)
    assert [one.headline.partition(" teachers")[0] for one in runs] == [
        "24 pairs, 72 captions, 2", "24 pairs, 72 captions, 2", "24 pairs, 2"
    ]  # fmt: skip


RICH: dict[str, Any] = {
    "store": "rich", "where": "", "epochs": 1, "batch_size": 48, "loss": {"feature": 1.0, "cross": 0.0},
    "data": {"views": True, "unpaired": True},
}  # fmt: skip


@pytest.mark.parametrize("order", ["shuffled", "windows"])
def test_views_captions_a_selection_lone_rows_and_policy_one_meet_in_a_step(rich_scene: Path, order: str) -> None:
    changes = RICH | {"data": RICH["data"] | {"order": order, "window": 1}}
    path = write_run(rich_scene, f"meet-{order}", **changes, selection="half", policy={"kind": "one"})
    ready, store = prepare(load_run(path), ALONE), FeatureStore.open(rich_scene / "rich")
    columns = ["caption", "image_rows", "view_number"]
    captions, owners, numbers = (store.sample_table(columns)[name].to_pylist() for name in columns)
    view_rows = {(owners[row][0], number): row for row, number in enumerate(numbers) if number}
    batches, kept, seen = ready.batches, store.available("half"), set()
    assert batches.views is not None
    assert batches.choices is not None
    for batch in batches.from_step(0):
        views = batches.views.numbers(0, batch.epoch, batch.rows).tolist()
        said = batches.choices.choose(0, batch.epoch, batch.rows)[0].tolist()
        kinds, tokens = [kind(row) for row in batch.rows.tolist()], iter(batch.tokens)
        there = np.array([[[one != "text", one != "image"]] * 2 for one in kinds])
        there &= kept[batch.rows][:, :, None] | np.array([one != "pair" for one in kinds])[:, None, None]
        drawn = drawn_teacher(0, batch.epoch, batch.positions, torch.from_numpy(there.any(2)))
        assert np.array_equal(torch.stack([target.present for target in batch.targets], 1).numpy(), there)
        for place, (row, view, text) in enumerate(zip(batch.rows.tolist(), views, said, strict=True)):
            if kinds[place] != "image":
                assert torch.equal(next(tokens), TOKENIZER([captions[text]])[0])
            for t, (slug, target) in enumerate(zip(SLUGS, batch.targets, strict=True)):
                for tower, found in enumerate((target.image[place], target.text[place])):
                    if not there[place, t, tower] or not drawn[place, t]:
                        assert not found.any()
                        continue
                    of = text if tower else view_rows[row, view]
                    assert np.array_equal(found.numpy(), (store.image, store.text)[tower](slug)[of])
            seen.add((kinds[place], text == row))
    assert seen == {("pair", True), ("pair", False), ("image", True), ("text", True)}


@pytest.mark.integration
def test_ranks_and_resumptions_meet_the_same_captions_and_lone_rows_in_windows(rich_scene: Path) -> None:
    gentle: dict[str, Any] = {"optimizer": {"lr": 1e-4, "warmup_steps": 2}}
    changes = RICH | gentle | {"data": {"unpaired": True, "order": "windows", "window": 1}}
    whole, both = (write_run(rich_scene, name, **changes) for name in ("whole", "both"))
    report = quiet(whole)
    in_ranks(1, both, stopped_at_first_step)
    assert in_ranks(2, both).losses == pytest.approx(report.losses, rel=1e-4)
    assert_equal_ends(load_run(whole), load_run(both))

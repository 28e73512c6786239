"""Selection rules against sums written out by hand, one pair at a time, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_store import make_planted

from mmkd.store import FeatureStore
from mmkd.store.convert.importing import import_features
from mmkd.store.convert.rows import StoreRows, chosen_rows
from mmkd.store.selection import SelectionRule, load_rule, select
from mmkd.store.selection.compute import compute_scores, examples, judge, pairs_to_judge
from mmkd.store.selection.rule import AgreementScore, CosineScore, RankScore
from mmkd.store.selection.rules import find_rule, shipped_rules
from mmkd.store.selection.scores import BLOCK_ROWS, draw_rows
from mmkd.store.selection.verdict import Line

MODELS = {"far": 2.0, "near": 0.3, "noisy": 1.0}
HOLES = {"near": [3, 7, 200], "far": [7, 8]}
RELEASE = Path(__file__).resolve().parents[2] / "shared" / "data" / "mmkd_release"


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmkd.store.selection.scores.SPAN_ROWS", 100)
    monkeypatch.setattr("mmkd.store.reader._ROWS_AT_ONCE", 256)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """360 image rows and 6 prompts, three encoders of known noise, with holes."""
    modality = {i: {"modality": ("CT", "MRI", None)[i % 3]} for i in range(360)}
    return FeatureStore.open(make_planted(tmp_path_factory.mktemp("s"), MODELS, HOLES, modality).root)


def kept(store: FeatureStore, keep: dict[str, Any], **rest: Any) -> np.ndarray:
    """Pairs that a rule keeps."""
    rule = SelectionRule.model_validate({"keep": keep} | rest)
    return judge(pairs_to_judge(store, rule), rule)[0]


def unit(store: FeatureStore, slug: str, tower: str) -> np.ndarray:
    """Unit features in float64."""
    values = np.array(getattr(store, tower)(slug), dtype=np.float64)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def cosines(store: FeatureStore) -> np.ndarray:
    """float64 (N, T), NaN where a teacher has no pair."""
    out = [(unit(store, slug, "image") * unit(store, slug, "text")).sum(axis=1) for slug in store.teachers]
    return np.where(store.available(), np.stack(out, axis=1), np.nan)


def test_cosine_by_value_by_teacher_and_by_quantile(store: FeatureStore) -> None:
    expected = cosines(store)
    assert np.array_equal(kept(store, {"cosine": {"at_least": 0.5}}), expected >= 0.5)
    own = {"far": 0.2, "others": 0.9}
    assert np.array_equal(kept(store, {"cosine": {"at_least": own}}), expected >= np.array([0.2, 0.9, 0.9]))
    found = kept(store, {"cosine": {"quantile": 0.3}})
    for t, there in enumerate(store.available().T):
        values = np.sort(expected[there, t])
        dropped = int(0.3 * len(values))
        assert found[:, t].sum() == len(values) - dropped
        assert set(np.flatnonzero(found[:, t])) == set(np.flatnonzero(expected[:, t] >= values[dropped]))


@pytest.mark.parametrize("direction", ["both", "image_to_text", "text_to_image"])
def test_rank_among_random_captions(store: FeatureStore, direction: str) -> None:
    spec = RankScore(among=64, direction=direction)
    columns = pairs_to_judge(store, SelectionRule.model_validate({"keep": {"rank": {"at_most": 1}}}))
    scores = compute_scores(columns, [spec], seed=5)[spec]
    for t, slug in enumerate(store.teachers):
        image, text = unit(store, slug, "image"), unit(store, slug, "text")
        pool = draw_rows(np.flatnonzero(columns.available[:, t]), 64, 5, "")
        for row in np.flatnonzero(columns.available[:, t])[::7]:
            true = image[row] @ text[row]
            to_text = 1 + sum(image[row] @ text[other] > true + 1e-5 for other in pool)
            to_image = 1 + sum(text[row] @ image[other] > true + 1e-5 for other in pool)
            expected = {"both": max(to_text, to_image), "image_to_text": to_text, "text_to_image": to_image}
            assert scores[row, t] == expected[direction]
    assert np.array_equal(np.isnan(scores), ~columns.available)


def test_agreement_is_the_mean_overlap_with_the_other_teachers(store: FeatureStore) -> None:
    spec = AgreementScore(k=5, among=80)
    columns = pairs_to_judge(store, SelectionRule.model_validate({"keep": {"rank": {"at_most": 1}}}))
    scores = compute_scores(columns, [spec], seed=1)[spec]
    pool = draw_rows(np.flatnonzero(columns.available.all(axis=1)), 80, 1, "")
    for row in [*range(0, 360, 11), 3, 7, 8, *pool[:5]]:
        near = {}
        for t, slug in enumerate(store.teachers):
            if columns.available[row, t]:
                image = unit(store, slug, "image")
                ordered = sorted((r for r in pool if r != row), key=lambda r: -float(image[row] @ image[r]))
                near[t] = set(ordered[:5])
        for t, mine in near.items():
            others = [len(mine & theirs) / 5 for u, theirs in near.items() if u != t]
            assert scores[row, t] == pytest.approx(np.mean(others) if others else 0.0, abs=1e-6)


def test_zero_shot_by_prompts_of_another_store(store: FeatureStore, tmp_path: Path) -> None:
    rows = chosen_rows(store, where="split = 'prompt'")
    import_features(StoreRows([(store, rows)]), tmp_path / "prompts", "float16", lambda done, every: None)
    rule = {"zero_shot": {"prompts": str(tmp_path / "prompts"), "label": "label"}}
    found = kept(store, rule)
    table = store.sample_table(["label", "split"]).to_pandas()
    for t, slug in enumerate(store.teachers):
        text, image = unit(store, slug, "text"), unit(store, slug, "image")
        classes = sorted(set(table["label"]))
        means = [text[(table["split"] == "prompt") & (table["label"] == name)].mean(axis=0) for name in classes]
        nearest = np.argmax(image @ np.stack([mean / np.linalg.norm(mean) for mean in means]).T, axis=1)
        right = np.array([classes[best] for best in nearest]) == table["label"]
        assert np.array_equal(found[:, t], right & store.available()[:, t])
    assert 0.5 < found[:360, 1].mean() < 1
    assert kept(store, {"zero_shot": rule["zero_shot"] | {"top": 3}}).sum() == store.available().sum()


def test_home_and_where(store: FeatureStore) -> None:
    table = store.sample_table(["modality", "domain", "row"]).to_pandas()
    available = store.available()
    found = kept(store, {"home": {"teachers": {"near": ["CT"]}}})
    assert np.array_equal(found[:, 1], available[:, 1] & (table["modality"] == "CT"))
    assert np.array_equal(found[:, [0, 2]], available[:, [0, 2]])
    found = kept(store, {"home": {"teachers": {"near": ["CT", "MRI"]}, "unlisted": "drop"}})
    assert not found[:, [0, 2]].any()
    found = kept(store, {"where": "modality is null and domain = 'lung'"})
    expected = (table["modality"].isna() & (table["domain"] == "lung")).to_numpy()
    assert np.array_equal(found, available & expected[:, None])


leaves = st.sampled_from(
    [{"cosine": {"at_least": 0.6}}, {"cosine": {"quantile": 0.4}}, {"where": "domain = 'colon'"},
     {"home": {"teachers": {"far": ["MRI"]}}}]
)  # fmt: skip
trees = st.recursive(
    leaves,
    lambda below: st.one_of(
        below.map(lambda one: {"not": one}),
        st.lists(below, min_size=1, max_size=3).map(lambda many: {"all": many}),
        st.lists(below, min_size=1, max_size=3).map(lambda many: {"any": many}),
    ),
    max_leaves=5,
)


@settings(max_examples=25)
@given(trees)
def test_rules_combine_as_sets_of_pairs(store: FeatureStore, tree: dict[str, Any]) -> None:
    def pairs(rule: dict[str, Any]) -> set[int]:
        (kind, content), everything = next(iter(rule.items())), set(np.flatnonzero(store.available()))
        if kind == "not":
            return everything - pairs(content)
        if kind == "all":
            return set.intersection(*map(pairs, content))
        if kind == "any":
            return set.union(*map(pairs, content))
        return set(np.flatnonzero(kept(store, rule)))

    assert set(np.flatnonzero(kept(store, tree))) == pairs(tree)


def test_the_best_teachers_of_a_row(store: FeatureStore) -> None:
    everything = {"not": {"cosine": {"at_least": 2}}}
    found = kept(store, {"teachers": {"of": everything, "at_most": 2, "by": {"cosine": {}}, "scale": "raw"}})
    expected, available = cosines(store), store.available()
    for row in range(366):
        best = sorted(np.flatnonzero(available[row]), key=lambda t: -expected[row, t])[:2]
        assert sorted(best) == np.flatnonzero(found[row]).tolist()
    found = kept(store, {"teachers": {"of": {"cosine": {"at_least": 0.6}}, "at_least": 2}})
    enough = expected >= 0.6
    assert np.array_equal(found, enough & (enough.sum(axis=1) >= 2)[:, None])


def test_a_target_number_of_pairs_finds_its_threshold(store: FeatureStore) -> None:
    expected, available = cosines(store), store.available()
    found = kept(store, {"pairs": {"target": 300, "by": {"cosine": {}}, "scale": "raw"}})
    assert found.sum() == 300
    assert np.nanmin(np.where(found, expected, np.nan)) >= np.nanmax(np.where(~found, expected, np.nan))
    columns = [(column, column[there]) for column, there in zip(expected.T, available.T, strict=True)]
    shares = np.stack([[np.mean(there <= value) for value in column] for column, there in columns], axis=1)
    found = kept(store, {"pairs": {"share": 0.5}})
    assert found.sum() == round(0.5 * available.sum())
    assert np.min(shares[found]) >= np.max(shares[~found & available]) - 1e-6
    inner = kept(store, {"pairs": {"of": {"where": "domain = 'lung'"}, "target": 50, "by": {"rank": {"among": 32}}}})
    assert inner.sum() == 50


def test_the_result_depends_on_the_seed_alone(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = SelectionRule.model_validate({"keep": {"rank": {"at_most": 3, "among": 32}}})
    columns = pairs_to_judge(store, rule)
    specs = [RankScore(among=32), AgreementScore(k=3, among=40), CosineScore()]
    one = compute_scores(columns, specs, seed=0, threads=1)
    four = compute_scores(columns, specs, seed=0, threads=4)
    monkeypatch.setattr("mmkd.store.selection.compute.BLOCK_ROWS", 64)
    small = compute_scores(columns, specs, seed=0, threads=3)
    for spec in specs:
        np.testing.assert_array_equal(one[spec], four[spec])
        np.testing.assert_allclose(small[spec], one[spec], rtol=0, atol=1e-6)
    assert BLOCK_ROWS == 2048
    other = compute_scores(columns, specs, seed=1)
    assert not np.array_equal(one[specs[0]], other[specs[0]], equal_nan=True)


def test_a_draw_does_not_change_when_rows_are_appended() -> None:
    first = draw_rows(np.arange(1000), 50, 3, "")
    again = draw_rows(np.r_[np.arange(1000), np.arange(2000, 2001)], 50, 3, "")
    assert len(set(first) & set(again)) >= 49
    assert len(set(first)) == 50
    counts = np.bincount(np.concatenate([draw_rows(np.arange(100), 50, seed, "") for seed in range(200)]))
    assert counts.min() > 60  # of 100 expected, standard deviation 7
    assert counts.max() < 140


def test_written_once_read_by_zarr_and_by_the_store(store: FeatureStore) -> None:
    rule = SelectionRule.model_validate({"keep": {"cosine": {"at_least": 0.5}}, "teachers": ["near", "far"]})
    report = select(store, "half", rule)
    expected = cosines(store) >= 0.5
    expected[:, 2] = False
    assert np.array_equal(store.available("half"), expected)
    group = zarr.open_group(store.root, mode="r")
    plain = group["selections/half"]
    assert np.array_equal(plain[:].astype(bool), expected[:, :2])
    card = plain.attrs["mmkd"]
    assert list(card["teachers"]) == ["far", "near"]
    assert card["digest"] == report.digest
    assert card["rule"]["keep"] == {"cosine": {"at_least": 0.5}}
    counts = report.counts
    assert counts.pairs.kept == expected.sum()
    assert {slug: share.kept for slug, share in counts.teachers.items()} == {
        "far": expected[:, 0].sum(), "near": expected[:, 1].sum()
    }  # fmt: skip
    assert counts.overlaps["far"]["near"] == (expected[:, 0] & expected[:, 1]).sum()
    modality = np.array([str(m) for m in store.sample_table(["modality"])["modality"].to_pylist()])
    assert counts.groups["CT"].kept == expected[modality == "CT"].sum()
    assert counts.groups["(not stated)"].kept == expected[modality == "None"].sum()
    live = store.available()[:, :2].any(axis=1)
    assert counts.rows_without == (live & ~expected.any(axis=1)).sum()
    assert sum(counts.rows_by_teachers) == live.sum()
    assert not list((store.root / "selections").glob(".*"))


def test_examples_stand_on_both_sides_of_the_line(store: FeatureStore) -> None:
    score = np.round(cosines(store), 3).astype(np.float32)
    line = Line("", score, np.full(3, 0.5), higher=True)
    found = examples(store, tuple(store.teachers), line, 3)
    above, below = np.sort(score[score >= 0.5])[:3][::-1], np.sort(score[score < 0.5])[::-1][:3]
    assert [one.score for one in found] == pytest.approx([*above, *below])
    assert [one.kept for one in found] == [True] * 3 + [False] * 3
    keys = store.sample_table(["key"])["key"].to_pylist()
    assert all(keys[one.row] == one.key for one in found)


def test_planted_teachers_are_told_apart(store: FeatureStore) -> None:
    """The rule that ranks captions believes the encoder without noise more often than the noisy ones."""
    found = kept(store, {"rank": {"at_most": 5, "among": 128}})
    by_teacher = dict(zip(store.teachers, found.sum(axis=0), strict=True))
    assert by_teacher["near"] > 1.2 * by_teacher["noisy"] > 1.4 * by_teacher["far"]


def test_shipped_rules_say_why_and_can_be_read() -> None:
    for name, path in shipped_rules().items():
        load_rule(find_rule(name))
        comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert len(comments) >= 3, name
    for name in ("mmkd_release_reconstruction", "mmkd_paper_share"):
        assert "RECONSTRUCTION" in find_rule(name).read_text()


@pytest.mark.skipif(not RELEASE.is_dir(), reason="the original release's samples are not here")
def test_the_reconstruction_gives_the_published_availability(tmp_path: Path) -> None:
    import json

    from mmkd.store.convert.original import OriginalRelease

    import_features(OriginalRelease(RELEASE), tmp_path / "s", "float32", lambda done, every: None)
    store = FeatureStore.open(tmp_path / "s")
    report = select(store, "published", load_rule(find_rule("mmkd_release_reconstruction")))
    assert report.warnings
    found = store.available("published")
    lines = [json.loads(line) for line in (RELEASE / "meta.jsonl").read_text().splitlines()]
    for row, line in zip(found, lines, strict=True):
        kept = {slug for slug, yes in zip(store.teachers, row, strict=True) if yes}
        assert kept == {name.lower() for name in line["available_clips"]}

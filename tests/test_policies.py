"""Shares of teachers: the draws against SplitMix64 in whole numbers, each policy by its definition."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkd.base.errors import ConfigError
from mmkd.distill.config import PolicyConfig
from mmkd.distill.draws import draws
from mmkd.distill.policies import (
    Standard,
    all_teachers,
    best_teachers,
    drop_teachers,
    familiarity,
    make_policy,
    one_teacher,
    weighted_teachers,
)
from mmkd.distill.teacher_features import TeacherTargets
from mmkd.store.layout import TOWERS

AVAILABLE = torch.tensor([[True, True, True], [False, True, True], [False, False, False], [True, False, False]])


def split_mix(state: int) -> int:
    """SplitMix64 in whole numbers modulo 2^64."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_the_mixer_is_split_mix_64() -> None:
    # First output of the published generator for seed 1234567.
    assert split_mix(1234567) == 6457827717110365317


@settings(max_examples=50)
@given(st.integers(0, 2**63 - 1), st.integers(0, 10_000), st.integers(0, 2**40))
def test_draws_are_a_function_of_seed_epoch_position_and_column(seed: int, epoch: int, position: int) -> None:
    found = draws(seed, epoch, torch.tensor([position, position + 1]), 3)
    for i in range(2):
        for column in range(3):
            state = split_mix(split_mix(split_mix(seed) ^ epoch) ^ (position + i)) ^ column
            assert found[i, column].item() == (split_mix(state) >> 11) / 2**53


def test_draws_are_uniform_and_independent_enough() -> None:
    found = draws(3, 1, torch.arange(20_000), 4).numpy()
    assert np.abs(found.mean(0) - 0.5).max() < 0.01
    assert np.abs(np.corrcoef(found.T) - np.eye(4)).max() < 0.03
    assert np.abs(np.corrcoef(found[:-1, 0], found[1:, 0])[0, 1]) < 0.03
    other = draws(3, 2, torch.arange(20_000), 1).numpy()[:, 0]
    assert abs(np.corrcoef(found[:, 0], other)[0, 1]) < 0.03


def test_all_available_teachers_share_equally() -> None:
    expected = [[1 / 3] * 3, [0, 0.5, 0.5], [0, 0, 0], [1, 0, 0]]
    assert all_teachers(AVAILABLE).tolist() == [pytest.approx(row) for row in expected]


def test_one_teacher_is_drawn_among_those_available_each_as_likely() -> None:
    chosen = one_teacher(AVAILABLE.repeat(3000, 1), draws(0, 0, torch.arange(12_000), 1)[:, 0])
    assert chosen.sum(1).tolist() == [1, 1, 0, 1] * 3000
    frequency = chosen.view(3000, 4, 3).mean(0)
    assert frequency.flatten().tolist() == pytest.approx([1 / 3] * 3 + [0, 0.5, 0.5, 0, 0, 0, 1, 0, 0], abs=0.03)
    assert one_teacher(AVAILABLE, torch.tensor([0.999999, 0.0, 0.5, 0.99])).tolist() == [
        [0, 0, 1], [0, 1, 0], [0, 0, 0], [1, 0, 0],
    ]  # fmt: skip


def test_weights_are_shares_among_those_available() -> None:
    expected = [[0.2, 0.6, 0.2], [0, 0.75, 0.25], [0, 0, 0], [1, 0, 0]]
    found = weighted_teachers(AVAILABLE, torch.tensor([1.0, 3.0, 1.0]))
    assert found.tolist() == [pytest.approx(row) for row in expected]
    assert weighted_teachers(AVAILABLE, torch.tensor([0.0, 1.0, 1.0]))[3].tolist() == [0, 0, 0]


def test_the_best_teachers_are_those_with_the_highest_scores() -> None:
    scores = torch.tensor([[0.1, 0.3, 0.2], [9.0, 0.1, 0.2], [1.0, 2.0, 3.0], [-5.0, 1.0, 1.0]])
    assert best_teachers(AVAILABLE, scores, 1).tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert best_teachers(AVAILABLE, scores, 2).tolist() == [[0, 0.5, 0.5], [0, 0.5, 0.5], [0, 0, 0], [1, 0, 0]]
    assert best_teachers(AVAILABLE, scores, 9).tolist() == all_teachers(AVAILABLE).tolist()


def test_a_teacher_that_cannot_be_judged_has_a_share_beside_the_best() -> None:
    scores = torch.tensor([[0.1, 0.3, torch.nan], [9.0, 0.1, torch.nan], [1.0, 2.0, torch.nan], [-5.0, 1.0, torch.nan]])
    assert best_teachers(AVAILABLE, scores, 1).tolist() == [[0, 0.5, 0.5], [0, 0.5, 0.5], [0, 0, 0], [1, 0, 0]]


def test_agreement_is_judged_by_each_teachers_own_standard() -> None:
    rng = np.random.default_rng(0)
    image = torch.tensor(rng.normal(size=(50, 6)))
    near, far = image + torch.tensor(rng.normal(size=(50, 6))) * 0.1, torch.tensor(rng.normal(size=(50, 6)))
    everywhere = torch.ones(50, 2, dtype=torch.bool)
    some = everywhere.clone()
    some[:20] = False
    teachers = [TeacherTargets(image, near, everywhere), TeacherTargets(image, far, some)]
    scores = Standard.of(teachers).scores(teachers)
    assert scores[:, 0].mean().item() == pytest.approx(0, abs=1e-4)
    assert scores[some[:, 0], 1].std().item() == pytest.approx(1, rel=1e-4)
    raw = torch.cosine_similarity(image, near, dim=1)
    assert torch.equal(scores[:, 0].argsort(), raw.float().argsort())


def test_familiarity_is_the_nearest_caption_of_the_run_and_not_the_samples_own() -> None:
    image = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    wrong = torch.tensor([[0.0, -1.0], [-1.0, 0.0], [-1.0, -1.0]])
    target = TeacherTargets(image, wrong, torch.ones(3, 2, dtype=torch.bool))
    known = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    assert familiarity(target, known).tolist() == pytest.approx([1.0, 0.8, 1.4 / 2**0.5])
    assert familiarity(target, known.double()).dtype == torch.float32


def test_a_wrong_caption_does_not_change_which_teacher_is_best_by_the_corpus() -> None:
    rng = torch.Generator().manual_seed(0)
    at_home = torch.arange(40) < 20  # the first teacher knows the first half, the second the other
    everywhere = torch.ones(40, 2, dtype=torch.bool)
    captions = torch.eye(8)
    noise = torch.nn.functional.normalize(torch.randn(40, 8, generator=rng), dim=1)
    known = captions[torch.arange(40) % 8]
    teachers = [
        TeacherTargets(torch.where(mine[:, None], known, noise), noise.flip(0), everywhere)
        for mine in (at_home, ~at_home)
    ]
    by_corpus = Standard.of(teachers, [captions, captions]).scores(teachers)
    assert torch.equal(by_corpus.argmax(1), (~at_home).long())
    by_caption = Standard.of(teachers).scores(teachers)
    assert (by_caption.argmax(1) == (~at_home)).float().mean() < 0.9


def test_each_caption_and_image_is_known_to_the_teacher_at_home_and_rows_are_no_ones_who_lacks_them() -> None:
    rng = torch.Generator().manual_seed(0)
    class_of, said = torch.arange(40) % 8, torch.randperm(40, generator=rng) % 8  # captions are of other images
    vectors, everywhere = torch.eye(8), torch.ones(40, 2, dtype=torch.bool)
    lacking = everywhere.clone()
    lacking[3] = False

    def seen(kind: torch.Tensor, first: bool) -> torch.Tensor:
        noise = torch.nn.functional.normalize(torch.randn(40, 8, generator=rng), dim=1)
        return torch.where((kind < 4)[:, None] == first, vectors[kind], noise)

    targets = [TeacherTargets(seen(class_of, True), seen(said, True), lacking),
               TeacherTargets(seen(class_of, False), seen(said, False), everywhere)]  # fmt: skip
    rows = np.arange(40)
    teachers: Any = SimpleNamespace(
        slugs=("a", "b"),
        towers=(TOWERS, TOWERS),
        gather=lambda r: tuple(TeacherTargets(t.image[r], t.text[r], t.present[r]) for t in targets),
    )
    batch: Any = SimpleNamespace(targets=targets, has=None)
    groups = np.stack([rows, rows], axis=1)
    config = PolicyConfig(kind="best", by="corpus", keys="known")
    policy = make_policy(config, 0, teachers, rows, groups, torch.device("cpu"))
    scores = policy.scores(batch)
    found = policy.knowledge(batch, scores)
    assert scores is not None
    assert found is not None
    assert torch.equal(scores.argmax(1), (class_of >= 4).long())
    shares = found.exp()
    assert shares.sum(1).flatten().tolist() == pytest.approx([1.0] * 80)
    home = torch.stack([said, class_of], dim=1) >= 4
    home[3] = True
    assert torch.equal(shares.argmax(1).bool(), home)
    assert shares[3].tolist() == [[0, 0], [1, 1]]
    plain = make_policy(config.model_copy(update={"keys": "all"}), 0, teachers, rows, groups, torch.device("cpu"))
    assert plain.knowledge(batch, plain.scores(batch)) is None


def test_runs_with_lone_rows_judge_these_though_none_is_looked_at_and_say_what_is_not_there() -> None:
    rows = np.arange(40)
    features = torch.nn.functional.normalize(torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0)), dim=2)
    target = TeacherTargets(features[0], features[1], torch.ones(40, 2, dtype=torch.bool))

    def gather(chosen: np.ndarray[Any, Any]) -> tuple[TeacherTargets, ...]:
        return (TeacherTargets(target.image[chosen], target.text[chosen], target.present[chosen]),)

    teachers: Any = SimpleNamespace(slugs=("a",), towers=(TOWERS,), gather=gather)
    config, cpu = PolicyConfig(kind="best", by="corpus"), torch.device("cpu")
    pairs = np.stack([rows, rows], axis=1)
    policy = make_policy(config, 0, teachers, rows, pairs, cpu, unpaired=True)
    has = torch.tensor([[row < 30, row != 0] for row in range(40)])
    scores = policy.scores(cast("Any", SimpleNamespace(targets=[target.masked(has)], has=has)))
    assert scores is not None
    assert policy.standard is not None
    assert policy.text_standard is not None
    swapped = TeacherTargets(target.text, target.image, target.present)
    expected = torch.where(has[:, :1], policy.standard.scores([target]), policy.text_standard.scores([swapped]))
    assert torch.equal(scores, expected)
    assert make_policy(config, 0, teachers, rows, pairs, cpu).text_standard is None
    target.present[:, 0] = False
    with pytest.raises(ConfigError, match=r"^policy.by corpus: a has features of none of the 40 images it looks at"):
        make_policy(config, 0, teachers, rows, pairs, cpu, unpaired=True)
    for lone, what in (([-1, 1], "captions"), ([1, -1], "images")):
        line = f"^policy.by corpus: none of the 40 rows it looks at has {what}; take another policy$"
        with pytest.raises(ConfigError, match=line):
            make_policy(config, 0, teachers, rows, np.where(np.array(lone) < 0, -1, pairs), cpu, unpaired=True)


def test_dropping_keeps_the_teacher_with_the_largest_loss_and_shares_that_sum_to_one() -> None:
    shares = all_teachers(AVAILABLE)
    losses = torch.tensor([[1.0, 5.0, 2.0], [9.0, 1.0, 2.0], [1.0, 1.0, 1.0], [1.0, 9.0, 9.0]])
    every = torch.zeros(4, 3, dtype=torch.float64)  # each draw lies below the chance
    assert drop_teachers(shares, losses, every, 0.5).tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert torch.equal(drop_teachers(shares, losses, every + 0.6, 0.5), shares)
    drawn = draws(1, 0, torch.arange(4000), 3)
    found = drop_teachers(all_teachers(torch.ones(4000, 3, dtype=torch.bool)), losses[:1].expand(4000, 3), drawn, 0.25)
    assert found.sum(1).tolist() == pytest.approx([1.0] * 4000)
    assert (found[:, [0, 2]] > 0).double().mean(0).tolist() == pytest.approx([0.75, 0.75], abs=0.03)
    assert (found[:, 1] > 0).all()

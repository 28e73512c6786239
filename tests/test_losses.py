"""Each loss against an independent statement in float64 loops, its gradient against finite differences; ranks."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from open_clip.loss import ClipLoss
from tiny_run import write_run
from torch.autograd import gradcheck

from mmkd.distill import losses
from mmkd.distill.losses import (
    PairFeatures,
    Similarities,
    bank_loss,
    both_ways,
    contrast,
    feature_loss,
    relational_loss,
    stack_teachers,
    task_loss,
    unit,
    weighted_mean,
)
from mmkd.distill.terms import FeatureKind

FEATURE_KINDS: tuple[FeatureKind, ...] = get_args(FeatureKind)
N, WIDTH, KEYS = 5, 4, 3
GROUPS = [7, 2, 7, 9, 4]  # rows 0 and 2 share a caption
BANK_GROUPS = [2, 11, 7]
MISSING = 3  # the row that the teacher lacks
Array = np.ndarray


def rows(seed: int, n: int = N) -> Array:
    """Unit rows, float64."""
    values = np.random.default_rng(seed).normal(size=(n, WIDTH))
    return values / np.sqrt((values**2).sum(axis=1, keepdims=True))


def tensor(values: Array) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pairs(image: Array, text: Array, groups: list[int], available: list[bool] | None = None) -> PairFeatures:
    mask = None if available is None else torch.tensor(available)[:, None].expand(-1, 2)
    return PairFeatures(tensor(image), tensor(text), torch.tensor(groups), mask)


def slow_softmax(logits: list[float]) -> list[float]:
    powers = [np.exp(x - max(logits)) for x in logits]
    return [p / sum(powers) for p in powers]


def slow_contrast(queries: Array, keys: Array, scale: float, groups: list[int], key_groups: list[int]) -> list[float]:
    """Supervised InfoNCE by its definition: the mean of -log p over the keys that share the query's group."""
    values = []
    for i in range(len(queries)):
        p = slow_softmax([scale * sum(queries[i][d] * key[d] for d in range(WIDTH)) for key in keys])
        positive = [j for j in range(len(keys)) if key_groups[j] == groups[i]]
        values.append(-sum(np.log(p[j]) for j in positive) / len(positive))
    return values


def slow_both(s: tuple[Array, Array], k: tuple[Array, Array], scale: float, g: list[int], kg: list[int]) -> Array:
    return (np.array(slow_contrast(s[0], k[1], scale, g, kg)) + slow_contrast(s[1], k[0], scale, g, kg)) / 2


def test_task_loss_is_the_definition_and_open_clips() -> None:
    image, text = rows(0), rows(1)
    student = pairs(image, text, GROUPS)
    found = task_loss(student, student, torch.tensor(12.5))
    expected = slow_both((image, text), (image, text), 12.5, GROUPS, GROUPS)
    assert np.allclose(found.numpy(), expected, rtol=1e-12)
    distinct = pairs(image, text, list(range(N)))
    reference = ClipLoss()(tensor(image), tensor(text), torch.tensor(12.5, dtype=torch.float64))
    assert task_loss(distinct, distinct, torch.tensor(12.5)).mean().item() == pytest.approx(reference.item(), rel=1e-12)


def test_equal_captions_are_positives_of_each_other() -> None:
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    log_p = (3.0 * queries @ queries.T).log_softmax(-1)
    same = torch.tensor([[True, False, True], [False, True, False], [True, False, True]])
    expected = [-(log_p[0, 0] + log_p[0, 2]) / 2, -log_p[1, 1], -(log_p[2, 0] + log_p[2, 2]) / 2]
    found = contrast(queries, queries, torch.tensor(3.0), same)
    assert found.tolist() == pytest.approx([x.item() for x in expected], rel=1e-6)


def test_cross_loss_is_the_definition_over_the_rows_that_the_teacher_has() -> None:
    s, t = (rows(2), rows(3)), (rows(4), rows(5))
    there = [i != MISSING for i in range(N)]
    found = both_ways(pairs(*s, GROUPS), pairs(*t, GROUPS, there), torch.tensor(7.0)).numpy()
    kept = np.flatnonzero(there)
    few = [GROUPS[i] for i in kept]
    expected = slow_both((s[0][kept], s[1][kept]), (t[0][kept], t[1][kept]), 7.0, few, few)
    assert np.allclose(found[kept], expected, rtol=1e-12)
    assert np.isfinite(found).all()  # the row without a positive too, which gets no weight


@pytest.mark.parametrize("there", [None, [True, False, True]])
def test_bank_loss_is_the_definition_over_batch_and_bank(there: list[bool] | None) -> None:
    s, t, b = (rows(2), rows(3)), (rows(4), rows(5)), (rows(6, KEYS), rows(7, KEYS))
    found = bank_loss(pairs(*s, GROUPS), pairs(*t, GROUPS), pairs(*b, BANK_GROUPS, there), torch.tensor(5.0))
    kept = [j for j in range(KEYS) if there is None or there[j]]
    keys = tuple(np.concatenate([x, y[kept]]) for x, y in zip(t, b, strict=True))
    expected = slow_both(s, keys, 5.0, GROUPS, GROUPS + [BANK_GROUPS[j] for j in kept])  # type: ignore[arg-type]
    assert np.allclose(found.numpy(), expected, rtol=1e-12)


def test_stacked_teachers_get_what_each_gets_alone() -> None:
    scales = [5.0, 9.0]
    there = [[i != MISSING for i in range(N)], [i > 0 for i in range(N)]]
    students = [pairs(rows(seed), rows(seed + 1), GROUPS) for seed in (2, 12)]
    teachers = [pairs(rows(seed), rows(seed + 1), GROUPS, mask) for seed, mask in zip((4, 14), there, strict=True)]
    both, theirs = stack_teachers(students), stack_teachers(teachers)
    scale = torch.tensor(scales)[:, None, None]
    for kind in FEATURE_KINDS:
        alone = torch.stack([feature_loss(s, t, kind) for s, t in zip(students, teachers, strict=True)])
        assert torch.allclose(feature_loss(both, theirs, kind), alone, rtol=1e-12)
    alone = torch.stack([both_ways(s, t, torch.tensor(x)) for s, t, x in zip(students, teachers, scales, strict=True)])
    assert torch.allclose(both_ways(both, theirs, scale), alone, rtol=1e-12)
    own = Similarities(students[0], students[0], torch.tensor(3.0))
    alone = torch.stack(
        [relational_loss(own, Similarities(t, t, torch.tensor(x))) for t, x in zip(teachers, scales, strict=True)]
    )
    assert torch.allclose(relational_loss(own, Similarities(theirs, theirs, scale)), alone, rtol=1e-12)
    assert torch.equal(theirs.of(1).text, teachers[1].text)
    assert theirs.of(1).mask.all(1).tolist() == there[1]


def test_with_a_bank_of_the_rest_the_value_does_not_depend_on_the_batch() -> None:
    """Rows 0-1 with a bank of 2-4 are contrasted as in a batch of all five."""
    s, t = (rows(2), rows(3)), (rows(4), rows(5))
    whole = both_ways(pairs(*s, GROUPS), pairs(*t, GROUPS), torch.tensor(5.0))
    part = bank_loss(
        pairs(s[0][:2], s[1][:2], GROUPS[:2]),
        pairs(t[0][:2], t[1][:2], GROUPS[:2]),
        pairs(t[0][2:], t[1][2:], GROUPS[2:]),
        torch.tensor(5.0),
    )
    assert torch.allclose(part, whole[:2], rtol=1e-12)


def slow_feature(s: Array, t: Array, kind: str) -> list[float]:
    values = []
    for a, b in zip(s, t, strict=True):
        gap = a - b
        if kind == "cosine":
            values.append(1 - float(a @ b) / np.sqrt(float(a @ a) * float(b @ b)))
        elif kind == "mse":
            values.append(float(gap @ gap) / WIDTH)
        else:
            scaled = np.sqrt(WIDTH) * np.abs(gap)
            values.append(float(np.mean([x * x / 2 if x < 1 else x - 0.5 for x in scaled])))
    return values


@pytest.mark.parametrize("kind", FEATURE_KINDS)
def test_feature_loss_is_the_definition(kind: str) -> None:
    s, t = (rows(2), rows(3)), (rows(4), rows(5))
    found = feature_loss(pairs(*s, GROUPS), pairs(*t, GROUPS), kind)  # type: ignore[arg-type]
    expected = np.array(slow_feature(s[0], t[0], kind)) + slow_feature(s[1], t[1], kind)
    assert np.allclose(found.numpy(), expected, rtol=1e-12)


def test_mse_of_unit_rows_is_the_cosine_loss_by_two_over_the_width() -> None:
    s, t = pairs(rows(2), rows(3), GROUPS), pairs(rows(4), rows(5), GROUPS)
    assert torch.allclose(feature_loss(s, t, "mse"), feature_loss(s, t, "cosine") * 2 / WIDTH, rtol=1e-12)


def slow_relational(s: tuple[Array, Array], t: tuple[Array, Array], scales: tuple[float, float]) -> list[float]:
    values = []
    for i in range(len(s[0])):
        total = 0.0
        for a, b in ((0, 1), (1, 0)):
            q = slow_softmax([scales[0] * float(s[a][i] @ key) for key in s[b]])
            p = slow_softmax([scales[1] * float(t[a][i] @ key) for key in t[b]])
            total += sum(x * np.log(x / y) for x, y in zip(p, q, strict=True))
        values.append(total / 2)
    return values


def relational(s: tuple[Array, Array], t: tuple[Array, Array], there: list[bool] | None = None) -> torch.Tensor:
    student, teacher = pairs(*s, GROUPS), pairs(*t, GROUPS, there)
    return relational_loss(
        Similarities(student, student, torch.tensor(9.0)), Similarities(teacher, teacher, torch.tensor(4.0))
    )


def test_relational_loss_is_the_definition_over_the_rows_that_the_teacher_has() -> None:
    s, t = (rows(2), rows(3)), (rows(4), rows(5))
    assert np.allclose(relational(s, t).numpy(), slow_relational(s, t, (9.0, 4.0)), rtol=1e-10)
    kept = np.array([i for i in range(N) if i != MISSING])
    found = relational(s, t, [i != MISSING for i in range(N)]).numpy()
    expected = slow_relational((s[0][kept], s[1][kept]), (t[0][kept], t[1][kept]), (9.0, 4.0))
    assert np.allclose(found[kept], expected, rtol=1e-10)


def test_what_others_know_better_loses_its_share_of_the_teachers_similarities() -> None:
    s, t, student_scale, scale = (rows(2), rows(3)), (rows(4), rows(5)), torch.tensor(9.0), torch.tensor(4.0)
    shares = np.random.default_rng(0).uniform(0.01, 1, size=(2, N))
    student, teacher = pairs(*s, GROUPS), pairs(*t, GROUPS)
    known = Similarities(teacher, teacher, scale, torch.from_numpy(shares).log())
    found = relational_loss(Similarities(student, student, student_scale), known)
    expected = np.zeros(N)
    for way, (a, b) in enumerate(((0, 1), (1, 0))):
        p = shares[way] * np.exp(4 * (np.asarray(t[a]) @ np.asarray(t[b]).T))
        q = np.exp(9 * (np.asarray(s[a]) @ np.asarray(s[b]).T))
        p, q = (part / part.sum(1, keepdims=True) for part in (p, q))
        expected += (p * np.log(p / q)).sum(1) / 2
    assert np.allclose(found.numpy(), expected, rtol=1e-10)


def test_a_student_like_its_teacher_has_nothing_to_learn_from_relations() -> None:
    s = pairs(rows(2), rows(3), GROUPS)
    side = Similarities(s, s, torch.tensor(4.0))
    assert relational_loss(side, side).abs().max().item() < 1e-15


def by_name(name: str, s: PairFeatures, scale: torch.Tensor) -> torch.Tensor:
    """One loss with teacher rows that are fixed, row 3 missing."""
    teacher = pairs(rows(4), rows(5), GROUPS, [i != MISSING for i in range(N)])
    bank = pairs(rows(6, KEYS), rows(7, KEYS), BANK_GROUPS, [True, False, True])
    if name in FEATURE_KINDS:
        return feature_loss(s, teacher, name)  # type: ignore[arg-type]
    terms: dict[str, Callable[[], torch.Tensor]] = {
        "task": lambda: task_loss(s, s, scale),
        "cross": lambda: both_ways(s, teacher, scale),
        "bank": lambda: bank_loss(s, teacher, bank, scale),
        "relational": lambda: relational_loss(
            Similarities(s, s, scale), Similarities(teacher, teacher, torch.tensor(4.0))
        ),
    }
    return terms[name]()


@pytest.mark.parametrize("block", [losses.BLOCK, 2 * N])
@pytest.mark.parametrize("name", ["task", "cross", "bank", "relational", *FEATURE_KINDS])
def test_gradients_are_those_of_finite_differences(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "BLOCK", block)
    weights = torch.tensor([1.0, 0.5, 0.25, 0.0, 1.0])  # the missing row has none

    def value(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        values = by_name(name, PairFeatures(unit(image), unit(text), torch.tensor(GROUPS)), scale)
        return weighted_mean(values, weights, weights.sum())

    inputs = [tensor(3 * rows(8)).requires_grad_(), tensor(2 * rows(9)).requires_grad_()]
    assert gradcheck(value, (*inputs, torch.tensor(6.0, dtype=torch.float64, requires_grad=True)))


@pytest.mark.parametrize("name", ["task", "cross", "bank", "relational"])
def test_rows_of_two_ranks_give_the_mean_and_gradient_of_one_process(name: str) -> None:
    """Losses take the rows of all ranks as keys; here both ranks' graphs lie in one process."""
    whole = [tensor(rows(s, 6)).requires_grad_() for s in (2, 3)]
    t, b = [tensor(rows(s, 6)) for s in (4, 5)], [tensor(rows(s, KEYS)) for s in (6, 7)]
    group, there = torch.tensor([1, 1, 2, 3, 1, 4]), torch.tensor([True, True, False, True, True, True])
    bank = PairFeatures(*b, torch.tensor([4, 8, 9]))
    weights, scale = there.double(), torch.tensor(6.0)

    def values(part: slice) -> torch.Tensor:
        every, own = PairFeatures(*whole, group), PairFeatures(whole[0][part], whole[1][part], group[part])
        teacher = PairFeatures(*t, group, there[:, None].expand(-1, 2))
        own_teacher = teacher.rows(part)
        return {
            "task": lambda: task_loss(own, every, scale),
            "cross": lambda: both_ways(own, teacher, scale),
            "bank": lambda: bank_loss(own, teacher, bank, scale),
            "relational": lambda: relational_loss(
                Similarities(own, every, scale), Similarities(own_teacher, teacher, torch.tensor(4.0))
            ),
        }[name]()

    one = weighted_mean(values(slice(0, 6)), weights, weights.sum())
    halves = [slice(0, 3), slice(3, 6)]  # 2 and 3 available rows
    two = sum(weighted_mean(values(part), weights[part], weights.sum()) for part in halves)
    assert two.item() == pytest.approx(one.item(), abs=1e-12)  # type: ignore[union-attr]
    for a, b_ in zip(torch.autograd.grad(one, whole), torch.autograd.grad(two, whole), strict=True):  # type: ignore[arg-type]
        assert torch.allclose(a, b_, atol=1e-12)


@pytest.mark.parametrize("name", ["task", "cross", "relational"])
def test_some_rows_at_a_time_give_the_same_and_keep_no_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teachers, count, width = 3, 200, 16
    torch.manual_seed(0)
    group = torch.stack([torch.randint(0, 60, (count,)), torch.arange(count)], dim=1)
    there = torch.rand(teachers, count) < 0.9
    theirs = PairFeatures(
        *(unit(torch.randn(teachers, count, width)) for _ in range(2)), group, there[:, :, None].expand(-1, -1, 2)
    )
    learned = [torch.randn(*shape, width, requires_grad=True) for shape in ((count,), (teachers, count)) for _ in "it"]
    scale = torch.full((teachers, 1, 1), 5.0, requires_grad=True)

    def values() -> torch.Tensor:
        own = PairFeatures(unit(learned[0]), unit(learned[1]), group)
        if name == "task":
            return task_loss(own, own, scale[0, 0, 0])[None]
        if name == "relational":
            return relational_loss(Similarities(own, own, scale[0]), Similarities(theirs, theirs, torch.tensor(4.0)))
        return both_ways(PairFeatures(unit(learned[2]), unit(learned[3]), group), theirs, scale)

    def result() -> tuple[torch.Tensor, list[torch.Tensor], int]:
        """Values, gradients, and the largest tensor that is kept between forward and backward pass."""
        kept = [0]

        def note(saved: torch.Tensor) -> torch.Tensor:
            kept.append(saved.numel())
            return saved

        with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
            found = values()
        gradients = torch.autograd.grad((found * there).sum(), [*learned, scale], allow_unused=True)
        return found, [gradient for gradient in gradients if gradient is not None], max(kept)

    whole, gradients, most = result()
    assert most >= count * count
    monkeypatch.setattr(losses, "BLOCK", 37 * teachers * count)
    some, in_parts, least = result()
    assert some.shape == (1 if name == "task" else teachers, count)
    torch.testing.assert_close(some, whole, rtol=1e-6, atol=1e-6)
    assert len(gradients) == len(in_parts) >= 3
    for expected, found in zip(gradients, in_parts, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert least <= teachers * count * width


def test_a_batch_that_fits_is_compared_without_a_step_of_its_own() -> None:
    """Gradients of features that several terms use would be added in another order: other bits."""
    features = PairFeatures(torch.ones(3, 4), torch.ones(3, 4), torch.arange(3))
    assert features.rows(slice(None)) is features
    assert features.rows(slice(1, 3)).group.tolist() == [1, 2]


def test_a_row_without_weight_may_hold_anything() -> None:
    values = torch.tensor([2.0, float("inf"), 4.0], requires_grad=True)
    mean = weighted_mean(values, torch.tensor([1.0, 0.0, 3.0]), torch.tensor(4.0))
    assert mean.item() == 14 / 4
    assert torch.autograd.grad(mean, values)[0].tolist() == [0.25, 0.0, 0.75]
    assert weighted_mean(values, torch.zeros(3), torch.tensor(0.0)).item() == 0


def test_losses_of_half_precision_features_are_computed_in_float32() -> None:
    features = torch.tensor([[300.0, 400.0]], dtype=torch.float16)  # the square of the norm is beyond float16
    assert unit(features).dtype == torch.float32
    assert unit(features).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)]]


def test_pairs_of_one_caption_or_one_image_are_positives() -> None:
    """Pairs 0 and 1 share a caption, 1 and 2 an image; 0 and 2 share nothing, though both are alike to 1."""
    group = torch.tensor([[0, 0], [0, 1], [5, 1], [6, 7]])
    torch.manual_seed(0)
    image, text = (unit(torch.randn(4, 6, dtype=torch.float64)) for _ in range(2))
    pairs = PairFeatures(image, text, group)
    positives = [[0, 1], [0, 1, 2], [1, 2], [3]]
    found = task_loss(pairs, pairs, torch.tensor(3.0, dtype=torch.float64))
    for row, right in enumerate(positives):
        expected = 0.0
        for logits in (3 * image[row] @ text.T, 3 * text[row] @ image.T):
            expected += float(logits.logsumexp(0) - logits[right].mean()) / 2
        assert float(found[row]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.integration
def test_a_term_is_a_function_and_a_line_in_the_table(training_scene: Path, tmp_path: Path) -> None:
    """A module of its own adds one; a run learns from it and logs it."""
    path = write_run(training_scene, "own-term", epochs=1, loss={"agreement": 0.5})
    (tmp_path / "own_term.py").write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from mmkd.distill.terms import TERMS\n"
        "def agreement(c):\n"
        "    mine, theirs = ((side.image * side.text).sum(-1) for side in (c.mapped, c.teachers))\n"
        "    return (mine - theirs).square()\n"
        "TERMS['agreement'] = agreement\n"
        "from mmkd.distill.config import load_run\n"
        "from mmkd.distill.trainer import train\n"
        "train(load_run(Path(sys.argv[1])), say=print)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", str(tmp_path / "own_term.py"), str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"agreement\D+\d", done.stdout + done.stderr)

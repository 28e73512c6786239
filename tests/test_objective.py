"""The objective: known answers of the released loss, two real ranks against one process, shares and balance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import objective_scene as scene
import pytest
import torch
from forked import forked_ranks, peaceful

from mmkd.distill.draws import draws
from mmkd.distill.world import World

pytestmark = pytest.mark.integration

ALONE = World(torch.device("cpu"))
Array = np.ndarray


def released_loss(image: Array, text: Array, scale: float, t_image: Array, t_text: Array) -> dict[str, float]:
    """The loss of the release by its description, float64: teacher rows as they are, targets on the diagonal."""
    image, text = (x / np.sqrt((x * x).sum(1))[:, None] for x in (image, text))

    def cross_entropy(logits: Array) -> float:
        shifted = logits - logits.max(1)[:, None]
        return float(np.mean(np.log(np.exp(shifted).sum(1)) - np.diag(shifted)))

    constant = np.log(1 / 0.07)  # not its exponential
    task = (cross_entropy(scale * image @ text.T) + cross_entropy(scale * text @ image.T)) / 2
    feature = float(np.mean((image - t_image) ** 2) + np.mean((text - t_text) ** 2))
    cross = (cross_entropy(constant * image @ t_text.T) + cross_entropy(constant * text @ t_image.T)) / 2
    return {"task": task, "feature": feature, "cross": cross, "total": task + 50 * feature + cross}


def slope(value: Callable[[Array], float], at: Array) -> Array:
    """Central differences."""
    gradient = np.zeros_like(at)
    for index in np.ndindex(*at.shape):
        step = np.zeros_like(at)
        step[index] = 1e-5
        gradient[index] = (value(at + step) - value(at - step)) / 2e-5
    return gradient


def test_the_preset_mmkd_clip_is_the_released_loss_with_its_gradients(
    tmp_path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The release has a teacher for every row: here one is given to row 2.
    present = scene.PRESENT.copy()
    present[2, 1] = True
    monkeypatch.setattr(scene, "PRESENT", present)
    values = {name: array.astype(np.float64) for name, array in scene.arrays().items()}
    drawn = draws(scene.SEED, 2, torch.arange(100, 108), 1)[:, 0].tolist()
    teacher = {"image": [], "text": []}  # type: dict[str, list[Array]]
    chosen = []
    for row, u in enumerate(drawn):
        slug = np.array(scene.SLUGS)[present[row]][int(u * present[row].sum())]
        chosen.append(slug)
        for tower, kept in teacher.items():
            kept.append(values[f"{slug}/weight"] @ values[f"{slug}/{tower}"][row] + values[f"{slug}/bias"])
    assert len(set(chosen)) == 3, "teachers are mixed in this batch"
    t_image, t_text = np.array(teacher["image"]), np.array(teacher["text"])
    assert np.abs(np.linalg.norm(t_image, axis=1) - 1).min() > 0.01  # as stored, not of unit norm

    found = scene.results(ranks, "mmkd_clip", tmp_path / "found.pt")
    expected = released_loss(values["image"], values["text"], np.exp(2.5), t_image, t_text)
    assert {name: found[name].item() for name in expected} == pytest.approx(expected, rel=1e-6)
    by_image = slope(lambda x: released_loss(x, values["text"], np.exp(2.5), t_image, t_text)["total"], values["image"])
    by_text = slope(lambda x: released_loss(values["image"], x, np.exp(2.5), t_image, t_text)["total"], values["text"])
    for name, expected_slope in (("d image", by_image), ("d text", by_text)):
        scale = np.abs(expected_slope).max()
        assert np.allclose(found[name].numpy() / scale, expected_slope / scale, atol=1e-6)
    assert set(found) == {*expected, "d log_scale", "d image", "d text"}  # nothing of the teachers' side is learned


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """All recipes in two real processes."""
    out = tmp_path_factory.mktemp("ranks") / "2.pt"
    peaceful(forked_ranks(2, scene.write_results, list(scene.RECIPES), out))
    found: dict[str, dict[str, torch.Tensor]] = torch.load(out, weights_only=True)
    return found


@pytest.mark.parametrize("recipe", scene.RECIPES)
def test_two_ranks_give_terms_and_gradients_of_one_process(
    two_ranks: dict[str, dict[str, torch.Tensor]], recipe: str
) -> None:
    one, two = scene.terms_and_gradients(recipe, ALONE), two_ranks[recipe]
    assert one.keys() == two.keys()
    for name, expected in one.items():
        scale = max(1.0, expected.abs().max().item())
        assert torch.allclose(two[name] / scale, expected / scale, rtol=0, atol=1e-6), name
    assert all(torch.isfinite(value).all() for value in one.values())


def test_rows_without_a_teacher_learn_from_the_pairs_alone(tmp_path: Path, ranks: int) -> None:
    """Row 2 has none: of the teachers' terms only its own share of nothing reaches it."""
    gradient = scene.results(ranks, "teachers alone", tmp_path / "found.pt")["d image"]
    assert gradient[2].abs().max().item() == 0
    assert (gradient[[0, 1, 3, 4, 5, 6, 7]].abs().sum(1) > 0).all()


def test_terms_are_means_over_rows_of_means_over_their_teachers(tmp_path: Path, ranks: int) -> None:
    asked, rows, values = scene.objective("ours"), np.arange(scene.ROWS), scene.arrays()
    found = scene.results(ranks, "ours", tmp_path / "found.pt")["feature"].item()
    total, count = 0.0, 0
    for row in rows:
        teachers = np.flatnonzero(scene.PRESENT[row])
        losses = []
        for t in teachers:
            head = asked.heads.maps[t].weight.detach().numpy().astype(np.float64)
            loss = 0.0
            for tower in ("image", "text"):
                s, v = head @ values[tower][row], values[f"{scene.SLUGS[t]}/{tower}"][row]
                loss += 1 - float(s @ v) / float(np.linalg.norm(s) * np.linalg.norm(v))
            losses.append(loss)
        if losses:
            total, count = total + float(np.mean(losses)), count + 1
    assert count == 7
    assert found == pytest.approx(total / count, rel=1e-6)


def _relations(values: dict[str, Array], t: int, has: Array, here: Array) -> Array:
    """Each row's divergence of the student's similarities from the teacher's over the keys that both have."""
    scale = {"t": (9.0, 14.0, 20.0)[t], "s": np.exp(2.5)}
    slug, total = scene.SLUGS[t], np.zeros(scene.ROWS)
    for way, (query, key) in enumerate((("image", "text"), ("text", "image"))):
        keys = np.flatnonzero(here & has[:, 1 - way])
        for row in np.flatnonzero(here & has[:, way]):
            log = {}
            for who, prefix in (("t", f"{slug}/"), ("s", "")):
                a, b = values[prefix + query][row], values[prefix + key][keys]
                logits = scale[who] * (b @ a) / np.linalg.norm(a) / np.linalg.norm(b, axis=1)
                log[who] = logits - np.log(np.exp(logits).sum())
            total[row] += np.sum(np.exp(log["t"]) * (log["t"] - log["s"])) / 2
    return total


def test_rows_without_a_pair_learn_from_the_terms_of_the_tower_that_they_have(tmp_path: Path, ranks: int) -> None:
    """Against loops over NumPy: rows 1 and 6 are lone images, row 4 is a lone text."""
    values = {name: array.astype(np.float64) for name, array in scene.arrays().items()}
    found, asked = scene.results(ranks, "unpaired", tmp_path / "found.pt"), scene.objective("unpaired")
    has, pairs, group = scene.HAS[: scene.ROWS], np.array([0, 2, 3, 5, 7]), np.array(scene.GROUPS)
    shares = scene.PRESENT / np.maximum(scene.PRESENT.sum(1, keepdims=True), 1)

    def unit(x: Array) -> Array:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def contrast(queries: Array, keys: Array, scale: float, kept: Array) -> Array:
        logits = scale * unit(queries)[kept] @ unit(keys)[kept].T
        same = group[kept][:, None] == group[kept]
        return np.log(np.exp(logits).sum(1)) - np.where(same, logits, 0).sum(1) / same.sum(1)

    image, text = values["image"], values["text"]
    task = contrast(image, text, np.exp(2.5), pairs) + contrast(text, image, np.exp(2.5), pairs)
    expected = {"task": float(task.mean() / 2), "feature": 0.0, "cross": 0.0, "relational": 0.0}
    of_pairs = 0.0
    for t, slug in enumerate(scene.SLUGS):
        here, head = scene.PRESENT[:, t], asked.heads.maps[t].weight.detach().numpy().astype(np.float64)
        mine = {tower: unit(values[tower] @ head.T) for tower in ("image", "text")}
        theirs = {tower: unit(values[f"{slug}/{tower}"][: scene.ROWS]) for tower in mine}
        near = np.stack([1 - (mine[tower] * theirs[tower]).sum(1) for tower in mine], axis=1)
        expected["feature"] += float(shares[:, t] @ (near * has).sum(1))
        expected["relational"] += float(shares[:, t] @ _relations(values, t, has, here))
        kept = pairs[here[pairs]]
        both = contrast(mine["image"], theirs["text"], 1 / 0.07, kept) + contrast(
            mine["text"], theirs["image"], 1 / 0.07, kept
        )
        expected["cross"] += float(shares[kept, t] @ both / 2)
        of_pairs += float(shares[kept, t].sum())
    for name in ("feature", "relational"):
        expected[name] /= shares.sum()
    expected["cross"] /= of_pairs
    assert {name: found[name].item() for name in expected} == pytest.approx(expected, rel=1e-5)
    assert not found["d image"][4].any()
    assert not found["d text"][[1, 6]].any()
    assert found["d image"][[1, 6]].abs().sum(1).gt(0).all()
    assert found["d text"][4].abs().sum() > 0


def test_a_key_counts_by_what_its_teacher_knows_of_its_caption_and_of_its_image(tmp_path: Path, ranks: int) -> None:
    asked, batch, values = scene.objective("known"), scene.batch_of("known", np.arange(scene.ROWS)), scene.arrays()
    assert asked.side is not None
    scores = asked.side.policy.scores(batch)
    shares = asked.side.policy.shares(batch, scores).double().numpy()
    known = asked.side.policy.knowledge(batch, scores)
    assert known is not None
    of_caption, of_image = known.double().numpy().transpose(2, 0, 1)
    student = {tower: values[tower].astype(np.float64) for tower in ("image", "text")}
    total = 0.0
    for t, (slug, scale) in enumerate(zip(scene.SLUGS, [9.0, 14.0, 20.0], strict=True)):
        theirs = {tower: values[f"{slug}/{tower}"].astype(np.float64) for tower in ("image", "text")}
        keys = np.flatnonzero(scene.PRESENT[:, t])
        for row in np.flatnonzero(shares[:, t]):
            ways = []
            for query, key, share in (("image", "text", of_caption), ("text", "image", of_image)):
                p = np.exp([scale * cosine(theirs[query][row], theirs[key][k]) + share[k, t] for k in keys])
                q = np.exp([np.exp(2.5) * cosine(student[query][row], student[key][k]) for k in keys])
                p, q = p / p.sum(), q / q.sum()
                ways.append(float((p * np.log(p / q)).sum()))
            total += shares[row, t] * sum(ways) / 2
    found = scene.results(ranks, "known", tmp_path / "found.pt")["relational"].item()
    assert found == pytest.approx(total / shares.sum(), rel=1e-5)


def cosine(one: Array, other: Array) -> float:
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


def test_equal_balance_gives_every_teacher_a_part_of_one_size() -> None:
    from mmkd.distill.objective import Reduction

    values = torch.tensor([[1.0, 100.0], [3.0, 300.0]], requires_grad=True)
    shares = torch.full((2, 2), 0.5)
    (even,) = Reduction("equal", ["x"], 2)({"x": values}, shares, ALONE, {"x": torch.tensor(True)}).values()
    (plain,) = Reduction("none", ["x"], 2)({"x": values}, shares, ALONE, {"x": torch.tensor(True)}).values()
    assert even.item() == pytest.approx(plain.item()) == pytest.approx(101.0)
    gradient = torch.autograd.grad(even, values)[0]
    # Each value's part of the whole, in shares of its teacher's sum, is the same for both teachers.
    assert torch.allclose(gradient[:, 0] * 2, gradient[:, 1] * 200)


def test_learned_balance_settles_where_each_variance_is_its_loss() -> None:
    """exp(-u) m + u is least at u = log m."""
    from mmkd.distill.objective import Reduction

    reduction = Reduction("learned", ["x", "y"], 2)
    with torch.no_grad():
        reduction.log_variances.copy_(torch.tensor([0.0, 0.0, 2.0, 200.0]).log().nan_to_num(neginf=0.0))
    values = torch.tensor([[1.0, 100.0], [3.0, 300.0]])
    found = reduction({"y": values}, torch.full((2, 2), 0.5), ALONE, {"y": torch.tensor(True)})["y"]
    found.backward()
    assert found.item() == pytest.approx((1 + np.log(2) + 1 + np.log(200)) / 2, rel=1e-6)
    assert reduction.log_variances.grad is not None
    assert reduction.log_variances.grad.abs().max().item() < 1e-6

"""A small batch with three teachers of widths 3, 5 and 3, made in memory, and what one of many ranks makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from forked import forked_ranks, peaceful

from mmkd.distill.alignment import Alignment, AlignmentCard, TeacherMap
from mmkd.distill.batches import Batch
from mmkd.distill.config import LossConfig, PolicyConfig
from mmkd.distill.objective import Objective, StudentFeatures, TeacherSide
from mmkd.distill.policies import make_policy
from mmkd.distill.presets import compose
from mmkd.distill.teacher_features import TeacherTargets
from mmkd.distill.teacher_side import Bank, Heads, Preparation
from mmkd.distill.world import World, join_ranks
from mmkd.store.layout import TOWERS

ROWS, WIDTH, SEED, STEP = 8, 4, 11, 3
# The first and the last are judged together, the one between them apart.
SLUGS, WIDTHS = ("a", "b", "c"), (3, 5, 3)
# Row 2 has no teacher, row 7 one; ranks 0 and 1 of two hold different numbers of rows of each.
PRESENT = np.array([[1, 1, 1], [0, 1, 1], [0, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1], [1, 0, 1], [0, 1, 0]], dtype=bool)
GROUPS = [4, 5, 6, 4, 7, 8, 9, 5]
BANK_ROWS = 20
# Of the recipes of rows without a pair: 1 and 6 are lone images, 4 is a lone text.
HAS = np.array([[True, i not in (1, 6)] for i in range(ROWS)] + [[True, True]] * (BANK_ROWS - ROWS))
HAS[4] = [False, True]
CLIP = compose({"preset": "mmkd_clip"}, Path("run.yaml"))
RECIPES: dict[str, dict[str, Any]] = {
    "mmkd_clip": {"loss": CLIP["loss"], "policy": CLIP["policy"]},
    "ours": {"loss": {}},
    "everything": {
        "loss": {"bank": 1.0, "relational": 0.5, "feature_kind": "smooth_l1", "bank_rows": {"size": 6, "refresh": 2}},
        "policy": {"kind": "weighted", "weights": {"b": 3.0}, "drop": 0.5},
    },
    "known": {"loss": {"relational": 2.0}, "policy": {"kind": "best", "by": "corpus", "keys": "known"}},
    "equal": {"loss": {"balance": "equal"}},
    "teachers alone": {"loss": {"task": 0.0}},
    "one tower": {"loss": {}, "towers": [("image", "text"), ("image",), ("image", "text")]},
    "learned": {"loss": {"balance": "learned", "relational": 2.0}, "policy": {"kind": "one"}},
    "unpaired": {"loss": {"relational": 0.5}, "unpaired": True},
    "unpaired, everything": {
        "loss": {"bank": 1.0, "relational": 0.5, "balance": "equal", "bank_rows": {"size": 6, "refresh": 2}},
        "policy": {"kind": "best", "by": "corpus", "keys": "known", "drop": 0.5},
        "towers": [("image", "text"), ("image",), ("image", "text")],
        "unpaired": True,
    },
}


def arrays() -> dict[str, np.ndarray]:
    """All numbers of the scene, float32, by name."""
    rng = np.random.default_rng(0)
    found = {"image": rng.normal(size=(ROWS, WIDTH)), "text": rng.normal(size=(ROWS, WIDTH))}
    for slug, width in zip(SLUGS, WIDTHS, strict=True):
        found |= {f"{slug}/{tower}": rng.normal(size=(BANK_ROWS, width)) for tower in ("image", "text")}
        found[f"{slug}/weight"] = rng.normal(size=(WIDTH, width)) * 0.5
        found[f"{slug}/bias"] = rng.normal(size=WIDTH) * 0.1
    return {name: values.astype(np.float32) for name, values in found.items()}


def alignment(values: dict[str, np.ndarray]) -> Alignment:
    """One affine map a teacher to the student's width."""
    card = AlignmentCard(
        method="test", settings={}, dim=WIDTH, unit_input=False, teachers=dict.fromkeys(SLUGS, "-"),
        widths=dict(zip(SLUGS, WIDTHS, strict=True)), corpus="-", rows=1,
    )  # fmt: skip
    maps = {}
    for slug in SLUGS:
        bias = torch.tensor(values[f"{slug}/bias"])
        maps[slug] = TeacherMap(torch.tensor(values[f"{slug}/weight"]), bias, bias)
    return Alignment(card, maps)


def has_of(recipe: str) -> np.ndarray:
    """Which rows have an image, a text."""
    return HAS if RECIPES[recipe].get("unpaired") else np.ones_like(HAS)


def targets_of(recipe: str, rows: np.ndarray) -> tuple[TeacherTargets, ...]:
    """What the teachers say of these rows; rows from 8 on are the bank's own and every teacher has them."""
    values, towers = arrays(), RECIPES[recipe].get("towers", [TOWERS] * 3)
    present = np.concatenate([PRESENT, np.ones((BANK_ROWS - ROWS, 3), dtype=bool)])[rows]
    return tuple(
        TeacherTargets(
            *(torch.tensor(values[f"{slug}/{tower}"][rows] * present[:, [t]]) for tower in ("image", "text")),
            torch.tensor(present[:, [t]] & has_of(recipe)[rows] & [tower in towers[t] for tower in TOWERS]),
        )
        for t, slug in enumerate(SLUGS)
    )


def objective(recipe: str) -> Objective:
    """The objective of a recipe, the same weights each time."""
    torch.manual_seed(0)
    loss = LossConfig.model_validate(RECIPES[recipe]["loss"])
    policy = PolicyConfig.model_validate(RECIPES[recipe].get("policy", {}))
    aligned = recipe in ("mmkd_clip", "learned")
    prepare = Preparation(SLUGS, alignment(arrays()) if aligned else None, loss.unit_teachers)
    heads = Heads("none", WIDTH, SLUGS, [WIDTH] * 3) if aligned else Heads("linear", WIDTH, SLUGS, WIDTHS)
    rows, cpu = np.arange(BANK_ROWS), torch.device("cpu")
    towers, gather = RECIPES[recipe].get("towers", [TOWERS] * 3), partial(targets_of, recipe)
    teachers: Any = SimpleNamespace(slugs=SLUGS, towers=towers, gather=gather)
    groups = np.where(has_of(recipe)[:, ::-1], rows[:, None], -1)
    shares = make_policy(policy, SEED, teachers, rows, groups, cpu, unpaired=RECIPES[recipe].get("unpaired", False))
    bank = None
    if loss.bank:
        paired = rows[has_of(recipe).all(axis=1)]
        bank = Bank(paired, paired % 9, gather, prepare, config=loss.bank_rows, seed=SEED, device=cpu)
    return Objective(loss, TeacherSide(heads, prepare, shares, [9.0, 14.0, 20.0], bank, towers))


def batch_of(recipe: str, rows: np.ndarray) -> Batch:
    """These rows, standing at positions 100 and on of epoch 2."""
    nothing = torch.zeros(len(rows), 0)
    return Batch(
        step=STEP, epoch=2, rows=rows, positions=torch.from_numpy(rows + 100), images=nothing, tokens=nothing,
        columns=(0,) * len(rows), groups=torch.tensor(GROUPS)[rows], targets=targets_of(recipe, rows),
        has=torch.tensor(HAS[rows]) if RECIPES[recipe].get("unpaired") else None,
    )  # fmt: skip


def terms_and_gradients(recipe: str, world: World) -> dict[str, torch.Tensor]:
    """Terms of the whole batch, the total, and its gradients with respect to all that can learn."""
    values, rows = arrays(), np.split(np.arange(ROWS), world.size)[world.rank]
    image, text = (torch.tensor(values[name][rows], requires_grad=True) for name in ("image", "text"))
    log_scale = torch.tensor(2.5, requires_grad=True)
    asked = objective(recipe)
    terms = asked(StudentFeatures(image, text, log_scale), batch_of(recipe, rows), world)
    asked.total(terms).backward()
    learned = {"log_scale": log_scale} | dict(asked.named_parameters())
    found = {name: world.sum(term) for name, term in terms.items()}
    found["total"] = asked.total(found)
    # A parameter is shared by the ranks, so its parts are summed; a feature belongs to one.
    found |= {
        f"d {name}": world.sum(p.grad if p.grad is not None else torch.zeros_like(p)) for name, p in learned.items()
    }
    assert image.grad is not None
    assert text.grad is not None
    return found | {"d image": world.gather(image.grad), "d text": world.gather(text.grad)}


def results(ranks: int, recipe: str, note: Path) -> dict[str, torch.Tensor]:
    """`terms_and_gradients` in so many real ranks, which leave a note."""
    peaceful(forked_ranks(ranks, write_results, [recipe], note))
    found: dict[str, torch.Tensor] = torch.load(note)[recipe]
    return found


def write_results(recipes: Sequence[str], out: Path) -> None:
    """Write terms and gradients of these recipes, over all ranks, to `out`."""
    with join_ranks(1.0) as this:
        found = {recipe: terms_and_gradients(recipe, this) for recipe in recipes}
        if this.first:
            torch.save(found, out)

"""Do lone images, views, further captions and vision-only teachers help a student? Paired over seeds, with intervals.

    export PYTHONPATH=build/types
    python -P benchmarks/richer_data.py OUT [--seeds 0,1,2,3,4] [--only EXPERIMENT] [--docs]

Corpus, student, scores and training are those of distillation.py, whose OUT may be given: corpus and tower outputs are
kept there. All arms of an experiment take the same number of steps of the same size. The first arm is what the others
are held against; intervals are corrected for the number of these. `--docs` writes the tables into docs/distillation.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmkd.benchmarks import distillation as base
from mmkd.benchmarks.distillation import BATCH, Material, Scenario
from mmkd.benchmarks.random_towers import SIZE
from mmkd.demo.corpus import VAGUE_SHARE, WRONG_SHARE
from mmkd.demo.specialists import WIDTH, load_towers, tower_features
from mmkd.distill.batches import Batch, BatchPlan, Schedule
from mmkd.distill.draws import draws
from mmkd.distill.objective import make_objective
from mmkd.distill.optimizer import lr_factor
from mmkd.distill.teacher_features import TeacherTargets
from mmkd.distill.world import World
from mmkd.evaluate.heads.torch_training import reproducible
from mmkd.store.layout import TOWERS

VIEWS, CAPTIONS = 4, 4
CPU = torch.device("cpu")
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Arm:
    """One way to train. kinds: what rows there are besides the pairs."""

    recipe: dict[str, Any]
    kinds: tuple[str, ...] = ()
    captions: int = 1
    student_views: bool = False
    teacher_views: bool = False
    vision_only: bool = False


PAIRS_ALONE = base.RECIPES[base.ALONE]
EXPERIMENTS: dict[str, tuple[Scenario, dict[str, Arm]]] = {
    "lone images": (
        Scenario(share=0.1),
        {
            "154 pairs": Arm({}),
            "and 1,382 lone images": Arm({}, ("image",)),
            "and 1,382 lone texts": Arm({}, ("text",)),
            "and both": Arm({}, ("image", "text")),
        },
    ),
    "captions": (
        Scenario(share=0.1),
        {
            "one caption": Arm({}),
            "four captions": Arm({}, captions=CAPTIONS),
        },
    ),
    "captions, pairs alone": (
        Scenario(share=0.1),
        {
            "one caption": Arm(PAIRS_ALONE),
            "four captions": Arm(PAIRS_ALONE, captions=CAPTIONS),
        },
    ),
    "vision-only teachers": (
        Scenario(vague=VAGUE_SHARE, wrong=WRONG_SHARE, overlap=3),
        {
            "three CLIP teachers": Arm({}),
            "and three vision-only": Arm({}, vision_only=True),
        },
    ),
    "views": (
        Scenario(),
        {
            "crops against features of the whole image": Arm({}, student_views=True),
            "views against their own features": Arm({}, student_views=True, teacher_views=True),
            "whole images": Arm({}),
        },
    ),
    "views, random weights": (
        Scenario(random=True),
        {
            "crops against features of the whole image": Arm({"loss": {"task": 0.1}}, student_views=True),
            "views against their own features": Arm({"loss": {"task": 0.1}}, student_views=True, teacher_views=True),
        },
    ),
}


def view_pictures(made: Material, out: Path) -> list[Path]:
    """The views of all training images as files, image by image; made once by the recipe's defaults."""
    from mmkd.base.images.views import Views

    recipe, folder, found = Views(count=VIEWS, seed=0), out / "views", []
    folder.mkdir(exist_ok=True)
    for row in made.train:
        for number in range(1, VIEWS + 1):
            found.append(folder / f"{row['key']}-{number}.png")
            if not found[-1].is_file():
                with Image.open(out / "corpus" / row["image"]) as picture:
                    recipe.picture(picture, row["key"], number).save(found[-1])
    return found


def kept(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """A tensor that is computed once."""
    if not path.is_file():
        torch.save(make(), path)
    found: Tensor = torch.load(path)
    return found


def tower_views(made: Material, out: Path) -> Tensor:
    """What the towers make of the views, float32 (N * VIEWS, 1280)."""

    def make() -> Tensor:
        # Images alone are asked for: caption and class are of no use.
        rows = [made.train[0] | {"image": str(path.relative_to(out))} for path in view_pictures(made, out)]
        return tower_features(load_towers(), rows, out).image

    return kept(out / "views.pt", make)


def small_views(made: Material, out: Path) -> Tensor:
    """The views as the student that begins from random weights sees them, float32 (N * VIEWS, 3, 64, 64)."""
    from mmkd.benchmarks.random_towers import read_pixels

    return kept(
        out / f"views-{SIZE}.pt", lambda: read_pixels(out, [str(p.relative_to(out)) for p in view_pictures(made, out)])
    )


class Teachers:
    """What `TeacherFeatures` gives a run: features of each row's image, or of its view, and of its caption."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        heads = scene.made.teachers[scene.scenario.overlap]
        slugs = list(heads)
        if scene.scenario.overlap == 3:  # three cover all domains, three others cover them again
            slugs = slugs[::3] + (slugs[1::3] if scene.arm.vision_only else [])
        self.slugs = tuple(slugs)
        self.heads = [heads[slug] for slug in slugs]
        self.towers = tuple(
            TOWERS if number < 3 or not scene.arm.vision_only else ("image",) for number in range(len(slugs))
        )
        self.cards = {
            slug: SimpleNamespace(logit_scale=float(head.logit_scale.exp()), towers=towers)
            for slug, head, towers in zip(slugs, self.heads, self.towers, strict=True)
        }
        self.dims = (WIDTH,) * len(slugs)

    def gather(self, rows: Rows, epoch: int | None = None) -> tuple[TeacherTargets, ...]:
        """Features of these rows; of the view that an epoch draws where the arm has it so."""
        scene, has = self.scene, torch.from_numpy(self.scene.has[rows])
        image = scene.tower_image[rows]
        if epoch is not None and scene.arm.teacher_views:
            image = scene.tower_views[scene.places[rows] * VIEWS + scene.drawn_views(rows, epoch)]
        text = scene.tower_text[torch.from_numpy(scene.drawn_captions(rows, epoch))]
        out = []
        for head, towers in zip(self.heads, self.towers, strict=True):
            own = torch.tensor([tower in towers for tower in TOWERS])
            found = (image @ head.image.T) * has[:, :1], (text @ head.text.T) * (has[:, 1:] & own[1])
            out.append(TeacherTargets(*found, has & own))
        return tuple(out)


class Scene:
    """Rows of one arm under one seed. places: of each row in the corpus. said: (n, K) numbers of its captions."""

    def __init__(self, made: Material, out: Path, scenario: Scenario, arm: Arm, seed: int) -> None:
        self.made, self.scenario, self.arm, self.seed = made, scenario, arm, seed
        first = base.setting(made, scenario, seed)
        paired, rows = first.places.numpy(), list(first.rows)
        others = np.setdiff1d(np.arange(len(made.train)), paired)
        kinds = [[True, True]] * len(paired)
        self.places = paired
        for kind in arm.kinds:
            self.places = np.concatenate([self.places, others])
            rows += [made.train[place] for place in others]
            kinds += [[kind == "image", kind == "text"]] * len(others)
        self.has = np.array(kinds)
        self.captions = list(made.texts)
        number = {caption: place for place, caption in enumerate(self.captions)}
        by_class: dict[str, list[str]] = {}
        for row in made.train:
            if row["caption"] not in by_class.setdefault(row["class"], []):
                by_class[row["class"]].append(row["caption"])
        rng = np.random.default_rng([seed, 11])
        said = []
        for row in rows:
            more = [caption for caption in by_class[row["class"]] if caption != row["caption"]]
            chosen = [row["caption"], *(more[i] for i in rng.permutation(len(more)))][: arm.captions]
            said.append([number[caption] for caption in np.resize(chosen, arm.captions)])
        self.said = np.array(said)
        self.tower_image = made.image[self.places]
        self.tower_text = torch.stack(list(made.texts.values()))
        self.tower_views = tower_views(made, out) if arm.student_views else torch.empty(0)

    def drawn_views(self, rows: Rows, epoch: int) -> Rows:
        """The view of each row in an epoch, from 0."""
        return (draws(self.seed, epoch, torch.from_numpy(rows), 1)[:, 0].numpy() * VIEWS).astype(np.int64)

    def drawn_captions(self, rows: Rows, epoch: int | None) -> Rows:
        """The number of each row's caption in an epoch; its own without one."""
        if epoch is None:
            return self.said[rows, 0]
        drawn = draws(self.seed, epoch, torch.from_numpy(rows), 2)[:, 1].numpy() * self.arm.captions
        return self.said[rows, drawn.astype(np.int64)]

    def groups(self, rows: Rows, epoch: int | None) -> Rows:
        """Numbers of the rows' captions and images, -1 for none."""
        found = np.stack([self.drawn_captions(rows, epoch), self.places[rows]], axis=1)
        return np.where(self.has[rows][:, ::-1], found, -1)


def run(made: Material, out: Path, scenario: Scenario, arm: Arm, seed: int) -> dict[str, float]:
    """Train one student; its scores in [0, 1]."""
    scene = Scene(made, out, scenario, arm, seed)
    config, teachers, rows = base.run_config(arm.recipe, seed), Teachers(scene), np.arange(len(scene.has))
    seen, student = base.beginning(made, out, scenario, seed)
    image, views = seen.image[scene.places], torch.empty(0)
    if arm.student_views:
        views = small_views(made, out) if scenario.random else scene.tower_views
    text = torch.stack([seen.texts[caption] for caption in scene.captions])
    steps, rate = (
        (base.RANDOM_STEPS, base.RANDOM_LEARNING_RATE) if scenario.random else (base.STEPS, base.LEARNING_RATE)
    )
    asked: Any = teachers if config.loss.teacher_terms else None
    objective = make_objective(config, WIDTH, asked, rows, scene.groups(rows, None), CPU)
    parts = [part for module in (student, objective) for part in module.parameters()]
    decays = [
        {"params": [p for p in parts if (p.ndim > 1) == big], "weight_decay": base.WEIGHT_DECAY * big}
        for big in (True, False)
    ]
    optimizer = torch.optim.AdamW(decays, lr=rate, betas=(0.9, 0.98), fused=True)
    plan = BatchPlan(rows, Schedule(len(rows), BATCH, -(-steps // (len(rows) // BATCH))), seed)
    for step, epoch, start, batch_rows in plan.steps(0):
        if step == steps:
            break
        has = torch.from_numpy(scene.has[batch_rows])
        batch = Batch(
            step=step, epoch=epoch, rows=batch_rows, positions=torch.arange(start, start + BATCH),
            images=torch.from_numpy(batch_rows), tokens=torch.from_numpy(batch_rows), columns=(),
            groups=torch.from_numpy(scene.groups(batch_rows, epoch)),
            targets=teachers.gather(batch_rows, epoch) if asked else (), has=None if has.all() else has,
        )  # fmt: skip
        pixels = image[batch_rows]
        if arm.student_views:
            pixels = views[scene.places[batch_rows] * VIEWS + scene.drawn_views(batch_rows, epoch)]
        features = student(pixels, text[scene.drawn_captions(batch_rows, epoch)])
        for group in optimizer.param_groups:
            group["lr"] = rate * lr_factor(step, base.WARM_UP, steps)
        optimizer.zero_grad()
        torch.autograd.backward([objective.total(objective(features, batch, World(CPU)))])
        optimizer.step()
        with torch.no_grad():
            student.log_scale.clamp_(0, math.log(100))
    student.eval()
    with torch.no_grad():
        features = student(seen.test_image, text)
        return base.scores(made, features.image, dict(zip(scene.captions, features.text, strict=True)))


def table(name: str, found: dict[str, dict[int, dict[str, float]]], seeds: list[int]) -> str:
    """Markdown of one experiment."""
    reference, done = next(iter(found)), [arm for arm, runs in found.items() if set(seeds) <= set(runs)]
    lines = [f"| {name} | balanced accuracy, % | AUROC, % | minus the first row | AUROC |", "|---|---:|---:|---:|---:|"]
    for arm, runs in found.items():
        if arm not in done:
            lines.append(f"| {arm} | not run | | | |")
            continue
        scores = {key: [100 * runs[seed][key] for seed in seeds] for key in ("bacc", "auroc")}
        cells = [f"{statistics.mean(scores['bacc']):.1f} ({statistics.stdev(scores['bacc']):.1f})",
                 f"{statistics.mean(scores['auroc']):.1f}"]  # fmt: skip
        for key, values in scores.items():
            paired = [a - 100 * found[reference][s][key] for a, s in zip(values, seeds, strict=True)]
            half = base.half_width(paired, max(1, len(done) - 1))
            cells.append("" if arm == reference else f"{statistics.mean(paired):+z.1f} ± {half:.1f}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is left, then print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--only", choices=EXPERIMENTS, action="append", help="an experiment; again for more")
    parser.add_argument("--docs", action="store_true")
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    (given.out / "richer").mkdir(parents=True, exist_ok=True)
    made = base.kept_material(given.out, None, "demo")
    text = base.DOCS.read_text()
    for name in given.only or EXPERIMENTS:
        scenario, arms = EXPERIMENTS[name]
        found: dict[str, dict[int, dict[str, float]]] = {arm: {} for arm in arms}
        for seed in seeds:
            for arm, settings in arms.items():
                path = given.out / "richer" / f"{name} {arm} {seed}.json".replace(" ", "-").replace(",", "")
                if not path.is_file():
                    started = time.perf_counter()
                    with reproducible(seed):
                        path.write_text(json.dumps(run(made, given.out, scenario, settings, seed)))
                    seconds = time.perf_counter() - started
                    print(f"{name}, {arm}, seed {seed}: {path.read_text()} in {seconds:.0f} s", flush=True)
                found[arm][seed] = json.loads(path.read_text())
        content = table(name, found, seeds)
        print(f"\n{content}")
        begin, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, _, behind = text.partition(begin)
        text = before + begin + content + end + behind.partition(end)[2]
    if given.docs:
        base.DOCS.write_text(text)


if __name__ == "__main__":
    main()

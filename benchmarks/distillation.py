"""What do teachers give a student, and which recipe gets most out of them? Real images, five seeds, paired intervals.

    export PYTHONPATH=build/types
    python -P benchmarks/distillation.py OUT [--small-sets DATA] [--seeds 0,1,2,3,4] [--only SCENARIO] [--docs]
    python -P benchmarks/distillation.py OUT --finished --docs     runs nothing: docs/distillation.md of what is there

A student is trained for every scenario, recipe and seed; finished runs are kept in OUT, so that the command may be
stopped and given again. `--docs` writes the tables, with `--only` those of the scenarios named, into
docs/distillation.md.

Corpora: the demo's (24 classes in nine domains) and, with `--small-sets`, eight classes of Medical MNIST and
BreastMNIST (medical_mnist_small.npz, breastmnist.npz). Teachers are the demo's specialists, tuned on clean pairs that
the student's corpus does not hold; on the second corpus four of the nine know something and five are strangers to every
image.

The student has EfficientNet-Lite0 (ImageNet) and MiniLM, both locked, and learns a linear map after each: the outputs
of the towers are computed once and a run costs seconds. Objective, policies, heads and the order of rows are the
product's own; crops are fixed. In the scenarios `random weights` towers of 0.4 million parameters each begin from
random weights and learn (random_towers.py): a run costs a minute.

A seed decides captions, order, first weights and the rows of a tenth. A score is the balanced accuracy of zero-shot
classification over all classes, mean over domains, on held-out images with prompts of other wording.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import t as student_t
from torch import Tensor, nn

from mmkd.benchmarks.random_towers import IMAGE_WIDTH, TEXT_WIDTH, ImageTower, TextTower, read_pixels, tokenize
from mmkd.demo.corpus import COLUMNS, VAGUE, VAGUE_SHARE, WRONG_SHARE, as_found, build_corpus
from mmkd.demo.specialists import WIDTH, Features, Heads, load_towers, random_heads, tower_features, train_heads
from mmkd.distill.batches import Batch, BatchPlan, Schedule
from mmkd.distill.config import RunConfig
from mmkd.distill.losses import unit
from mmkd.distill.objective import StudentFeatures, make_objective
from mmkd.distill.optimizer import lr_factor
from mmkd.distill.order import Windows
from mmkd.distill.policies import Standard, agreement, familiarity
from mmkd.distill.presets import compose
from mmkd.distill.teacher_features import TeacherTargets
from mmkd.distill.world import World
from mmkd.evaluate.heads.torch_training import reproducible
from mmkd.evaluate.metrics import macro_auroc
from mmkd.store.layout import TOWERS, Tower

DOCS = Path(__file__).parent.parent / "docs" / "distillation.md"
BATCH, STEPS, LEARNING_RATE, WARM_UP, WEIGHT_DECAY = 64, 120, 3e-3, 20, 0.05
RANDOM_STEPS, RANDOM_LEARNING_RATE = 160, 2e-3
"""Of students that begin from random weights."""
FITS = 0.8
"""A caption is taken for right when its cosine by the teacher that knows the image best reaches this share of the
largest that this teacher gives any caption of the corpus."""

# Class, domain (a specialist of the demo is at home there), modality, captions, prompts.
Class = tuple[str, str, str, tuple[str, ...], tuple[str, ...]]
MEDICAL_MNIST: tuple[Class, ...] = (
    ("abdomen-ct", "ct", "CT",
     ("axial CT of the abdomen", "abdominal CT, liver and bowel", "computed tomography of the upper abdomen",
      "CT slice at the level of the kidneys", "abdominal computed tomography, soft tissue", "CT of abdominal organs"),
     ("CAT scan of the belly", "tomogram of the viscera below the diaphragm", "CT through the abdominal cavity")),
    ("breast-mri", "body-mri", "MRI",
     ("axial MRI of the breast", "breast MR image, both breasts", "magnetic resonance imaging of the breast",
      "MRI slice of the breasts and chest wall", "contrast-enhanced breast MRI", "MR image of mammary tissue"),
     ("magnetic resonance picture of the mammary glands", "MR tomogram of the breasts", "breast scan by MRI")),
    ("chest-xray", "radiograph", "radiography",
     ("frontal chest radiograph", "chest X-ray of lungs and heart", "plain film of the thorax",
      "posteroanterior radiograph of the chest", "X-ray of the lungs and ribs", "chest radiography, frontal view"),
     ("roentgenogram of the thorax", "X-ray picture of both lungs", "a PA film of the rib cage")),
    ("chest-ct", "ct", "CT",
     ("axial CT of the chest", "chest CT, lungs and mediastinum", "computed tomography of the thorax",
      "CT slice through the lungs", "thoracic computed tomography", "CT of the lungs and heart"),
     ("CAT scan of the thorax", "tomogram of the lungs", "CT through the thoracic cavity")),
    ("hand-xray", "radiograph", "radiography",
     ("radiograph of the hand", "X-ray of the bones of the hand", "hand X-ray, fingers and wrist",
      "plain film of a hand", "radiography of the hand, posteroanterior view", "X-ray of carpal bones and fingers"),
     ("roentgenogram of the fingers", "X-ray picture of metacarpals and phalanges", "a film of hand bones")),
    ("head-ct", "ct", "CT",
     ("axial CT of the head", "head CT, skull and brain", "computed tomography of the brain",
      "CT slice of the skull and brain", "non-contrast head computed tomography", "CT of the brain without contrast"),
     ("CAT scan of the cranium", "tomogram of the cerebrum inside the skull", "CT through the head")),
)  # fmt: skip
BREAST: tuple[Class, ...] = (
    ("breast-ultrasound-malignant", "ultrasound", "ultrasound",
     ("breast ultrasound, malignant lesion", "ultrasound of breast cancer", "sonogram of a malignant breast tumour",
      "B-mode image of a carcinoma of the breast", "malignant mass in breast ultrasound", "breast carcinoma, sonogram"),
     ("sonography of a cancer of the breast", "ultrasonic picture of a malignant breast nodule",
      "suspicious breast mass seen with ultrasound")),
    ("breast-ultrasound-benign", "ultrasound", "ultrasound",
     ("breast ultrasound, normal or benign", "ultrasound of a healthy breast", "sonogram of a benign breast lesion",
      "B-mode image of benign breast tissue", "benign finding in breast ultrasound", "normal breast, sonogram"),
     ("sonography of a breast without cancer", "ultrasonic picture of a harmless breast nodule",
      "unremarkable breast seen with ultrasound")),
)  # fmt: skip
SETS = {"medical_mnist_small": MEDICAL_MNIST, "breastmnist": BREAST}

Row = dict[str, str]


@dataclass(frozen=True)
class Scenario:
    """What the student learns from."""

    corpus: str = "demo"
    vague: float = 0.0
    wrong: float = 0.0
    share: float = 1.0
    """Of the pairs."""
    overlap: int = 1
    """Domains that each teacher knows."""
    random: bool = False
    """Whether the student begins from random weights and its towers learn (random_towers.py)."""
    windows: bool = False
    """Whether the recipes are orders of the rows."""


SCENARIOS = {
    "found": Scenario(vague=VAGUE_SHARE, wrong=WRONG_SHARE),
    "clean": Scenario(),
    "half wrong": Scenario(wrong=0.5),
    "a tenth": Scenario(share=0.1),
    "overlap": Scenario(vague=VAGUE_SHARE, wrong=WRONG_SHARE, overlap=3),
    "second, found": Scenario("second", VAGUE_SHARE, WRONG_SHARE),
    "second, clean": Scenario("second"),
    "random weights, found": Scenario(vague=VAGUE_SHARE, wrong=WRONG_SHARE, random=True),
    "random weights, clean": Scenario(random=True),
    "windows, found": Scenario(vague=VAGUE_SHARE, wrong=WRONG_SHARE, windows=True),
    "windows, clean": Scenario(windows=True),
}
ALONE, REFERENCE = "pairs alone", "preset distil"
_ALL: dict[str, Any] = {"policy": {"kind": "all", "by": "caption"}}
_ONE: dict[str, Any] = {"policy": {"kind": "one", "by": "caption"}}


def _loss(**weights: float) -> dict[str, Any]:
    return {"loss": {"task": 0.0, "feature": 0.0, "cross": 0.0, "relational": 0.0} | weights}


RECIPES: dict[str, dict[str, Any]] = {
    REFERENCE: {},
    ALONE: _loss(task=1.0) | _ALL,
    "all teachers, task 1, feature 1, cross 1": _loss(task=1.0, feature=1.0, cross=1.0) | _ALL,
    "one random teacher, task 1, feature 1, cross 1": _loss(task=1.0, feature=1.0, cross=1.0) | _ONE,
    "all teachers, task 1, feature 10, cross 1": _loss(task=1.0, feature=10.0, cross=1.0) | _ALL,
    "distil without task": {"loss": {"task": 0.0}},
    "distil, task 0.1": {"loss": {"task": 0.1}},
    "distil without task, all teachers": {"loss": {"task": 0.0}} | _ALL,
    "distil, all teachers": _ALL,
    "distil, best by caption": {"policy": {"by": "caption"}},
    "distil, two best": {"policy": {"best": 2}},
    "distil without relational": {"loss": {"relational": 0.0}},
    "distil without feature": {"loss": {"feature": 0.0}},
    "distil, feature 3": {"loss": {"feature": 3.0}},
    "distil, feature 30": {"loss": {"feature": 30.0}},
    "distil and cross 1": {"loss": {"cross": 1.0}},
    "pairs alone, only captions that fit": _loss(task=1.0) | _ALL | {"select": True},
    "distil, only captions that fit": {"select": True},
    "distil, keys known": {"policy": {"keys": "known"}},
    "distil, task 0.1, keys known": {"loss": {"task": 0.1}, "policy": {"keys": "known"}},
}
SHORT = tuple(RECIPES)[:3]
"""Recipes of every scenario of locked towers; the first two scenarios have all."""
SHARD = 64
WINDOWS: dict[str, dict[str, Any]] = {
    f"{REFERENCE}, windows of {together} shards, {how}": {"window": together, "mixed": mixed}
    for mixed, how in ((True, "rows in random order"), (False, "rows by class"))
    for together in (4, 8)
}
"""Shards of 64 rows; a window of four holds four batches."""
SLOW = (ALONE, "distil, task 0.1")
"""Recipes of students whose towers learn."""


def recipes_of(name: str) -> tuple[str, ...]:
    """The recipes that a scenario is run with."""
    if SCENARIOS[name].random:
        return SLOW
    if SCENARIOS[name].windows:
        return REFERENCE, *WINDOWS
    return tuple(RECIPES) if name in tuple(SCENARIOS)[:2] else SHORT


@dataclass(frozen=True)
class Material:
    """A corpus as the towers see it: float32 (N, 1280) of N training rows, and (384,) of every caption."""

    train: list[Row]
    image: Tensor
    texts: dict[str, Tensor]
    test: list[Row]
    test_image: Tensor
    prompts: list[Row]
    teachers: dict[int, dict[str, Heads]]
    """By the number of domains that each knows."""


@dataclass(frozen=True)
class Teachers:
    """What `TeacherFeatures` gives a run, computed instead of read: image and text are (N, 256) of each teacher."""

    slugs: tuple[str, ...]
    image: list[Tensor]
    text: list[Tensor]
    cards: dict[str, Any]

    @property
    def dims(self) -> tuple[int, ...]:
        """Widths."""
        return tuple(part.shape[1] for part in self.image)

    @property
    def towers(self) -> tuple[tuple[Tower, ...], ...]:
        """Every teacher has both."""
        return (TOWERS,) * len(self.slugs)

    def gather(self, rows: np.ndarray) -> tuple[TeacherTargets, ...]:
        """See `TeacherFeatures.gather`."""
        there = torch.ones(len(rows), 2, dtype=torch.bool)
        return tuple(TeacherTargets(a[rows], b[rows], there) for a, b in zip(self.image, self.text, strict=True))


def read_rows(table: Path) -> list[Row]:
    """The rows of a caption table."""
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def demo_material(out: Path) -> Material:
    """The demo's corpus with clean captions, kept in OUT."""
    folder = out / "corpus"
    if not (folder / "eval" / "captions.csv").is_file():
        build_corpus(folder, vague=0.0, wrong=0.0)
    private, train, held_out = (read_rows(folder / name / "captions.csv") for name in ("private", "train", "eval"))
    return material(private, train, held_out, folder, {})


def material(
    private: list[Row], train: list[Row], held_out: list[Row], folder: Path, strangers: dict[str, Heads]
) -> Material:
    """Run the towers over everything once and tune the specialists."""
    towers = load_towers()
    test, prompts = ([row for row in held_out if row["split"] == split] for split in ("test", "prompt"))
    private, train, test = ([row | {"image": f"{name}/{row['image']}"} for row in rows]
                            for name, rows in (("private", private), ("train", train), ("eval", test)))  # fmt: skip
    own = tower_features(towers, private, folder)
    images = tower_features(towers, train + test, folder)
    every = sorted({row["caption"] for row in private + train + test + prompts} | set(VAGUE))
    # The towers' own function wants an image for each caption; any will do.
    said = tower_features(towers, [train[0] | {"caption": caption} for caption in every], folder)
    domains = list(dict.fromkeys(row["domain"] for row in private))
    teachers: dict[int, dict[str, Heads]] = {}
    for overlap in (1, 3):
        teachers[overlap] = dict(strangers)
        for number, domain in enumerate(domains):
            known = {domains[(number + step) % len(domains)] for step in range(overlap)}
            places = torch.tensor([place for place, row in enumerate(private) if row["domain"] in known])
            teachers[overlap][f"{domain}-specialist"] = train_heads(own.take(places))
    texts = dict(zip(every, said.text, strict=True))
    return Material(train, images.image[: len(train)], texts, test, images.image[len(train) :], prompts, teachers)


def second_material(data: Path, out: Path, first: Material) -> Material:
    """Medical MNIST and BreastMNIST: half of each class' training images are private, the other half the student's."""
    folder = out / "second"
    rows: dict[str, list[Row]] = {"private": [], "train": [], "eval": []}
    for name, classes in SETS.items():
        with np.load(data / f"{name}.npz") as arrays:
            for split in ("train", "test"):
                seen = dict.fromkeys(range(len(classes)), 0)
                labels = arrays[f"{split}_labels"].reshape(-1)
                for number, (pixels, label) in enumerate(zip(arrays[f"{split}_images"], labels, strict=True)):
                    slug, domain, modality, captions, prompts = classes[int(label)]
                    count = seen[int(label)]
                    seen[int(label)] += 1
                    part = "eval" if split == "test" else ("private", "train")[count % 2]
                    words = captions if split == "train" else prompts
                    key = f"{name}-{split}-{number:04d}"
                    (folder / part / "images").mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(folder / part / "images" / f"{key}.png")
                    said = words[count // 2 % len(words)]
                    rows[part].append(_row(key, f"images/{key}.png", said, modality, domain, slug, split))
        for slug, domain, modality, _, prompts in classes:
            rows["eval"] += [_row(f"{slug}-{i}", "", text, modality, domain, slug, "prompt")
                             for i, text in enumerate(prompts)]  # fmt: skip
    own = {row["domain"] for row in rows["private"]}
    strangers = {
        slug: heads for slug, heads in first.teachers[1].items() if slug.removesuffix("-specialist") not in own
    }
    return material(rows["private"], rows["train"], rows["eval"], folder, strangers)


def _row(*values: str) -> Row:
    return dict(zip(COLUMNS, (*values, "right"), strict=True))


def kept_material(out: Path, data: Path | None, corpus: str) -> Material:
    """A corpus' material, computed once."""
    path = out / f"{corpus}.pt"
    if not path.is_file():
        if corpus == "demo":
            made = demo_material(out)
        else:
            assert data is not None, "asked only with --small-sets"
            made = second_material(data, out, kept_material(out, data, "demo"))
        torch.save(made, path)
    found: Material = torch.load(path, weights_only=False)
    return found


@dataclass(frozen=True)
class Setting:
    """A scenario under one seed: rows and their places in the corpus, teachers. fits: of each row, see `FITS`."""

    rows: list[Row]
    places: Tensor
    caption: NDArray[np.int64]
    teachers: Teachers
    fits: Tensor

    def detection(self) -> float:
        """AUROC of wrong against right captions by the same score; NaN without wrong ones."""
        known = [place for place, row in enumerate(self.rows) if row["fits"] != "vague"]
        wrong = np.array([self.rows[place]["fits"] == "wrong" for place in known])
        if not wrong.any():
            return math.nan
        score = -self.fits.numpy()[known].astype(np.float64)
        columns = np.stack([-score, score], axis=1)
        return float(macro_auroc(wrong.astype(np.int64), columns, np.ones((1, len(known))))[0])


def setting(made: Material, scenario: Scenario, seed: int) -> Setting:
    """Draw captions and rows, and let the teachers judge the captions."""
    noisy = as_found(made.train, seed, scenario.vague, scenario.wrong)
    order = np.random.default_rng([seed, 7]).permutation(len(noisy))[: max(BATCH, round(scenario.share * len(noisy)))]
    chosen = torch.from_numpy(np.sort(order))
    rows = [noisy[place] for place in chosen]
    image = made.image[chosen]
    text = torch.stack([made.texts[row["caption"]] for row in rows])
    encoded = pa.array([row["caption"] for row in rows], pa.large_string()).dictionary_encode()
    caption = encoded.indices.to_numpy().astype(np.int64)
    numbers = np.arange(len(rows))
    heads = made.teachers[scenario.overlap]
    teachers = Teachers(
        slugs=tuple(heads),
        image=[image @ one.image.T for one in heads.values()],
        text=[text @ one.text.T for one in heads.values()],
        cards={slug: SimpleNamespace(logit_scale=float(one.logit_scale.exp())) for slug, one in heads.items()},
    )
    targets = teachers.gather(numbers)
    first = np.unique(caption, return_index=True)[1]
    captions = [unit(target.text[first]) for target in targets]
    known = torch.stack([familiarity(*pair) for pair in zip(targets, captions, strict=True)], dim=1)
    best = Standard.of(targets, captions).scores(targets).argmax(dim=1, keepdim=True)
    given = torch.stack([agreement(target) for target in targets], dim=1)
    fits = (given.gather(1, best) / known.gather(1, best))[:, 0]
    return Setting(rows, chosen, caption, teachers, fits)


class Student(nn.Module):
    """Two towers, a linear map after each and a temperature. Locked towers are `nn.Identity`: what the student sees
    then are their outputs."""

    def __init__(self, towers: tuple[nn.Module, nn.Module], first: Heads) -> None:
        super().__init__()
        self.image_tower, self.text_tower = towers
        self.image, self.text, self.log_scale = (
            nn.Parameter(part) for part in (first.image, first.text, first.logit_scale)
        )

    def forward(self, images: Tensor, texts: Tensor) -> StudentFeatures:
        """Features of B images and B texts."""
        return StudentFeatures(
            self.image_tower(images) @ self.image.T, self.text_tower(texts) @ self.text.T, self.log_scale
        )


def beginning(made: Material, out: Path, scenario: Scenario, seed: int) -> tuple[Material, Student]:
    """What the student sees, in place of what the teachers' towers see, and the student before its first step."""
    torch.manual_seed(seed)
    towers: tuple[nn.Module, nn.Module] = (nn.Identity(), nn.Identity())
    seen, widths = made, (made.image.shape[1], next(iter(made.texts.values())).shape[0])
    if scenario.random:
        texts, vocabulary = tokenize(list(made.texts))
        pixels = [read_pixels(out / "corpus", [row["image"] for row in rows]) for rows in (made.train, made.test)]
        seen = replace(made, image=pixels[0], texts=texts, test_image=pixels[1])
        towers, widths = (ImageTower(), TextTower(vocabulary)), (IMAGE_WIDTH, TEXT_WIDTH)
    blank = Features(torch.empty(0, widths[0]), torch.empty(0, widths[1]), torch.empty(0))
    return seen, Student(towers, random_heads(blank, 1000 + seed))


def run_config(recipe: dict[str, Any], seed: int) -> RunConfig:
    """The run of a recipe: what it changes, over preset `distil`."""
    changes = {name: value for name, value in recipe.items() if name not in ("select", "window", "mixed")}
    content = {"preset": "distil", "store": "none", "out": "none", "student": {"model": "none"}, "seed": seed}
    return RunConfig.model_validate(compose(content | changes, DOCS))


def run(made: Material, out: Path, scenario: Scenario, recipe: dict[str, Any], seed: int) -> dict[str, float]:
    """Train one student; its scores in [0, 1] and the AUROC of the captions that do not fit."""
    scene = setting(made, scenario, seed)
    keep = np.arange(len(scene.rows))
    if recipe.get("select"):
        keep = np.flatnonzero(scene.fits.numpy() >= FITS)
    config = run_config(recipe, seed)
    batch_size = min(BATCH, len(keep))
    labels = np.stack([scene.caption, np.arange(len(scene.rows))], axis=1)
    asked = scene.teachers if config.loss.teacher_terms else None
    seen, student = beginning(made, out, scenario, seed)
    image, text = seen.image[scene.places], torch.stack([seen.texts[row["caption"]] for row in scene.rows])
    steps, rate = (RANDOM_STEPS, RANDOM_LEARNING_RATE) if scenario.random else (STEPS, LEARNING_RATE)
    objective = make_objective(config, WIDTH, asked, keep, labels[keep], torch.device("cpu"))  # type: ignore[arg-type]
    matrices = [part for module in (student, objective) for part in module.parameters() if part.ndim > 1]
    others = [part for module in (student, objective) for part in module.parameters() if part.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
    windows = None
    if together := recipe.get("window"):
        windows = Windows(np.arange(len(keep)), SHARD, together, seed)
        keep = np.random.default_rng(0).permutation(keep) if recipe["mixed"] else keep
    plan = BatchPlan(keep, Schedule(len(keep), batch_size, -(-steps // (len(keep) // batch_size))), seed, windows)
    for step, epoch, start, rows in plan.steps(0):
        if step == steps:
            break
        picked = torch.from_numpy(rows)
        batch = Batch(
            step=step, epoch=epoch, rows=rows, positions=torch.arange(start, start + len(rows)), images=picked,
            tokens=picked, columns=(), groups=torch.from_numpy(labels[rows]),
            targets=asked.gather(rows) if asked else (),
        )  # fmt: skip
        features = student(image[picked], text[picked])
        for group in optimizer.param_groups:
            group["lr"] = rate * lr_factor(step, WARM_UP, steps)
        optimizer.zero_grad()
        torch.autograd.backward([objective.total(objective(features, batch, World(torch.device("cpu"))))])
        optimizer.step()
        with torch.no_grad():
            student.log_scale.clamp_(0, math.log(100))
    student.eval()
    with torch.no_grad():
        features = student(seen.test_image, torch.stack(list(seen.texts.values())))
        found = scores(made, features.image, dict(zip(seen.texts, features.text, strict=True)))
    return found | {"detection": scene.detection(), "kept": len(keep) / len(scene.rows)}


def scores(made: Material, image: Tensor, texts: dict[str, Tensor]) -> dict[str, float]:
    """Zero-shot balanced accuracy and AUROC over all classes, mean over domains."""
    classes = sorted({row["class"] for row in made.test})
    vectors = torch.stack(
        [
            unit(torch.stack([texts[row["caption"]] for row in made.prompts if row["class"] == name])).mean(0)
            for name in classes
        ]
    )
    cosines = unit(image) @ unit(vectors).T
    truth = torch.tensor([classes.index(row["class"]) for row in made.test])
    domain_of = {row["class"]: row["domain"] for row in made.test}
    by_domain: dict[str, list[tuple[float, float]]] = {}
    for place, name in enumerate(classes):
        mine = truth == place
        recall = float((cosines[mine].argmax(1) == place).float().mean())
        above = (cosines[mine, place][:, None] > cosines[~mine, place][None]).float().mean()
        by_domain.setdefault(domain_of[name], []).append((recall, float(above)))
    means = [[statistics.mean(pair[i] for pair in found) for i in (0, 1)] for found in by_domain.values()]
    return {"bacc": statistics.mean(m[0] for m in means), "auroc": statistics.mean(m[1] for m in means)}


def half_width(values: Sequence[float], comparisons: int) -> float:
    """Half of the 95 % interval of a mean: Student's t over seeds, Bonferroni for the number of comparisons."""
    if len(values) < 2:
        return math.nan
    point = float(student_t.ppf(1 - 0.025 / comparisons, len(values) - 1))
    return point * statistics.stdev(values) / math.sqrt(len(values))


def table(name: str, results: dict[str, dict[int, dict[str, float]]], seeds: list[int]) -> str:
    """Markdown of one scenario: best recipe first, differences to the two recipes that everything is held against."""
    done = {recipe: found for recipe, found in results.items() if set(seeds) <= set(found)}
    comparisons = max(1, len(done) - 1)
    lines = [
        f"| {name} | balanced accuracy, % | AUROC, % | minus {ALONE} | minus {REFERENCE} |",
        "|---|---:|---:|---:|---:|",
    ]
    mean = {recipe: statistics.mean(found[seed]["bacc"] for seed in seeds) for recipe, found in done.items()}
    for recipe in sorted(done, key=lambda key: -mean[key]):
        found = done[recipe]
        cells = [f"{100 * mean[recipe]:.1f} ({100 * statistics.stdev(found[s]['bacc'] for s in seeds):.1f})",
                 f"{100 * statistics.mean(found[s]['auroc'] for s in seeds):.1f}"]  # fmt: skip
        for other in (ALONE, REFERENCE):
            if other == recipe or other not in done:
                cells.append("")
                continue
            paired = [found[seed]["bacc"] - done[other][seed]["bacc"] for seed in seeds]
            cells.append(f"{100 * statistics.mean(paired):+z.1f} ± {100 * half_width(paired, comparisons):.1f}")
        lines.append(f"| {recipe} | " + " | ".join(cells) + " |")
    lines += [f"| {recipe} | not run | | | |" for recipe in results if recipe not in done]
    return "\n".join(lines) + "\n"


def detection(results: dict[str, dict[str, dict[int, dict[str, float]]]], seeds: list[int]) -> str:
    """Markdown: how well wrong captions are found, by scenario. It does not depend on the student."""
    lines = ["| scenario | AUROC of wrong against right captions, % | captions kept, % |", "|---|---:|---:|"]
    for name, recipes in results.items():
        found = [run["detection"] for seed, run in recipes.get(REFERENCE, {}).items() if seed in seeds]
        kept = [run["kept"] for run in recipes.get("distil, only captions that fit", {}).values()]
        if len(found) == len(seeds) and not math.isnan(found[0]):
            half = 100 * half_width(found, 1)
            share = f"{100 * statistics.mean(kept):.0f}" if kept else "not run"
            lines.append(f"| {name} | {100 * statistics.mean(found):.1f} ± {half:.1f} | {share} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is left, then print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--small-sets", type=Path)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--only", choices=SCENARIOS, action="append", help="a scenario; again for more")
    parser.add_argument("--finished", action="store_true")
    parser.add_argument("--docs", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    results: dict[str, dict[str, dict[int, dict[str, float]]]] = {
        name: {recipe: {} for recipe in recipes_of(name)} for name in SCENARIOS
    }
    # What all scenarios of a kind have first, then the recipes that two of them have.
    cells = [(name, recipe, seed) for name, found in results.items() for seed in seeds for recipe in found]
    for name, recipe, seed in sorted(cells, key=lambda cell: cell[1] not in (*SHORT, *SLOW)):
        scenario = SCENARIOS[name]
        path = given.out / "runs" / f"{name}, {recipe}, {seed}.json".replace(" ", "-").replace(",", "")
        absent = scenario.corpus == "second" and given.small_sets is None
        if not (path.is_file() or given.finished or absent or (given.only and name not in given.only)):
            started = time.perf_counter()
            with reproducible(seed):
                seen = kept_material(given.out, given.small_sets, scenario.corpus)
                made = run(seen, given.out, scenario, (RECIPES | WINDOWS)[recipe], seed)
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(made))
            seconds = time.perf_counter() - started
            print(f"{name}, {recipe}, seed {seed}: {made['bacc']:.3f} in {seconds:.0f} s", flush=True)
        if path.is_file():
            results[name][recipe][seed] = json.loads(path.read_text())
    asked = given.only or list(SCENARIOS)
    tables = {name: table(name, results[name], seeds) for name in asked}
    if not given.only:
        tables["detection"] = detection(results, seeds)
    text = DOCS.read_text()
    for name, content in tables.items():
        print(f"\n{content}")
        begin, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, _, behind = text.partition(begin)
        text = before + begin + content + end + behind.partition(end)[2]
    if given.docs:
        DOCS.write_text(text)


if __name__ == "__main__":
    main()

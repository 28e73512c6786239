"""What corruptions of the test images cost: every task's metric and the features, at each family and severity, against
the same images as they are."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmkd.base.arrays import Bools, Ints
from mmkd.base.errors import UserError
from mmkd.base.images.corruptions import Corruptions
from mmkd.base.images.recipe import read_recipe
from mmkd.base.text import counted
from mmkd.evaluate.corruption_report import ALL, FEATURES, CorruptionReport, Drop
from mmkd.evaluate.dataset import DatasetRows, Samples, load_dataset
from mmkd.evaluate.dataset_spec import DatasetSpec
from mmkd.evaluate.features import Block, Features
from mmkd.evaluate.metrics import weighted_mean
from mmkd.evaluate.plan import model_names
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.scoring import Metric, Scoring
from mmkd.evaluate.statistics import Replicates, averaged, paired_difference, resampled
from mmkd.evaluate.suite import Suite
from mmkd.evaluate.task import Variant
from mmkd.evaluate.tasks import TASKS
from mmkd.store import FeatureStore
from mmkd.store.layout import Tower

CROSS_VALIDATED = ("survival", "diagnosis")
"""Every image is trained on in one fold, so that corrupted ones would be too."""
SHARED = ("retrieval", "multiple_choice")
"""A sample's score depends on the others, so that each condition is predicted on its own; the rest are trained once."""
ROWS = 100_000
"""Pictures that a trained head sees at a time; it is trained again for the next."""
COSINE = Scoring("standard", {"cosine": Metric(lambda p, w: weighted_mean(p.score[:, 0], w), share=False)}, "cosine")

Pair = tuple[Replicates, Replicates]
Predict = Callable[[int, Bools], tuple[Predictions, Bools]]


class PictureFeatures(Features):
    """Features of pictures with the texts of their images. own: the image's row of every grid row, int64 (N,)."""

    def __init__(self, of: Features, own: Ints) -> None:
        super().__init__(of.store, of.model, of.members, of.beside)
        self.own = own

    def each_member(self) -> tuple[Features, ...]:
        return tuple(PictureFeatures(one, self.own) for one in super().each_member())

    def read(self, tower: Tower, rows: Ints, normalized: bool) -> Block:
        return super().read(tower, self.own[rows] if tower == "text" else rows, normalized)


def measure_corruptions(suite: Suite, dataset: str | None = None) -> list[CorruptionReport]:
    """Measure every model of a suite on each data set whose store has corrupted test images, or on one. Heads are
    trained on the clean images, with all labels. Raises ConfigError for an unknown data set, UserError where no store
    has corrupted images."""
    reports, without = [], []
    for spec in suite.chosen(dataset):
        store = FeatureStore.open(spec.store)
        data = load_dataset(spec, store)
        found = corrupted_rows(store, data.split("test").rows)
        if found is None:
            without.append(f"{spec.dataset}: {store.root} has no corrupted test images")
        else:
            reports.append(_measure_dataset(suite, spec, data, *found))
    if not reports:
        raise UserError(f"{'; '.join(without)}; extract them with `mmkd extract --corrupt`")
    return [replace(one, notes=(*one.notes, *without)) for one in reports]


def corrupted_rows(store: FeatureStore, rows: Ints) -> tuple[Corruptions, Ints] | None:
    """Return the recipe, and the grid rows of the pictures made of these rows, int64 (conditions, n), -1 for none; None
    if the store has none of them."""
    recipe, found = None, np.empty((0, len(rows)), dtype=np.int64)
    for span in store.record.spans():
        if span.corpus.recipe is None or span.corpus.recipe.get("kind") != "corruptions":
            continue
        one = read_recipe(span.corpus.recipe, str(store.root))
        assert isinstance(one, Corruptions)
        if recipe is None:
            recipe, found = one, np.full((one.count, len(rows)), -1, dtype=np.int64)
        inside = (pc.field("row") >= span.rows.start) & (pc.field("row") < span.rows.stop)
        table = store.sample_table(columns=["row", "image_rows", "view_number"], filter=inside)
        image = pc.list_element(table["image_rows"], 0).to_numpy()
        place = np.minimum(np.searchsorted(rows, image), len(rows) - 1)
        there = rows[place] == image
        number = table["view_number"].to_numpy()[there]
        found[number - 1, place[there]] = table["row"].to_numpy()[there]
    return None if recipe is None or (found < 0).all() else (recipe, found)


def _measure_dataset(
    suite: Suite, spec: DatasetSpec, data: DatasetRows, recipe: Corruptions, rows: Ints
) -> CorruptionReport:
    every, whole = data.split("test"), (rows >= 0).all(axis=0)
    clean = Samples(every.name, every.table.filter(pa.array(whole)))
    blocks = [_moved(clean, clean.rows), *(_moved(clean, one[whole]) for one in rows)]
    notes = [] if whole.all() else [f"{counted(int((~whole).sum()), 'test row')} without corrupted pictures left out"]
    if crossed := [task for task in spec.tasks if task in CROSS_VALIDATED]:
        notes.append(f"{', '.join(crossed)}: every image is trained on in some fold; not measured")
    models, own = model_names(suite, [data.store]), np.arange(len(data.store))
    for block in blocks:
        own[block.rows] = clean.rows
    features = [PictureFeatures(Features(data.store, model, suite.ensembles.get(model, ())), own) for model in models]
    drops, losses = list[Drop](), dict[str, list[str]]()
    for one in features:
        measured, lacking = _measure_model(suite, spec, data, recipe, one, blocks)
        drops += measured
        for note in lacking:
            losses.setdefault(note, []).append(one.model)
    notes += [note if len(of) == len(models) else f"{', '.join(of)}: {note}" for note, of in losses.items()]
    used = np.concatenate([block.rows for block in blocks])
    return CorruptionReport(
        suite.suite, suite.version, spec.dataset, recipe, len(clean), models, suite.bootstrap, data.digest,
        {one.model: one.digest(used) for one in features}, tuple(drops), tuple(notes),
    )  # fmt: skip


def _measure_model(
    suite: Suite, spec: DatasetSpec, data: DatasetRows, recipe: Corruptions, features: Features, blocks: list[Samples]
) -> tuple[list[Drop], list[str]]:
    """Return the drops of one model, and notes on the images that a family took from it."""
    cosines, drops = _cosines(data, features, blocks), list[Drop]()
    seen = np.array([found.available for found in cosines])

    def measure(title: str, scoring: Scoring, predict: Predict) -> None:
        found = _scored(suite, spec, scoring, predict, seen)
        drops.extend(_drops(recipe, features.model, title, found, scoring, suite.bootstrap.level))

    measure(FEATURES, COSINE, lambda i, mask: (cosines[i], mask))
    for name in (task for task in spec.tasks if task not in CROSS_VALIDATED):
        for variant in TASKS[name].variants(spec):
            if variant.fraction == 1 and variant.seed == 0:
                title = " ".join(filter(None, (name, variant.head)))
                measure(title, TASKS[name].scoring(spec), _predictor(name, variant, data, features, blocks, seen[0]))
    return drops, _losses(recipe, seen)


def _losses(recipe: Corruptions, seen: Bools) -> list[str]:
    """Return what to know of families without a feature of some image, such as `stain` of a gray one. seen: bool
    (1 + conditions, n), the images as they are first."""
    notes, n = [], int(seen[0].sum())
    counts = n - seen[1:].sum(axis=1)
    for family in recipe.families:
        lost = {at: int(c) for (name, at), c in zip(recipe.conditions, counts, strict=True) if name == family}
        for count in sorted({*lost.values()} - {0}):
            severities = [str(at) for at in lost if lost[at] == count]
            where = "" if len(severities) == len(lost) else f" at severity {', '.join(severities)}"
            end = "; left out" if count == n else ""
            notes.append(f"{family}{where}: {count} of {n} images have no such picture{end}")
    if (counts % max(1, n)).any():
        notes.append(f"rows `all` are of the {_common(seen).sum()} images that have a picture of every family in them")
    return notes


def _common(seen: Bools) -> Bools:
    """The images that every condition has which has any."""
    return np.asarray(seen[seen.any(axis=1)].all(axis=0))


def _moved(samples: Samples, rows: Ints) -> Samples:
    """The same samples with their image features in other rows."""
    place = samples.table.column_names.index("row")
    return Samples(samples.name, samples.table.set_column(place, "row", pa.array(rows)))


def _predictor(
    name: str, variant: Variant, data: DatasetRows, features: Features, blocks: list[Samples], there: Bools
) -> Predict:
    """Predictions of a task for a block of the same samples, by its place, and which of these are of a mask, bool (n,).
    there: bool (n,), images that have a feature as they are."""
    task = TASKS[name]

    def predict(test: Samples) -> Predictions:
        return task.predict(variant, replace(data, splits=data.splits | {"test": test}), features)

    if name in SHARED:
        known: dict[tuple[int, bytes], Predictions] = {}

        def of_mask(i: int, mask: Bools) -> tuple[Predictions, Bools]:
            kept = mask | ~there  # an image without a feature stays what it is in any evaluation
            if (asked := (i, kept.tobytes())) not in known:
                known[asked] = predict(Samples("test", blocks[i].table.filter(pa.array(kept))))
            return known[asked], np.ones(len(known[asked]), dtype=bool)

        return of_mask
    place, n, parts = blocks[0].table.column_names.index("key"), len(blocks[0]), list[Predictions]()
    keyed = [
        block.table.set_column(place, "key", pa.array([f"{i} {key}" for key in block.ids]))
        for i, block in enumerate(blocks)
    ]
    size = max(1, ROWS // n)
    for some in (keyed[i : i + size] for i in range(0, len(keyed), size)):
        found = predict(Samples("test", pa.concat_tables(some)))
        assert len(found) == n * len(some), "one prediction for each test sample"
        parts += [found.take(np.arange(len(found)) // n == i) for i in range(len(some))]
    parts = [replace(part, ids=blocks[0].ids, group=data.groups(blocks[0])) for part in parts]
    return lambda i, mask: (parts[i], mask)


def _cosines(data: DatasetRows, features: Features, blocks: Sequence[Samples]) -> list[Predictions]:
    """Cosine of every image to itself as it is, float64 (n, 1)."""
    clean, found = features.images(blocks[0].rows), []
    for block in blocks:
        other = features.images(block.rows)
        score, there = np.einsum("nd,nd->n", clean.values, other.values)[:, None], clean.available & other.available
        groups, domains = data.groups(blocks[0]), data.domains(blocks[0])
        found.append(Predictions(block.ids, groups, domains, None, score.astype(np.float64), there, ("cosine",)))
    return found


def _scored(
    suite: Suite, spec: DatasetSpec, scoring: Scoring, predict: Predict, seen: Bools
) -> tuple[dict[int, Pair], list[Pair]]:
    """Clean and corrupted value of the primary metric on the images that both have: of each condition with any, by its
    number from 1; and of each of these on the images that all have."""
    name, before = suite.resample_name(spec.dataset), dict[bytes, Replicates]()

    def score(one: Predictions, both: Bools) -> Replicates:
        asked = {"bootstrap": suite.bootstrap, "name": name, "parts": {"": both}}
        return resampled(one, [scoring.primary], scoring, **asked)["", scoring.primary]  # type: ignore[arg-type]

    def pair(i: int, mask: Bools) -> Pair:
        (clean, inside), (moved, _) = predict(0, mask), predict(i, mask)
        both = inside & clean.available & moved.available
        if (asked := mask.tobytes() + both.tobytes()) not in before:
            before[asked] = score(clean, both)
        return before[asked], score(moved, both)

    common, places = _common(seen), [i for i in range(1, len(seen)) if seen[i].any()]
    found = {i: pair(i, seen[i]) for i in places}
    same = {i for i in places if np.array_equal(seen[i], common)}
    return found, [found[i] if i in same else pair(i, common) for i in places if common.any()]


def _drops(
    recipe: Corruptions,
    model: str,
    task: str,
    found: tuple[dict[int, Pair], list[Pair]],
    scoring: Scoring,
    level: float,
) -> Iterator[Drop]:
    pairs, alike = found
    named = [(*recipe.conditions[i - 1], pair) for i, pair in pairs.items()]
    if alike:
        clean, value = (averaged([pair[side] for pair in alike], same_rows=True) for side in (0, 1))
        named.append((ALL, 0, (clean, value)))
    for family, severity, (clean, value) in named:
        yield Drop(
            model, task, scoring.primary, family, severity, clean.value, value.value, *value.interval(level),
            paired_difference(value, clean, level), scoring.metrics[scoring.primary].share,
        )  # fmt: skip

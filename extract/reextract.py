"""Run a teacher again on random rows of a store and compare: checksums prove that bytes are what was written, only the
teacher that the right thing was. Machines differ in last bits, so the answer is cosines and a tolerance."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmkd.base.errors import CorpusError, TeacherError, UserError
from mmkd.extract.corpora import open_corpus
from mmkd.extract.device import open_device
from mmkd.extract.encode import Workbench, encode_inputs
from mmkd.extract.forward import BatchSizes
from mmkd.extract.report import ShardReport
from mmkd.extract.shard import SOURCE_COLUMNS, caption_fault, image_sources
from mmkd.extract.teachers import TeacherSpec, describe_teacher, load_teacher
from mmkd.extract.teachers.published import parse_teacher
from mmkd.extract.teachers.spec import HF_HUB, LOCAL_DIR
from mmkd.store import IMAGE_SOUND, TEXT_SOUND, FeatureStore
from mmkd.store.layout import TOWER_INPUTS, Tower

ROWS = 200
"""Default number of rows to rerun."""

TOLERANCE = 1e-3
"""Distance (1 - cosine) beyond which a row counts as different. float16 storage costs some 1e-7, another machine or
precision up to 1e-4; other weights, preprocessing or rows cost far more."""


@dataclass(frozen=True)
class TowerCosines:
    """Cosines between stored features and those of now."""

    compared: int
    """Rows; everything below is of these, and NaN when there are none."""
    below: int
    """Rows whose cosine is below 1 - tolerance, or not a number."""
    smallest: float
    quantiles: dict[str, float]
    mean: float
    strangers: float
    """Mean cosine to the stored feature of another row, as a mix-up of rows would give."""


@dataclass(frozen=True)
class TeacherComparison:
    slug: str
    source: str
    """Source of the teacher that ran now."""
    digest_stored: str | None
    """None when the store does not know (imported features)."""
    digest_now: str
    rows: int
    """Rows drawn, of those with a sound feature."""
    tolerance: float
    towers: dict[Tower, TowerCosines]
    not_compared: dict[str, int]
    """Reasons inputs could not be rerun, with counts."""

    @property
    def same_teacher(self) -> bool:
        """False when weights, preprocessing or tokenizer are not those that the store was made with."""
        return self.digest_stored in (None, self.digest_now)

    @property
    def sound(self) -> bool:
        """True when the teacher is the same, rows were compared, and none lies beyond the tolerance."""
        found = self.towers.values()
        compared = sum(tower.compared for tower in found)
        return self.same_teacher and compared > 0 and not sum(tower.below for tower in found)

    def lines(self) -> Iterator[str]:
        """Yield the comparison as a user reads it."""
        yield f"{self.slug}: {self.source} run again on {self.rows} random rows"
        if not self.same_teacher:
            yield f"another teacher: digest {self.digest_now} now, {self.digest_stored} when it was stored"
        for tower, found in self.towers.items():
            quantiles = "  ".join(f"{at} {value:.6f}" for at, value in found.quantiles.items())
            cosines = f"{found.compared} compared, cosine min {found.smallest:.6f}  {quantiles}  mean {found.mean:.6f}"
            cosines += f"; to other rows {found.strangers:.3f}"
            yield f"{TOWER_INPUTS[tower]:9} {cosines if found.compared else 'none compared'}"
        yield from (f"  {count:,} x {reason}" for reason, count in self.not_compared.items())
        below, compared = (sum(getattr(one, name) for one in self.towers.values()) for name in ("below", "compared"))
        verdict = "sound" if self.sound else "NOT sound"
        yield f"{verdict}: {below} of {compared} features differ by more than {self.tolerance:g} (1 - cosine)"


def compare_with_teacher(
    store: FeatureStore, teacher: str, rows: int, *, corpus: str | None, tolerance: float, seed: int
) -> TeacherComparison:
    """Rerun a teacher (a slug of the store, or as `mmkd extract --teachers` takes it) on up to `rows` random rows with
    a sound feature; a row differs when 1 - cosine is above `tolerance`. `corpus`: where it or its images lie now.
    Raises UserError without a sound row of the teacher; TeacherError if it cannot be loaded, or gives features of
    another width; CorpusError if no input of the drawn rows can be read."""
    spec = _spec(store, teacher)
    stored = store.card(spec.slug)
    card = describe_teacher(spec)
    has, had = (", ".join(one.towers) for one in (card, stored))
    for is_other, differs in (
        (card.dim != stored.dim, f"gives {card.dim} values, {store.root} holds {stored.dim}"),
        (has != had, f"has towers {has}, {store.root} holds {had}"),
    ):
        if is_other:
            raise TeacherError(
                f"teacher {spec.slug!r} at {card.source} {differs}: another teacher; name the right one as "
                f"{spec.slug}=local-dir:FOLDER"
            )
    valid = store.valid(spec.slug)
    sound = np.flatnonzero(valid)
    if not len(sound):
        raise UserError(f"{store.root} holds no sound feature of {spec.slug}; run `mmkd extract` first")
    drawn = np.sort(np.random.default_rng(seed).choice(sound, min(rows, len(sound)), replace=False))
    device = open_device()
    loaded = load_teacher(spec, card, device.place)
    table = store.sample_table(["caption", "image_sha256", *SOURCE_COLUMNS]).take(pa.array(drawn))
    captions = [None if caption_fault(caption) else caption for caption in table["caption"].to_pylist()]
    bench, report = Workbench(device=device, sizes=BatchSizes(device.start_rows)), ShardReport(0, (spec.slug,))
    sources = image_sources(table, [True] * len(table), store.record, _place(corpus))
    facts, images, texts = encode_inputs(sources, captions, {spec.slug: loaded}, bench, report)
    reasons = [
        "image: none"
        if fact is None
        else fact.reason or ("image: not the bytes of then" if sha not in (None, fact.image_sha256) else None)
        for sha, fact in zip(table["image_sha256"].to_pylist(), facts, strict=True)
    ]
    usable = {
        "image": np.array([reason is None for reason in reasons]) & (valid[drawn] & IMAGE_SOUND > 0),
        "text": np.array([caption is not None for caption in captions]) & (valid[drawn] & TEXT_SOUND > 0),
    }
    now = {"image": images.get(spec.slug), "text": texts.get(spec.slug)}
    wanted = (reason for reason, bits in zip(reasons, valid[drawn], strict=True) if reason and bits & IMAGE_SOUND)
    faults = dict(Counter(wanted).most_common())
    if not any(mask.any() for mask in usable.values()):
        why = next(iter(faults), "no caption")
        raise CorpusError(
            f"no input of the {len(drawn)} rows drawn from {store.root} can be read ({why}); name the "
            "folder where the images lie now with --corpus"
        )
    towers = {
        tower: _cosines(store.features(spec.slug, tower)[drawn][usable[tower]], fresh[usable[tower]], tolerance)
        for tower in stored.towers
        if (fresh := now[tower]) is not None
    }
    known = None if stored.loader == "imported" else stored.digest
    return TeacherComparison(spec.slug, card.source, known, card.digest, len(drawn), tolerance, towers, faults)


def _spec(store: FeatureStore, teacher: str) -> TeacherSpec:
    """Return the named teacher; for a bare slug of the store, the source in its card."""
    if (card := store.teachers.get(teacher)) is not None and card.source.startswith((LOCAL_DIR, HF_HUB)):
        return parse_teacher(f"{teacher}={card.source}").model_copy(update={"revision": card.revision})
    if card is None and not any(sign in teacher for sign in "=:/."):
        store.card(teacher)
    spec = parse_teacher(teacher)
    store.card(spec.slug)
    return spec


def _place(corpus: str | None) -> str | None:
    """Return the folder that `--corpus` means: itself, or that of the corpus it names."""
    if corpus is None:
        return None
    return str(Path(corpus).resolve() if Path(corpus).is_dir() else open_corpus(corpus).root)


def _cosines(stored: NDArray[np.floating[Any]], now: NDArray[np.floating[Any]], tolerance: float) -> TowerCosines:
    """Compare features (n, D) of the same rows."""
    wide = (values.astype(np.float64) for values in (stored, now))
    with np.errstate(invalid="ignore", divide="ignore"):
        before, after = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in wide)
    cosines = (before * after).sum(axis=1)
    below = int(np.count_nonzero(~(cosines >= 1 - tolerance)))
    if not len(cosines):
        return TowerCosines(0, 0, np.nan, {}, np.nan, np.nan)
    # float64 rounding may pass 1 by some 1e-16, which would look odd in a report.
    cosines = np.minimum(cosines, 1.0)
    quantiles = {name: float(np.quantile(cosines, q)) for name, q in (("1%", 0.01), ("5%", 0.05), ("50%", 0.5))}
    strangers = float((np.roll(before, 1, axis=0) * after).sum(axis=1).mean()) if len(cosines) > 1 else np.nan
    return TowerCosines(len(cosines), below, float(cosines.min()), quantiles, float(cosines.mean()), strangers)

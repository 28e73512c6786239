"""Validation during training: retrieval and zero-shot on held-out rows that are not trained on, never report sets."""

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import torch
from numpy.typing import NDArray

from mmkd.base.errors import ConfigError, UserError
from mmkd.base.places.remote import RemotePath
from mmkd.distill.captions import Captions, Tokenize, tokenize_captions
from mmkd.distill.config import DataConfig, MonitorConfig, MonitorSet
from mmkd.distill.further_captions import TrainingCaptions
from mmkd.distill.image_places import ImagePlaces
from mmkd.distill.images import RowImages, StoredImages, image_batches, row_images
from mmkd.distill.losses import unit
from mmkd.distill.optimizer import WeightAverage
from mmkd.distill.pairs import Pairs, count_pending, is_pair, refuse_pending, rows_where
from mmkd.distill.student import Towers, student_pixels
from mmkd.distill.world import World
from mmkd.store import FeatureStore

_QUERIES_AT_ONCE = 1024
_COLUMNS = ("row", "key", "uri", "offset", "length", "status")


@dataclass(frozen=True)
class HeldOutRows:
    """Rows of one monitor set, found before any network is built, so that mistakes in them show at once."""

    metrics: tuple[str, ...]
    """Names of its scores."""
    store: FeatureStore
    places: ImagePlaces
    caption: NDArray[np.int64]
    """Number of each pair's caption in `captions`."""
    captions: list[str]
    labels: list[str]
    """Class of each pair; empty for retrieval."""
    prompts: pa.Table | None
    """Columns `caption` and `class`; None for retrieval."""
    digest: str
    """Digest of the rows, images and captions, independent of the store's location."""


@dataclass(frozen=True)
class HeldOut:
    """One monitor set with its tokens and images. labels: int64 (n,), class of each pair; empty for retrieval. prompts:
    captions of the classes, None for retrieval. prompt_labels: int64 (p,), class of each prompt."""

    rows: HeldOutRows
    images: RowImages
    captions: Captions
    labels: torch.Tensor
    prompts: Captions | None
    prompt_labels: torch.Tensor


def read_held_out(rows: HeldOutRows, data: DataConfig, side: int, tokenizer: Tokenize) -> HeldOut:
    """Find the images of a monitor set for a student of `side` pixels, and tokenize its captions and prompts."""
    named: list[str] = rows.prompts["class"].to_pylist() if rows.prompts is not None else []
    place = {name: number for number, name in enumerate(sorted(set(named)))}
    images = row_images(rows.store, rows.places, data.images, side)
    if isinstance(images, StoredImages) and isinstance(rows.store.root, RemotePath):
        raise ConfigError(
            f"monitor set {rows.metrics[0].partition('/')[0]!r}: its images lie all over {rows.store.root}; name a "
            "`store` on this machine that has its rows (`mmkd store subset`)"
        )
    return HeldOut(
        rows=rows,
        images=images,
        captions=tokenize_captions(rows.captions, tokenizer),
        labels=torch.tensor([place[label] for label in rows.labels], dtype=torch.long),
        prompts=tokenize_captions(rows.prompts["caption"].to_pylist(), tokenizer) if rows.prompts is not None else None,
        prompt_labels=torch.tensor([place[name] for name in named], dtype=torch.long),
    )


def find_held_out(
    entry: MonitorSet, run_store: FeatureStore, training: Pairs, choices: TrainingCaptions | None
) -> HeldOutRows:
    """Draw `limit` of the rows that match a monitor set, as evenly over its classes as they allow. Raises ConfigError
    if one is also among the `training` rows of `run_store`, or has one of their further captions; UserError if fewer
    than two match, or classes, prompts and limit do not fit; IncompleteStoreError if rows that match have not been
    extracted yet."""
    store = run_store if entry.store is None else FeatureStore.open(entry.store)
    columns = list(dict.fromkeys(["caption", "image_sha256", *([entry.label] if entry.label else [])]))
    table = rows_where(store, entry.where, list(dict.fromkeys([*columns, *_COLUMNS])))
    refuse_pending(store, count_pending(table), len(table))
    table, where = table.filter(is_pair(table)), f"monitor set {entry.name!r}"
    if len(table) < 2:
        raise UserError(f"{where}: {len(table)} rows of {store.root} match {entry.where}; change its `where`")
    classes = table[entry.label].cast(pa.string()).to_pylist() if entry.label else [None] * len(table)
    if entry.label and (blank := classes.count(None)):
        raise UserError(f"{where}: {blank} of its rows have no {entry.label}; leave them out with `where`")
    if entry.limit < len(set(classes)):
        raise UserError(f"{where}: limit {entry.limit} is less than its {len(set(classes))} classes; raise it")
    drawn = draw_evenly(classes, entry.limit)
    table = table.take(pa.array(drawn))
    labels = [classes[place] for place in drawn] if entry.label else []
    if both := _rows_in_both(table, run_store, training, choices):
        raise ConfigError(
            f"{where}: row {both[0]} and {len(both) - 1} more are trained on too (with the caption, and the image or "
            "key, of a training row); keep them apart with `where`"
        )
    prompts = None
    if entry.label is not None:
        found = rows_where(store, entry.prompts, list(dict.fromkeys(["caption", entry.label])))
        prompts = pa.table({"caption": found["caption"], "class": found[entry.label].cast(pa.string())}).drop_null()
        named = sorted(set(prompts["class"].to_pylist()))
        if unknown := sorted(set(labels) - set(named)):
            names = ", ".join(named) or "none"
            raise UserError(f"{where}: no prompt for class {unknown[0]!r}; its prompts name {names}")
        if len(named) < 2:
            raise UserError(f"{where}: its prompts name the one class {named[0]!r}, expected two or more")
    shown = table.select(columns).to_pydict()
    content = json.dumps([shown, prompts.to_pydict() if prompts is not None else None], default=str)
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    encoded = table["caption"].combine_chunks().dictionary_encode()
    numbers, captions = encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()
    return HeldOutRows(entry.metrics, store, ImagePlaces.of(table), numbers, captions, labels, prompts, digest)


def draw_evenly(classes: list[str | None], limit: int) -> NDArray[np.int64]:
    """Draw at most `limit` places, ascending: equally many of each class that has enough; a function of its
    arguments."""
    order = np.random.default_rng(0).permutation(len(classes))
    seen: dict[str | None, int] = {}
    turn = np.empty(len(classes), dtype=np.int64)
    for place in order:
        turn[place] = seen[classes[place]] = seen.get(classes[place], -1) + 1
    return np.sort(order[np.argsort(turn[order], kind="stable")][:limit])


def _rows_in_both(
    table: pa.Table, run_store: FeatureStore, training: Pairs, choices: TrainingCaptions | None
) -> list[int]:
    """List the held-out rows that have a caption, and the image bytes or the key, of a row that is trained on: images
    that were encoded again, and imported features, keep their keys. Of an image that is trained on alone, any
    caption."""
    both = np.zeros(len(table), dtype=bool)
    for name in ("image_sha256", "key"):
        alike = pads.field(name).isin(table[name].combine_chunks().drop_null().unique())
        found = run_store.sample_table(columns=["row", "caption", name], filter=alike)
        rows = found["row"].to_numpy()
        place = np.minimum(training.numbers(rows), len(training.rows) - 1)
        trained = training.rows[place] == rows
        found = found.filter(pa.array(trained))
        known = set(zip(found[name].to_pylist(), found["caption"].to_pylist(), strict=True))
        if choices is not None:
            owners, said = choices.of_rows(found["row"].to_numpy())
            more = run_store.sample_table(columns=["row", "caption"], filter=pads.field("row").isin(np.unique(said)))
            names = dict(zip(found["row"].to_pylist(), found[name].to_pylist(), strict=True))
            captions = dict(zip(more["row"].to_pylist(), more["caption"].to_pylist(), strict=True))
            known |= {(names[row], captions[by]) for row, by in zip(owners.tolist(), said.tolist(), strict=True)}
        alone = set(found[name].filter(pa.array(training.groups[place[trained], 0] < 0)).to_pylist())
        pairs = zip(table[name].to_pylist(), table["caption"].to_pylist(), strict=True)
        both |= [pair in known or pair[0] in alone for pair in pairs]
    rows_in_both: list[int] = table["row"].to_numpy()[both].tolist()
    return rows_in_both


@dataclass(kw_only=True)
class Monitor:
    """All held-out sets of a run, and the weights that are judged."""

    config: MonitorConfig
    sets: list[HeldOut]
    towers: Towers
    average: WeightAverage | None
    """Judged in place of the towers' own weights, where there is one."""
    batch_rows: int
    """Images or captions of one forward pass."""
    workers: int
    """Processes that read images."""
    world: World

    @property
    def judge(self) -> str:
        """The metric that chooses the best checkpoint, and a digest of the rows that it looks at; may be empty."""
        metric = self.config.chosen_metric
        digests = [held.rows.digest for held in self.sets if metric in held.rows.metrics]
        return f"{metric} {digests[0]}" if digests else ""

    @torch.no_grad()
    def scores(self) -> dict[str, float]:
        """Return every metric of every set by `SET/METRIC`, in [0, 1], higher is better; the same on every rank."""
        found: dict[str, float] = {}
        towers, average, training = self.towers, self.average, self.towers.training
        own = {name: value.detach().clone() for name, value in towers.state_dict().items()} if average else {}
        try:
            if average:
                towers.load_state_dict(average.values)
            self.world.share_buffers(towers)
            towers.eval()
            for held in self.sets:
                found |= self._judge(held)
        finally:
            if average:
                towers.load_state_dict(own)
            towers.train(training)
        return found

    def _judge(self, held: HeldOut) -> dict[str, float]:
        images = self._encode_images(held)
        if held.prompts is None:
            groups = torch.from_numpy(held.rows.caption)
            texts = self._encode_texts(held.captions)[groups]
            ranks = torch.cat([positive_ranks(images, texts, groups), positive_ranks(texts, images, groups)])
            return {name: (ranks < k).float().mean().item() for name, k in zip(held.rows.metrics, (1, 5), strict=True)}
        prompts = self._encode_texts(held.prompts)
        classes = int(held.prompt_labels.max()) + 1
        sums = torch.zeros(classes, prompts.shape[1]).index_add_(0, held.prompt_labels, prompts)
        predicted = (images @ unit(sums).T).argmax(dim=1)
        present = [held.labels == label for label in torch.unique(held.labels)]
        recalls = [(predicted[mine] == held.labels[mine]).float().mean() for mine in present]
        return {held.rows.metrics[0]: torch.stack(recalls).mean().item()}

    def _encode_images(self, held: HeldOut) -> torch.Tensor:
        """Return float32 (n, D) of unit norm, on the CPU; every rank encodes its share."""
        rows = held.rows.places.rows
        padded = np.resize(rows, -(-len(rows) // self.world.size) * self.world.size)
        mine = padded.reshape(self.world.size, -1)[self.world.rank]
        parts = np.split(mine, range(self.batch_rows, len(mine), self.batch_rows))
        plain = student_pixels(self.towers.student)
        pixels = image_batches(held.images, plain, ((0, part) for part in parts), 0, self.workers)
        found = [unit(self.towers.encode_images(images.to(self.world.device))) for images in pixels]
        return self.world.gather(torch.cat(found)).cpu()[: len(rows)]

    def _encode_texts(self, captions: Captions) -> torch.Tensor:
        numbers = np.arange(len(captions))
        parts = np.split(numbers, range(self.batch_rows, len(numbers), self.batch_rows))
        tokens = (captions.tokens(part) for part in parts)
        return torch.cat([unit(self.towers.encode_tokens(part.to(self.world.device))).cpu() for part in tokens])


def positive_ranks(queries: torch.Tensor, gallery: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Count the wrong answers that are at least as near as the nearest right one: int64 (n,), 0 is best. `queries`,
    `gallery`: float32 (n, D) of unit norm. groups: int64 (n,); an answer is right when its group is equal."""
    ranks = []
    for chunk, mine in zip(*(torch.split(part, _QUERIES_AT_ONCE) for part in (queries, groups)), strict=True):
        cosine = chunk @ gallery.T
        right = mine[:, None] == groups[None, :]
        nearest = cosine.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(((cosine >= nearest) & ~right).sum(dim=1))
    return torch.cat(ranks)

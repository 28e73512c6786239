"""Pictures that a recipe makes of the images of a store, as a corpus of its own behind them: the pictures of an image
are adjacent rows, so that a shard reads and decodes it once for all of them."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mmkd.base.errors import CorpusError, UserError
from mmkd.base.images.recipe import Recipe, read_recipe
from mmkd.base.text import counted
from mmkd.extract.corpora import CorpusRow, Ignored, Part
from mmkd.extract.corpora.row import INDEX_FAULTS
from mmkd.extract.index import append_below, check_same_corpus, restore_parts
from mmkd.store.record import CorpusSpan, Store
from mmkd.store.samples import PartFiles, read_part
from mmkd.store.writer import finish_append


@dataclass(frozen=True)
class DerivedPictures:
    """A `Corpus`: the pictures of every image of corpus `number` of a store, failed images and all. Rows that the index
    refused have no image that is read, and so no pictures."""

    store: Store
    number: int
    recipe: Recipe
    labels: tuple[str, ...] = ()

    @property
    def images(self) -> CorpusSpan:
        return self.store.record.spans()[self.number]

    @property
    def kind(self) -> str:
        return self.recipe.kind

    @property
    def location(self) -> str:
        return f"{self.kind} of {self.images.corpus.location}"

    @property
    def root(self) -> str:
        return self.images.corpus.root

    def settings(self) -> str:
        return json.dumps(self.recipe.model_dump(mode="json"), sort_keys=True)

    def parts(self) -> Sequence[Part]:
        # The digest, not the parts' bytes: these change when the images are extracted.
        digest = self.images.corpus.digest
        return [Part(str(place), 0, digest) for place in range(len(self.images.shards))]

    def rows_of(self, part: Part) -> Iterator[CorpusRow | Ignored]:
        table, _ = read_part(self.store.root, self.images.shards[int(part.name)])
        names = ("row", "key", "uri", "offset", "length", "modality", "reason")
        for row, key, uri, offset, length, modality, reason in zip(*(table[n].to_pylist() for n in names), strict=True):
            if uri is None or (reason or "").startswith(INDEX_FAULTS):
                continue
            for number in range(1, self.recipe.count + 1):
                name = self.recipe.row_key(key, number)
                yield CorpusRow(name, None, uri, offset, length, modality, image_rows=(row,), view_number=number)

    def ignored(self) -> Iterator[Ignored]:
        return iter(())


def derived_corpora(store: Store) -> list[DerivedPictures]:
    """Return the corpora of a store whose rows a recipe made. Raises ConfigError, UserError as `read_recipe`."""
    recipes = (span.corpus.recipe for span in store.record.spans())
    return [
        DerivedPictures(store, recipe["corpus"], read_recipe(recipe, str(store.root))) for recipe in recipes if recipe
    ]


def append_pictures(store: Store, recipe: Recipe, say: Callable[[str], object]) -> Store:
    """Append the pictures of every corpus with images that has none of this kind; return the longer store. Raises
    UserError as `pictures_of`; CorpusError if none has an image; StoreError if the store cannot be
    written."""
    # Not by the digest, which is of a recipe as it was written: 1 and 1.0 are the same.
    if known := pictures_of(store, recipe):
        finish_append(store)
    for number, span in enumerate(store.record.spans()):
        pictures = DerivedPictures(store, number, recipe)
        if span.corpus.is_linked or number in known:
            continue
        if not any(next(pictures.rows_of(part), None) for part in pictures.parts()):
            continue
        content = {"corpus": number, **recipe.model_dump(mode="json")}
        made = append_below(store, pictures, towers=("image",), recipe=content).rows
        known.add(number)
        store = Store.open(store.root)
        images = counted(len(made) // recipe.count, "image")
        say(f"{recipe.kind}: {recipe.count} of each of {images}, rows {made.start:,} to {made.stop - 1:,}")
    if not known:
        raise CorpusError(f"{store.root} has no image that {recipe.kind} can be made of; leave {recipe.option} out")
    return store


def pictures_of(store: Store, recipe: Recipe) -> set[int]:
    """Return the numbers of the corpora that have pictures of this recipe. Raises UserError if one has pictures of its
    kind by another recipe."""
    found = set()
    for one in derived_corpora(store):
        if one.kind == recipe.kind:
            if one.recipe != recipe:
                differing = _differing(one.recipe, recipe)
                raise UserError(f"{store.root} has {differing}; ask for the same, or name a new store")
            found.add(one.number)
    return found


def restore_pictures(store: Store, say: Callable[[str], object]) -> int:
    """As `restore_parts` for pictures; tells `say` of those that cannot be listed yet, as sample parts of an earlier
    corpus are missing too."""
    restored = 0
    for one in derived_corpora(store):
        span, files = check_same_corpus(one, store), PartFiles(store.root)
        gone = [shard for shard in range(span.shards.stop) if shard not in files]
        if not gone or gone[-1] < span.shards.start:
            continue
        if gone[0] in span.shards:
            restored += restore_parts(one, store)
        else:
            first = next(own for own in reversed(store.record.input_spans) if own.shards.start <= gone[0]).corpus
            say(
                f"sample parts of {one.location} stay missing until those of {first.location} are there: "
                f"`mmkd extract {first.location} {store.root}` lists them"
            )
    return restored


def _differing(there: Recipe, wanted: Recipe) -> str:
    """Return the first member of two recipes of a kind that differs."""
    before, now = (one.model_dump(mode="json") for one in (there, wanted))
    name = next(name for name in before if before[name] != now[name])
    return f"{there.kind} with {name} {json.dumps(before[name])}, not {json.dumps(now[name])}"

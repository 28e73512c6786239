"""Windows of shards in a run: found for its order, fetched from a store behind a URL, and judged by policies."""

import numpy as np
from numpy.typing import NDArray

from mmkd.distill.config import RunConfig
from mmkd.distill.fetch_ahead import FetchAhead
from mmkd.distill.further_captions import TrainingCaptions
from mmkd.distill.images import RowImages, StoredImages
from mmkd.distill.order import Windows
from mmkd.distill.pairs import Pairs
from mmkd.distill.teacher_features import TeacherFeatures
from mmkd.distill.views import TrainingViews
from mmkd.store import FeatureStore
from mmkd.store.layout import TOWERS, Tower

_FEW = 64
"""Features of a teacher that are too few to judge it by: the mean of its scores is wrong by an eighth of their
deviation."""


def find_windows(
    config: RunConfig,
    store: FeatureStore,
    pairs: Pairs,
    slugs: tuple[str, ...],
    images: RowImages,
    workers: int,
    views: TrainingViews | None,
    choices: TrainingCaptions | None,
) -> tuple[Windows | None, FetchAhead | None]:
    """Return the windows of a run that has them, and what fetches them of a store behind a URL, with the rows of their
    views and further captions."""
    if config.data.order != "windows":
        return None, None
    windows = Windows(pairs.rows, store.record.rows_per_shard, config.data.window, config.seed)
    if store.cache is None:
        return windows, None
    beside: dict[Tower, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
    if views is not None:
        beside["image"] = views.images.repeat(views.recipe.count), views.rows.ravel()
    if choices is not None:
        beside["text"] = choices.of_rows(choices.rows)
    inputs, rows = images.inputs if isinstance(images, StoredImages) else None, (2 * workers + 2) * config.batch_size
    return windows, FetchAhead(store, windows, slugs, inputs, beside, rows_ahead=rows, epochs=config.epochs)


def judged_rows(
    config: RunConfig,
    pairs: Pairs,
    windows: Windows | None,
    teachers: TeacherFeatures | None,
    ahead: FetchAhead | None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return rows and groups of the pairs from which policies learn what they want to know of all: those of the first
    window, and of each teacher that has hardly a feature there, those of the window where it has most."""
    if windows is None or teachers is None or config.policy.kind != "best":
        return pairs.rows, pairs.groups
    every = windows.of_epoch(0)

    def count(shards: NDArray[np.int64]) -> NDArray[np.int64]:
        return teachers.present(pairs.rows[windows.inside(shards)]).sum(axis=0)

    # Policies judge teachers with both towers.
    few, chosen = (count(every[0]) < _FEW) & [[towers == TOWERS] for towers in teachers.towers], {0}
    if few.any():
        chosen |= set(np.stack([count(shards) for shards in every])[:, few].argmax(axis=0).tolist())
    shards = np.concatenate([every[number] for number in sorted(chosen)])
    if ahead is not None:
        ahead.read(shards)
    some = windows.inside(shards)
    return pairs.rows[some], pairs.groups[some]

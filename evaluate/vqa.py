"""Visual question answering with pooled features: a small trained head, or ranking written-out answers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkd.evaluate.answer_text import answer_index, normalised, vocabulary
from mmkd.evaluate.classification import scoring_with_primary
from mmkd.evaluate.dataset import SPLITS, DatasetRows, Samples, Split
from mmkd.evaluate.dataset_spec import VqaColumns
from mmkd.evaluate.features import Features
from mmkd.evaluate.metrics import Floats
from mmkd.evaluate.predictions import Predictions, choices_digest
from mmkd.evaluate.ranking import TIE, weighted_mean
from mmkd.evaluate.settings import TaskSettings, VqaSettings
from mmkd.evaluate.splits import hold_out, shared_groups
from mmkd.evaluate.task import Metric, Scoring, Variant
from mmkd.store import UserError
from mmkd.store.layout import Tower

BOTH: tuple[Split, ...] = ("train", "test")
COLUMNS = ("answer", "right", "closed", "covered")


class Vqa:
    """The answer of every test question, and whether it is the right one word for word."""

    name = "vqa"
    version = 2

    def towers(self, settings: TaskSettings) -> tuple[Tower, ...]:
        """Images, and questions as captions."""
        return ("image", "text")

    def variants(self, settings: TaskSettings) -> tuple[Variant, ...]:
        """The trained head with each seed; ranking needs one run."""
        own = settings.vqa
        return tuple(
            Variant(head=head, seed=seed) for head in own.heads for seed in range(own.seeds if head != "rank" else 1)
        )

    def scoring(self, settings: TaskSettings) -> Scoring:
        """Accuracy over all questions and over either kind; the coverage is the ceiling that the vocabulary sets."""
        metrics: dict[str, Metric] = {
            "overall_acc": lambda found, weights: weighted_mean(found.column("right"), weights),
            "closed_acc": lambda found, weights: _share_of(found, found.column("closed") > 0, weights),
            "open_acc_exact": lambda found, weights: _share_of(found, found.column("closed") == 0, weights),
            "coverage": lambda found, weights: weighted_mean(found.column("covered"), weights),
        }
        return scoring_with_primary(
            Scoring(
                "standard",
                metrics,
                "overall_acc",
                proportions=frozenset(metrics),
                rows={
                    "closed_acc": lambda found: found.column("closed") > 0,
                    "open_acc_exact": lambda found: found.column("closed") == 0,
                },
            ),
            settings.vqa.primary,
        )

    def problems(self, data: DatasetRows, settings: TaskSettings) -> list[str]:
        """There must be train and test questions with answers, and candidates where they are to be ranked."""
        found = []
        try:
            for name in BOTH:
                _answers(data, data.split(name))
            if "rank" in settings.vqa.heads:
                _candidates(data)
        except UserError as error:
            found.append(str(error))
        return found

    def predict(self, variant: Variant, data: DatasetRows, features: Features) -> Predictions:
        """Answer, right, closed and covered of every test question, float64 (n, 4)."""
        settings = data.spec.settings.vqa
        columns = _columns(data)
        test = data.split("test")
        if variant.head == "rank":
            answer, words, info = _rank(data, features)
        else:
            answer, words, info = _fuse(data, features, settings, variant.seed)
        true = answer_index(_answers(data, test), words)
        closed, covered = test.matching(columns.closed), true >= 0
        score = np.column_stack([answer, (answer == true) & covered, closed, covered]).astype(np.float64)
        available = answer >= 0
        score[~available] = np.nan
        info |= {
            "vocabulary": list(words),
            "closed": int(closed.sum()),
            "open": int((~closed).sum()),
            "test_images_in_train": _shared_images(data),
        }
        return Predictions(
            ids=test.ids,
            group=data.groups(test),
            domain=data.domains(test),
            y=None,
            score=score,
            available=available,
            columns=COLUMNS,
            info=info,
        )


def _share_of(found: Predictions, kind: NDArray[np.bool_], weights: Floats) -> Floats:
    return weighted_mean(found.column("right")[kind], weights[:, kind])


def _fuse(
    data: DatasetRows, features: Features, settings: VqaSettings, seed: int
) -> tuple[NDArray[np.int64], tuple[str, ...], dict[str, Any]]:
    """Train the head: answers int64 (n,), -1 where the model lacks a feature; the vocabulary; facts."""
    from mmkd.evaluate.heads.fusion_mlp import Questions, fit_predict  # noqa: PLC0415 (torch, for those who ask for it)

    def questions(samples: Samples) -> tuple[Questions, NDArray[np.bool_]]:
        image, text = features.images(samples.rows), features.texts(samples.rows)
        there = image.available & text.available
        answer = answer_index(_answers(data, samples), words)
        return Questions(image.values[there], text.values[there], answer[there]), there

    names = [name for name in SPLITS if name in data.splits and (name != "test" or settings.vocabulary == "all")]
    words = vocabulary(np.concatenate([_answers(data, data.split(name)) for name in names]))
    train, there = questions(data.split("train"))
    if len(train.answer) == 0:
        raise UserError(f"{features.model} has no features for any of the {len(there)} train questions")
    if "val" in data.splits:
        val = questions(data.split("val"))[0]
    else:
        # Images (or patients) stay whole, so that a held-out question is not about a picture that was learned.
        out = hold_out(np.zeros(len(train.answer), np.int64), _held_together(data, data.split("train"))[there], seed)
        train, val = train.take(~out), train.take(out)
    test, test_there = questions(data.split("test"))
    found, kept = fit_predict(train, val, test, len(words), (settings, seed))
    answer = np.full(len(test_there), -1, dtype=np.int64)
    answer[test_there] = found
    return answer, words, {"epoch": kept, "train_questions": len(train.answer), "vocabulary_of": settings.vocabulary}


def _rank(data: DatasetRows, features: Features) -> tuple[NDArray[np.int64], tuple[str, ...], dict[str, Any]]:
    """The candidate of each question that is nearest to its image; a tie with a right one counts as wrong."""
    candidates, of = _candidates(data)
    test = data.split("test")
    words = vocabulary(_answers(data, candidates))
    index = answer_index(_answers(data, candidates), words)
    texts, images = features.texts(candidates.rows), features.images(test.rows)
    true = answer_index(_answers(data, test), words)
    answer = np.full(len(test), -1, dtype=np.int64)
    for i, (key, caption) in enumerate(zip(test.ids, test.column("caption"), strict=True)):
        mine = [c for c in of.get(str(key), of.get(str(caption), [])) if texts.available[c]]
        if mine and images.available[i]:
            cosine = texts.values[mine] @ images.values[i]
            best = [index[mine[c]] for c in np.flatnonzero(cosine >= cosine.max() - TIE)]
            answer[i] = next((a for a in best if a != true[i]), best[0])
    lacking = int((~texts.available).sum())
    return (
        answer,
        words,
        {
            "candidates": len(candidates),
            "questions_without_candidates": int((answer < 0).sum()),
            "choices": choices_digest(candidates.ids[texts.available]),
            "warnings": [f"{lacking} of the {len(candidates)} candidates have no features"] if lacking else [],
        },
    )


def _candidates(data: DatasetRows) -> tuple[Samples, dict[str, list[int]]]:
    """Candidate rows, and their positions by the question (key or text) that they answer."""
    columns = _columns(data)
    if data.candidates is None or len(data.candidates) == 0:
        raise UserError(f"{data.spec.dataset}: head `rank` needs `vqa: candidates`, text rows with written-out answers")
    of: dict[str, list[int]] = {}
    for i, question in enumerate(data.candidates.column(columns.candidate_of)):
        of.setdefault(str(question), []).append(i)
    return data.candidates, of


def _answers(data: DatasetRows, samples: Samples) -> NDArray[np.object_]:
    """Answers as they stand in the table, str (n,).

    Raises:
        UserError: a question without an answer.
    """
    column = _columns(data).answer
    values = samples.column(column)
    for value, key in zip(values, samples.ids, strict=True):
        if not normalised(value):
            raise UserError(
                f"{data.spec.dataset}: {samples.name} question {key!r} has {column}={value!r}, not an answer"
            )
    return values


def _columns(data: DatasetRows) -> VqaColumns:
    assert data.spec.vqa is not None, "the suite requires the columns for this task"
    return data.spec.vqa


def _held_together(data: DatasetRows, samples: Samples) -> NDArray[np.object_]:
    """What questions depend on each other by: the group column, else the image, str (n,)."""
    if data.spec.group is not None:
        return data.groups(samples)
    images = samples.column("image_sha256")
    return np.where(images == None, samples.ids, images)  # noqa: E711 - element by element


def _shared_images(data: DatasetRows) -> int:
    """Test images that are training images too (all 203 of VQA-RAD's are)."""
    digests = [data.split(name).column("image_sha256") for name in BOTH]
    return len(shared_groups(*(values[values != None] for values in digests)))  # noqa: E711 - element by element

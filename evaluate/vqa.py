"""Visual question answering with pooled features: a small trained head, or ranking written-out answers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from mmkd.base.errors import UserError
from mmkd.evaluate.dataset import SPLITS, DatasetRows, Samples, Split
from mmkd.evaluate.dataset_spec import DatasetSpec, RowFilter, Section, check_sides
from mmkd.evaluate.features import Features
from mmkd.evaluate.heads.settings import FusionSettings, budget_warnings
from mmkd.evaluate.metrics import Floats
from mmkd.evaluate.predictions import Predictions, choices_digest
from mmkd.evaluate.ranking import TIE, weighted_mean
from mmkd.evaluate.splits import hold_out, shared_groups
from mmkd.evaluate.task import Metric, Scoring, Task, TaskSettings, Variant, answers_of_test, without_features
from mmkd.store.evaluation_rows import CANDIDATE, KIND, TEXT_OF
from mmkd.store.layout import Tower

BOTH: tuple[Split, ...] = ("train", "test")
_ARTICLES = re.compile(r"\b(a|an|the)\s+(?=\w)")
_NO_MEANING = re.compile(r"""
    [!"\#$&'()*,;?@\[\\\]^_`{|}~]     # punctuation; signs and relations stay: ER+, > 2, 5 %
    | [./:] (?!\d) | (?<!\d) [./:]     # except in numbers: 1.5, 1/2
    | (?<=\s)-(?=\s) | (?<=[^\W\d])-(?=\w) | (?<=\w)-(?=[^\W\d])  # a hyphen in a word, no sign: t1-weighted, not ER-
    """, re.VERBOSE)  # fmt: skip
_X_RAY = re.compile(r"\bx[ -]?rays?\b")
COLUMNS = ("answer", "right", "closed", "covered")


class VqaSettings(FusionSettings, TaskSettings):
    """Visual question answering with pooled features: for comparing encoders, not with fine-tuned fusion models."""

    heads: tuple[Literal["fusion_mlp", "rank"], ...] = ("fusion_mlp",)
    """`rank` needs candidate rows in the store and is not trained."""
    vocabulary: Literal["train", "all"] = "train"
    """`all` adds the test answers, as published numbers often do; the coverage is then 1 by construction."""
    seeds: int = Field(default=5, ge=1)


class VqaColumns(Section):
    """Columns of the answers. The caption of a row is the question, its image is the subject."""

    from_source = {"candidates": {"candidates": {KIND: CANDIDATE}, "candidate_of": TEXT_OF}}  # noqa: RUF012

    answer: str
    """Column of the right answer."""
    closed: RowFilter
    """Column and the value(s) that mark closed questions, for example `{answer_type: CLOSED}`."""
    open: RowFilter | None = None
    """The same column(s) with the values that mark open ones. Without it a column may have one other value and no null;
    `*` stands for all other values."""
    candidates: RowFilter | None = None
    """Text rows `question answer` among which the head `rank` chooses; they have the answer in the answer column
    and the question's key, or its text, in the column `candidate_of`."""
    candidate_of: str = "question"

    @model_validator(mode="after")
    def _sides_differ(self) -> VqaColumns:
        check_sides(self.closed, self.open, "closed", "open")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """Answer, and the columns that distinguish closed from open questions."""
        return (self.answer, *self.closed)

    @property
    def texts(self) -> dict[str, tuple[RowFilter, tuple[str, ...]]]:
        """Written-out answers."""
        return {} if self.candidates is None else {"candidate": (self.candidates, (self.answer, self.candidate_of))}


class Vqa(Task[VqaSettings]):
    """The answer of every test question, and whether it is the right one word for word."""

    name = "vqa"
    version = 3
    settings = VqaSettings
    section = VqaColumns

    def needs(self, spec: DatasetSpec) -> Iterator[str]:
        """Yield columns of the answers, and training questions."""
        yield from super().needs(spec)
        if spec.rows.train is None:
            yield "vqa needs `rows: train`"

    def towers(self, spec: DatasetSpec) -> tuple[Tower, ...]:
        """Return images, and questions as captions."""
        return ("image", "text")

    def variants(self, spec: DatasetSpec) -> tuple[Variant, ...]:
        """Return the trained head with each seed; ranking needs one run."""
        own = self.own(spec)
        return tuple(
            Variant(head=head, seed=seed) for head in own.heads for seed in range(own.seeds if head != "rank" else 1)
        )

    def standard_scoring(self, spec: DatasetSpec) -> Scoring:
        """Return accuracy over all questions and over either kind; the coverage is the ceiling that the vocabulary
        sets."""
        metrics: dict[str, Metric] = {
            "overall_acc": lambda found, weights: weighted_mean(found.column("right"), weights),
            "closed_acc": lambda found, weights: _share_of(found, found.column("closed") > 0, weights),
            "open_acc_exact": lambda found, weights: _share_of(found, found.column("closed") == 0, weights),
            "coverage": lambda found, weights: weighted_mean(found.column("covered"), weights),
        }
        return Scoring(
            "standard",
            metrics,
            "overall_acc",
            proportions=frozenset(metrics),
            rows={
                "closed_acc": lambda found: found.column("closed") > 0,
                "open_acc_exact": lambda found: found.column("closed") == 0,
            },
        )

    def problems(self, data: DatasetRows) -> list[str]:
        """Require train and test questions with answers, and candidates where they are ranked."""
        try:
            for name in BOTH:
                _answers(data, data.split(name))
            _closed(data, data.split("test"))
            if "rank" in self.own(data.spec).heads:
                _candidates(data)
        except UserError as error:
            return [str(error)]
        return []

    def counts(self, data: DatasetRows) -> dict[str, dict[str, int]]:
        """Return closed and open test questions."""
        closed = _closed(data, data.split("test"))
        return {"test questions": {"closed": int(closed.sum()), "open": int((~closed).sum())}}

    def predict(self, variant: Variant, data: DatasetRows, features: Features) -> Predictions:
        """Return answer, right, closed and covered of every test question, float64 (n, 4)."""
        test = data.split("test")
        if variant.head == "rank":
            found = _rank(data, features)
        else:
            found = _fuse(data, features, self.own(data.spec), variant.seed)
        true, closed = answer_index(_answers(data, test), found.words), _closed(data, test)
        right = (found.answer == true) & found.covered
        score = np.column_stack([found.answer, right, closed, found.covered]).astype(np.float64)
        available = found.answer >= 0
        score[~available] = np.nan
        info = found.info | {
            "vocabulary": list(found.words),
            "closed": int(closed.sum()),
            "open": int((~closed).sum()),
            "test_images_in_train": _shared_images(data),
        }
        return answers_of_test(data, score, available, COLUMNS, info=info)


def normalized(answer: object) -> str:
    """Return an answer without case, punctuation, articles before a word and doubled blanks; `x-ray` and `x ray` are
    one word. The steps are those of VQA's evaluation (Antol et al. 2015, section 3.3) without its number words. What
    tells two answers apart stays: signs (`ER+`, `ER-`, `-5`), relations (`>2`), fractions, and `A` as an answer of its
    own."""
    text = str(answer if answer is not None else "").lower().strip()
    text = _X_RAY.sub("xray", re.sub("[\u2010-\u2015\u2212]", "-", text))
    return " ".join(_ARTICLES.sub(" ", " ".join(_NO_MEANING.sub(" ", text).split())).split())


def vocabulary(answers: NDArray[np.object_]) -> tuple[str, ...]:
    """Return every normalized answer once, sorted: the order never depends on the run."""
    return tuple(sorted({normalized(answer) for answer in answers} - {""}))


def answer_index(answers: NDArray[np.object_], words: tuple[str, ...]) -> NDArray[np.int64]:
    """Return the index of every answer in the vocabulary, int64 (n,); -1 for one that is not in it."""
    index = {word: i for i, word in enumerate(words)}
    return np.array([index.get(normalized(answer), -1) for answer in answers], dtype=np.int64)


def _share_of(found: Predictions, kind: NDArray[np.bool_], weights: Floats) -> Floats:
    return weighted_mean(found.column("right")[kind], weights[:, kind])


@dataclass(frozen=True)
class _Answered:
    """Answers to n test questions. answer: int64 (n,), index in `words`, -1 where the model lacks a feature. covered:
    bool (n,), questions whose right answer can be given: it is in the vocabulary, or among the candidates that the
    model has features of."""

    answer: NDArray[np.int64]
    covered: NDArray[np.bool_]
    words: tuple[str, ...]
    info: dict[str, Any]


def _fuse(data: DatasetRows, features: Features, settings: VqaSettings, seed: int) -> _Answered:
    """Train the head and answer."""
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
    found, trained = fit_predict(train, val, test, words=len(words), settings=settings, seed=seed)
    answer = np.full(len(test_there), -1, dtype=np.int64)
    answer[test_there] = found
    facts = {
        **trained._asdict(),
        "train_questions": len(train.answer),
        "vocabulary_of": settings.vocabulary,
        "warnings": budget_warnings([trained]) + without_features(int(there.sum()), len(there), "train questions"),
    }
    return _Answered(answer, answer_index(_answers(data, data.split("test")), words) >= 0, words, facts)


def _rank(data: DatasetRows, features: Features) -> _Answered:
    """Return the candidate of each question that is nearest to its image; a tie with a right one counts as wrong."""
    candidates, of = _candidates(data)
    test = data.split("test")
    words = vocabulary(_answers(data, candidates))
    index = answer_index(_answers(data, candidates), words)
    texts, images = features.texts(candidates.rows), features.images(test.rows)
    true = answer_index(_answers(data, test), words)
    answer, covered = np.full(len(test), -1, dtype=np.int64), np.zeros(len(test), dtype=bool)
    for i, (key, caption) in enumerate(zip(test.ids, test.column("caption"), strict=True)):
        mine = [c for c in of.get(str(key), of.get(str(caption), [])) if texts.available[c]]
        covered[i] = any(index[c] == true[i] for c in mine)
        if mine and images.available[i]:
            cosine = texts.values[mine] @ images.values[i]
            best = [index[mine[c]] for c in np.flatnonzero(cosine >= cosine.max() - TIE)]
            answer[i] = next((a for a in best if a != true[i]), best[0])
    info = {
        "candidates": len(candidates),
        "questions_without_candidates": int((answer < 0).sum()),
        "choices": choices_digest(candidates.ids[texts.available]),
        "warnings": without_features(int(texts.available.sum()), len(candidates), "candidates"),
    }
    return _Answered(answer, covered, words, info)


def _candidates(data: DatasetRows) -> tuple[Samples, dict[str, list[int]]]:
    """Return the candidate rows, and their positions by the question (key or text) that they answer."""
    columns = _columns(data)
    candidates = data.texts.get("candidate", ())
    if not isinstance(candidates, Samples) or len(candidates) == 0:
        raise UserError(f"{data.spec.dataset}: head `rank` needs `vqa: candidates`, text rows with written-out answers")
    of: dict[str, list[int]] = {}
    for i, question in enumerate(candidates.column(columns.candidate_of)):
        of.setdefault(str(question), []).append(i)
    return candidates, of


def _answers(data: DatasetRows, samples: Samples) -> NDArray[np.object_]:
    """Return the table's answers unchanged, str (n,). Raises UserError for a question without an answer."""
    column = _columns(data).answer
    values = samples.column(column)
    for value, key in zip(values, samples.ids, strict=True):
        if not normalized(value):
            raise UserError(
                f"{data.spec.dataset}: {samples.name} question {key!r} has {column}={value!r}, not an answer"
            )
    return values


def _columns(data: DatasetRows) -> VqaColumns:
    found: VqaColumns = getattr(data.spec, TASK.name)
    return found


def _closed(data: DatasetRows, samples: Samples) -> NDArray[np.bool_]:
    return samples.two_way(_columns(data).closed, _columns(data).open, "vqa: open")


def _held_together(data: DatasetRows, samples: Samples) -> NDArray[np.object_]:
    """Return groups of questions that depend on each other: the group column, else the image, str (n,)."""
    if data.spec.group is not None:
        return data.groups(samples)
    return samples.filled("image_sha256", samples.ids)


def _shared_images(data: DatasetRows) -> int:
    """Return test images that are training images too (all 203 of VQA-RAD's are)."""
    digests = [data.split(name).column("image_sha256") for name in BOTH]
    return len(shared_groups(*(values[values != None] for values in digests)))  # noqa: E711 - element by element


TASK = Vqa()

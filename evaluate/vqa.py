"""Visual question answering with pooled features: a small trained head, or ranking written-out answers."""

import re
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from pydantic import Field

from mmkd.base.arrays import Bools, Ints, Objects
from mmkd.base.errors import UserError
from mmkd.evaluate.dataset import SPLITS, DatasetRows, Samples, Split
from mmkd.evaluate.dataset_spec import DatasetSpec, RowFilter, Section, side_faults
from mmkd.evaluate.features import Features
from mmkd.evaluate.heads.settings import FusionSettings, budget_warnings
from mmkd.evaluate.metrics import weighted_mean
from mmkd.evaluate.predictions import Predictions, choices_digest
from mmkd.evaluate.retrieval import TIE
from mmkd.evaluate.scoring import Metric, Scoring
from mmkd.evaluate.splits import hold_out
from mmkd.evaluate.task import Task, TaskSettings, Variant, answers_of_test, without_features
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

    def faults(self) -> Iterator[str]:
        yield from side_faults(self.closed, self.open, "closed", "open")

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.answer, *self.closed)

    @property
    def texts(self) -> dict[str, tuple[RowFilter, tuple[str, ...]]]:
        return {} if self.candidates is None else {"candidate": (self.candidates, (self.answer, self.candidate_of))}


class Vqa(Task[VqaSettings]):
    """The answer of every test question, and whether it is the right one word for word."""

    name = "vqa"
    version = 3
    settings = VqaSettings
    section = VqaColumns

    def needs(self, spec: DatasetSpec) -> Iterator[str]:
        yield from super().needs(spec)
        if spec.rows.train is None:
            yield "vqa needs `rows: train`"

    def towers(self, spec: DatasetSpec) -> tuple[Tower, ...]:
        return ("image", "text")

    def variants(self, spec: DatasetSpec) -> tuple[Variant, ...]:
        own = self.own(spec)
        seeds = {"rank": 1, "fusion_mlp": own.seeds}
        return tuple(Variant(head=head, seed=seed) for head in own.heads for seed in range(seeds[head]))

    def standard_scoring(self, spec: DatasetSpec) -> Scoring:
        """Accuracy over all questions and over either kind; the coverage is the ceiling that the vocabulary sets."""

        def of_kind(closed: int) -> Metric:
            def rows(found: Predictions) -> Bools:
                return np.asarray(found.column("closed") == closed)

            return Metric(lambda found, w: weighted_mean(found.column("right"), w * rows(found)), mean=True, rows=rows)

        metrics = {
            "overall_acc": Metric(lambda found, w: weighted_mean(found.column("right"), w), mean=True),
            "closed_acc": of_kind(1),
            "open_acc_exact": of_kind(0),
            "coverage": Metric(lambda found, w: weighted_mean(found.column("covered"), w), mean=True),
        }
        return Scoring("standard", metrics, "overall_acc")

    def problems(self, data: DatasetRows) -> list[str]:
        for name in BOTH:
            _answers(data, data.split(name))
        _closed(data)
        if "rank" in self.own(data.spec).heads:
            _candidates(data)
        return []

    def counts(self, data: DatasetRows) -> dict[str, dict[str, int]]:
        closed = _closed(data)
        return {"test questions": {"closed": int(closed.sum()), "open": int((~closed).sum())}}

    def predict(self, variant: Variant, data: DatasetRows, features: Features) -> Predictions:
        """Return answer, right, closed and covered of every test question, float64 (n, 4)."""
        test = data.split("test")
        if variant.head == "rank":
            answer, covered, words, facts = _rank(data, features)
        else:
            answer, covered, words, facts = _fuse(data, features, self.own(data.spec), variant.seed)
        right, closed = (answer == answer_index(_answers(data, test), words)) & covered, _closed(data)
        available = answer >= 0
        score = np.where(available[:, None], np.column_stack([answer, right, closed, covered]), np.nan)
        digests = [data.split(name).column("image_sha256") for name in BOTH]
        info = facts | {
            "vocabulary": list(words),
            "closed": int(closed.sum()),
            "open": int((~closed).sum()),
            "test_images_in_train": len(set(digests[0]) & set(digests[1]) - {None}),
        }
        return answers_of_test(data, score, available, COLUMNS, info=info)


def normalized(answer: object) -> str:
    """Return an answer without case, punctuation, articles before a word and doubled blanks, as VQA's evaluation (Antol
    et al. 2015, section 3.3) without its number words. What tells two answers apart stays: signs (`ER+`, `ER-`, `-5`),
    relations (`>2`), fractions, and `A` as an answer of its own."""
    text = str(answer if answer is not None else "").lower().strip()
    text = _X_RAY.sub("xray", re.sub("[\u2010-\u2015\u2212]", "-", text))
    return " ".join(_ARTICLES.sub(" ", " ".join(_NO_MEANING.sub(" ", text).split())).split())


def vocabulary(answers: Objects) -> tuple[str, ...]:
    """Return every normalized answer once, sorted."""
    return tuple(sorted({normalized(answer) for answer in answers} - {""}))


def answer_index(answers: Objects, words: tuple[str, ...]) -> Ints:
    """Return the index of every answer in the vocabulary, int64 (n,); -1 for one that is not in it."""
    index = {word: i for i, word in enumerate(words)}
    return np.array([index.get(normalized(answer), -1) for answer in answers], dtype=np.int64)


Answers = tuple[Ints, Bools, tuple[str, ...], dict[str, Any]]
"""Answers to n test questions, int64 (n,), indices of words, -1 without a feature; whether the right answer is in the
vocabulary or among the candidates with features, bool (n,); the words; facts."""


def _fuse(data: DatasetRows, features: Features, settings: VqaSettings, seed: int) -> Answers:
    from mmkd.evaluate.heads.fusion_mlp import Questions, fit_predict  # noqa: PLC0415 (torch, for those who ask for it)

    def questions(samples: Samples) -> tuple[Questions, Bools]:
        image, text = features.images(samples.rows), features.texts(samples.rows)
        there = image.available & text.available
        answer = answer_index(_answers(data, samples), words)
        return Questions(image.values[there], text.values[there], answer[there]), there

    names = [name for name in SPLITS if name in data.splits and (name != "test" or settings.vocabulary == "all")]
    words = vocabulary(np.concatenate([_answers(data, data.split(name)) for name in names]))
    samples = data.split("train")
    train, there = questions(samples)
    if len(train.answer) == 0:
        raise UserError(f"{features.model} has no features for any of the {len(there)} train questions")
    if "val" in data.splits:
        val = questions(data.split("val"))[0]
    else:
        # Images (or patients) stay whole, so that a held-out question is not about a picture that was learned.
        whole = samples.filled("image_sha256", samples.ids) if data.spec.group is None else data.groups(samples)
        out = hold_out(np.zeros(len(train.answer), np.int64), whole[there], seed)
        train, val = train.take(~out), train.take(out)
    test, test_there = questions(data.split("test"))
    found, trained = fit_predict(train, val, test, words=len(words), settings=settings, seed=seed)
    answer = np.full(len(test_there), -1, dtype=np.int64)
    answer[test_there] = found
    facts = trained._asdict() | {
        "train_questions": len(train.answer),
        "vocabulary_of": settings.vocabulary,
        "warnings": budget_warnings([trained]) + without_features(int(there.sum()), len(there), "train questions"),
    }
    return answer, answer_index(_answers(data, data.split("test")), words) >= 0, words, facts


def _rank(data: DatasetRows, features: Features) -> Answers:
    """Return the candidate of each question that is nearest to its image; a tie with a right one counts as wrong."""
    candidates, of = _candidates(data)
    test = data.split("test")
    written = _answers(data, candidates)
    words = vocabulary(written)
    index = answer_index(written, words)
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
    return answer, covered, words, info


def _candidates(data: DatasetRows) -> tuple[Samples, dict[str, list[int]]]:
    """Return the candidate rows, and their positions by the question (key or text) that they answer."""
    candidates = data.texts.get("candidate")
    if not candidates:
        raise UserError(f"{data.spec.dataset}: head `rank` needs `vqa: candidates`, text rows with written-out answers")
    return candidates, candidates.positions(data.spec.section(VqaColumns).candidate_of)


def _answers(data: DatasetRows, samples: Samples) -> Objects:
    """Return the table's answers, str (n,). Raises UserError for a question without an answer."""
    column = data.spec.section(VqaColumns).answer
    values = samples.column(column)
    for value, key in zip(values, samples.ids, strict=True):
        if not normalized(value):
            raise UserError(
                f"{data.spec.dataset}: {samples.name} question {key!r} has {column}={value!r}, not an answer"
            )
    return values


def _closed(data: DatasetRows) -> Bools:
    columns = data.spec.section(VqaColumns)
    return data.split("test").two_way(columns.closed, columns.open, "vqa: open")

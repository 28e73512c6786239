"""Multiple-choice questions about images: the option whose text is nearest to the image."""

import numpy as np

from mmkd.base.arrays import Floats, Ints
from mmkd.base.errors import UserError
from mmkd.evaluate.dataset import DatasetRows
from mmkd.evaluate.dataset_spec import DatasetSpec, RowFilter, Section
from mmkd.evaluate.features import Features
from mmkd.evaluate.metrics import ratio, weighted_mean
from mmkd.evaluate.predictions import Predictions, choices_digest
from mmkd.evaluate.retrieval import TIE
from mmkd.evaluate.scoring import Metric, Scoring
from mmkd.evaluate.task import Task, TaskSettings, Variant, answers_of_test
from mmkd.evaluate.vqa import normalized
from mmkd.store.evaluation_rows import CANDIDATE, KIND, TEXT_OF


class ChoiceSettings(TaskSettings):
    """Multiple-choice questions; nothing to set."""


class ChoiceColumns(Section):
    """Columns of the questions and of their options."""

    from_source = {"candidates": {"options": {KIND: CANDIDATE}, "option_of": TEXT_OF}}  # noqa: RUF012

    answer: str
    """Column of a question's right answer; in the rows of its options, of the answer that the option is."""
    options: RowFilter
    """Text rows, one for each option of a question, such as `question answer`."""
    option_of: str = "question"
    """Column of the options with the key of their question, or its text."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.answer,)

    @property
    def texts(self) -> dict[str, tuple[RowFilter, tuple[str, ...]]]:
        return {"option": (self.options, (self.answer, self.option_of))}


class MultipleChoice(Task[ChoiceSettings]):
    """Whether the right option of each test question is nearer to its image than all others. Questions may have
    different numbers of options. An ensemble joins its members' features."""

    name = "multiple_choice"
    settings = ChoiceSettings
    section = ChoiceColumns

    def standard_scoring(self, spec: DatasetSpec) -> Scoring:
        """Accuracy, and the share of what lies between guessing and perfection (Cohen's kappa for a known chance)."""
        return Scoring(
            "standard",
            {
                "acc": Metric(lambda found, weights: weighted_mean(found.column("right"), weights), mean=True),
                "acc_over_chance": Metric(_over_chance),
                "chance": Metric(lambda found, weights: weighted_mean(1 / found.column("options"), weights)),
            },
            "acc",
        )

    def problems(self, data: DatasetRows) -> list[str]:
        _questions(data)
        return []

    def counts(self, data: DatasetRows) -> dict[str, dict[str, int]]:
        sizes, counts = np.unique([len(options) for options, _ in _questions(data)], return_counts=True)
        return {"test questions by options": dict(zip(map(str, sizes), counts.tolist(), strict=True))}

    def predict(self, variant: Variant, data: DatasetRows, features: Features) -> Predictions:
        """Return right, the chosen option's place and the number of options of every test question, float64 (n, 3). A
        question without features of its image or of any of its options is missing; a tie is wrong."""
        options, images = features.texts(data.texts["option"].rows), features.images(data.split("test").rows)
        score = np.full((len(images.available), 3), np.nan)
        for i, (places, right) in enumerate(_questions(data)):
            if images.available[i] and options.available[places].all():
                cosines = options.values[places] @ images.values[i]
                others = np.delete(cosines, right)
                score[i] = cosines[right] > others.max() + TIE, cosines.argmax(), len(places)
        ids = data.texts["option"].ids[options.available]
        info = {"options": len(options.available), "choices": choices_digest(ids), "warnings": []}
        return answers_of_test(data, score, ~np.isnan(score[:, 0]), ("right", "choice", "options"), info=info)


def _questions(data: DatasetRows) -> list[tuple[Ints, int]]:
    """Return the positions of each test question's options, int64 (m,), and which of them is right."""
    columns, options, test = data.spec.section(ChoiceColumns), data.texts["option"], data.split("test")
    of = options.positions(columns.option_of)
    written = [normalized(one) for one in options.column(columns.answer)]
    found = []
    for key, caption, answer in zip(test.ids, test.column("caption"), test.column(columns.answer), strict=True):
        mine = of.get(str(key), of.get(str(caption), []))
        right = [place for place, option in enumerate(mine) if written[option] == normalized(answer)]
        if len(mine) < 2 or len(right) != 1:
            raise UserError(
                f"{data.spec.dataset}: test question {key!r} has {len(mine)} options, {len(right)} of them with its "
                f"{columns.answer} {answer!r}; expected two or more options and one right one"
            )
        found.append((np.array(mine, dtype=np.int64), right[0]))
    return found


def _over_chance(found: Predictions, weights: Floats) -> Floats:
    chance = weighted_mean(1 / found.column("options"), weights)
    return ratio(weighted_mean(found.column("right"), weights) - chance, 1 - chance)

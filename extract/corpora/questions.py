"""Questions about images in JSON lists, as VQA-RAD and SLAKE are released."""

import functools
import json
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import field_validator

from mmkd.base.errors import CorpusError, faults_as
from mmkd.extract.corpora.files import DICOM, PICTURES, FileCorpus
from mmkd.extract.corpora.row import CorpusRow, Ignored, Part, as_label, first_text
from mmkd.extract.corpora.tabular import check_names, label_names
from mmkd.store.evaluation_rows import CANDIDATE, KIND, SAMPLE, TEXT_OF

_IMAGE = ("image_name", "img_name", "image", "image_path")
_ID = ("qid", "id", "question_id")
_MAX_BYTES = 1 << 28
# How the usual files begin; `validate.json` and `valset.json` are both the validation questions.
_SPLITS = ("train", "val", "test")


class QuestionsCorpus(FileCorpus):
    """A JSON file, or all of a folder: lists of questions. The question is the caption of its image. Labels are the
    other fields as they stand (`answer_type` in capitals, without blanks: releases differ), `split` (by the file's name
    where the question does not say), and `row_kind` and `text_of`, which tell candidate answers from questions."""

    kind: Literal["vqa"] = "vqa"
    images: str | None = None
    """Folder that image names are relative to; the folder of `path` when not given."""
    language: str | None = "en"
    """Language to keep, by `q_lang`; null keeps all."""
    candidates: tuple[str, ...] = ()
    """Answers to closed questions: each makes a text row `question answer` for every question that has one of them.
    Training and validation questions get none: nothing is ranked there."""
    label_columns: tuple[str, ...] | None = None
    """Fields that pass into the sample table; all but image and question when not given."""

    suffixes = (".json",)
    named_by_rows = (*PICTURES, *DICOM)
    by_content = True

    @field_validator("candidates", mode="before")
    @classmethod
    def _candidates_are_words(cls, value: object) -> object:
        wrong = [one for one in value if isinstance(one, bool)] if isinstance(value, list) else []
        if wrong:
            raise ValueError(f"YAML reads {wrong[0]} in candidates as true or false; put the words in quotes")
        return value

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """Fields of any question that are not the question or its image, then `split` and what tells candidates."""
        records = (record for part in self.parts() for record in self._records(part) if self._is_wanted(record))
        names = tuple(dict.fromkeys(name for record in records for name in record))
        check_names(names, self.path)
        others = {name: name for name in ("question", "modality", "split", KIND, TEXT_OF, *_ID)}
        return (*label_names(self.label_columns, others, names, self.path), "split", KIND, TEXT_OF)

    def rows_of(self, part: Part) -> Iterator[CorpusRow | Ignored]:
        stem = part.name.rpartition(".")[0]
        name = stem.rpartition("/")[2].lower()
        split = next((split for split in _SPLITS if name.startswith(split)), None)
        records = self._records(part)
        wanted = [record for record in records if self._is_wanted(record)]
        if len(wanted) < len(records):
            yield Ignored("question: not in the `language`", part.name, len(records) - len(wanted))
        for number, record in enumerate(wanted):
            image = as_label(_value(record, _IMAGE)) or None
            key = as_label(_value(record, _ID)) or f"question-{number + 1}"
            question = record.get("question")
            labels = {label: as_label(record.get(label)) for label in self.labels}
            labels |= {"split": as_label(record.get("split")) or split, KIND: SAMPLE, TEXT_OF: None}
            if "answer_type" in labels:
                labels["answer_type"] = (labels["answer_type"] or "").strip().upper() or None
            caption = question.strip() if isinstance(question, str) else ""
            row = CorpusRow(f"{stem}/{key}", caption, image, modality=first_text(record.get("modality")), labels=labels)
            yield row
            answer = (labels.get("answer") or "").strip().lower()
            is_closed = labels.get("answer_type") == "CLOSED" and labels["split"] not in ("train", "val")
            if is_closed and answer in {candidate.lower() for candidate in self.candidates}:
                for candidate in self.candidates:
                    more: dict[str, str | None] = {"answer": candidate, KIND: CANDIDATE, TEXT_OF: row.key}
                    text = f"{caption} {candidate}"
                    yield CorpusRow(f"{row.key}#{candidate}", text, None, labels=labels | more, by_design=True)

    def _records(self, part: Part) -> list[dict[str, Any]]:
        """Return the questions of one file. Raises CorpusError if it is not JSON, not a list of questions."""
        if part.size > _MAX_BYTES:
            raise CorpusError(f"{self.path}: {part.name} has more than {_MAX_BYTES >> 20} MB; is it a question file?")
        fault, advice = f"{self.path}: {part.name} is not JSON", "; download it again"
        with self.open_part(part) as file, faults_as(CorpusError, (ValueError, RecursionError), fault, advice):
            content = json.load(file)
        if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
            raise CorpusError(
                f"{self.path}: {part.name} holds {type(content).__name__}, expected a list of questions; "
                "name the question files with `splits`"
            )
        if content and not any("question" in record for record in content):
            raise CorpusError(
                f"{self.path}: {part.name} has no field 'question'; it has {', '.join(list(content[0])[:20])}"
            )
        return content

    def _is_wanted(self, record: dict[str, Any]) -> bool:
        return self.language is None or record.get("q_lang", self.language) == self.language


def _value(record: dict[str, Any], usual: tuple[str, ...]) -> Any:
    return next((record[name] for name in usual if name in record), None)

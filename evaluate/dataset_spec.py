"""Description of one data set of a suite: rows of a store, meanings of their columns, tasks.

`mmkd.evaluate.tasks.Dataset` is this model with the settings and sections of all tasks. Text is compared by one rule in
filters, labels, groups and answers (`mmkd.base.text.cell_text`); in a list `""` means null.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from mmkd.base.config import Frozen, without_repeats
from mmkd.base.errors import UserError
from mmkd.base.text import cell_text
from mmkd.evaluate.measures import Measures
from mmkd.store.evaluation_rows import KIND, NEGATIVE, PROMPT, SAMPLE, TEXT_OF
from mmkd.store.layout import check_slug

OTHERS = "*"
"""Wildcard for every value that is not listed on the other side of a two-way column, null excepted."""


def _texts(value: object) -> tuple[str, ...]:
    """One value or several as text, in the form in which cells are compared."""
    values = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(one, bool) for one in values):
        raise ValueError(f"YAML reads {values!r} as true or false; put the value in quotes")
    for one in values:
        if one is not None and not isinstance(one, int | float | str):
            raise ValueError(f"YAML reads {one!s} as a {type(one).__name__}, expected text; put the value in quotes")
    return tuple(cell_text(one) or "" for one in values)


def _columns(value: object) -> object:
    if isinstance(value, dict) and any(isinstance(name, bool) for name in value):
        raise ValueError("YAML reads the name of a column (`on`, `yes`, `no`) as true or false; put it in quotes")
    return value


def _classes(value: object) -> object:
    """Class names with the values that stand for them; in a list a name is its own value."""
    if isinstance(value, dict):
        if wrong := [name for name in value if isinstance(name, bool)]:
            raise ValueError(f"YAML reads a class name as {wrong[0]}; put it in quotes")
        names = without_repeats(_texts(list(value)))
        if "" in names:
            raise ValueError("YAML reads a class name as null or blank; put a name in quotes")
        return dict(zip(names, value.values(), strict=True))
    return {name: (name,) for name in without_repeats(_texts(value))} if isinstance(value, list | tuple) else value


def folder_name(name: str) -> str:
    """`name`, which becomes a folder or a file of the results. Raises ValueError if it cannot be one."""
    try:
        return check_slug(name)
    except UserError:
        raise ValueError(f"{name!r} must be up to 64 lower-case letters, digits, '-', '_' or '.'") from None


FolderName = Annotated[str, AfterValidator(folder_name)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]
Classes = Annotated[dict[str, Texts], BeforeValidator(_classes)]
RowFilter = Annotated[dict[str, Texts], BeforeValidator(_columns)]
"""Column to accepted value(s), `""` for null; a row must pass all columns. `{}` takes every row."""


def side_faults(yes: RowFilter, no: RowFilter | None, one: str, other: str) -> Iterator[str]:
    """Yield values on both sides of a two-way column, columns of one side alone, and a first side without a value."""
    if not yes or not all(yes.values()):
        yield f"`{one}` names no value; write `{one}: {{COLUMN: [VALUE, ...]}}`"
    for column, values in (no or {}).items():
        if column not in yes:
            yield f"`{other}` has the column {column!r}, `{one}` has {', '.join(yes)}"
        elif both := set(values) & set(yes[column]):
            yield f"{column}: {min(both)!r} is both {one} and {other}"


class Download(Frozen):
    """File that anyone may download under the set's license."""

    url: str = Field(pattern="^https?://")
    to: str
    """File or folder that it becomes; `${name}` is a root."""
    checksum: str | None = Field(None, pattern="^(md5:[0-9a-f]{32}|sha256:[0-9a-f]{64})$")
    member: str | None = None
    """File or folder in this zip or tar that becomes `to`, `.` for all of it; without one the file is not unpacked."""


class Fetch(Frozen):
    """What brings the files to where `source` expects them: downloads, then steps by hand."""

    files: tuple[Download, ...] = ()
    steps: tuple[str, ...] = ()


class About(Frozen):
    """Source of a public data set. No score depends on it."""

    homepage: str | None = None
    licence: str | None = None
    """As its owners state it; read their terms before you use the data."""
    access: str | None = None
    """Conditions beyond a download: registration, a data use agreement."""
    citation: str | None = None
    expected: dict[Literal["train", "val", "test", "all"], int | None] = Field(default_factory=dict)
    """Published number of samples (of slides: of groups) of each split, or of `all`; null where we do not know."""
    layout: Literal["confirmed", "unconfirmed"] | None = None
    """`confirmed` if file names, columns and codes of the description were compared with the `evidence`."""
    evidence: str | None = None
    """URL of the files, of code that reads them, or of their documentation."""
    fetch: Fetch = Fetch()

    def faults(self) -> Iterator[str]:
        if self.layout == "confirmed" and not self.evidence:
            yield "layout is 'confirmed' without `evidence`; give the URL that it was compared with"


class SplitFilters(Frozen):
    """Rows of each split."""

    test: RowFilter
    train: RowFilter | None = None
    val: RowFilter | None = None
    """Without one, a part of `train` is held out, whole groups at a time."""


class Prompts(Frozen):
    """Text rows of the same store whose captions describe the classes."""

    file: str | None = None
    """Prompt file of a set with a `source`, relative to the description; `rows` and `label` then follow from it."""
    rows: RowFilter
    label: str | None = None
    """Column that holds the class (its name) of a prompt; by default the data set's label column."""
    negatives: RowFilter | None = None
    """Rows that describe the absence of a class, for several labels per image."""


class SeveralLabels(Frozen):
    """Columns of the labels when a sample can have several. `classes` gives name and value of each."""

    column: str | None = None
    """Column that lists the values of a sample's labels; by default every class' value names a column of its own."""
    separator: str | None = None
    """Between the values in `column`; without one it holds a JSON list."""
    nothing: Texts = ()
    """Values in `column` that mean no label, such as `No Finding`."""
    positive: Texts = ("1", "true", "True")
    negative: Texts = ("0", "false", "False")
    unknown: Texts = ("-1", "")
    """Values of a class' own column: presence, absence, or that the sample does not count. Any other is an error."""

    @property
    def meanings(self) -> dict[str | None, int]:
        """Value of a class' own column to 1, 0 or -1 (unknown)."""
        lists = ((-1, self.unknown), (0, self.negative), (1, self.positive))
        return {value or None: meaning for meaning, values in lists for value in values}

    def faults(self) -> Iterator[str]:
        unknown = set(self.unknown) - {"-1", ""}  # these two are unknown unless another list has them
        if twice := (set(self.positive) & set(self.negative)) | (unknown & {*self.positive, *self.negative}):
            yield f"value {min(twice)!r} stands in two of the lists positive, negative and unknown"


class Section(Frozen):
    """Part of a description that belongs to one task and has the task's name."""

    from_source: ClassVar[dict[str, dict[str, Any]]] = {}
    """Key of the `source` to the values that the section has by default when the source has that key."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the sample table that the task reads."""
        raise NotImplementedError

    @property
    def texts(self) -> dict[str, tuple[RowFilter, tuple[str, ...]]]:
        """Name to text rows that the task reads besides the splits, and their columns."""
        return {}


Kind = TypeVar("Kind", bound=Section)


class DatasetSpec(Frozen):
    """One data set of a suite."""

    sections: ClassVar[dict[str, type[Section]]] = {}
    """Name to model of the sections of all tasks."""

    dataset: FolderName
    version: int = 1
    about: About = About()
    described_in: str = ""
    """File of the description; `load_suite` fills it in."""
    source: dict[str, Any] | None = None
    """Source read by `mmkd extract`; see docs/corpora.md. No score depends on it."""
    store: str
    """Path of the mmkd store that holds its rows and the features of all models."""
    modality: str = "unspecified"
    role: Literal["monitor", "report"] = "report"
    """`monitor` sets may be looked at while a student is trained or chosen, `report` sets may not."""
    label: str | None = None
    classes: Classes | None = None
    """Class names in order, with the value or values of the label column that mean each: `{tumour: "yes", none: "no"}`.
    In a list a name is its own value. By default the classes of the prompts, or of the test rows, sorted."""
    multilabel: SeveralLabels | None = None
    """Instead of `label` where a sample can have several."""
    group: str | None = None
    """Column of the patient or another source of dependence: intervals resample whole groups."""
    domain: str | None = None
    """Column by which tables may divide the rows."""
    bag: str | None = None
    """Column whose equal values make a bag of patches (a slide); by default every row is a bag of one."""
    fold: str | None = None
    """Column with the published folds, for tasks that cross-validate; by default folds are drawn."""
    rows: SplitFilters
    prompts: Prompts | None = None
    tasks: tuple[str, ...] = Field(min_length=1)
    settings: Any = None
    """Settings of every task, by its name."""
    measures: Measures = Measures()
    """Metrics beside those of the tasks."""
    notes: str = ""

    def section(self, kind: type[Kind]) -> Kind:
        """Return the section of one task, which must be there."""
        return next(one for one in self.own_sections() if isinstance(one, kind))

    def own_sections(self) -> Iterator[Section]:
        return (section for name in self.sections if (section := getattr(self, name)) is not None)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the sample table that the tasks read, each once."""
        named = [self.label, self.group, self.domain, self.bag, self.fold, *self.measures.subgroups]
        if self.multilabel is not None:
            own = (value for values in (self.classes or {}).values() for value in values)
            named += [self.multilabel.column] if self.multilabel.column is not None else own
        for section in self.own_sections():
            named += section.columns
        return tuple(dict.fromkeys(name for name in named if name is not None))

    @model_validator(mode="before")
    @classmethod
    def _rows_of_a_description(cls, raw: Any) -> Any:
        """Fill in what follows from `source`: samples, prompts and other texts are distinguished by `row_kind`."""
        if not isinstance(raw, dict):
            return raw
        filled, prompts = dict(raw), raw.get("prompts") or {}
        has_file = isinstance(prompts, dict) and prompts.get("file") is not None
        if not isinstance(raw.get("source"), dict):
            if has_file:
                raise ValueError("a prompt file is encoded with the `source`, which is missing")
            return raw
        if isinstance(raw.get("rows"), dict):
            filled["rows"] = {
                split: {KIND: SAMPLE} | chosen if isinstance(chosen, dict) else chosen
                for split, chosen in raw["rows"].items()
            }
        if has_file:
            filled["prompts"] = {"rows": {KIND: PROMPT}, "label": TEXT_OF, "negatives": {KIND: NEGATIVE}, **prompts}
        for name, section in cls.sections.items():
            for key, values in section.from_source.items():
                if isinstance(raw.get(name), dict) and raw["source"].get(key):
                    filled[name] = values | raw[name]
        return filled

    def faults(self) -> Iterator[str]:
        counts = Counter(value for values in (self.classes or {}).values() for value in values)
        if twice := [value for value, count in counts.items() if count > 1]:
            yield f"classes: value {twice[0]!r} means two classes"
        if self.classes is not None and not all(self.classes.values()):
            yield "classes: a class has no value"
        if self.multilabel is not None and self.label is not None:
            yield f"{self.dataset}: `label` is for one label a sample, `multilabel` for several; keep one"

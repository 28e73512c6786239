"""Configuration of one `extract` run."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from mmkd.base.config import Frozen
from mmkd.base.errors import ConfigError
from mmkd.base.images.recipe import Recipe
from mmkd.base.places.remote import StorePath, as_root
from mmkd.extract.cluster_config import ClusterConfig
from mmkd.extract.corpora import Corpus, open_corpus
from mmkd.extract.limited_corpus import LimitedCorpus, Require
from mmkd.extract.teachers import TeacherSpec, describe_teacher
from mmkd.store import TeacherCard
from mmkd.store.layout import Encoding


@dataclass(frozen=True)
class FailureLimit:
    """Failed inputs allowed before a run stops: `1%` of those read, or a number of rows."""

    share: float = 0.0
    rows: int | None = None

    @classmethod
    def parse(cls, text: str) -> "FailureLimit":
        """Read `1%`, `0.5 %` or `200`. Raises ConfigError if it is neither a percentage up to 100 nor a row count."""
        number = text.strip()
        try:
            limit = cls(share=float(number[:-1]) / 100) if number.endswith("%") else cls(rows=int(number))
            if 0 <= limit.share <= 1 and (limit.rows or 0) >= 0:
                return limit
        except ValueError:
            pass
        raise ConfigError(f"--failures is {text!r}, expected a share such as 1%, a number of rows, or retry")

    def passed(self, failed: int, seen: int, total: int) -> bool:
        """Return True when `failed` of `seen` rows, of a run of `total`, are too many."""
        if self.rows is not None:
            return failed > self.rows
        # Two bad images among the first thirty say nothing.
        return failed > self.share * max(seen, min(1000, total))

    def __str__(self) -> str:
        return f"{100 * self.share:g}%" if self.rows is None else f"{self.rows} rows"


def parse_failures(texts: Sequence[str]) -> tuple[FailureLimit | None, bool]:
    """Read the values of `--failures`: a limit, and whether failed images are read again. Raises ConfigError for a
    value that is neither, or two limits."""
    limits = [FailureLimit.parse(text) for text in texts if text != "retry"]
    if len(limits) > 1:
        raise ConfigError(f"--failures has the limits {limits[0]} and {limits[1]}; name one")
    return next(iter(limits), None), "retry" in texts


class ExtractConfig(Frozen):
    """One run: which corpus, which teachers, where to, on what."""

    corpus: str
    """A table, a tar, a folder or a corpus.yaml; see `mmkd.extract.corpora.open_corpus`."""
    store: Annotated[StorePath, BeforeValidator(as_root)]
    """A folder or a URL."""
    teachers: tuple[TeacherSpec, ...] = Field(min_length=1)
    encoding: Encoding = "float16"
    """Encoding of new features; a part of the teacher's digest, so it cannot change inside a store."""
    cluster: ClusterConfig = ClusterConfig()
    limit: int | None = Field(default=None, gt=0)
    """Only the first rows of the corpus, this many: a store of its own, to try things out."""
    require: Require | None = None
    """Rows without this (an image, a caption, or both) are failed; `images` and `texts` allow the other to be missing.
    When not given, a row with one side of a corpus of pairs is `partial`."""
    rows_per_shard: Literal[256, 512, 1024, 2048, 4096, 8192, 16384] | None = None
    """Of a new store; chosen by rows and workers when not given."""
    retry_failed: bool = False
    """Also retry images that failed before."""
    recipes: tuple[Recipe, ...] = ()
    """Pictures to make of every image besides: views."""
    keep_inputs: int | None = Field(default=None, gt=0)
    """Pixels of the shorter side of JPEGs to keep for training; none are kept when not given."""
    max_failures: FailureLimit | None = None
    """Stop when more inputs than this cannot be used."""

    @cached_property
    def opened(self) -> Corpus:
        """The corpus that the run names, or part of it. Opened once, without importing torch. Raises CorpusError,
        ConfigError, UserError (see `open_corpus`)."""
        corpus = open_corpus(self.corpus)
        whole = self.limit is None and self.require is None
        return corpus if whole else LimitedCorpus(corpus, self.limit, self.require)

    def described(self) -> list[tuple[TeacherSpec, TeacherCard]]:
        """Return the teachers as this run computes and keeps them, with their cards; hashes files the first time.
        Raises TeacherError (see `describe_teacher`)."""
        halved = {"precision": "auto"} if self.cluster.worker.autocast else {}
        specs = [spec.model_copy(update=halved) if spec.precision == "fp32" else spec for spec in self.teachers]
        return [(spec, describe_teacher(spec).with_encoding(self.encoding)) for spec in specs]

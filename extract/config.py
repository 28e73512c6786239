"""What one `extract` run is asked to do."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from mmkd.extract.cluster_config import ClusterConfig
from mmkd.extract.failure_limit import FailureLimit
from mmkd.extract.teachers import TeacherSpec
from mmkd.store.yaml_config import Frozen


class ExtractConfig(Frozen):
    """One run: which corpus, which teachers, where to, on what."""

    corpus: str
    """A table, a tar, a folder or a corpus.yaml; see `mmkd.extract.corpora.open_corpus`."""
    store: Path
    teachers: tuple[TeacherSpec, ...] = Field(min_length=1)
    cluster: ClusterConfig = ClusterConfig()
    limit: int | None = Field(default=None, gt=0)
    """Only the first so many rows of the corpus: a store of its own, to try things out."""
    retry_failed: bool = False
    """Read images that failed once more, beside what is left to do."""
    max_failures: FailureLimit | None = None
    """Stop when more inputs than this cannot be used."""

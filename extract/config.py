"""What one `extract` run is asked to do."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from mmkd.extract.teachers import TeacherSpec


class ExtractConfig(BaseModel):
    """One run: which corpus, which teachers, where to, on what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    corpus: str
    """A table, a tar, a folder or a corpus.yaml; see `mmkd.extract.corpora.open_corpus`."""
    store: Path
    teachers: tuple[TeacherSpec, ...] = Field(min_length=1)
    scheduler: str = "local"
    """`local`, or the address of a Dask scheduler."""
    workers: int | None = Field(default=None, gt=0)
    """Processes of the local cluster; one per core when not given. Each loads all teachers."""
    keep_inputs: int | None = Field(default=None, gt=0)
    """Pixels of the shorter side of JPEGs to keep for training; none are kept when not given."""
    decode_threads: int = Field(default=2, gt=0)
    """Threads that read and decode images in each worker."""

"""`results.jsonl`: one line for each metric of each finished unit, only ever appended to, by any number of runs."""

import functools
import hashlib
import os
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from mmkd.base.errors import CorruptStoreError, MmkdError
from mmkd.base.files import disk_errors
from mmkd.base.lock import lock_until_closed
from mmkd.evaluate.task import Unit

RESULTS = "results.jsonl"


class ResultRow(Unit):
    """One metric of one unit; docs/evaluation.md describes the file. A change of its fields is a new `version`."""

    version: Literal[1] = 1
    suite: str
    suite_digest: str
    """Of the suite without places, models and notes: results of two labs belong together if it is the same."""
    suite_version: int
    dataset_version: int
    modality: str
    role: str
    protocol: str
    metric: str = ""
    value: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    n: int = 0
    """Samples (or queries) scored."""
    n_missing: int = 0
    """Samples the model has no features for; they are not scored."""
    n_groups: int = 0
    n_boot: int = 0
    boot_seed: int
    status: Literal["ok", "undefined", "failed"]
    """`ok`: a value. `undefined`: predictions are there, but the metric has no value on them. `failed`: the unit could
    not be run; `reason` says why. Neither of the last two is ever counted as zero."""
    code_version: str
    code_digest: str
    """Digest of the scoring sources; `code_version` does not change with edits."""
    predictions: str = ""
    """Path of the per-sample file, relative to this one."""
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    """Doubts about the value: a training that was too short, a fit that did not converge, an untrained class."""


def failure(error: Exception) -> str:
    """Return the reason for a missing result in one line, with the source line of a bug."""
    if isinstance(error, MmkdError):
        return str(error)
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, ValueError | ArithmeticError | MemoryError):  # numerics that the unit's data break
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{text} ({Path(frame.filename).name}, line {frame.lineno}); please report this"


@functools.cache
def code_digest() -> str:
    """16 hex digits that change with the sources of predictions and metrics; not with those of figures and pages."""
    sha = hashlib.sha256()
    here = Path(__file__).parent
    pages = ("curves", "drawing", "figures", "pages")
    pictures = {here / f"{name}.py" for name in pages}
    sources = {*here.glob("*.py"), *(here / "heads").glob("*.py")} - pictures
    for path in sorted(sources):
        sha.update(f"{path.relative_to(here)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return sha.hexdigest()[:16]


def append_results(out: Path, rows: Iterable[ResultRow]) -> None:
    """Append one unit's rows in one write, after cutting off a line that a kill left unfinished. Raises StoreError if
    the disk is full or read-only."""
    path = out / RESULTS
    data = "".join(row.model_dump_json() + "\n" for row in rows).encode()
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            lock_until_closed(file)
            file.truncate(path.read_bytes().rfind(b"\n") + 1)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def read_results(out: Path) -> dict[str, list[ResultRow]]:
    """Return all results by unit key. A unit that was run again has its latest rows only. Raises CorruptStoreError if a
    line is not a result."""
    path = out / RESULTS
    if not path.is_file():
        return {}
    latest: dict[str, dict[str, ResultRow]] = {}
    for i, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = ResultRow.model_validate_json(line)
        except ValidationError as error:
            raise CorruptStoreError(
                f"{path} line {i} is not a result of this version ({error.errors()[0]['msg']}); name another folder"
            ) from error
        rows = latest.setdefault(row.key, {})
        if row.status == "failed" or any(old.status == "failed" for old in rows.values()):
            rows.clear()
        rows[row.metric] = row
    return {key: list(rows.values()) for key, rows in latest.items()}

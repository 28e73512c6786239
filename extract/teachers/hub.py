"""Files of a Hugging Face repository: from the cache, else from the hub or its mirror (`HF_ENDPOINT`)."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors
from huggingface_hub.constants import HF_HUB_CACHE, is_offline_mode

from mmkd.base.errors import TeacherError

_DATASETS = "datasets/"
# A connection that breaks in the middle raises the HTTP library's own error: requests, httpx or httpx2, by version.
_HTTP_ERROR: type[Exception] = hub_errors.HfHubHTTPError.__bases__[0]


def fetch_file(slug: str, repository: str, filename: str, revision: str = "") -> Path | None:
    """Return the path of `filename` in the cache, downloading it once where the hub can be reached. Returns None when
    the repository exists and has no such file. Raises TeacherError with the reason in one line: offline, gated, no such
    repository or revision, no network."""
    wanted = revision or None
    # Some weights lie in a repository of the hub's other kind: `datasets/org/name`, as in its web address.
    kind, full_name = (
        ("dataset", repository.removeprefix(_DATASETS)) if repository.startswith(_DATASETS) else ("model", repository)
    )
    try:
        cached = huggingface_hub.try_to_load_from_cache(full_name, filename, revision=wanted, repo_type=kind)
    except hub_errors.HFValidationError as error:
        raise TeacherError(
            f"teacher {slug!r}: {repository!r} is not a repository's name; write hf-hub:org/name"
        ) from error
    if isinstance(cached, str):
        return Path(cached)
    if cached is not None:
        # The cache remembers that the hub said there is no such file.
        return None
    where = f"teacher {slug!r}: {repository}/{filename}"
    place = f"or download the repository elsewhere and give {slug}=local-dir:/path"
    try:
        return Path(huggingface_hub.hf_hub_download(full_name, filename, revision=wanted, repo_type=kind))
    except hub_errors.LocalEntryNotFoundError as error:
        if is_offline_mode():
            if _repository_is_cached(f"{kind}s--{full_name.replace('/', '--')}"):
                return None
            raise TeacherError(
                f"{where} is not in the cache {HF_HUB_CACHE} and HF_HUB_OFFLINE is set; "
                f"unset it once to download, {place}"
            ) from error
        raise TeacherError(
            f"{where} is not in the cache {HF_HUB_CACHE} and the hub cannot be reached; "
            f"connect, set HF_ENDPOINT to a mirror, {place}"
        ) from error
    except hub_errors.EntryNotFoundError:
        return None
    except hub_errors.GatedRepoError as error:
        raise TeacherError(
            f"{where} is gated: accept its terms at https://huggingface.co/{repository}, run `hf auth login`, {place}"
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise TeacherError(
            f"{where}: the repository has no revision {revision!r}; leave it out or correct it"
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise TeacherError(
            f"{where}: the hub knows no such repository, or it is private; check the name, run `hf auth login`, {place}"
        ) from error
    except (_HTTP_ERROR, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TeacherError(
            f"{where} could not be downloaded ({reason}); try again, set HF_ENDPOINT to a mirror, {place}"
        ) from error


def _repository_is_cached(folder: str) -> bool:
    """Return True if a snapshot of the repository is downloaded: a missing file was then not wanted."""
    snapshots = Path(HF_HUB_CACHE) / folder / "snapshots"
    return snapshots.is_dir() and any(snapshots.iterdir())

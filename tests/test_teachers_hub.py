"""Weights from the hub's cache, and why they cannot be had from the hub, in one line each."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from mmkd.base.errors import TeacherError
from mmkd.extract.teachers import describe_teacher, load_teacher, parse_teachers
from tests import teacher_snapshots as snapshots
from tests.teacher_parts import sealed  # noqa: F401

pytestmark = pytest.mark.usefixtures("sealed")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    root = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(root), raising=False)
    monkeypatch.setattr("mmkd.extract.teachers.source.HF_HUB_CACHE", str(root))
    return root


def repository(cache: Path, kind: str, name: str) -> Path:
    """A repository's folder in the cache, as a download leaves it."""
    root = cache / f"{kind}s--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    return snapshot


def test_from_the_cache_without_a_network(cache: Path) -> None:
    snapshots.quiltnet(repository(cache, "model", "org/clip"))
    (spec,) = parse_teachers("mine=hf-hub:org/clip")
    card = describe_teacher(spec)
    assert load_teacher(spec, card, torch.device("cpu")).card.dim == snapshots.DIM


def test_a_data_sets_repository_and_a_text_tower_of_its_own(cache: Path) -> None:
    snapshots.pmcclip(repository(cache, "dataset", "axiong/pmc_oa"))
    place = repository(cache, "dataset", "axiong/pmc_oa2")
    snapshots.pmcclip(place)
    text = repository(cache, "model", "org/bert")
    for name in ("config.json", "vocab.txt", "tokenizer_config.json"):
        (place / name).rename(text / name)
    (spec,) = parse_teachers("pmcclip=hf-hub:datasets/axiong/pmc_oa2")
    spec = spec.model_copy(
        update={"text_source": "hf-hub:org/bert", "options": {"image_size": 64, "dim": snapshots.DIM}}
    )
    (whole,) = parse_teachers("pmcclip=hf-hub:datasets/axiong/pmc_oa")
    whole = whole.model_copy(update={"options": {"image_size": 64, "dim": snapshots.DIM}})
    assert describe_teacher(spec).digest == describe_teacher(whole).digest


def test_the_cached_repository_without_its_weights(cache: Path) -> None:
    place = repository(cache, "model", "org/clip")
    snapshots.quiltnet(place)
    (place / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(TeacherError, match=r"hf-hub:org/clip has no weights under open_clip_model.safetensors"):
        describe_teacher(parse_teachers("mine=hf-hub:org/clip")[0])


RESPONSE: Any = SimpleNamespace(headers={}, request=None)
BROKEN_CONNECTION = errors.HfHubHTTPError.__bases__[0]("peer closed connection")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            errors.GatedRepoError("no", response=RESPONSE),
            "is gated: accept its terms at https://huggingface.co/org/clip",
        ),
        (errors.RepositoryNotFoundError("no", response=RESPONSE), "knows no such repository, or it is private"),
        (errors.RevisionNotFoundError("no", response=RESPONSE), "the repository has no revision"),
        (errors.HfHubHTTPError("429 too\nmany", response=RESPONSE), "could not be downloaded (429 too many)"),
        (BROKEN_CONNECTION, "could not be downloaded (peer closed connection)"),
        (errors.LocalEntryNotFoundError("no"), "is not in the cache"),
        (OSError("No space left on device"), "could not be downloaded (No space left on device)"),
    ],
)
def test_reasons_are_one_line(error: Exception, message: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise error

    # The hub itself is what is missing here, so its client is what is replaced.
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(TeacherError) as raised:
        describe_teacher(parse_teachers("mine=hf-hub:org/clip")[0])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert cache.name in str(raised.value) or "cache" not in message


def test_a_name_that_is_no_repository(cache: Path) -> None:
    with pytest.raises(TeacherError, match="'a b/c d' is not a repository's name; write hf-hub:org/name"):
        describe_teacher(parse_teachers("mine=hf-hub:a b/c d")[0])
    assert not cache.exists()

"""Each of the nine, in its published file format, against a reference forward that is not ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mmkd.extract.teachers import describe_teacher, load_teacher
from mmkd.extract.teachers.geometry import geometry_of, normalize, pixels_of
from mmkd.extract.teachers.spec import Teacher, TeacherSpec
from tests import teacher_snapshots as snapshots
from tests.teacher_parts import sealed  # noqa: F401

pytestmark = pytest.mark.usefixtures("sealed")

CPU = torch.device("cpu")
FORMS: dict[str, Callable[[Path], snapshots.Snapshot]] = snapshots.NINE | {
    "genmedclip-b16-pmb": snapshots.genmedclip_pmb,
    "pubmedclip-original": snapshots.pubmedclip_original,
    "pmcclip-checkpoint": lambda folder: snapshots.pmcclip(folder, whole=True),
    "pmcclip-notebook": lambda folder: snapshots.pmcclip(
        folder, heads=4, pooler=True, attention_pool_heads=4, text_feature="pooler_output"
    ),
    "pmcclip-masked": lambda folder: snapshots.pmcclip(folder, mask=True, attention_mask=True),
    "medclip-resnet": lambda folder: snapshots.medclip(folder, resnet=True),
}


def load(spec: TeacherSpec) -> Teacher:
    return load_teacher(spec, describe_teacher(spec), CPU)


def batch_of(teacher: Teacher) -> torch.Tensor:
    geometry = geometry_of(teacher.card.preprocessing)
    return torch.from_numpy(np.stack([pixels_of(picture, [geometry])[geometry] for picture in snapshots.pictures()]))


@pytest.mark.integration
@pytest.mark.parametrize("form", FORMS)
def test_features_are_the_authors(form: str, tmp_path: Path) -> None:
    snapshot = FORMS[form](tmp_path)
    teacher = load(snapshot.spec)
    pixels = batch_of(teacher)
    tokens, _ = teacher.tokenize(snapshots.CAPTIONS)
    images = normalize(pixels, teacher.card.preprocessing)
    with torch.no_grad():
        image, text = snapshot.image(images.expand(-1, 3, -1, -1)), snapshot.text(tokens)
    ours_image, ours_text = teacher.encode_images(pixels), teacher.encode_texts(tokens)
    assert ours_image.shape == (3, snapshots.DIM)
    assert ours_text.shape == (4, snapshots.DIM)
    for ours, theirs in ((ours_image, image), (ours_text, text)):
        assert theirs.std() > 0.5, "a quiet reference would hide mistakes"
        assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-5

"""Captions cut to the shortest length that leaves their features alone; options of the forward pass."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from in_process import run, tree_digest
from tiny_corpus import write_table_corpus
from tiny_teachers import write_tiny_teacher

from mmkd.base.errors import TeacherError
from mmkd.extract.cluster_config import ClusterConfig, WorkerConfig
from mmkd.extract.config import ExtractConfig
from mmkd.extract.dispatch import TeachersPlugin
from mmkd.extract.encode import cut_lengths
from mmkd.extract.teachers import describe_teacher, load_teacher, parse_teachers
from mmkd.extract.teachers.loaded import LoadedTeacher, half_type
from mmkd.extract.teachers.spec import TeacherSpec
from mmkd.store.record import Store
from tests import teacher_snapshots as snapshots
from tests.teacher_parts import sealed  # noqa: F401
from tests.test_teachers_nine import FORMS

CPU = torch.device("cpu")
# The ResNet's authors let padding be attended to: nothing may be cut there.
WHOLE_CONTEXT = {"pmcclip", "pmcclip-checkpoint", "pmcclip-notebook"}


def loaded(spec: TeacherSpec) -> LoadedTeacher:
    teacher = load_teacher(spec, describe_teacher(spec), CPU)
    assert isinstance(teacher, LoadedTeacher)
    return teacher


def captions() -> list[str]:
    """128 captions of 1 to 50 words, most of them short."""
    rng = np.random.default_rng(0)
    words = ["lesion", "of", "the", "left", "lower", "lobe", "axial", "ct", "with", "contrast", "normal", "heart"]
    return [" ".join(rng.choice(words, count)) for count in 1 + (49 * rng.random(128) ** 4).astype(int)]


@pytest.mark.integration
@pytest.mark.usefixtures("sealed")
@pytest.mark.parametrize("form", FORMS)
def test_a_cut_caption_has_the_features_of_the_padded_one(form: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    make: Callable[[Path], snapshots.Snapshot] = FORMS[form]
    teacher = loaded(make(tmp_path).spec)
    tokens, _ = teacher.tokenize(captions())
    cut = cut_lengths(tokens, teacher.text_lengths)
    assert teacher.text_lengths[-1] == tokens.shape[1]
    if form in WHOLE_CONTEXT:
        assert set(cut) == {tokens.shape[1]}
        return
    assert len(set(cut)) >= 3, "captions of one length prove nothing"
    for length in np.unique(cut):
        places = np.flatnonzero(cut == length)[[0] * 32]  # a pass has 32 rows, always
        whole, short = teacher.encode_texts(tokens[places])[0], teacher.encode_texts(tokens[places, :length])[0]
        assert (whole - short).abs().max() / whole.abs().max() < 1e-6
        assert torch.equal(whole.half(), short.half())


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=15), min_size=1, max_size=80), st.sampled_from([0, 9]))
def test_nothing_of_a_caption_is_cut_off(own: list[list[int]], padding: int) -> None:
    """Padded with an id of its own, or with the end token (9) as CLIP's tokenizer of transformers does."""
    rows = [[*(word % 9 for word in words), 9] for words in own]
    tokens = torch.full((len(rows), 16), padding)
    for row, words in zip(tokens, rows, strict=True):
        row[: len(words)] = torch.tensor(words)
    lengths = (4, 8, 12, 16)
    found = cut_lengths(tokens, lengths)
    assert all(len(words) <= length for words, length in zip(rows, found, strict=True))
    # In order of length, 32 together: the longest of them, and the token behind its end token if that is another one.
    needed = sorted(len(words) if padding == 9 or len(words) == 16 else len(words) + 1 for words in rows)
    longest = [needed[min(start + 32, len(needed)) - 1] for start in range(0, len(needed), 32)]
    steps = [next(step for step in lengths if step >= count) for count in longest]
    assert sorted(found) == [step for start, step in enumerate(steps) for _ in needed[32 * start : 32 * (start + 1)]]


def test_autocast_is_a_teacher_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (spec,) = parse_teachers(f"one=local-dir:{write_tiny_teacher(tmp_path / 'one', seed=1)}")
    plain = ExtractConfig(corpus="c", store=tmp_path / "s", teachers=(spec,))
    cluster = ClusterConfig(worker=WorkerConfig(autocast=True))
    half = plain.model_copy(update={"cluster": cluster})
    ((plain_spec, plain_card),), ((half_spec, half_card),) = plain.described(), half.described()
    assert (plain_spec.precision, half_spec.precision) == ("fp32", "auto")
    assert plain_card.digest != half_card.digest
    own = spec.model_copy(update={"precision": "fp16"})
    assert half.model_copy(update={"teachers": (own,)}).described()[0][0].precision == "fp16"
    # On a CPU it computes what float32 does; on a GPU what that GPU has.
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(loaded(plain_spec).encode_images(pixels), loaded(half_spec).encode_images(pixels))
    for supported, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, found=supported: found)
        assert half_type("auto", torch.device("cuda")) is expected
    assert half_type("fp32", torch.device("cuda")) is None


def test_the_order_of_weights_changes_last_bits_at_most(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    teacher = loaded(snapshots.quiltnet(tmp_path).spec)
    pixels = torch.randint(0, 256, (8, 3, *teacher.card.preprocessing.image_size), dtype=torch.uint8)
    last = teacher.encode_images(pixels)
    teacher.tune(channels_last=False)
    first = teacher.encode_images(pixels)
    assert (first - last).abs().max() / last.abs().max() < 1e-5
    teacher.tune()
    assert torch.equal(teacher.encode_images(pixels), last)


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_worker_tunes_its_teachers_as_its_settings_say(tmp_path: Path, channels_last: bool) -> None:
    (spec,) = parse_teachers(f"one=local-dir:{write_tiny_teacher(tmp_path / 'one', seed=1)}")
    plugin = TeachersPlugin([(spec, describe_teacher(spec))], WorkerConfig(channels_last=channels_last))
    plugin.setup(None)
    (patches,) = (part for part in plugin.loaded["one"]._model.modules() if isinstance(part, torch.nn.Conv2d))
    assert patches.weight.is_contiguous(memory_format=torch.channels_last) is channels_last
    assert patches.weight.is_contiguous() is not channels_last


def test_compiling_without_a_compiler_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (spec,) = parse_teachers(f"one=local-dir:{write_tiny_teacher(tmp_path / 'one', seed=1)}")
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(TeacherError, match="needs the C\\+\\+ compiler '/nowhere/g\\+\\+'"):
        loaded(spec).tune(compiled=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_towers_give_the_same_store_whatever_the_batch(tmp_path: Path) -> None:
    from mmkd.extract.encode import Workbench
    from mmkd.extract.forward import BatchSizes
    from mmkd.extract.shard import extract_shard
    from mmkd.store import FeatureStore
    from mmkd.store.writer import add_teacher

    torch.set_num_threads(1)
    (spec,) = parse_teachers(f"one=local-dir:{write_tiny_teacher(tmp_path / 'one', seed=1)}")
    table = write_table_corpus(tmp_path / "c", 150)
    plain = run(table, tmp_path / "plain", {"one": loaded(spec)})
    for name, rows in (("a", 32), ("b", 128)):
        teacher = loaded(spec)
        teacher.tune(compiled=True)
        record = run(table, tmp_path / name, {}).record
        add_teacher(Store(tmp_path / name, record), teacher.card)
        extract_shard(Store(tmp_path / name, record), 0, {"one": teacher}, Workbench(sizes=BatchSizes(rows)))
    assert tree_digest(tmp_path / "a") == tree_digest(tmp_path / "b")
    ours = FeatureStore.open(tmp_path / "a")
    for tower in ("image", "text"):
        before, after = (getattr(store, tower)("one").astype(np.float32) for store in (plain, ours))
        assert np.abs(before - after).max() / np.abs(before).max() < 2e-3  # float16 steps

"""One test for each way in which a teacher loads without a word and is wrong, and for each that used to stop it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from mmkd.base.errors import TeacherError
from mmkd.extract.teachers import describe_teacher, load_teacher
from mmkd.extract.teachers.spec import Teacher, TeacherSpec
from mmkd.extract.teachers.transformers_model import pooled
from tests import teacher_snapshots as snapshots
from tests.teacher_parts import sealed  # noqa: F401

pytestmark = pytest.mark.usefixtures("sealed")
CPU = torch.device("cpu")
VISIBLE = 1e-3
"""A hundred times what the comparison with the references allows."""


def load(spec: TeacherSpec) -> Teacher:
    return load_teacher(spec, describe_teacher(spec), CPU)


def with_options(spec: TeacherSpec, **options: object) -> TeacherSpec:
    return spec.model_copy(update={"options": spec.options | options})


def image_features(spec: TeacherSpec) -> torch.Tensor:
    teacher = load(spec)
    channels = 1 if teacher.card.preprocessing.color == "L" else 3
    size = teacher.card.preprocessing.image_size
    generator = torch.Generator().manual_seed(0)
    return teacher.encode_images(torch.randint(0, 256, (2, channels, *size), dtype=torch.uint8, generator=generator))


def text_features(spec: TeacherSpec, captions: list[str] | None = None) -> torch.Tensor:
    teacher = load(spec)
    return teacher.encode_texts(teacher.tokenize(captions or snapshots.CAPTIONS)[0])


def differs(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() / one.abs().max() > VISIBLE)


@pytest.mark.integration
def test_quick_gelu_is_another_teacher(tmp_path: Path) -> None:
    right = snapshots.quiltnet(tmp_path).spec
    wrong = with_options(right, model={"quick_gelu": True})
    assert differs(image_features(right), image_features(wrong))
    assert differs(text_features(right), text_features(wrong))
    assert describe_teacher(right).weights_sha256 == describe_teacher(wrong).weights_sha256
    assert describe_teacher(right).digest != describe_teacher(wrong).digest


def test_a_folder_with_only_pt_is_refused(tmp_path: Path) -> None:
    spec = snapshots.quiltnet(tmp_path).spec
    (tmp_path / "open_clip_pytorch_model.bin").rename(tmp_path / "epoch_latest.pt")
    # open_clip itself goes on with random weights here.
    with pytest.raises(TeacherError, match=r"no weights under open_clip_model.safetensors.*it holds epoch_latest.pt"):
        describe_teacher(spec)
    named = spec.model_copy(update={"weights": ("epoch_latest.pt",)})
    assert image_features(named).isfinite().all()


@pytest.mark.parametrize("make", [snapshots.bmca, snapshots.unimedclip])
def test_numpy_scalars_need_trust(make: object, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert callable(make)
    spec = make(tmp_path, numpy_scalars=True).spec
    with pytest.raises(TeacherError, match=r"any code; if its sha256 [0-9a-f]{64} .*--trust-pickle"):
        describe_teacher(spec)
    assert image_features(spec.model_copy(update={"trust_pickle": True})).isfinite().all()
    assert any("sha256" in record.message for record in caplog.records)


@pytest.mark.integration
def test_the_text_towers_configuration_never_asks_the_network(tmp_path: Path) -> None:
    spec = snapshots.biomedclip(tmp_path).spec
    (tmp_path / "config.json").unlink()
    # Known towers need no file; this one is smaller than the real, so the weights are refused, key by key.
    card = describe_teacher(spec)
    with pytest.raises(
        TeacherError, match=r"wrong shape.*text.transformer.embeddings.word_embeddings.weight \(40, 32\) for"
    ):
        load_teacher(spec, card, CPU)
    unknown = with_options(spec, model={"text_cfg": {"hf_model_name": "someone/unknown-bert"}})
    with pytest.raises(TeacherError, match=r"someone/unknown-bert/config.json is not in the cache .*HF_HUB_OFFLINE"):
        describe_teacher(unknown)


def test_text_tower_beside_the_weights_in_a_folder_of_its_own(tmp_path: Path) -> None:
    snapshot = snapshots.biomedclip(tmp_path)
    expected = text_features(snapshot.spec)
    nested = tmp_path / "BiomedNLP-BiomedBERT-base-uncased-abstract"
    nested.mkdir()
    for name in ("config.json", "vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).rename(nested / name)
    assert torch.equal(text_features(snapshot.spec), expected)


def test_open_clip_keys_of_old_revisions_are_read_and_others_named(tmp_path: Path) -> None:
    spec = snapshots.biomedclip(tmp_path).spec
    expected = describe_teacher(spec).digest
    path = tmp_path / "open_clip_config.json"
    old = path.read_text().replace("hf_proj_type", "proj").replace("hf_pooler_type", "pooler_type")
    assert "hf_proj_type" not in old
    path.write_text(old)
    assert describe_teacher(spec).digest == expected
    wrong = with_options(spec, model={"text_cfg": {"pooling": "cls"}})
    with pytest.raises(TeacherError, match="text_cfg has pooling, which open_clip 3"):
        describe_teacher(wrong)


def test_attention_pool_heads(tmp_path: Path) -> None:
    spec = snapshots.pmcclip(tmp_path).spec
    assert differs(image_features(spec), image_features(with_options(spec, attention_pool_heads=2)))


def test_last_hidden_state_and_pooler_output(tmp_path: Path) -> None:
    spec = snapshots.pmcclip(tmp_path).spec
    assert differs(text_features(spec), text_features(with_options(spec, text_feature="pooler_output")))


def test_padding_is_attended_unless_asked(tmp_path: Path) -> None:
    spec = snapshots.pmcclip(tmp_path).spec
    assert differs(text_features(spec), text_features(with_options(spec, attention_mask=True)))
    digests = {
        describe_teacher(with_options(spec, **changes)).digest
        for changes in ({}, {"attention_mask": True}, {"attention_pool_heads": 2})
    }
    assert len(digests) == 3


def test_swins_old_names_need_more_than_load_state_dict(tmp_path: Path) -> None:
    spec = snapshots.medclip(tmp_path).spec
    old = load_file(tmp_path / "old-names" / "model.safetensors")
    model = transformers.SwinModel(transformers.SwinConfig(**snapshots.SWIN))
    assert set(old) != set(model.state_dict()), "transformers writes today's names: this trap is gone"
    assert image_features(spec).isfinite().all()


def test_outputs_of_transformers_4_and_5() -> None:
    features = torch.ones(2, 3)
    assert pooled(features) is features
    assert pooled(SimpleNamespace(pooler_output=features, last_hidden_state=None)) is features


@pytest.mark.parametrize(
    "make", [snapshots.biomedclip, snapshots.plip, snapshots.pmcclip, snapshots.medclip, snapshots.unimedclip]
)
def test_position_ids_are_the_only_surplus_forgiven(make: object, tmp_path: Path) -> None:
    assert callable(make)
    spec: TeacherSpec = make(tmp_path).spec
    name = (
        "text_encoder.pth"
        if spec.slug == "pmcclip"
        else (spec.weights or tuple(p.name for p in tmp_path.glob("*.bin")))[0]
    )
    content = torch.load(tmp_path / name, weights_only=True)
    weights = content.get("state_dict", content)
    assert any(key.endswith("embeddings.position_ids") for key in weights)
    prefix = next(key for key in weights if "encoder.layer" in key or "encoder.layers" in key).partition(
        "encoder.layer"
    )[0]
    weights[f"{prefix}encoder.stranger.weight"] = torch.ones(1)
    torch.save(content, tmp_path / name)
    with pytest.raises(TeacherError, match=r"unexpected \(.*encoder\.stranger\.weight"):
        load(spec)


def test_missing_keys_are_named(tmp_path: Path) -> None:
    spec = snapshots.quiltnet(tmp_path).spec
    weights = torch.load(tmp_path / "open_clip_pytorch_model.bin")
    del weights["visual.proj"], weights["ln_final.bias"]
    torch.save(weights, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(TeacherError, match=r"2 missing \(ln_final.bias, visual.proj\)"):
        load(spec)


def test_a_caption_does_not_feel_its_neighbours(tmp_path: Path) -> None:
    spec = snapshots.medclip(tmp_path).spec
    teacher = load(spec)
    together = teacher.encode_texts(teacher.tokenize(snapshots.CAPTIONS)[0])
    alone = torch.cat([teacher.encode_texts(teacher.tokenize([caption])[0]) for caption in snapshots.CAPTIONS])
    assert (together - alone).abs().max() / alone.abs().max() < 1e-5
    # The authors pad to the batch's longest caption and average padding: with that rule they would.
    assert differs(alone, text_features(with_options(spec, pooled_tokens="context")))


def test_loading_leaves_the_random_generator_alone(tmp_path: Path) -> None:
    spec = snapshots.quiltnet(tmp_path).spec
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load(spec)
    assert torch.equal(torch.rand(3), expected)


def test_tied_configuration_of_a_clip_model_in_an_open_clip_folder_is_not_a_text_tower(tmp_path: Path) -> None:
    # QuiltNet's repository holds both forms of itself.
    spec = snapshots.biomedclip(tmp_path).spec
    nested = tmp_path / "BiomedNLP-BiomedBERT-base-uncased-abstract"
    nested.mkdir()
    (tmp_path / "config.json").rename(nested / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "projection_dim": 512}))
    assert text_features(spec).isfinite().all()

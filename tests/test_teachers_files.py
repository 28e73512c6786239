"""What users have on disk: damaged, mistaken and changed files, long captions, NaN."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmkd.base.errors import TeacherError
from mmkd.extract.teachers import TeacherSpec, describe_teacher, load_teacher
from mmkd.extract.teachers.loaded import LoadedTeacher
from tests import teacher_snapshots as snapshots
from tests.teacher_parts import sealed  # noqa: F401

pytestmark = pytest.mark.usefixtures("sealed")
CPU = torch.device("cpu")


def load(spec: TeacherSpec) -> LoadedTeacher:
    teacher = load_teacher(spec, describe_teacher(spec), CPU)
    assert isinstance(teacher, LoadedTeacher)
    return teacher


@pytest.mark.parametrize("make", [snapshots.quiltnet, snapshots.genmedclip, snapshots.plip, snapshots.medclip])
@pytest.mark.parametrize("keep", [0.6, 0.0005, 0])
def test_half_downloaded_weights(make: object, keep: float, tmp_path: Path) -> None:
    assert callable(make)
    spec = make(tmp_path).spec
    (weights,) = [path for path in tmp_path.iterdir() if path.suffix in (".bin", ".safetensors")]
    content = weights.read_bytes()
    weights.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(TeacherError, match=f"{weights.name} is truncated or corrupted .*download it again"):
        describe_teacher(spec)


def test_a_pointer_instead_of_weights(tmp_path: Path) -> None:
    spec = snapshots.quiltnet(tmp_path).spec
    (tmp_path / "open_clip_pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(TeacherError, match=r"truncated or corrupted"):
        describe_teacher(spec)


def test_a_half_downloaded_configuration(tmp_path: Path) -> None:
    spec = snapshots.quiltnet(tmp_path).spec
    path = tmp_path / "open_clip_config.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(TeacherError, match=r"open_clip_config.json is not a whole JSON file"):
        describe_teacher(spec)


def test_a_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    spec = snapshots.quiltnet(one).spec
    snapshots.plip(other)
    (other / "pytorch_model.bin").rename(one / "open_clip_pytorch_model.bin")
    with pytest.raises(TeacherError) as error:
        load(spec)
    assert "missing (" in str(error.value)
    assert "vision_model.pre_layrnorm.weight" in str(error.value)
    assert "\n" not in str(error.value)


def test_another_teachers_tokenizer(tmp_path: Path) -> None:
    bert, clip = tmp_path / "bert", tmp_path / "clip"
    bert.mkdir()
    clip.mkdir()
    bert_spec, clip_spec = snapshots.biomedclip(bert).spec, snapshots.plip(clip).spec
    swap = tmp_path / "swap"
    swap.mkdir()
    (clip / "vocab.json").rename(swap / "vocab.json")
    for name in ("merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        (clip / name).rename(swap / name)
    snapshots.write_bert_tokenizer(clip)
    with pytest.raises(TeacherError, match=r"does not end a caption with its highest id.*another teacher's tokenizer"):
        load(clip_spec)
    (bert / "vocab.txt").unlink()
    for path in swap.iterdir():
        path.rename(bert / path.name)
    with pytest.raises(
        TeacherError, match=r"516 tokens, the text tower 40 embeddings: this is another teacher's tokenizer"
    ):
        load(bert_spec)


def test_no_tokenizer(tmp_path: Path) -> None:
    spec = snapshots.plip(tmp_path).spec
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink()
    with pytest.raises(TeacherError, match=r"no tokenizer in local-dir:.*put tokenizer.json, vocab.txt, vocab.json"):
        describe_teacher(spec)


def test_files_that_changed_after_the_card(tmp_path: Path) -> None:
    spec = snapshots.quiltnet(tmp_path).spec
    card = describe_teacher(spec)
    torch.save(snapshots.native_state(99), tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(TeacherError, match=rf"expected {card.digest} \(different: weights_sha256\)"):
        load_teacher(spec, card, CPU)


def test_weights_pinned_by_their_hash(tmp_path: Path) -> None:
    spec = snapshots.quiltnet(tmp_path).spec
    found = describe_teacher(spec).weights_sha256
    assert describe_teacher(spec.model_copy(update={"weights_sha256": found})).weights_sha256 == found
    with pytest.raises(TeacherError, match=rf"weights have sha256 {found}, expected {'0' * 64}; download them again"):
        describe_teacher(spec.model_copy(update={"weights_sha256": "0" * 64}))


def test_the_hash_is_remembered_and_the_file_is_watched(tmp_path: Path) -> None:
    spec = snapshots.quiltnet(tmp_path).spec
    weights = describe_teacher(spec).weights_sha256
    entries = list((tmp_path / "cache" / "mmkd" / "sha256").iterdir())
    remembered = [path for path in entries if "open_clip_pytorch_model.bin" in path.read_text()]
    assert len(remembered) == 1
    remembered[0].write_text(remembered[0].read_text().replace(weights, "ab" * 32))
    assert describe_teacher(spec).weights_sha256 == "ab" * 32
    (tmp_path / "open_clip_pytorch_model.bin").touch()
    assert describe_teacher(spec).weights_sha256 == weights


def test_captions_are_counted_before_they_are_cut(tmp_path: Path) -> None:
    for make in (snapshots.biomedclip, snapshots.quiltnet, snapshots.plip):
        folder = tmp_path / make.__name__
        folder.mkdir()
        teacher = load(make(folder).spec)
        tokens, lengths = teacher.tokenize(["a b", "", "a " * 300])
        assert tokens.shape == (3, teacher.card.context_length)
        assert lengths == [4, 2, 302]
        assert teacher.tokenize([])[0].shape == (0, teacher.card.context_length)


def test_nan_in_half_precision_is_computed_again(tmp_path: Path) -> None:
    spec = snapshots.quiltnet(tmp_path).spec
    weights = torch.load(tmp_path / "open_clip_pytorch_model.bin")
    weights["visual.transformer.resblocks.0.mlp.c_fc.weight"] *= 1e5  # beyond float16's 65504
    torch.save(weights, tmp_path / "open_clip_pytorch_model.bin")
    full, half = load(spec), load(spec.model_copy(update={"precision": "fp16"}))
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    features = half.encode_images(pixels)
    assert half.half_precision_failures == 3
    torch.testing.assert_close(features, full.encode_images(pixels), rtol=1e-4, atol=1e-3)
    assert half.card.digest != full.card.digest


def features(teacher: LoadedTeacher) -> torch.Tensor:
    """Features of two drawn pictures."""
    height, width = teacher.card.preprocessing.image_size
    pixels = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return teacher.encode_images(pixels)


def test_open_clip_weights_in_shards_with_an_index(tmp_path: Path) -> None:
    spec = snapshots.quiltnet(tmp_path).spec
    whole = features(load(spec))
    path = tmp_path / "open_clip_pytorch_model.bin"
    weights = {name: tensor.contiguous() for name, tensor in torch.load(path, weights_only=True).items()}
    path.unlink()
    names = sorted(weights)
    files = {"model-1.safetensors": names[: len(names) // 2], "model-2.safetensors": names[len(names) // 2 :]}
    for file, here in files.items():
        save_file({name: weights[name].clone() for name in here}, tmp_path / file)
    index = {"weight_map": {name: file for file, here in files.items() for name in here}}
    (tmp_path / "open_clip_model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(features(load(spec)), whole)


def test_a_folder_saved_by_the_processor_of_transformers_5(tmp_path: Path) -> None:
    spec = snapshots.plip(tmp_path).spec
    before = describe_teacher(spec)
    path = tmp_path / "preprocessor_config.json"
    content = json.loads(path.read_text())
    # Beside the older file it says nothing of images.
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    assert describe_teacher(spec).digest == before.digest
    path.unlink()
    with pytest.raises(TeacherError, match=r"has no preprocessor_config\.json or processor_config\.json"):
        describe_teacher(spec)
    saved = {"processor_class": "CLIPProcessor", "image_processor": content}
    (tmp_path / "processor_config.json").write_text(json.dumps(saved))
    assert describe_teacher(spec).digest == before.digest
    assert load(spec).card.digest == before.digest
    path.write_text(json.dumps(content | {"image_mean": [0.1, 0.2, 0.3]}))
    with pytest.raises(TeacherError, match=r"preprocessor_config\.json and processor_config\.json of .* disagree"):
        describe_teacher(spec)


def test_a_timm_tower_of_another_size_is_one_line(tmp_path: Path) -> None:
    spec = snapshots.biomedclip(tmp_path).spec
    card = describe_teacher(spec)
    wrong = card.preprocessing.model_copy(update={"image_size": (40, 40)})
    with pytest.raises(TeacherError, match=r"its image tower does not take 40 x 40 pixels .*correct image_size"):
        load(spec.model_copy(update={"preprocessing": wrong}))


def test_a_full_device_is_not_taken_for_a_wrong_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: LoadedTeacher, images: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LoadedTeacher, "encode_images", full)
    with pytest.raises(TeacherError, match="cpu has too little memory for one image; give fewer teachers"):
        load(snapshots.biomedclip(tmp_path).spec)


def test_weights_of_the_oldest_torch_and_configurations_of_the_oldest_transformers(tmp_path: Path) -> None:
    spec = snapshots.plip(tmp_path).spec
    expected = features(load(spec))
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    config = json.loads((tmp_path / "config.json").read_text())
    old = {"text_config_dict": None, "vision_config_dict": None, "torch_dtype": "float32", "transformers_version": None}
    (tmp_path / "config.json").write_text(json.dumps(config | old))
    assert torch.equal(features(load(spec)), expected)


def test_siglip_2_of_varying_patches_is_refused_before_any_weights(tmp_path: Path) -> None:
    config = {"model_type": "siglip2", "vision_config": {"num_patches": 256}, "text_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TeacherError, match=r"NaFlex, .* is not supported; take its checkpoint of one size"):
        describe_teacher(TeacherSpec(slug="mine", source=f"local-dir:{tmp_path}"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_mean": None}, r"image_mean: .*download it again"),
        ({"image_std": [0.5, 0.5]}, r"image_std\.2: .*download it again"),
        ({"size": [32, 32]}, r"size: Input should be a valid dictionary"),
        ({"size": None}, r"size: Input should be a valid dictionary"),
        ({"resample": "bicubic"}, r"resample: .*valid integer"),
        ({"resample": 1}, r"resample 1, .*which mmkd does not do exactly"),
        ({"do_center_crop": None}, r"which mmkd does not do exactly"),
        ({"do_resize": None}, r"which mmkd does not do exactly"),
        ({"rescale_factor": 1}, r"rescale_factor 1, .*which mmkd does not do exactly"),
        ({"do_rescale": False}, r"do_rescale False, .*which mmkd does not do exactly"),
        ({"image_processor": ["x"]}, r"the image processor's configuration: image_processor: "),
    ],
)
def test_an_image_processor_that_cannot_be_followed_is_one_line(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    spec = snapshots.pubmedclip(tmp_path).spec
    edit_json(tmp_path / "preprocessor_config.json", **changes)
    with pytest.raises(TeacherError, match=message) as error:
        describe_teacher(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("weight_map", [None, {}, ["a"], {"a": 3}, {"a": "../model.safetensors"}, {"a": ["b"]}])
def test_an_index_without_shards_beside_it_is_one_line(weight_map: object, tmp_path: Path) -> None:
    spec = snapshots.plip(tmp_path).spec
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(TeacherError, match=r"index\.json has no weight_map from tensors to files beside it"):
        describe_teacher(spec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": "x"}, r"config\.json of type 'clip' cannot be used"),
        ({"quantization_config": {"load_in_8bit": True}}, r"is of quantized weights .*take the repository's float"),
    ],
)
def test_a_configuration_that_transformers_refuses_is_one_line(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    spec = snapshots.plip(tmp_path).spec
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(TeacherError, match=message) as error:
        describe_teacher(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("model_cfg", {"vision_cfg": None}, r"lacks vision_cfg: not open_clip's"),
        ("model_cfg", {"embed_dim": "24x"}, r"lacks embed_dim: not open_clip's"),
        ("model_cfg", {"vision_cfg": {"timm_model_name": "hf-hub:timm/x"}}, r"architecture lies elsewhere"),
        ("preprocess_cfg", {"mean": "x"}, r"mean\.0 is 'x': .*give 'preprocessing' in a YAML card"),
        ("preprocess_cfg", {"mean": [0.5, 0.5], "std": [1, 1]}, r"does not take 32 x 32 pixels .*mean or std"),
    ],
)
def test_an_open_clip_configuration_that_cannot_be_used_is_one_line(
    section: str, changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    spec = snapshots.quiltnet(tmp_path).spec
    path = tmp_path / "open_clip_config.json"
    edit_json(path, **{section: json.loads(path.read_text())[section] | changes})
    with pytest.raises(TeacherError, match=message) as error:
        load(spec)
    assert "\n" not in str(error.value)


def test_a_configuration_with_a_byte_order_mark(tmp_path: Path) -> None:
    spec = snapshots.quiltnet(tmp_path).spec
    path = tmp_path / "open_clip_config.json"
    before = describe_teacher(spec)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert describe_teacher(spec).digest == before.digest


@pytest.mark.integration
@pytest.mark.parametrize("make", [snapshots.plip, snapshots.quiltnet, snapshots.medclip, snapshots.pmcclip])
def test_a_size_or_context_that_a_tower_does_not_take_is_one_line(make: object, tmp_path: Path) -> None:
    assert callable(make)
    spec = make(tmp_path).spec
    card = describe_teacher(spec)
    longer = spec.model_copy(update={"context_length": 4000})
    with pytest.raises(TeacherError, match=r"its text tower does not take 4000 tokens .*correct context_length"):
        load(longer)
    if make is snapshots.medclip:
        return  # Swin takes any size
    wrong = card.preprocessing.model_copy(update={"image_size": (48, 48)})
    with pytest.raises(TeacherError, match=r"its image tower does not take 48 x 48 pixels .*correct image_size"):
        load(spec.model_copy(update={"preprocessing": wrong}))


def test_weights_quantized_to_integers_are_refused(tmp_path: Path) -> None:
    spec = snapshots.quiltnet(tmp_path).spec
    path = tmp_path / "open_clip_pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    torch.save({name: tensor.to(torch.int8) for name, tensor in weights.items()}, path)
    with pytest.raises(TeacherError, match=r"holds 8-bit integers for .* no quantized weights; take the float weights"):
        load(spec)


@pytest.mark.integration
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod."])
def test_weights_of_a_compiled_model(prefix: str, tmp_path: Path) -> None:
    spec = snapshots.quiltnet(tmp_path).spec
    whole = features(load(spec))
    path = tmp_path / "open_clip_pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    torch.save({prefix + name: tensor for name, tensor in weights.items()}, path)
    assert torch.equal(features(load(spec)), whole)


def test_a_torchscript_program_is_not_called_damaged(tmp_path: Path) -> None:
    spec = snapshots.quiltnet(tmp_path).spec
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(TeacherError, match=r"is a TorchScript program, .*state_dict"):
        describe_teacher(spec)

"""What users write: names, places, YAML cards, any other model, encoders of their own."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import open_clip
import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from mmkd.base.errors import TeacherError, UserError
from mmkd.extract.teachers import TeacherSpec, describe_teacher, load_teacher, parse_teachers
from mmkd.extract.teachers.loaded import LoadedTeacher
from mmkd.extract.teachers.loaders import LOADERS
from mmkd.extract.teachers.published import encoders, find_published, the_nine, variants
from tests import teacher_snapshots as snapshots
from tests.teacher_parts import sealed  # noqa: F401

pytestmark = pytest.mark.usefixtures("sealed")
CPU = torch.device("cpu")


def load(spec: TeacherSpec) -> LoadedTeacher:
    teacher = load_teacher(spec, describe_teacher(spec), CPU)
    assert isinstance(teacher, LoadedTeacher)
    return teacher


# --- names and places ------------------------------------------------------------------------------------------------


def test_all_is_the_nine() -> None:
    specs = parse_teachers("all")
    assert [spec.slug for spec in specs] == list(snapshots.NINE)
    assert pickle.loads(pickle.dumps(specs)) == specs


def test_spellings_of_the_original() -> None:
    names = ["BMCA", "BiomedCLIP", "UniMedCLIP", "QuiltNet", "GenMedClip", "PLIP", "PUBMEDCLIP", "PMCCLIP", "MedCLIP"]
    assert {spec.slug for spec in parse_teachers(",".join(names))} == set(snapshots.NINE)


def test_every_card_is_complete() -> None:
    slugs = [teacher.slug for teacher in (*the_nine(), *variants(), *encoders())]
    assert len(set(slugs)) == len(slugs)
    assert [teacher.slug for teacher in the_nine() if teacher.inferred] == ["medclip"]
    assert {teacher.slug for teacher in the_nine() if teacher.license == "not stated"} == {"bmca", "plip", "medclip"}


@pytest.mark.parametrize(
    ("slug", "source", "loader", "dim", "weights", "revision"),
    [
        ("bmca", "hf-hub:BIOMEDICA/BMC_CLIP_CF", "open_clip", 768, ("BMC_CLIP_CF.pt",), ""),
        (
            "biomedclip", "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224", "open_clip", 512, (),
            "9f341de24bfb00180f1b847274256e9b65a3a32e",
        ),
        (
            "unimedclip", "hf-hub:UzairK/unimed-clip-vit-b16", "open_clip", 512, ("unimed-clip-vit-b16.pt",),
            "84a67cb0331b511b630136e4878beaa5a3fdc657",
        ),
        ("pmcclip", "hf-hub:datasets/axiong/pmc_oa", "pmc_clip", 768, (), ""),
        ("quiltnet", "hf-hub:wisdomik/QuiltNet-B-32", "open_clip", 512, (), ""),
        ("genmedclip", "hf-hub:wisdomik/GenMedClip", "open_clip", 512, (), ""),
        ("plip", "hf-hub:vinid/plip", "transformers", 512, (), ""),
        ("pubmedclip", "hf-hub:flaviagiammarino/pubmed-clip-vit-base-patch32", "transformers", 512, (), ""),
        ("medclip", "https://storage.googleapis.com/pytrial/medclip-vit-pretrained.zip", "medclip", 512, (), ""),
        (
            "mmkd-b16", "https://drive.google.com/file/d/16pDQ2rI3VKezUl_WVxm1gVmhljQWxjJR", "open_clip", 512,
            ("MMKD_B16.pth",), "",
        ),
        (
            "unimedclip-l14", "hf-hub:UzairK/unimed_clip_vit_l14_base_text_encoder", "open_clip", 768,
            ("unimed_clip_vit_l14_base_text_encoder.pt",), "",
        ),
        ("pmcclip-notebook", "hf-hub:datasets/axiong/pmc_oa", "pmc_clip", 768, (), ""),
        ("pmcclip-checkpoint", "hf-hub:datasets/axiong/pmc_oa", "pmc_clip", 768, ("checkpoint.pt",), ""),
        ("quiltnet-b16", "hf-hub:wisdomik/QuiltNet-B-16", "open_clip", 512, (), ""),
        ("quiltnet-b16-pmb", "hf-hub:wisdomik/QuiltNet-B-16-PMB", "open_clip", 512, (), ""),
        ("genmedclip-b32", "hf-hub:wisdomik/GenMedClip-B-32", "open_clip", 512, (), ""),
        ("genmedclip-b16-pmb", "hf-hub:wisdomik/GenMedClip-B-16-PMB", "open_clip", 512, (), ""),
        ("pubmedclip-original", "hf-hub:sarahESL/PubMedCLIP", "open_clip", 512, ("PubMedCLIP_ViT32.pth",), ""),
        ("medclip-resnet", "https://storage.googleapis.com/pytrial/medclip-pretrained.zip", "medclip", 512, (), ""),
    ],
)  # fmt: skip
def test_the_recipe_of_every_card(
    slug: str, source: str, loader: str, dim: int, weights: tuple[str, ...], revision: str
) -> None:
    card = find_published(slug)
    assert (card.source, card.loader, card.dim) == (source, loader, dim)
    assert (card.weights, card.revision) == (weights, revision)
    assert card.spec.options == card.options


@pytest.mark.parametrize(
    ("slug", "source", "gated", "dim", "pooling"),
    [
        ("uni", "MahmoodLab/UNI", True, 1024, "class"),
        ("uni2-h", "MahmoodLab/UNI2-h", True, 1536, "class"),
        ("virchow2", "paige-ai/Virchow2", True, 2560, "class_mean"),
        ("h-optimus-0", "bioptimus/H-optimus-0", True, 1536, "class"),
        ("h-optimus-1", "bioptimus/H-optimus-1", True, 1536, "class"),
        ("prov-gigapath", "prov-gigapath/prov-gigapath", True, 1536, "class"),
        ("phikon-v2", "owkin/phikon-v2", False, 1024, "class"),
        ("rad-dino", "microsoft/rad-dino", False, 768, "class"),
        ("dinov2-base", "facebook/dinov2-base", False, 768, "class"),
        ("dinov2-large", "facebook/dinov2-large", False, 1024, "class"),
        ("dinov3-base", "facebook/dinov3-vitb16-pretrain-lvd1689m", True, 768, "class"),
        ("dinov3-large", "facebook/dinov3-vitl16-pretrain-lvd1689m", True, 1024, "class"),
        ("medsiglip", "google/medsiglip-448", True, 1152, None),
        ("conch", "MahmoodLab/CONCH", True, 512, None),
    ],
)
def test_the_recipe_of_every_other_encoder(slug: str, source: str, gated: bool, dim: int, pooling: str | None) -> None:
    card = find_published(slug)
    assert card in encoders()
    assert (card.source, card.gated, card.dim) == (f"hf-hub:{source}", gated, dim)
    assert card.options.get("pooling") == pooling
    assert (card.text_tower == "none") == (pooling is not None)
    assert card.loader in LOADERS
    assert card.sources, "every fact has its source"
    assert card.spec.preprocessing == card.preprocessing


@pytest.mark.integration
@pytest.mark.parametrize(
    ("slug", "architecture", "published"),
    [  # the architecture and model_args of the repository's config.json, as far as they are public
        ("uni", "vit_large_patch16_224", {}),
        ("uni2-h", "", {}),
        ("virchow2", "vit_huge_patch14_224",
         {"reg_tokens": 4, "mlp_ratio": 5.3375, "global_pool": "", "init_values": 1e-5}),
        ("h-optimus-0", "vit_giant_patch14_reg4_dinov2", {"img_size": 224, "global_pool": "token"}),
        ("prov-gigapath", "vit_giant_patch14_dinov2",
         {"img_size": 224, "patch_size": 16, "depth": 40, "num_heads": 24, "init_values": 1e-5, "mlp_ratio": 5.33334}),
    ],
)  # fmt: skip
def test_a_recipe_of_timm_gives_the_width_of_its_card(
    slug: str, architecture: str, published: dict[str, object], tmp_path: Path
) -> None:
    card = find_published(slug)
    config = {"architecture": architecture or "unknown", "model_args": published, "pretrained_cfg": {"crop_pct": 1.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"nothing": torch.zeros(1)}, tmp_path / "model.safetensors")
    torch.save({"nothing": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    found = describe_teacher(card.spec.model_copy(update={"source": f"local-dir:{tmp_path}"}))
    assert (found.dim, found.towers) == (card.dim, ("image",))
    assert found.image_preprocessing.image_size == (224, 224)


def test_what_a_variant_takes_from_the_card_it_is_like() -> None:
    original, student, large = map(find_published, ("unimedclip", "mmkd-b16", "unimedclip-l14"))
    assert student.options == original.options
    assert large.options == original.options | {"architecture": "ViT-L-14-336-quickgelu"}
    assert student.text_source == large.text_source == original.text_source != ""
    # Spellings, pins and doubts are a card's own.
    assert (large.also_called, large.revision, large.open_questions) == ((), "", ())
    assert find_published("medclip-resnet").inferred is False
    notebook = find_published("pmcclip-notebook").options
    assert notebook == {"attention_pool_heads": 8, "text_feature": "pooler_output"}


def test_a_known_name_keeps_its_recipe_at_another_place() -> None:
    (spec,) = parse_teachers("BMCA=local-dir:/mirror/bmca")
    assert (spec.slug, spec.source, spec.weights) == ("bmca", "local-dir:/mirror/bmca", ("BMC_CLIP_CF.pt",))
    assert spec.options == {"architecture": "ViT-L-14"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("biomedclp", "no teacher is called 'biomedclp': did you mean 'biomedclip'?"),
        ("", "no teacher named"),
        ("plip,plip", "'plip' is named 2 times"),
        ("local-dir:/x", "write my-teacher=local-dir:/x"),
        ("hf-hub:org/name", "write my-teacher=hf-hub:org/name"),
        ("./folder/clip", "write my-teacher=local-dir:./folder/clip"),
        ("mine=/folder", "write mine=local-dir:/folder, mine=hf-hub:org/name"),
        ("Mine!=local-dir:/x", "'Mine!' cannot be a folder name"),
        ("nowhere.yaml", "cannot read nowhere.yaml"),
    ],
)
def test_mistakes_in_the_list(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_teachers(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bare_folder_is_told_how_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student").mkdir()
    with pytest.raises(TeacherError, match=r"'student' is a path, .*write my-teacher=local-dir:student"):
        parse_teachers("student")


def test_a_five_line_card(tmp_path: Path) -> None:
    snapshots.bmca(tmp_path)
    card = tmp_path / "mine.yaml"
    card.write_text(
        "slug: mine\nsource: 'local-dir:.'\nweights: [BMC_CLIP_CF.pt]\noptions:\n  architecture: tiny-clip\n"
    )
    (spec,) = parse_teachers(str(card))
    assert load(spec).card.slug == "mine"
    (renamed,) = parse_teachers(f"other={card}")
    assert renamed == spec.model_copy(update={"slug": "other"})


def test_a_card_like_a_known_teacher(tmp_path: Path) -> None:
    card = tmp_path / "mine.yaml"
    card.write_text("slug: mine\nlike: pmcclip\nsource: local-dir:/x\noptions: {text_feature: pooler_output}\n")
    (spec,) = parse_teachers(str(card))
    assert (spec.loader, spec.options) == ("pmc_clip", {"text_feature": "pooler_output"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("slug: a\nsource: local-dir:/x\nweigths: [a]\n", "weigths: unknown key; did you mean 'weights'?"),
        ("slug: a\n", "source: Field required"),
        ("slug: [a\n", "is not YAML"),
        ("- a\n", "holds list, expected a mapping"),
    ],
)
def test_mistakes_in_a_card(tmp_path: Path, content: str, message: str) -> None:
    card = tmp_path / "card.yaml"
    card.write_text(content)
    with pytest.raises(UserError) as error:
        parse_teachers(str(card))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_options_and_loaders_are_checked_by_name(tmp_path: Path) -> None:
    spec = snapshots.quiltnet(tmp_path).spec
    with pytest.raises(TeacherError, match=r"option 'archtecture': .* this loader has: architecture, model, rename"):
        describe_teacher(spec.model_copy(update={"options": {"archtecture": "x"}}))
    with pytest.raises(TeacherError, match=r"no loader 'openclip'; did you mean 'open_clip'"):
        describe_teacher(spec.model_copy(update={"loader": "openclip"}))
    with pytest.raises(TeacherError, match=r"no architecture 'ViT-B-33'; did you mean 'ViT-B-32'"):
        describe_teacher(spec.model_copy(update={"options": {"architecture": "ViT-B-33"}}))


# --- any other model -------------------------------------------------------------------------------------------------


def test_an_open_clip_folder_by_place_alone(tmp_path: Path) -> None:
    snapshots.quiltnet(tmp_path)
    (spec,) = parse_teachers(f"mine=local-dir:{tmp_path}")
    assert load(spec).card.dim == snapshots.DIM


def test_siglip_of_transformers(tmp_path: Path) -> None:
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.SiglipConfig(
        text_config=tower | {"vocab_size": 40, "max_position_embeddings": 16, "projection_size": 32},
        vision_config=tower | {"image_size": 32, "patch_size": 16},
    )
    model = snapshots.loud(transformers.SiglipModel(config), 3)
    model.save_pretrained(tmp_path)
    preprocessor = {"size": {"height": 32, "width": 32}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor | {"rescale_factor": 1 / 255}))
    words = {word: n for n, word in enumerate(["<unk>", "</s>", "chest", "x", "ray", "mri"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "</s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (spec,) = parse_teachers(f"mine=local-dir:{tmp_path}")
    teacher = load(spec)
    assert (teacher.card.preprocessing.resize_mode, teacher.card.context_length) == ("hf_squash", 16)
    tokens, lengths = teacher.tokenize(["chest x ray", "mri " * 20])
    assert lengths == [3, 20]
    with torch.no_grad():
        expected = model.get_text_features(input_ids=tokens).pooler_output
    torch.testing.assert_close(teacher.encode_texts(tokens), expected, rtol=1e-5, atol=1e-5)


def test_an_encoder_from_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "house_encoder.py").write_text(
        "class Loader:\n"
        "    def describe(self, spec):\n"
        "        return f'card of {spec.source}'\n"
        "    def load(self, spec, card, device):\n"
        "        return 'teacher'\n"
        "loader = Loader()\n"
    )
    info = tmp_path / "house-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: house\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[mmkd.teachers]\nhouse = house_encoder:loader\nbroken = house_encoder:nothing\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (spec,) = parse_teachers("mine=house:anything")
    assert describe_teacher(spec) == "card of house:anything"
    with pytest.raises(TeacherError, match=r"entry point 'broken' .*cannot be loaded"):
        describe_teacher(parse_teachers("mine=broken:x")[0])


def test_siglip_of_open_clip(tmp_path: Path) -> None:
    text = {"context_length": 16, "vocab_size": 40, "width": 32, "heads": 4, "layers": 2}
    config = {
        "embed_dim": snapshots.DIM,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 128, "patch_size": 16},
        "text_cfg": text
        | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "hf_tokenizer_name": "timm/ViT-B-16-SigLIP"}
        | {"tokenizer_kwargs": {"clean": "canonicalize"}},
    }
    model = snapshots.loud(open_clip.CustomTextCLIP(**{k: v for k, v in config.items() if k != "custom_text"}), 4)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    snapshots.write_bert_tokenizer(tmp_path)
    teacher = load(parse_teachers(f"mine=local-dir:{tmp_path}")[0])
    tokens, lengths = teacher.tokenize(["A, B!"])
    assert lengths == [4], "punctuation goes, as SigLIP's canonical form wants"
    with torch.no_grad():
        torch.testing.assert_close(teacher.encode_texts(tokens), model.encode_text(tokens), rtol=1e-5, atol=1e-5)
    assert teacher.card.preprocessing.resize_mode == "squash"

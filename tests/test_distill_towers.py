"""The student's towers: padding that costs nothing, first weights, locks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.model import set_model_preprocess_cfg
from safetensors.torch import save_file
from tiny_teachers import TINY, write_tiny_teacher
from transformers import BertConfig, BertModel

from mmkd.base.errors import ConfigError
from mmkd.distill.config import LockConfig, OptimizerConfig, RunConfig, StudentConfig
from mmkd.distill.optimizer import learning_rate_shares, lock_layers, make_optimizer, set_learning_rate
from mmkd.distill.prepare import prepare
from mmkd.distill.student import Towers, build_student, length_groups
from mmkd.distill.world import World

TEXT = TINY["text_cfg"]
NATIVE: dict[str, tuple[dict[str, Any], bool]] = {
    "clip": ({}, True),
    "eos pooling": ({"pool_type": "eos", "eos_id": 49407}, True),
    "last column": ({"pool_type": "last"}, False),
    "attends to padding": ({"no_causal_mask": True, "pool_type": "last"}, False),
    "custom, causal": ({"custom": True}, True),
    "custom, attends to padding": ({"custom": True, "no_causal_mask": True}, False),
    "class token behind the text": ({"custom": True, "embed_cls": True}, False),
}


def towers_of(text: dict[str, Any]) -> Towers:
    settings = dict(text)
    kind = open_clip.CustomTextCLIP if settings.pop("custom", False) else open_clip.CLIP
    torch.manual_seed(0)
    clip = kind(**TINY | {"text_cfg": TEXT | {"layers": 3} | settings})
    set_model_preprocess_cfg(clip, {"size": 32, "mean": (0.5,) * 3, "std": (0.25,) * 3})
    return Towers(clip)


def rows_of(lengths: list[int], end: int = 49407) -> torch.Tensor:
    """Captions of these lengths, sixteen columns."""
    tokens = torch.zeros(len(lengths), 16, dtype=torch.long)
    generator = torch.Generator().manual_seed(1)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.randint(1, min(end, 40_000), (length,), generator=generator)
        row[length - 1] = end
    return tokens


def check(towers: Towers, end: int, exact: bool) -> None:
    lengths = [3, 16, 8, 5, 12, 9, 2, 3, 4, 7, 16, 1] * 10
    tokens, columns = rows_of(lengths, end), [8 if length <= 8 else 16 for length in lengths]
    short = [n for n, length in enumerate(lengths) if length <= 8]
    towers.check_padding(tokens[short], [8] * len(short))
    assert towers.cuts_padding is exact
    assert towers.training
    towers.eval()
    assert next(towers.parameters()).dtype == torch.float32
    assert length_groups(columns, 64) == [(8, short), (16, [n for n in range(120) if n not in short])]
    whole, cut = towers.encode_tokens(tokens), towers.encode_tokens(tokens, columns)
    assert (whole - cut).abs().max() <= 1e-6 * whole.abs().max()


@pytest.mark.parametrize("name", NATIVE)
def test_rows_of_like_length_give_the_features_of_padded_ones(name: str) -> None:
    text, exact = NATIVE[name]
    check(towers_of(text), 49407, exact)


@pytest.mark.parametrize("pooler", ["cls_pooler", "mean_pooler", "cls_last_hidden_state_pooler"])
def test_transformers_towers_mask_their_padding(pooler: str, tmp_path: Path) -> None:
    bert = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    BertModel(bert).save_pretrained(tmp_path)
    text = {"hf_model_name": str(tmp_path), "hf_pooler_type": pooler, "hf_proj_type": "linear", "context_length": 16}
    torch.manual_seed(0)
    clip = open_clip.CustomTextCLIP(**TINY | {"text_cfg": text})
    set_model_preprocess_cfg(clip, {"size": 32, "mean": (0.5,) * 3, "std": (0.25,) * 3})
    check(Towers(clip), 99, exact=True)
    clip.text.config.pad_token_id = 98  # padding is not what the tower masks
    check(Towers(clip), 99, exact=False)


@given(st.lists(st.integers(1, 10).map(lambda n: 8 * n), min_size=1, max_size=40), st.integers(0, 200))
def test_groups_hold_every_row_once_and_cost_least(columns: list[int], cost: int) -> None:
    groups = length_groups(columns, cost)
    assert sorted(row for _, rows in groups for row in rows) == list(range(len(columns)))
    assert all(length == max(columns[row] for row in rows) for length, rows in groups)
    spent = sum(cost + length * len(rows) for length, rows in groups)
    padded = cost + max(columns) * len(columns)
    each = sum(cost + length * columns.count(length) for length in set(columns))
    assert spent <= min(padded, each)


def native(seed: int, embed_dim: int = 24, **vision: Any) -> open_clip.CLIP:
    torch.manual_seed(seed)
    return open_clip.CLIP(**TINY | {"embed_dim": embed_dim, "vision_cfg": TINY["vision_cfg"] | vision})


def equal_towers(one: torch.nn.Module, other: torch.nn.Module) -> tuple[bool, bool]:
    """Whether the image towers are equal, and whether the text towers are."""
    mine, theirs = one.state_dict(), other.state_dict()
    names = [name for name in mine if not name.startswith("logit_")]
    return tuple(  # type: ignore[return-value]
        all(torch.equal(mine[name], theirs[name]) for name in names if name.startswith("visual.") is image)
        for image in (True, False)
    )


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """A model config, and an open_clip folder of the same network with a mean of its own."""
    (tmp_path / "student.json").write_text(json.dumps(TINY))
    write_tiny_teacher(tmp_path / "released", seed=5)
    return tmp_path


def student(scene: Path, **settings: Any) -> torch.nn.Module:
    return build_student(StudentConfig(model=str(scene / "student.json"), **settings))


def test_a_folder_brings_weights_preprocessing_and_tokenizer(scene: Path) -> None:
    place = f"local-dir:{scene / 'released'}"
    theirs = open_clip.create_model(place)
    for found in (build_student(StudentConfig(model=place)), student(scene, pretrained=place)):
        assert equal_towers(found, theirs) == (True, True)
        assert found.visual.preprocess_cfg["mean"] == [0.48, 0.46, 0.41]
    mine = student(scene, pretrained=place, preprocess={"mean": (0.1, 0.2, 0.3)})
    assert mine.visual.preprocess_cfg["mean"] == (0.1, 0.2, 0.3)
    assert mine.visual.preprocess_cfg["std"] == [0.27, 0.26, 0.28]


@pytest.mark.parametrize("form", ["folder", "file of both", "file of the tower"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_one_tower_begins_with_weights_of_its_own(scene: Path, tower: str, form: str) -> None:
    theirs = open_clip.create_model(f"local-dir:{scene / 'released'}")
    source = f"local-dir:{scene / 'released'}"
    if form != "folder":
        source = str(scene / "weights.pt")
        part = theirs.visual.state_dict() if tower == "image" else theirs.state_dict()
        torch.save(part if form == "file of the tower" else theirs.state_dict(), source)
    found = student(scene, pretrained={tower: source})
    assert equal_towers(found, theirs) == (tower == "image", tower == "text")


def test_networks_inside_towers_begin_with_weights_of_their_own(tmp_path: Path) -> None:
    bert = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    text = BertModel(bert)
    text.save_pretrained(tmp_path / "bert")
    trunk = timm.create_model("convnext_atto", num_classes=10)
    (tmp_path / "trunk").mkdir()
    save_file(trunk.state_dict(), tmp_path / "trunk/model.safetensors")
    (tmp_path / "trunk/config.json").write_text(json.dumps({"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}))
    vision = {"timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "linear", "image_size": 64}
    description = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": {"hf_model_name": "bert", "hf_proj_type": "mlp"}}
    (tmp_path / "student.json").write_text(json.dumps(description))
    found = student(tmp_path, pretrained={"image": str(tmp_path / "trunk"), "text": str(tmp_path / "bert")})
    assert torch.equal(found.visual.trunk.stem[0].weight, trunk.stem[0].weight)
    assert torch.equal(found.text.transformer.embeddings.word_embeddings.weight, text.embeddings.word_embeddings.weight)
    assert list(found.visual.preprocess_cfg["mean"]) == [0.5] * 3
    plain = student(tmp_path)  # transformers' own weights are not taken when none are asked for
    assert not torch.equal(
        plain.text.transformer.embeddings.word_embeddings.weight, text.embeddings.word_embeddings.weight
    )
    with pytest.raises(ConfigError, match=r"lacks \d+ of \d+ tensors .* expected weights of convnext_atto"):
        student(tmp_path, pretrained={"image": str(tmp_path / "bert")})


def test_weights_of_another_shape_are_named(scene: Path) -> None:
    torch.save(native(3, width=32).state_dict(), scene / "other.pt")
    with pytest.raises(ConfigError, match=r"pretrained.image: .*other.pt: class_embedding is 32, the student's is 64"):
        student(scene, pretrained={"image": str(scene / "other.pt")})
    with pytest.raises(ConfigError, match=r"other.pt does not fit"):
        student(scene, pretrained=str(scene / "other.pt"))
    with pytest.raises(ConfigError, match="'nothing' is neither a file nor a tag"):
        student(scene, pretrained="nothing")
    with pytest.raises(ValueError, match="brings its own weights"):
        StudentConfig(model="local-dir:x", pretrained="y")


RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "patch_size": None}


def test_locked_layers_learn_nothing_and_their_statistics_stay() -> None:
    torch.manual_seed(0)
    clip = open_clip.CLIP(**TINY | {"vision_cfg": RESNET, "text_cfg": TEXT | {"layers": 3}})
    set_model_preprocess_cfg(clip, {"size": 32, "mean": (0.5,) * 3, "std": (0.25,) * 3})
    towers = Towers(clip)
    lock_layers(towers, LockConfig(image="all", text=2))
    towers.train()
    before = {name: value.clone() for name, value in towers.state_dict().items()}
    optimizer = make_optimizer(towers, OptimizerConfig())
    image, text, _ = towers(torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8), rows_of([3] * 6))
    (image @ text.T).sum().backward()
    set_learning_rate(optimizer, 0.1)
    optimizer.step()
    changed = {name for name, value in towers.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(".visual." in name or "resblocks.1." in name or "token_embedding" in name for name in changed)
    assert any("resblocks.2." in name for name in changed)


def test_locking_every_layer_leaves_the_projection_to_learn() -> None:
    towers = towers_of({})
    lock_layers(towers, LockConfig(image="all", text=3))
    learned = {name for name, parameter in towers.named_parameters() if parameter.requires_grad}
    assert learned == {
        "student.logit_scale",
        "student.ln_final.weight",
        "student.ln_final.bias",
        "student.text_projection",
    }


@pytest.mark.parametrize(
    ("lock", "words"),
    [
        ({"image": "all", "text": "all"}, "leaves nothing of the student to learn"),
        ({"text": 9}, r"student.lock.text is 9, the tower has 3 layers .* at most 3"),
    ],
)
def test_a_lock_that_cannot_be_is_refused(lock: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        lock_layers(towers_of({}), LockConfig.model_validate(lock))


def test_parts_have_learning_rates_of_their_own() -> None:
    towers = towers_of({})
    config = OptimizerConfig.model_validate({"layer_decay": 0.5, "part_rates": {"image": 0.1, "text": 2.0}})
    shares = learning_rate_shares(towers, config)
    assert shares["student.visual.proj"] == pytest.approx(0.1)
    assert shares["student.visual.conv1.weight"] == pytest.approx(0.1 * 0.25)
    assert shares["student.text_projection"] == 2.0
    assert shares["student.transformer.resblocks.1.ln_1.weight"] == 2.0 * 0.25
    assert shares["student.logit_scale"] == 1.0


def test_convolutional_towers_give_the_same_features_and_gradients_in_their_layout() -> None:
    torch.manual_seed(0)
    clip = open_clip.CLIP(**TINY | {"vision_cfg": RESNET})
    set_model_preprocess_cfg(clip, {"size": 32, "mean": (0.5,) * 3, "std": (0.25,) * 3})
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    expected = clip.eval().encode_image((images / 255 - 0.5) / 0.25)
    expected.square().sum().backward()
    gradients = {name: part.grad.clone() for name, part in clip.visual.named_parameters()}
    clip.zero_grad()
    towers = Towers(clip).eval()
    assert towers.channels_last
    assert clip.visual.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    found = towers.encode_images(images)
    assert torch.allclose(found, expected, atol=1e-5)
    found.square().sum().backward()
    # Of a key's bias the gradient is 0 but for rounding: hence the largest of all as the measure.
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, part in clip.visual.named_parameters():
        assert torch.allclose(part.grad, gradients[name], rtol=1e-3, atol=1e-5 * largest), name
    assert not towers_of({}).channels_last


@pytest.mark.parametrize(("kernel", "stride", "fast"), [(1, 2, False), (3, 2, True), (1, 1, True)])
def test_strided_convolutions_of_single_pixels_do_not_run_channels_last(kernel: int, stride: int, fast: bool) -> None:
    clip = native(0)
    set_model_preprocess_cfg(clip, {"size": 32, "mean": (0.5,) * 3, "std": (0.25,) * 3})
    stem = torch.nn.Conv2d(3, 8, kernel, stride)
    clip.visual.stem = torch.nn.Sequential(stem, *(torch.nn.Conv2d(8, 8, 3) for _ in range(4)))
    assert Towers(clip).channels_last is fast


def test_a_text_tower_that_cannot_run_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BertConfig(num_hidden_layers=1).save_pretrained(tmp_path / "bert")
    text = {"hf_model_name": "bert", "hf_pooler_type": "max_pooler"}
    settings = {"store": tmp_path / "none", "out": tmp_path / "run", "epochs": 1, "batch_size": 2}
    for changes, reason in (
        ({}, "max_pooler fails on every caption; set hf_pooler_type to mean_pooler or cls_pooler"),
        ({"hf_model_name": "./gone", "hf_pooler_type": "cls_pooler"}, "its text tower ./gone cannot be read"),
        (
            {"hf_pooler_type": "cls_pooler", "hf_tokenizer_name": "./gone"},
            "the tokenizer of student model .* cannot be",
        ),
    ):
        path = tmp_path / "student.json"
        path.write_text(json.dumps(TINY | {"text_cfg": text | changes}))
        config = RunConfig.model_validate(settings | {"student": {"model": str(path)}})
        with pytest.raises(ConfigError, match=reason):
            prepare(config, World(torch.device("cpu")))


@pytest.mark.parametrize(("name", "last"), [("EVA02-B-16", {"pos_embed", "cls_token"}), ("MobileCLIP-S1", {"gamma"})])
def test_positions_class_tokens_and_layer_scales_of_timm_are_not_decayed(name: str, last: set[str]) -> None:
    with torch.device("meta"):
        towers = torch.nn.ModuleDict({"student": open_clip.create_model(name, device="meta")})
    names = {parameter: name for name, parameter in towers.named_parameters()}
    groups = make_optimizer(towers, OptimizerConfig(weight_decay=0.2)).param_groups
    decayed = {names[parameter] for group in groups if group["weight_decay"] for parameter in group["params"]}
    assert last == {name.rpartition(".")[2] for name in names.values()} & {"pos_embed", "cls_token", "gamma"}
    assert not {name.rpartition(".")[2] for name in decayed} - {"weight", "in_proj_weight", "text_projection"}

"""The alignment file: what is written is read back bit for bit; what was changed, or is of others, is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_store import make_card

from mmkd.base.errors import CorruptStoreError, FormatVersionError, MmkdError, TeacherMismatchError, UserError
from mmkd.distill.alignment import Alignment, AlignmentCard, TeacherMap, load, save

WIDTHS = {"alpha": 6, "beta.v2": 9}


def made(**changes: object) -> Alignment:
    """Two teachers of widths 6 and 9 mapped to 4 by random numbers."""
    generator = torch.Generator().manual_seed(3)
    card = {
        "method": "pca",
        "settings": {"dim": 4},
        "dim": 4,
        "unit_input": True,
        "teachers": {slug: make_card(slug, dim).digest for slug, dim in WIDTHS.items()},
        "widths": WIDTHS,
        "corpus": "d",
        "rows": 10,
    } | changes
    maps = {
        slug: TeacherMap(*(torch.randn(shape, generator=generator) for shape in ((4, dim), (4,), (4,))))
        for slug, dim in WIDTHS.items()
    }
    return Alignment(AlignmentCard.model_validate(card), maps if card["dim"] else {})


def rewrite(path: Path, **metadata: str) -> None:
    """The same tensors under other metadata."""
    with safe_open(path, framework="pt") as file:
        tensors, old = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, path, old | metadata)


def test_saved_and_loaded_is_the_same_map(tmp_path: Path) -> None:
    alignment = made()
    save(alignment, tmp_path / "a.safetensors")
    loaded = load(tmp_path / "a.safetensors")
    assert loaded.card == alignment.card
    assert json.loads((tmp_path / "a.json").read_text())["method"] == "pca"
    for slug, dim in WIDTHS.items():
        features = torch.randn(5, dim, dtype=torch.float16)
        fitted = alignment.teacher_map(slug)
        unit = features.double() / features.double().norm(dim=1, keepdim=True)
        for tower, bias in (("image", fitted.image_bias), ("text", fitted.text_bias)):
            out = loaded(slug, tower, features)
            assert out.dtype == torch.float32
            assert torch.equal(out, alignment(slug, tower, features))
            torch.testing.assert_close(
                out.double(), unit @ fitted.weight.double().T + bias.double(), rtol=1e-5, atol=1e-6
            )


def test_no_gradient_flows_and_nothing_is_trained() -> None:
    alignment = made()
    assert list(alignment.parameters()) == []
    out = alignment("alpha", "image", torch.randn(3, 6, requires_grad=True))
    assert not out.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert alignment("alpha", "image", torch.ones(3, 6)).dtype == torch.float32
    assert len(alignment.state_dict()) == 6


def test_without_maps_every_teacher_keeps_its_own_space(tmp_path: Path) -> None:
    save(made(dim=None, method="none", unit_input=False), tmp_path / "none.safetensors")
    loaded = load(tmp_path / "none.safetensors")
    features = torch.randn(3, 9)
    assert torch.equal(loaded("beta.v2", "text", features), features)
    assert [loaded.width(slug) for slug in WIDTHS] == [6, 9]
    assert torch.equal(loaded.teacher_map("alpha").weight, torch.eye(6))


def test_the_same_alignment_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(made(), tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_any_changed_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(made(), path)
    whole = path.read_bytes()
    for place in (0, 9, 40, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(MmkdError):
            load(path)
    path.write_bytes(whole[:-3])
    with pytest.raises(CorruptStoreError, match="not a whole safetensors file"):
        load(path)


def test_strangers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no alignment at"):
        load(tmp_path / "nowhere.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no alignment; "):
        load(tmp_path / "other.safetensors")
    path = tmp_path / "a.safetensors"
    save(made(), path)
    rewrite(path, mmkd=made().card.model_copy(update={"format": 2}).model_dump_json())
    with pytest.raises(FormatVersionError, match="alignment format 2"):
        load(path)
    rewrite(path, mmkd=made(rows=11).card.model_dump_json())
    with pytest.raises(CorruptStoreError, match="wrong checksum"):
        load(path)
    rewrite(path, mmkd='{"format": 1}')
    with pytest.raises(CorruptStoreError, match="safetensors: method: Field required"):
        load(path)


def test_a_store_whose_teachers_are_others_is_refused() -> None:
    alignment = made()
    cards = {slug: make_card(slug, dim) for slug, dim in WIDTHS.items()}
    alignment.check(cards)
    with pytest.raises(UserError, match=r"no teacher 'gamma'; it was fitted for alpha, beta\.v2"):
        alignment.check(cards | {"gamma": make_card("gamma")})
    with pytest.raises(TeacherMismatchError, match="fitted on teacher alpha of digest"):
        alignment.check(cards | {"alpha": make_card("alpha", 6, weights="ff")})
    with pytest.raises(UserError, match="have width 5"):
        alignment("alpha", "image", torch.ones(2, 5))

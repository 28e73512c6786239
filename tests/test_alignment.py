"""Planted spaces: rotated, scaled and noised copies of a hidden one. The right method finds it, the others do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from tiny_store import make_card, make_store

from mmkd.base.errors import ConfigError, MmkdError, UserError
from mmkd.cli.align import align as align_command
from mmkd.distill.alignment import AlignmentCard, load
from mmkd.distill.alignment.closed_form import hadamard
from mmkd.distill.alignment.config import AlignConfig, AutoencoderSettings, load_align
from mmkd.distill.alignment.fit import METHODS, align, effective_rank, neighbor_overlap, recall_at_1
from mmkd.distill.alignment.rows import AlignmentRows, TeacherRows
from mmkd.distill.alignment.trained import MultiTeacherAutoencoder
from mmkd.store import FeatureStore
from mmkd.store.selection import SelectionRule, select
from mmkd.store.verify import verify

WIDTHS = {"big": 24, "small": 16, "wide": 32}
HIDDEN = 12
ROWS = 900


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureStore, np.ndarray]:
    """Three teachers: an orthonormal embedding of one hidden space each, scaled, shifted, with a little noise.

    Variances of the hidden directions fall from 4 to 0.25, so that PCA could find them; the order of directions and
    their signs are then still free in every teacher. Text = image + small noise, and a shift: the modality gap.
    """
    root = tmp_path_factory.mktemp("planted") / "store"
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(ROWS, HIDDEN)) * np.linspace(2, 0.5, HIDDEN)
    text = hidden + 0.05 * rng.normal(size=hidden.shape)
    features = {}
    for number, (slug, width) in enumerate(WIDTHS.items()):
        embedding = np.linalg.qr(rng.normal(size=(width, HIDDEN)))[0] * (0.5, 1.0, 3.0)[number]
        for tower, values in (("image", hidden), ("text", text)):
            shift = rng.normal(size=width)
            noise = 0.02 * rng.normal(size=(ROWS, width))
            features[f"{slug}/{tower}"] = (values @ embedding.T + shift + noise).astype(np.float16)
    make_store(root, ROWS, [make_card(slug, width) for slug, width in WIDTHS.items()], features=features)
    return FeatureStore.open(root), hidden


def fitted(store: FeatureStore, tmp_path: Path, method: str, dim: int = HIDDEN, **rest: Any) -> Any:
    """An alignment of the planted store by one method."""
    settings = rest.pop("settings", {})
    content = {"out": tmp_path / f"{method}.safetensors", "method": {method: settings}, "dim": dim, "unit_input": False}
    return align(store, AlignConfig.model_validate(content | rest))


def test_procrustes_recovers_the_hidden_space(planted: tuple[FeatureStore, np.ndarray], tmp_path: Path) -> None:
    store, hidden = planted
    alignment = fitted(store, tmp_path, "procrustes", settings={"reference": "small"})
    mapped = {s: alignment(s, "image", torch.from_numpy(store.image(s)[:].astype(np.float32))).numpy() for s in WIDTHS}
    for slug in ("big", "wide"):
        error = np.linalg.norm(mapped[slug] - mapped["small"]) / np.linalg.norm(mapped["small"])
        assert error < 0.05
    # What is common is the hidden space up to one rotation: distances are those of the hidden rows.
    centered = hidden - hidden.mean(axis=0)
    inner = mapped["wide"] @ mapped["wide"].T
    assert np.linalg.norm(inner - centered @ centered.T) / np.linalg.norm(centered @ centered.T) < 0.05
    scores = alignment.card.scores
    assert scores["image_to_text"] > 0.95
    assert scores["image_to_image"] > 0.95


@pytest.mark.integration
def test_joint_maps_find_it_and_widths_alone_do_not(planted: tuple[FeatureStore, np.ndarray], tmp_path: Path) -> None:
    store, _ = planted
    found = {
        "joint": fitted(store, tmp_path, "joint", settings={"steps": 30, "batch_size": 256}),
        "whitening": fitted(store, tmp_path, "whitening"),
        "autoencoder": fitted(store, tmp_path, "autoencoder", settings={"steps": 30, "batch_size": 256, "hidden": 32}),
    }
    recall = {name: alignment.card.scores["image_to_text"] for name, alignment in found.items()}
    assert recall["joint"] > 0.95
    assert recall["autoencoder"] < 0.2  # its objective never looks at two teachers at once
    assert recall["whitening"] < 0.5
    for alignment in found.values():
        assert load(tmp_path / f"{alignment.card.method}.safetensors").card == alignment.card


def test_phi_s_gives_every_channel_the_same_variance_and_keeps_distances(
    planted: tuple[FeatureStore, np.ndarray], tmp_path: Path
) -> None:
    store, _ = planted
    alignment = fitted(store, tmp_path, "whitening", dim=32)
    rows = AlignmentRows(store, AlignConfig(out=tmp_path, method={"none": {}}, unit_input=False))
    for slug in WIDTHS:
        block = rows.gather(rows.fit)[slug]
        image, text = (alignment(slug, tower, block.tower(tower)) for tower in ("image", "text"))
        variance = torch.cat([image, text]).double().square().mean(dim=0)
        torch.testing.assert_close(variance, torch.ones_like(variance), rtol=1e-4, atol=0)
        # A rotation and one factor: Gram matrices are proportional.
        raw = block.image.double() - block.image.double().mean(dim=0)
        ratio = torch.linalg.matrix_norm(image.double()) / torch.linalg.matrix_norm(raw)
        torch.testing.assert_close(image.double() @ image.double().T, ratio**2 * raw @ raw.T, rtol=1e-3, atol=1e-3)
    full = fitted(store, tmp_path, "whitening", dim=HIDDEN, settings={"kind": "full"})
    block = rows.gather(rows.fit)["wide"]
    both = torch.cat([full("wide", tower, block.tower(tower)) for tower in ("image", "text")]).double()
    torch.testing.assert_close(both.T @ both / len(both), torch.eye(HIDDEN, dtype=torch.float64), rtol=1e-3, atol=1e-3)


def test_pca_is_numpy_s_singular_value_decomposition(planted: tuple[FeatureStore, np.ndarray], tmp_path: Path) -> None:
    store, _ = planted
    alignment = fitted(store, tmp_path, "pca", dim=8)
    rows = AlignmentRows(store, AlignConfig(out=tmp_path, method={"none": {}}, unit_input=False))
    for slug in WIDTHS:
        image, text = (np.array(getattr(store, tower)(slug)[rows.fit], dtype=np.float64) for tower in ("image", "text"))
        both = np.concatenate([image - image.mean(axis=0), text - text.mean(axis=0)])
        right = np.linalg.svd(both, full_matrices=False)[2][:8]
        weight = alignment.teacher_map(slug).weight.double().numpy()
        np.testing.assert_allclose(np.abs((weight * right).sum(axis=1)), 1, atol=1e-5)
        np.testing.assert_allclose(alignment.teacher_map(slug).image_bias, -weight @ image.mean(axis=0), atol=1e-4)
    padded = fitted(store, tmp_path, "pca", dim=40)
    assert not padded.teacher_map("small").weight[16:].any()


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 24, 40, 48, 512, 768])
def test_hadamard_matrices(order: int) -> None:
    matrix = hadamard(order)
    assert torch.equal(matrix.abs(), torch.ones(order, order, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))
    with pytest.raises(ConfigError, match="none of order 28 is known"):
        hadamard(28)


def test_the_autoencoder_s_loss_and_gradient_by_hand() -> None:
    """The published description, written out once more in NumPy float64, one sample at a time."""
    torch.manual_seed(0)
    settings = AutoencoderSettings(hidden=7, dropout=0.2, noise=0.01)
    model = MultiTeacherAutoencoder({"a": 5, "b": 6}, 4, settings).double().eval()
    generator = torch.Generator().manual_seed(1)
    batch = {
        slug: TeacherRows(
            torch.arange(count),
            *(torch.randn(count, width, generator=generator, dtype=torch.float64) for _ in range(2)),
        )
        for slug, count, width in (("a", 3, 5), ("b", 2, 6))
    }
    weights = {name: value.detach().numpy().copy() for name, value in model.named_parameters()}

    def loss_of(p: dict[str, np.ndarray]) -> float:
        errors = []
        for index, slug in enumerate(("a", "b")):
            for tower in ("image", "text"):
                for x in batch[slug].tower(tower).numpy():
                    z = p[f"inputs.{index}.weight"] @ x + p[f"inputs.{index}.bias"]
                    # Both layers of an encoder end in ReLU, the last one of a decoder does not.
                    for name, is_last in (
                        ("encoders.{}.0", False),
                        ("encoders.{}.3", False),
                        ("decoders.{}.0", False),
                        ("decoders.{}.2", True),
                    ):
                        layer = name.format(tower)
                        z = p[f"{layer}.weight"] @ z + p[f"{layer}.bias"]
                        z = z if is_last else np.maximum(z, 0)
                    back = p[f"outputs.{index}.weight"] @ z + p[f"outputs.{index}.bias"]
                    errors.append(np.mean((back - x) ** 2))
        return float(np.mean(errors))

    loss = model.loss(batch)
    assert loss.item() == pytest.approx(loss_of(weights), abs=1e-9)
    loss.backward()
    for name, parameter in model.named_parameters():
        place = tuple(size // 2 for size in parameter.shape)
        step = np.zeros_like(weights[name])
        step[place] = 1e-6
        slope = (
            loss_of(weights | {name: weights[name] + step}) - loss_of(weights | {name: weights[name] - step})
        ) / 2e-6
        assert float(parameter.grad[place]) == pytest.approx(slope, abs=1e-6)
    model.train()
    assert settings.noise == AutoencoderSettings().noise == 0.01
    assert AutoencoderSettings().dropout == 0.2
    for tower in ("image", "text"):
        drops = [
            [type(layer) for layer in part[tower]].count(torch.nn.Dropout) for part in (model.encoders, model.decoders)
        ]
        assert drops == [2, 0]
    assert model.loss(batch).item() != loss.item()


def test_the_judge_s_numbers() -> None:
    rng = np.random.default_rng(0)
    base = torch.from_numpy(rng.normal(size=(60, 6)).astype(np.float32))
    unit = torch.nn.functional.normalize(base, dim=1)
    numbers = np.arange(60)
    assert recall_at_1(unit, unit, numbers) == 1.0
    assert recall_at_1(unit, unit.roll(1, 0), numbers) == 0.0
    assert recall_at_1(unit, unit.roll(1, 0), np.zeros(60)) == 1.0
    rotation = torch.from_numpy(np.linalg.qr(rng.normal(size=(6, 6)))[0].astype(np.float32))
    assert neighbor_overlap(base, base @ rotation) == 1.0
    other = torch.from_numpy(rng.normal(size=(60, 6)).astype(np.float32))
    assert neighbor_overlap(base, other) == pytest.approx(10 / 59, abs=0.06)
    spread = torch.eye(4).repeat(2, 1) * torch.tensor([1.0] * 4 + [-1.0] * 4)[:, None]
    assert effective_rank(spread) == pytest.approx(4.0)
    assert effective_rank(spread * torch.tensor([1.0, 0, 0, 0])) == pytest.approx(1.0)


def test_the_judge_never_sees_a_caption_that_was_fitted_on(
    planted: tuple[FeatureStore, np.ndarray], tmp_path: Path
) -> None:
    store, _ = planted
    rows = AlignmentRows(store, AlignConfig(out=tmp_path, method={"none": {}}, held_out=0.3))
    assert not set(rows.fit) & set(rows.judged)
    assert len(rows.fit) + len(rows.judged) == ROWS
    assert 0.2 < len(rows.judged) / ROWS < 0.4
    captions = np.array(store.sample_table(["caption"])["caption"].to_pylist())
    assert not set(captions[rows.fit]) & set(captions[rows.judged])


def test_selection_condition_and_teachers_decide_the_rows(
    planted: tuple[FeatureStore, np.ndarray], tmp_path: Path
) -> None:
    store, _ = planted
    if not (store.root / "selections").exists():
        rule = {"any": [{"home": {"column": "site", "teachers": {"big": ["s0"]}, "unlisted": "keep"}}]}
        select(store, "home", SelectionRule.model_validate({"keep": rule}))
    config = AlignConfig(
        out=tmp_path, method={"none": {}}, selection="home", where="site in ('s0', 's1')", teachers=("big", "wide")
    )
    rows = AlignmentRows(store, config)
    assert rows.slugs == ("big", "wide")
    everything = np.concatenate([rows.fit, rows.judged])
    assert set(everything % 3) == {0, 1}
    gathered = rows.gather(rows.fit[:50])
    assert np.array_equal(gathered["big"].members.numpy(), np.flatnonzero(rows.fit[:50] % 3 == 0))
    unit = gathered["big"].image.norm(dim=1)
    torch.testing.assert_close(unit, torch.ones_like(unit))


@pytest.mark.integration
@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bytes_and_the_store_is_not_touched(
    planted: tuple[FeatureStore, np.ndarray], tmp_path: Path, method: str
) -> None:
    store, _ = planted
    settings = {"steps": 4, "batch_size": 128} if method in ("joint", "autoencoder") else {}
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        fitted(store, tmp_path / name, method, settings=settings)
        files.append((tmp_path / name / f"{method}.safetensors").read_bytes())
    assert files[0] == files[1]
    assert verify(store.root).sound


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"method": {"pcaa": {}}}, "method.pcaa: unknown key; did you mean 'pca'"),
        ({"method": {}}, "has none, expected exactly one of none, pca"),
        ({"method": {"joint": {"step": 3}}}, "method.joint.step: unknown key; did you mean 'steps'"),
        ({"teachers": ["nobody"]}, "has no teacher 'nobody'"),
        ({"teachers": ["big", "big"]}, "teachers: big is named twice"),
        ({"selection": "nosuch"}, "has no selection 'nosuch'"),
        ({"where": "site = 's9'"}, "0 rows to fit on"),
        ({"where": "sit = 's1'"}, "did you mean 'site'"),
        ({"method": {"procrustes": {"reference": "x"}}}, "reference is 'x', the teachers are big, small, wide"),
        ({"method": {"whitening": {}}, "dim": 28}, "none of order 28 is known"),
        ({"held_out": 0.001}, "rows to judge by"),
        ({"out": "a.pt"}, r"expected a name that ends with \.safetensors"),
        ({"method": {"autoencoder": {"lr": 1e30, "steps": 3, "hidden": 4, "batch_size": 32}}}, "lower method lr"),
    ],
)
def test_what_a_user_can_get_wrong(
    planted: tuple[FeatureStore, np.ndarray], tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    content = {"out": "a.safetensors", "method": {"pca": {}}, "dim": 12} | change
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=complaint) as caught:
        align(planted[0], load_align(tmp_path / "run.yaml"))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_command(planted: tuple[FeatureStore, np.ndarray], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({"out": "p.safetensors", "method": {"procrustes": {}}, "dim": 12})
    )
    done = CliRunner().invoke(align_command, [str(planted[0].root), str(tmp_path / "run.yaml")])
    assert done.exit_code == 0, done.output
    for part in ("procrustes to width 12", "image of one teacher to text of another", "variance kept", "small"):
        assert part in done.output
    assert load(tmp_path / "p.safetensors").card.method == "procrustes"
    told = CliRunner().invoke(align_command, [str(planted[0].root), str(tmp_path / "run.yaml"), "--json"])
    assert AlignmentCard.model_validate_json(told.output) == load(tmp_path / "p.safetensors").card
    done = CliRunner().invoke(align_command, [str(planted[0].root), str(tmp_path / "nowhere.yaml")])
    assert isinstance(done.exception, MmkdError)


def test_full_whitening_scales_no_direction_below_the_floor(
    planted: tuple[FeatureStore, np.ndarray], tmp_path: Path
) -> None:
    store, _ = planted
    spreads = []
    for floor in (1e-4, 0.9):
        settings = {"kind": "full", "floor": floor}
        alignment = fitted(store, tmp_path, "whitening", settings=settings)
        values = torch.from_numpy(store.image("small")[:].astype("float32"))
        variance = alignment("small", "image", values).var(dim=0)
        spreads.append(float(variance.max() / variance.min()))
    assert spreads[0] < 2  # equal in every direction, up to what the text adds
    assert spreads[1] > 5  # all directions but the first keep their differences


def test_an_alignment_is_judged_on_as_many_rows_as_are_set(
    planted: tuple[FeatureStore, np.ndarray], tmp_path: Path
) -> None:
    store, _ = planted
    whole = fitted(store, tmp_path, "pca").card.scores["rows"]
    assert whole > 30
    assert fitted(store, tmp_path, "pca", judge_rows=30).card.scores["rows"] == 30

"""float16, float32 and int8: values there and back, what is missing, and everything that reads features reads int8."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny_store import make_card, make_store

from mmkd.cli.main import cli
from mmkd.store import FeatureStore
from mmkd.store.array import DecodedRows
from mmkd.store.encoding import cosine_error, decode_rows, encode_rows
from mmkd.store.fold import fold
from mmkd.store.layout import CODECS, ENCODINGS
from mmkd.store.writer import note_encoding_error

RELEASE = Path(__file__).resolve().parents[2] / "shared" / "data" / "mmkd_release"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureStore, dict[str, np.ndarray]]:
    """600 rows; alpha float16, beta int8 and gamma float32; the last shard of beta is not there."""
    root = tmp_path_factory.mktemp("mixed") / "store"
    cards = [make_card("alpha", 8), make_card("beta", 16).with_encoding("int8"), make_card("gamma", 5)]
    cards[2] = cards[2].with_encoding("float32")
    _, written = make_store(root, 600, cards)
    (root / "ledger/00002.beta.json").unlink()
    return FeatureStore.open(root), written


@given(
    arrays(np.float32, (6, 5), elements=st.floats(-(2.0**99), 2.0**99, width=32)),
    st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_int8_is_within_half_a_step_and_never_invents_a_row(values: np.ndarray, told: list[bool]) -> None:
    sound = np.array(told)
    stored, good = encode_rows(values, sound, "int8")
    codes, scale = stored
    decoded = decode_rows(stored)
    assert codes.dtype == np.int8
    assert not good[~sound].any()
    assert np.isnan(decoded[~good]).all()
    assert not codes[~good].any()
    peak = np.abs(values[good]).max(axis=1)
    assert (np.abs(codes[good]).max(axis=1) == 127).all()
    assert (np.abs(decoded[good] - values[good]) <= scale[good, None] * 0.5 + peak[:, None] * 1e-6).all()
    # What was left out could not be held: zero, or so small that its scale is no normal number.
    assert (np.abs(values[sound & ~good]).max(axis=1, initial=0) < 1.5e-36).all()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_missing_rows_and_rows_that_do_not_fit_read_as_nan(encoding: str) -> None:
    values = np.ones((5, 4), dtype=np.float32)
    values[1], values[2], values[3, 0] = 0, np.inf, np.nan
    stored, good = encode_rows(values, np.array([1, 1, 1, 1, 0], dtype=bool), encoding)
    assert good.tolist() == [True, False, False, False, False]
    assert np.isnan(decode_rows(stored)[1:]).all()
    assert (decode_rows(stored)[0] == 1).all()


def test_the_cosine_error_is_that_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    left = rng.normal(size=(50, 64)).astype(np.float32)
    right = left + rng.normal(size=left.shape).astype(np.float32) * 0.01
    sound = rng.random(50) < 0.5
    cosines = [
        np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b)) for a, b in zip(left[sound], right[sound], strict=True)
    ]
    told = cosine_error(left, right, sound)
    assert told.mean == pytest.approx(1 - np.mean(cosines), rel=0.01)
    assert told.worst == pytest.approx(1 - np.min(cosines), rel=0.01)
    assert cosine_error(left, right, np.zeros(50, dtype=bool)).worst == 0


def test_the_reader_decodes_rows_when_they_are_asked_for(mixed: tuple[FeatureStore, dict[str, np.ndarray]]) -> None:
    store, written = mixed
    image = store.image("beta")
    assert isinstance(image, DecodedRows)
    assert (image.shape, image.ndim, image.dtype, len(image)) == ((600, 16), 2, np.float32, 600)
    assert image.codes.dtype == np.int8
    assert not image.codes.flags.writeable
    fold(store)
    group = zarr.open_group(str(store.root), mode="r")["teachers/beta"]
    assert np.array_equal(image[:512], group["image"][:512] * group["image_scale"][:512][:, None])
    assert np.abs(image[:512] - written["beta/image"][:512]).max() < 4 / 127
    assert np.isnan(np.asarray(image)[512:]).all()
    assert np.array_equal(image[[511, 3]], image[:512][[511, 3]])
    assert image[5].shape == (16,)
    with pytest.raises(IndexError, match="takes rows only"):
        _ = image[:, 0]
    assert isinstance(store.image("alpha"), np.ndarray)
    assert np.array_equal(store.text("gamma"), written["gamma/text"])


def test_distillation_and_evaluation_take_int8(mixed: tuple[FeatureStore, dict[str, np.ndarray]]) -> None:
    torch = pytest.importorskip("torch")
    from mmkd.distill.teacher_features import TeacherFeatures
    from mmkd.evaluate.features import Features

    store, _ = mixed
    rows = np.array([500, 1, 599, 255, 256])
    teachers = TeacherFeatures(store, ["alpha", "beta"])
    for resident in (False, True):
        if resident:
            teachers.reside(torch.device("cpu"))
        alpha, beta = teachers.gather(rows)
        assert beta.present.tolist() == [[there] * 2 for there in (True, True, False, True, True)]
        assert beta.image.dtype == torch.float32
        assert np.array_equal(beta.image[beta.present[:, 0]].numpy(), store.image("beta")[rows[[0, 1, 3, 4]]])
        assert not beta.image[2].any()
        assert alpha.present.all()
    block = Features(store, "beta").texts(rows)
    assert block.available.tolist() == [True, True, False, True, True]
    assert np.allclose(np.linalg.norm(block.values[block.available], axis=1), 1)


@pytest.mark.parametrize("name", ["image", "image_scale", "text", "text_scale", "valid"])
def test_verify_finds_a_flipped_byte_in_every_array_of_int8(tmp_path: Path, name: str) -> None:
    make_store(tmp_path / "s", 300, [make_card("beta", 16).with_encoding("int8")])
    path = tmp_path / "s/teachers/beta" / name / "loose/00001"
    data = bytearray(path.read_bytes())
    data[7] ^= 4
    path.write_bytes(data)
    (problem,) = FeatureStore.open(tmp_path / "s").verify().problems
    assert f"teachers/beta/{name}/loose/00001" in problem


def test_verify_wants_the_members_of_the_encoding(tmp_path: Path) -> None:
    make_store(tmp_path / "s", 100, [make_card("alpha", 8), make_card("beta", 16).with_encoding("int8")])
    path = tmp_path / "s/ledger/00000.beta.json"
    entry = json.loads(path.read_text())
    del entry["image_error"]
    path.write_text(json.dumps(entry))
    (problem,) = FeatureStore.open(tmp_path / "s").verify().problems
    assert "members are not those of a shard of image and text in int8" in problem


def test_the_card_tells_the_error_once_all_shards_are_there(tmp_path: Path) -> None:
    root = tmp_path / "s"
    made, written = make_store(root, 600, [make_card("beta", 16).with_encoding("int8")])
    before = FeatureStore.open(root).card("beta")
    entry = (root / "ledger/00001.beta.json").rename(tmp_path / "aside")
    note_encoding_error(made, "beta")
    assert FeatureStore.open(root).card("beta") == before
    entry.rename(root / "ledger/00001.beta.json")
    note_encoding_error(made, "beta")
    store = FeatureStore.open(root)
    told = store.card("beta").encoding_error
    assert told is not None
    for tower in ("image", "text"):
        exact = cosine_error(
            written[f"beta/{tower}"], np.asarray(getattr(store, tower)("beta")), np.ones(600, dtype=bool)
        )
        assert told[tower].worst == exact.worst
        assert told[tower].mean == pytest.approx(exact.mean, rel=0.02)
    assert store.card("beta").digest == before.digest
    assert store.verify(deep=True).sound


def test_subset_changes_the_encoding(mixed: tuple[FeatureStore, dict[str, np.ndarray]], tmp_path: Path) -> None:
    store, _ = mixed
    words = ["store", "subset", str(store.root), str(tmp_path / "o"), "--encoding", "int8", "--allow-loss", "all"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    short = FeatureStore.open(tmp_path / "o")
    assert {card.encoding for card in short.teachers.values()} == {"int8"}
    assert np.array_equal(short.valid("alpha"), store.valid("alpha"))
    error = np.abs(short.image("gamma")[:] - store.image("gamma"))
    assert (error <= np.abs(store.image("gamma")).max(axis=1, keepdims=True) / 253).all()
    # Features that were int8 keep their codes and scales.
    assert np.array_equal(short.image("beta").codes, store.image("beta").codes)
    assert np.array_equal(short.image("beta").scales, store.image("beta").scales, equal_nan=True)
    assert short.card("gamma").encoding_error is not None
    assert short.verify(deep=True).sound


@pytest.mark.parametrize("codec", CODECS)
def test_an_archive_reads_back_equal_by_zarr(
    mixed: tuple[FeatureStore, dict[str, np.ndarray]], tmp_path: Path, codec: str
) -> None:
    store, _ = mixed
    arguments = ["store", "export", str(store.root), str(tmp_path / "a"), "--layout", "zarr", "--codec", codec]
    arguments += ["--allow-loss", "extraction"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    group = zarr.open_group(str(tmp_path / "a"), mode="r")
    for slug, card in store.teachers.items():
        assert group[f"teachers/{slug}"].attrs["mmkd_archive"]["card"]["digest"] == card.digest
        assert np.array_equal(group[f"teachers/{slug}/valid"][:], store.valid(slug))
        for tower in ("image", "text"):
            values = group[f"teachers/{slug}/{tower}"][:]
            if card.encoding == "int8":
                values = values * group[f"teachers/{slug}/{tower}_scale"][:][:, None]
            assert np.array_equal(values, np.asarray(getattr(store, tower)(slug)), equal_nan=True)
    for part in (Path(str(store.root)) / "samples").iterdir():
        assert (tmp_path / "a/samples" / part.name).read_bytes() == part.read_bytes()
    assert codec in json.dumps(group["teachers/alpha/image"].metadata.to_dict()["codecs"], default=str)


def test_an_archive_may_round_and_says_what_it_cost(
    mixed: tuple[FeatureStore, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    store, _ = mixed
    arguments = ["store", "export", str(store.root), str(tmp_path / "a"), "--layout", "zarr", "--codec", "blosc"]
    done = CliRunner().invoke(cli, [*arguments, "--allow-loss", "extraction", "--keep-bits", "5"])
    assert done.exit_code == 0, done.output
    group = zarr.open_group(str(tmp_path / "a"), mode="r")
    errors: list[np.ndarray] = []
    for slug, card in store.teachers.items():
        assert np.array_equal(group[f"teachers/{slug}/valid"][:], store.valid(slug))
        for tower in ("image", "text"):
            found = group[f"teachers/{slug}/{tower}"]
            assert found.shards == (256 * 32, card.dim)  # one file
            if card.encoding == "int8":  # codes and scales are never rounded
                scales = group[f"teachers/{slug}/{tower}_scale"][:]
                assert np.array_equal(found[:] * scales[:, None], store.features(slug, tower)[:], equal_nan=True)
                continue
            exact = np.asarray(store.features(slug, tower))
            mantissa, exponent = np.frexp(exact.astype(np.float64))
            expected = np.ldexp(np.rint(mantissa * 64) / 64, exponent)  # the leading bit and five more, ties to even
            usual = ~(np.abs(exact) < np.finfo(np.float16).tiny)  # subnormal numbers have fewer bits
            assert np.array_equal(found[:][usual], expected.astype(exact.dtype)[usual], equal_nan=True)
            sound = ~np.isnan(exact[:, 0])
            left, right = exact[sound].astype(np.float64), found[:][sound].astype(np.float64)
            norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
            errors.append(1 - (left * right).sum(axis=1) / norms)
    every = np.concatenate(errors)
    error = group.attrs["mmkd_archive"]["error"]
    assert error["worst"] == pytest.approx(every.max(), rel=5e-3)
    assert error["mean"] == pytest.approx(every.mean(), rel=1e-2)
    assert 1e-5 < error["mean"] < error["worst"] < 1e-4
    assert f"rounded (1 - cosine: mean {error['mean']:.1e}, worst {error['worst']:.1e})" in done.output


def test_rounding_needs_an_archive(tmp_path: Path) -> None:
    make_store(tmp_path / "s", 3, [make_card("alpha", 8)])
    refused = CliRunner().invoke(
        cli, ["store", "export", str(tmp_path / "s"), str(tmp_path / "a"), "--layout", "npy", "--keep-bits", "5"]
    )
    assert str(refused.exception) == "--keep-bits belongs to --layout zarr"


def test_an_archive_is_made_of_checked_chunks_only(tmp_path: Path) -> None:
    make_store(tmp_path / "s", 300, [make_card("alpha", 8)])
    path = tmp_path / "s/teachers/alpha/image/loose/00000"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    done = CliRunner().invoke(
        cli, ["store", "export", str(tmp_path / "s"), str(tmp_path / "a"), "--layout", "zarr", "--codec", "zstd"]
    )
    assert "teachers/alpha/image/loose/00000 has CRC32C" in str(done.exception)
    done = CliRunner().invoke(cli, ["store", "export", str(tmp_path / "s"), str(tmp_path / "b"), "--layout", "zarr"])
    assert "belong together" in str(done.exception)


def test_int8_of_the_original_release_keeps_directions(tmp_path: Path) -> None:
    if not RELEASE.is_dir():
        pytest.skip("the original release's samples are not here")
    done = CliRunner().invoke(cli, ["store", "import", str(RELEASE), str(tmp_path / "s"), "--encoding", "int8"])
    assert done.exit_code == 0, done.output
    store = FeatureStore.open(tmp_path / "s")
    worst = max(card.encoding_error[tower].worst for card in store.teachers.values() for tower in ("image", "text"))
    assert 0 < worst < 2e-3
    assert store.verify(deep=True).sound

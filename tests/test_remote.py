"""Stores behind URLs: a real S3 server and a real web server on loopback give what the disk gives."""

from __future__ import annotations

import http.server
import pickle
import threading
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.dataset as pads
import pytest
from click.testing import CliRunner
from tiny_store import make_card, make_store
from web_ranges import Ranges

from mmkd.base.errors import CorruptStoreError, NotAStoreError, UnreachableError, UserError
from mmkd.base.files import create_atomically, write_atomically
from mmkd.base.places.connection import server
from mmkd.base.places.remote import RemotePath, as_root
from mmkd.cli.main import cli
from mmkd.extract.corpora import open_corpus
from mmkd.store import FeatureStore, MmkdError
from mmkd.store.fold import fold
from mmkd.store.verify import verify

CARDS = [make_card("alpha", 8), make_card("beta", 16).with_encoding("int8"), make_card("gamma", 5)]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    root = tmp_path_factory.mktemp("local") / "store"
    fold(make_store(root, 600, CARDS)[0])
    return FeatureStore.open(root)


@pytest.fixture(scope="module")
def web(local: FeatureStore) -> Iterator[str]:
    handler = partial(Ranges, directory=str(Path(str(local.root)).parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/store"
        httpd.shutdown()


@pytest.fixture(scope="module")
def copied(local: FeatureStore, s3_server: str) -> str:
    """The local store's files, put object by object."""
    root = as_root("s3://shared/copied/store")
    for path in Path(str(local.root)).rglob("*"):
        if path.is_file():
            write_atomically(root / path.relative_to(str(local.root)).as_posix(), path.read_bytes())
    return str(root)


@pytest.fixture(params=["s3", "http", "memory"])
def remote(request: pytest.FixtureRequest, local: FeatureStore) -> FeatureStore:
    """The same store behind three kinds of URL."""
    if request.param == "memory":
        root = as_root("memory://remote/store")
        if not root.exists():
            make_store(root, 600, CARDS)
        return FeatureStore.open("memory://remote/store")
    return FeatureStore.open(request.getfixturevalue("copied" if request.param == "s3" else "web"))


@pytest.mark.parametrize("slug", ["alpha", "beta", "gamma"])
def test_a_url_gives_the_values_of_the_disk(local: FeatureStore, remote: FeatureStore, slug: str) -> None:
    rng = np.random.default_rng(0)
    mask = rng.random(600) < 0.1
    for tower in ("image", "text"):
        there, here = getattr(remote, tower)(slug), np.asarray(getattr(local, tower)(slug))
        assert (there.shape, there.dtype, len(there)) == (here.shape, here.dtype, 600)
        for rows in (
            slice(250, 300),
            599,
            -1,
            rng.integers(0, 600, 40),
            rng.integers(-600, 0, 9),
            mask,
            slice(0),
            rng.integers(0, 600, (3, 4)),
        ):
            assert np.array_equal(there[rows], here[rows], equal_nan=True)
        assert np.array_equal(np.asarray(there), here, equal_nan=True)
        with pytest.raises(IndexError):
            _ = there[600]
    assert np.array_equal(remote.valid(slug), local.valid(slug))


def test_a_url_gives_rows_ledger_summary_and_verdict(local: FeatureStore, remote: FeatureStore) -> None:
    assert remote.sample_table().equals(local.sample_table())
    only = remote.sample_table(["key"], filter=pads.field("site") == "s1")
    assert only.equals(local.sample_table(["key"], filter=pads.field("site") == "s1"))
    assert remote.ledger == local.ledger
    assert np.array_equal(remote.available(), local.available())
    here, there = local.summary(), remote.summary()
    assert (there.teachers, there.status, there.sample_bytes) == (here.teachers, here.status, here.sample_bytes)
    report = remote.verify(deep=True)
    assert report.sound
    assert (report.entries, report.orphans) == (9, ())


def test_zarr_opens_the_same_url(copied: str, local: FeatureStore) -> None:
    import zarr
    from obstore.store import from_url

    place = from_url(copied, client_options={"allow_http": True})
    group = zarr.open_group(zarr.storage.ObjectStore(place, read_only=True), mode="r")
    assert np.array_equal(group["teachers/alpha/image"][:], local.image("alpha"))
    decoded = group["teachers/beta/text"][:] * group["teachers/beta/text_scale"][:][:, None]
    assert np.array_equal(decoded, np.asarray(local.text("beta")))


def test_info_and_verify_take_urls(copied: str) -> None:
    done = CliRunner().invoke(cli, ["store", "info", copied])
    assert done.exit_code == 0
    assert "600 rows" in done.output or "rows      600" in done.output
    done = CliRunner().invoke(cli, ["store", "verify", copied, "--deep"])
    assert (done.exit_code, done.output.startswith("sound")) == (0, True)


@pytest.mark.parametrize(
    ("url", "error", "words"),
    [
        ("s3://no-such-bucket/store", UnreachableError, "bucket does not exist"),
        ("s3://shared/no/such/store", NotAStoreError, "does not exist"),
        ("http://127.0.0.1:9/store", UnreachableError, "check the URL"),
        ("gopher://host/store", UserError, "is not a URL that mmkd can read"),
        ("s3://", UserError, "is not a URL that mmkd can read"),
    ],
)
def test_a_url_that_leads_nowhere_is_one_line(s3_server: str, url: str, error: type[MmkdError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        FeatureStore.open(url)
    assert url.rstrip("/") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refused_credentials_are_one_line(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # moto grants everything unless it is told to look; a server that refuses is enough for our side of it.
    class Refuses(Ranges):
        def do_HEAD(self) -> None:  # noqa: N802 - the name that http.server calls
            self.send_error(403)

        do_GET = do_PUT = do_HEAD  # noqa: N815

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{httpd.server_port}")
        with pytest.raises(UnreachableError, match=r"refused by its server \(403 Forbidden.*credentials"):
            FeatureStore.open("s3://refusing-bucket/store")
        with pytest.raises(UnreachableError, match="refused"):
            write_atomically(as_root("s3://refusing-bucket/store/x"), b"x")
        httpd.shutdown()


def test_a_network_fault_is_no_corruption(s3_server: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`verify --repair` must not drop entries because a server was away for a moment."""
    root = as_root(bucket.replace("shared", "away"))
    urllib.request.urlopen(urllib.request.Request(f"{s3_server}/away", method="PUT")).close()
    make_store(root, 300, CARDS[:1])
    proxy = server(root.origin)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    server.cache_clear()
    with pytest.raises(UnreachableError):
        verify(root)
    assert proxy is not server(root.origin)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    server.cache_clear()
    assert verify(root).sound


def test_a_web_server_is_not_written(web: str) -> None:
    with pytest.raises(UnreachableError, match=r"cannot be used|refused"):
        write_atomically(as_root(f"{web}/x"), b"x")


def test_create_keeps_what_is_there(bucket: str) -> None:
    path = as_root(bucket) / "card"
    assert create_atomically(path, b"first")
    assert not create_atomically(path, b"second")
    assert path.read_bytes() == b"first"
    path.unlink()
    assert not path.is_file()
    path.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        path.unlink()


@pytest.mark.parametrize(("damage", "words"), [("flip", "CRC32C"), ("cut", "bytes, expected"), ("drop", "missing")])
def test_a_damaged_object_is_named(local: FeatureStore, bucket: str, damage: str, words: str) -> None:
    root = as_root(bucket)
    make_store(root, 300, CARDS[:1])
    path = root / "teachers/alpha/image/loose/00001"
    data = path.read_bytes()
    if damage == "drop":
        path.unlink()
    else:
        write_atomically(path, data[:-7] if damage == "cut" else bytes([data[0] ^ 1]) + data[1:])
    store = FeatureStore.open(bucket)
    assert np.isfinite(store.image("alpha")[:256]).all()
    with pytest.raises(CorruptStoreError, match=f"teachers/alpha/image/loose/00001.*{words}"):
        _ = store.image("alpha")[256:]
    (problem,) = store.verify().problems
    assert "shard 1 of alpha" in problem
    done = CliRunner().invoke(cli, ["store", "verify", bucket, "--repair"])
    assert (done.exit_code, "dropped ledger/00001.alpha.json" in done.output) == (0, True)
    assert np.isnan(FeatureStore.open(bucket).image("alpha")[256:]).all()


def test_a_path_behaves_like_one_and_can_be_sent(bucket: str) -> None:
    root = as_root(bucket)
    assert isinstance(root, RemotePath)
    assert str(root / "a" / "b.json") == f"{bucket}/a/b.json"
    assert (root / "a/b.json").name == "b.json"
    assert (root / "a/b.json").parent == root / "a"
    assert pickle.loads(pickle.dumps(root / "x")) == root / "x"
    for name in ("a/b.json", "a/c/d.json", "e"):
        write_atomically(root / name, name.encode())
    assert sorted(path.name for path in root.iterdir()) == ["a", "e"]
    assert [str(path) for path in (root / "a").glob("*.json")] == [f"{bucket}/a/b.json"]
    assert sorted(path.name for path in root.rglob("*.json")) == ["b.json", "d.json"]
    assert ((root / "a").is_dir(), (root / "a").is_file(), (root / "f").exists()) == (True, False, False)
    assert as_root("file:///some/where") == Path("/some/where")
    assert as_root("C:\\x") == Path("C:\\x")
    assert server(root.origin) is server(root.origin)


@pytest.mark.parametrize(("code", "target"), [(302, "/further{}"), (301, "{}")])
def test_a_server_that_redirects_in_a_circle_is_one_line(code: int, target: str) -> None:
    class Redirects(Ranges):
        def do_HEAD(self) -> None:  # noqa: N802 - the name that http.server calls
            self.send_response(code)
            self.send_header("Location", target.format(self.path))
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD  # noqa: N815

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Redirects) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{httpd.server_port}"
        for use in (lambda: FeatureStore.open(f"{url}/store"), lambda: open_corpus(f"{url}/a.tar")):
            with pytest.raises(MmkdError, match=rf"{url}/\S+ is redirected by its server to nowhere") as caught:
                use()
            assert "Generic" not in str(caught.value)
            assert "\n" not in str(caught.value)
        httpd.shutdown()

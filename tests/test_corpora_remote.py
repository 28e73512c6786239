"""Corpora behind URLs: a real S3 server and a real web server, both on loopback."""

from __future__ import annotations

import functools
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_corpus import png, write_table_corpus, write_tar_corpus
from web_ranges import Ranges

from mmkd.base.errors import CorpusError, UserError
from mmkd.base.images.source import ImageError
from mmkd.base.images.uri import image_source
from mmkd.base.places import connection
from mmkd.base.places.reading import join
from mmkd.base.places.remote import as_root
from mmkd.extract.corpora import corpus_rows, open_corpus
from mmkd.extract.decoding import decode_image, read_image
from mmkd.extract.index import check_same_corpus, create_indexed_store
from mmkd.store import FeatureStore

pytest.importorskip("obstore", reason="the extra remote is not installed")
moto_server = pytest.importorskip("moto.server", reason="moto's S3 server is not installed")


@pytest.fixture(scope="module")
def bucket() -> Iterator[SimpleNamespace]:
    """An S3 server with a bucket; `put(folder, prefix)` uploads."""
    import boto3

    server = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }
    before = dict(os.environ)
    os.environ.update(settings)
    connection.server.cache_clear()  # other tests use other servers of the same names
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    client.create_bucket(Bucket="corpora")

    def put(folder: Path, prefix: str) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), "corpora", f"{prefix}/{path.relative_to(folder).as_posix()}")

    yield SimpleNamespace(put=put, client=client)
    os.environ.clear()
    os.environ.update(before)
    connection.server.cache_clear()
    server.stop()


def test_tars_on_s3_give_the_rows_and_images_of_local_ones(tmp_path: Path, bucket: SimpleNamespace) -> None:
    folder = write_tar_corpus(tmp_path / "tars", 7, per_tar=3)
    bucket.put(folder, "a/tars")
    local, remote = open_corpus(str(folder)), open_corpus("s3://corpora/a/tars")
    assert list(corpus_rows(remote)) == list(corpus_rows(local))
    store = create_indexed_store(remote, tmp_path / "s")
    assert store.record.corpus.root == "s3://corpora/a/tars"
    for number, row in enumerate(FeatureStore.open(tmp_path / "s").sample_table().to_pylist()):
        source = image_source(store.record.corpus.root, row["uri"], row["offset"], row["length"])
        assert source.read() == png(number)
    check_same_corpus(open_corpus("s3://corpora/a/tars"), store)
    # The same size, other bytes: the service's tag tells.
    changed = bytearray((folder / "00001.tar").read_bytes())
    changed[600] ^= 1
    bucket.client.put_object(Bucket="corpora", Key="a/tars/00001.tar", Body=bytes(changed))
    with pytest.raises(CorpusError, match=r"00001\.tar was written again"):
        check_same_corpus(open_corpus("s3://corpora/a/tars"), store)


def test_parquet_and_tables_on_s3(tmp_path: Path, bucket: SimpleNamespace) -> None:
    pq.write_table(pa.table({"image": [png(i) for i in range(5)], "text": ["t"] * 5}), tmp_path / "p.parquet")
    bucket.client.upload_file(str(tmp_path / "p.parquet"), "corpora", "b/p.parquet")
    corpus = open_corpus("s3://corpora/b/p.parquet")
    rows = list(corpus_rows(corpus))
    assert [image_source(corpus.root, row.uri or "").read() for row in rows] == [png(i) for i in range(5)]
    write_table_corpus(tmp_path / "c", 3)
    bucket.put(tmp_path / "c", "c")
    corpus = open_corpus("s3://corpora/c")
    rows = list(corpus_rows(corpus))
    assert [row.uri for row in rows] == ["images/0.png", "images/1.png", "images/2.png"]
    assert image_source(corpus.root, "images/2.png").read() == png(2)
    bucket.client.delete_object(Bucket="corpora", Key="c/images/2.png")
    assert decode_image(*read_image(image_source(corpus.root, "images/2.png")), ()).reason == "image: file not found"
    # A local table may name pictures on a server.
    (tmp_path / "corpus.yaml").write_text("kind: table\npath: c/pairs.csv\nimages: s3://corpora/c\n")
    corpus = open_corpus(str(tmp_path / "corpus.yaml"))
    assert image_source(corpus.root, next(corpus_rows(corpus)).uri or "").read() == png(0)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The address of a server of tmp_path."""
    handler = functools.partial(Ranges, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_tar_on_a_web_server(tmp_path: Path, web: str) -> None:
    folder = write_tar_corpus(tmp_path / "tars", 3, per_tar=3)
    corpus = open_corpus(f"{web}/tars/00000.tar")
    rows = list(corpus_rows(corpus))
    assert rows == list(corpus_rows(open_corpus(str(folder))))
    assert image_source(corpus.root, rows[2].uri or "", rows[2].offset, rows[2].length).read() == png(2)
    with pytest.raises(CorpusError, match=r"does not exist|cannot be read"):
        open_corpus(f"{web}/tars/00009.tar")


def test_file_urls_are_paths(tmp_path: Path) -> None:
    folder = write_tar_corpus(tmp_path / "tars", 3, per_tar=3)
    assert list(corpus_rows(open_corpus(f"file://{folder}"))) == list(corpus_rows(open_corpus(str(folder))))


def test_urls_that_lead_nowhere(bucket: SimpleNamespace) -> None:
    with pytest.raises(UserError, match=r"gopher://example.org/a.tar is not a URL") as caught:
        open_corpus("gopher://example.org/a.tar")
    assert "\n" not in str(caught.value)
    with pytest.raises(CorpusError, match="does not exist"):
        open_corpus("s3://corpora/nothing-here")
    with pytest.raises(CorpusError, match=r"cannot be read|does not exist") as caught:
        open_corpus("s3://no-such-bucket/x.tar")
    assert "\n" not in str(caught.value)
    with pytest.raises(ImageError, match="leaves the corpus folder"):
        image_source("s3://corpora/c", "../a/tars/00000.tar").read()
    assert str(join(as_root("s3://corpora/c"), "d.tar")) == "s3://corpora/c/d.tar"

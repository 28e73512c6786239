"""Fixtures that several test files share."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import urllib.request
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from gappy_store import gappy  # noqa: F401 - a fixture
from hypothesis import settings
from tiny_store import make_card, make_store

if TYPE_CHECKING:  # what needs more than the core is imported by the fixture that needs it
    from extract_scene import Scene

# A machine that is busy proves nothing about the code; pytest-timeout ends what hangs.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What collecting imports stays for good: looking for garbage in it takes half of the time of collecting, and then
    0.4 s in every `gc.collect` of a library and of a forked process."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def disks_are_not_waited_for() -> Iterator[None]:
    """No test cuts the power. The 24,000 `fsync` of the store's tests took a third of their time. What is written when
    is seen in test_atomic.py, and what an error of `fsync` costs in test_store_properties.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """2048 rows, a tiny teacher, and the store that a run in this process makes of them."""
    from extract_scene import ROWS, Scene
    from in_process import load, run
    from tiny_corpus import write_table_corpus
    from tiny_teachers import write_tiny_teacher

    from mmkd.store.fold import fold
    from mmkd.store.record import Store

    root = tmp_path_factory.mktemp("scene")
    table = write_table_corpus(root / "corpus", ROWS)
    made = Scene(table, write_tiny_teacher(root / "teacher", seed=1, embed_dim=1024), root / "store")
    run(table, made.store, load({"tiny": made.teacher}, "tiny"))
    fold(Store.open(made.store))
    return made


@pytest.fixture
def small_store(tmp_path: Path) -> Path:
    """600 rows in three shards of 256, two teachers of widths 8 and 16."""
    root = tmp_path / "store"
    make_store(root, 600, [make_card("alpha", 8), make_card("beta", 16)])
    return root


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """An S3 server on loopback with a bucket `shared`; the environment names it, as a user would. Gives its address."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        request = urllib.request.Request(f"http://{host}:{port}/shared", method="PUT")
        urllib.request.urlopen(request).close()
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, request: pytest.FixtureRequest) -> str:
    """A URL of its own for each test."""
    return f"s3://shared/{request.node.name}"


@pytest.fixture(scope="session")
def training_scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to train in; see `tiny_run.write_scene`. Shared: do not change what is in it, copy it."""
    from tiny_run import write_scene

    return write_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="session")
def rich_scene(training_scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to train in with the store `rich`; see `rich_scene.write_rich_store`. Shared, as `training_scene`."""
    from rich_scene import write_rich_store

    root = tmp_path_factory.mktemp("rich")
    write_rich_store(root)
    shutil.copy(training_scene / "tiny-student.json", root)
    return root


@pytest.fixture(params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["one rank", "two ranks"])
def ranks(request: pytest.FixtureRequest) -> int:
    """Processes of a training run, for `tiny_run.in_ranks`: what is said of one holds of two (slow; the quick tests see
    fourteen run files on both, test_distill_one_and_two.py)."""
    number: int = request.param
    return number


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium. Closed with the file: while Playwright is open no other event loop can run."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield launched
        launched.close()

"""Random damage to what a user writes or copies: each file is read, or refused in one line; nothing else happens."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_corpus import png
from tiny_store import every_file, make_card, make_store

from mmkd.base.errors import MmkdError
from mmkd.distill.alignment.config import load_align
from mmkd.distill.config import load_run
from mmkd.evaluate.suite import load_suite
from mmkd.extract.cluster_config import load_cluster
from mmkd.extract.corpora import open_corpus
from mmkd.extract.index import list_corpus
from mmkd.extract.teachers import parse_teachers
from mmkd.store import FeatureStore
from mmkd.store.selection.rule import load_rule

EXAMPLES = int(os.environ.get("MMKD_FUZZ_EXAMPLES", "8"))
"""Of each test; `make fuzz` takes 400, and as many of the tests that count the inputs of random corpora."""
WORDS = st.one_of(
    st.sampled_from(
        ["", " ", "image", "task", "none", "all", "${data}", "~", "../x", "/", "a,b", "x = 1", "nan", "\x00", "é"]
    ),
    st.text(max_size=6),
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.integers(), st.floats(), st.dates(), st.binary(max_size=3), WORDS
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3), max_leaves=5
)
CONFIGURATIONS = {
    "run": """
        {store: features, out: runs/a, preset: distil, epochs: 2, where: "site = 's0'", batch_size: 24,
        student: {model: ViT-B-32, pretrained: {image: a.pt}, lock: {image: 1}, preprocess: {mean: [0, 0, 0]}},
        optimizer: {lr: 0.001, warmup: 0.25, betas: [0.9, 0.98]}, loss: {task: 1, feature: 2, cross: 1},
        data: {workers: 0, crop_scale: [0.8, 1]}, checkpoints: {every_steps: 100}, logging: {every_steps: 1},
        monitor: {every_steps: 4, sets: [{name: a, where: x = 1, label: organ, prompts: prompts}]}}
    """,
    "alignment": """
        {out: heads, method: {autoencoder: {hidden: 32, steps: 5, dropout: 0.1}}, dim: 16, teachers: [a, b],
        where: "site = 's0'", held_out: 0.2, seed: 1}
    """,
    "rule": """
        {keep: {all: [{cosine: {quantile: 0.5}}, {home: {teachers: {a: [CT]}, unlisted: drop}}, {not: {where: x = 1}},
        {teachers: {of: {rank: {at_most: 3, among: 10}}, at_least: 1, at_most: 2, by: {cosine: {}}}}]}, seed: 1}
    """,
    "suite": """
        {suite: mine, version: 1, store: stores/a, measures: {calibration: {}}, ensembles: {both: [a, b]},
        settings: {linear_probe: {fractions: [0.1, 1.0], seeds: 3}}, datasets: [{dataset: one, role: report,
        group: patient, about: {licence: CC0, expected: {train: 3}, layout: confirmed, evidence: "https://a.org"},
        rows: {train: {split: train}, test: {split: test}}, label: organ, classes: {a: [x, y], b: z},
        tasks: [zero_shot, linear_probe], prompts: {rows: {split: prompt}}}]}
    """,
    "cluster": """
        {scheduler: slurm, workers: 4, jobqueue: {slurm: {queue: gpu, cores: 8, memory: 64GB}},
        distributed: {comm: {timeouts: {connect: 30s}}}, worker: {autocast: false, batch_rows: 8}}
    """,
    "corpus": "{kind: table, path: a.csv, captions: each}",
    "evaluation set": """
        {dataset: one, modality: CT, source: {kind: table, path: a.csv, draw: {train: 0.5, test: 0.5, seed: 0},
        join: {table: b.csv, match: file, key: file}}, label: organ, prompts: {file: p.yaml}}
    """,
    "teacher": """
        {slug: mine, source: "local-dir:a", loader: open_clip, weights: [a.pt], context_length: 77,
        preprocessing: {image_size: [224, 224], mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}, precision: fp32}
    """,
}
READERS: dict[str, Callable[[Path], object]] = {
    "run": load_run,
    "alignment": load_align,
    "rule": load_rule,
    "suite": load_suite,
    "cluster": lambda path: load_cluster(str(path)),
    "corpus": lambda path: open_corpus(str(path)),
    "evaluation set": lambda path: open_corpus(str(path)),
    "teacher": lambda path: parse_teachers(str(path)),
}


INSERTED = st.one_of(
    st.binary(max_size=8), st.sampled_from([b"\t", b": ", b"- ", b"{", b"&a *a", b"!!python/name:x ", b", ", b"? "])
)


def containers(content: Any) -> list[Any]:
    """Every mapping and list within `content`, itself first."""
    inner = content.values() if isinstance(content, dict) else content if isinstance(content, list) else []
    return [
        one
        for one in (content, *(each for item in inner for each in containers(item)))
        if isinstance(one, (dict, list)) and one
    ]


def change(data: st.DataObject, content: dict[str, Any]) -> None:
    """Replace, remove, add or swap one value anywhere."""
    place = data.draw(st.sampled_from(containers(content) or [{"": 0}]))  # nothing may be left to change
    key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
    match data.draw(st.sampled_from(["replace", "remove", "add", "wrap"])):
        case "replace":
            place[key] = data.draw(VALUES)
        case "remove":
            del place[key]
        case "wrap":
            place[key] = data.draw(st.sampled_from([[place[key]], {str(key): place[key]}, str(place[key])]))
        case "add" if isinstance(place, dict):
            place[data.draw(SCALARS)] = data.draw(VALUES)
        case "add":
            place.append(data.draw(VALUES))


def read_or_refused(read: Callable[[], object]) -> MmkdError | None:
    """Return the error, of one line, or None; any other exception passes."""
    try:
        read()
    except MmkdError as error:
        text = str(error)
        assert text.strip()
        assert len(text.splitlines()) == 1
        return error
    return None


def beside(path: Path) -> None:
    """Write the files that the sound configurations name."""
    path.with_name("a.csv").write_text("image,caption,id,organ\na.png,one,1,x\nb.png,two,2,y\n")
    path.with_name("b.csv").write_text("id,file,site\n1,a.png,s\n2,b.png,t\n")
    path.with_name("p.yaml").write_text("{templates: ['{}'], classes: {x: [an x], y: [a y]}}")


@pytest.mark.parametrize("kind", READERS)
def test_the_configurations_are_sound_before_the_damage(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    beside(path)
    path.write_text(CONFIGURATIONS[kind])
    READERS[kind](path)


@pytest.mark.parametrize("kind", READERS)
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_configuration_is_read_or_refused(kind: str, data: st.DataObject) -> None:
    content = yaml.safe_load(CONFIGURATIONS[kind])
    for _ in range(data.draw(st.integers(1, 3))):
        change(data, content)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.yaml")
        beside(path)
        path.write_text(yaml.safe_dump(content, allow_unicode=True))
        read_or_refused(lambda: READERS[kind](path))


@pytest.mark.parametrize("kind", READERS)
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_configuration_of_damaged_text_is_read_or_refused(kind: str, data: st.DataObject) -> None:
    text = CONFIGURATIONS[kind].encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.yaml")
        beside(path)
        path.write_bytes(damaged(data, text))
        read_or_refused(lambda: READERS[kind](path))


def damaged(data: st.DataObject, content: bytes) -> bytes:
    """Cut, overwrite, insert or repeat somewhere."""
    start = data.draw(st.integers(0, len(content)))
    end = min(start + data.draw(st.integers(1, 40)), len(content))
    match data.draw(st.sampled_from(["cut", "overwrite", "insert", "drop", "repeat"])):
        case "cut":
            return content[:start]
        case "overwrite":
            return content[:start] + data.draw(st.binary(min_size=end - start, max_size=end - start)) + content[end:]
        case "insert":
            return (
                content[:start]
                + data.draw(
                    st.one_of(
                        st.binary(max_size=8),
                        st.sampled_from([b"\t", b": ", b"- ", b"{", b"&a *a", b"!!python/name:x "]),
                    )
                )
                + content[start:]
            )
        case "drop":
            return content[:start] + content[end:]
        case _:
            return content[:end] + content[start:end] * 3 + content[end:]


@pytest.fixture(scope="module")
def sound_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows of two teachers."""
    root = tmp_path_factory.mktemp("fuzz") / "store"
    make_store(root, 40, [make_card("a", 4), make_card("b", 6)])
    return root


def everything(root: Path) -> dict[str, Any]:
    """All that a reader gives of a store."""
    store = FeatureStore.open(root)
    found: dict[str, Any] = {"rows": len(store), "samples": store.sample_table().to_pylist()}
    found["available"] = store.available().tolist()
    for slug in sorted(store.teachers):
        for tower in store.card(slug).towers:
            found[f"{slug} {tower}"] = np.asarray(store.features(slug, tower)[:]).tobytes()
    return found


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_store_is_refused_found_or_whole(sound_store: Path, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "store")
        shutil.copytree(sound_store, root)
        files = every_file(root)
        for _ in range(data.draw(st.integers(1, 3))):
            path = root / data.draw(st.sampled_from([file.relative_to(root) for file in files]))
            match data.draw(st.sampled_from(["bytes", "remove", "other"])):
                case "bytes" if path.exists():
                    path.write_bytes(damaged(data, path.read_bytes()))
                case "remove":
                    path.unlink(missing_ok=True)
                case "other":
                    other = data.draw(st.sampled_from(files))
                    shutil.copy(sound_store / other.relative_to(root), path)
        same = []
        refused = read_or_refused(lambda: same.append(everything(root) == everything(sound_store)))
        sound = []
        unread = read_or_refused(lambda: sound.append(FeatureStore.open(root).verify(deep=True).sound))
        claimed = read_or_refused(lambda: sound.append(FeatureStore.open(root).summary().complete))
        if refused or not same[0]:
            assert unread or claimed or not all(sound), "wrong values of a store that calls itself sound and complete"


@pytest.mark.parametrize("kind", ["tar", "parquet", "csv", "jsonl"])
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_damaged_corpus_is_listed_or_refused(kind: str, data: st.DataObject) -> None:
    rows = [{"image": png(0), "caption": "one"}, {"image": png(1), "caption": "two, \u00e9"}]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a.{kind}")
        if kind == "tar":
            with tarfile.open(path, "w") as tar:
                for i, row in enumerate(rows):
                    for suffix, content in (("png", row["image"]), ("txt", str(row["caption"]).encode())):
                        info = tarfile.TarInfo(f"{i}.{suffix}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
        elif kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            lines = [{"image": f"{i}.png", "caption": row["caption"]} for i, row in enumerate(rows)]
            table = "image,caption\n" + "".join(f'{line["image"]},"{line["caption"]}"\n' for line in lines)
            path.write_text(table if kind == "csv" else "".join(json.dumps(line) + "\n" for line in lines))
        for _ in range(data.draw(st.integers(1, 3))):
            path.write_bytes(damaged(data, path.read_bytes()))

        def read() -> None:
            corpus = open_corpus(str(path))
            overview = list_corpus(corpus)
            assert overview.images + overview.captions + sum(count for count, _ in overview.ignored.values()) >= 0

        read_or_refused(read)


def test_control_characters_of_a_quoted_value_stay_visible() -> None:
    assert str(MmkdError("a\nb\x1b[31m\x00\u2028é")) == r"a\nb\x1b[31m\x00\u2028é"

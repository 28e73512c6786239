"""Rows with an image or a caption alone: what they are, what they learn from, and what refuses them in one line."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_teacher import Seer
from in_process import load, run
from tiny_corpus import picture, write_table_corpus
from tiny_model import parts
from tiny_run import assert_equal_ends, in_ranks, quiet, stopped_at_first_step, write_run, write_scene

from mmkd.base.errors import ConfigError
from mmkd.distill.batches import Batch
from mmkd.distill.checkpoint import find_checkpoint
from mmkd.distill.config import load_run
from mmkd.distill.pairs import Pairs, PairSource, open_pairs
from mmkd.distill.prepare import prepare
from mmkd.distill.teacher_features import TeacherFeatures
from mmkd.distill.train_step import Updater
from mmkd.distill.world import World
from mmkd.store import FeatureStore

ROWS = 60
CPU = torch.device("cpu")
LEARN: dict[str, Any] = {
    "where": "",
    "epochs": 1,
    "batch_size": 12,
    "data": {"unpaired": True},
    "loss": {"relational": 1.0},
    "optimizer": {"lr": 1e-4, "warmup_steps": 2},
}


def kind(row: int) -> str:
    """Of five rows three are pairs. Row 8, a lone image, and row 14 have a damaged other side."""
    return "text" if row in (10, 14) else "image" if row == 8 else ("pair", "pair", "pair", "image", "text")[row % 5]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers `one`, `two` and `seer`, which has an image tower alone, over sixty rows of three kinds."""
    root = write_scene(tmp_path_factory.mktemp("unpaired"), rows=2)
    table = write_table_corpus(root / "mixed", ROWS)
    rows = list(csv.DictReader(table.open(newline="")))
    (root / "mixed/images/10.png").write_bytes(b"not a picture")
    (root / "mixed/images/14.png").unlink()
    for number, row in enumerate(rows):
        row["image"] = "" if kind(number) == "text" and number not in (10, 14) else row["image"]
        row["caption"] = "" if kind(number) == "image" else row["caption"]
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    folders = {name: root / name for name in ("one", "two")}
    run(table, root / "mixed-features", load(folders, *folders) | {"seer": Seer()})
    return root


def write(root: Path, name: str, **changes: Any) -> Path:
    return write_run(root, name, **{"store": "mixed-features"} | LEARN | changes)


def pairs_of(store: FeatureStore, out: Path, unpaired: bool) -> Pairs:
    def words(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[len(text), 0] for text in texts])

    source = PairSource(store, "", ("one", "seer"), None, words, unpaired=unpaired)
    return open_pairs(out, source, World(CPU))


def test_rows_are_found_by_what_is_sound_of_them(root: Path, tmp_path: Path) -> None:
    store = FeatureStore.open(root / "mixed-features")
    found = pairs_of(store, tmp_path, unpaired=True)
    assert found.rows.tolist() == list(range(ROWS))
    has = (found.groups[:, ::-1] >= 0).tolist()
    assert has == [[kind(row) != "text", kind(row) != "image"] for row in range(ROWS)]
    kinds = [kind(row) for row in range(ROWS)]
    assert found.counts == {
        "pair": kinds.count("pair"),
        "lone image": kinds.count("image"),
        "lone text": kinds.count("text"),
    }
    assert found.taught == {"one": ROWS, "seer": ROWS - kinds.count("text")}
    assert [len(found.places[row][0]) > 0 for row in range(ROWS)] == [image for image, _ in has]
    assert (found.captions.lengths(np.arange(ROWS)) > 0).tolist() == [text for _, text in has]
    pairs = pairs_of(store, tmp_path, unpaired=False)
    assert pairs.rows.tolist() == [row for row in range(ROWS) if kind(row) == "pair"]
    assert pairs.all_paired
    features = TeacherFeatures(store, ("one", "seer"), unpaired=True)
    one, seer = features.gather(np.arange(ROWS))
    assert one.present.tolist() == has
    assert seer.present.tolist() == [[image, False] for image, _ in has]
    assert features.count_rows(np.arange(ROWS)) == {"one": ROWS, "seer": ROWS - kinds.count("text")}


def test_no_picture_is_read_of_a_lone_text_and_no_token_of_a_lone_image(root: Path, ranks: int) -> None:
    config, seen = load_run(write(root, f"read-{ranks}")), 0
    for rank in range(ranks):
        ready = prepare(config, World(CPU, rank, 1))
        batches = replace(ready.batches, world=World(CPU, rank, ranks))
        for batch in batches.from_step(0):
            kinds = [kind(row) for row in batch.rows.tolist()]
            assert batch.has is not None
            assert batch.has.tolist() == [[each != "text", each != "image"] for each in kinds]
            assert len(batch.images) == len(kinds) - kinds.count("text")
            assert len(batch.tokens) == len(batch.columns) == len(kinds) - kinds.count("image")
            seen += len(kinds)
    assert seen == ROWS


@pytest.mark.integration
def test_two_ranks_and_pieces_and_resumptions_end_where_one_run_does(root: Path) -> None:
    rich = {"policy": {"kind": "best", "by": "corpus", "drop": 0.3}, "heads": {"kind": "mlp"}}
    whole, both, stop = (write(root, name, **rich) for name in ("whole", "both", "stop"))
    report = in_ranks(1, whole)
    assert set(report.losses) == {"task", "feature", "cross", "relational", "total"}
    write(root, "both", **rich, compute={"micro_batch": 2})
    in_ranks(1, both, stopped_at_first_step)
    assert in_ranks(2, both).losses == pytest.approx(report.losses, rel=1e-4)
    assert_equal_ends(load_run(whole), load_run(both))
    for _ in range(2):
        in_ranks(1, stop, stopped_at_first_step)
    quiet(stop)
    ends = [find_checkpoint(load_run(path).out).read_bytes() for path in (whole, stop)]
    assert ends[0] == ends[1]


def test_ranks_and_pieces_without_an_image_or_a_text_take_their_part(root: Path) -> None:
    """Rows of one kind alone fill whole batches, and then whole runs."""
    for name, where, teachers in (
        ("images", "key = 'k3' or key = 'k8'", ["seer"]),
        ("texts", "key = 'k4' or key = 'k9'", ["one"]),
    ):
        loss = {"feature": 1.0, "cross": 0.0, "task": 0.0}
        path = write(root, name, where=where, teachers=teachers, batch_size=2, epochs=4, loss=loss)
        report = in_ranks(2, path)
        assert set(report.losses) == {"task", "feature", "total"}
        assert report.losses["task"] == 0
        assert report.losses["feature"] > 0


@pytest.mark.parametrize("micro", [1, 5, 11])
def test_pieces_give_the_gradient_of_the_whole_batch(micro: int) -> None:
    model, batch = parts()
    has = torch.tensor([[row not in (0, 4, 5), row not in (2, 7)] for row in range(12)])
    batch = replace(
        batch,
        has=has,
        images=batch.images[has[:, 0]],
        tokens=batch.tokens[has[:, 1]],
        columns=(16,) * 10,
        targets=tuple(target.masked(has) for target in batch.targets),
    )

    def gradients(batch: Batch, micro: int | None) -> dict[str, torch.Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        outcome = Updater(model, model.towers, optimizer, 1e9, World(CPU), torch.float32, micro, seed=0)(batch)
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return found | {f"term {name}": term for name, term in outcome.terms.items()}

    whole = gradients(batch, None)
    for name, value in gradients(batch, micro).items():
        assert (value - whole[name]).abs().max() <= 3e-6 * whole[name].abs().max(), name


def test_what_learns_from_no_lone_row_refuses_them_in_one_line(root: Path) -> None:
    lines = {
        "no term learns from those; set loss.feature or loss.relational, or leave data.unpaired out": {
            "loss": {"feature": 0.0, "cross": 1.0, "relational": 0.0}
        },
        "which policy.by caption cannot judge; set policy.by: corpus": {"policy": {"kind": "best"}},
    }
    for number, (line, changes) in enumerate(lines.items()):
        with pytest.raises(ConfigError, match=f"^data.unpaired: 25 rows have an image or a caption alone, .*{line}$"):
            quiet(write(root, f"refused-{number}", **changes))
    (root / "resnet.json").write_text(
        '{"embed_dim": 20, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32, '
        '"patch_size": null}, "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, '
        '"layers": 1}}'
    )
    norms = {"student": {"model": "resnet.json"}}
    with pytest.raises(ConfigError, match=r"^data.unpaired: .*set compute.batch_norm: frozen, or leave such rows out"):
        quiet(write(root, "norms", **norms))
    frozen = prepare(load_run(write(root, "frozen", **norms, compute={"batch_norm": "frozen"})), World(CPU))
    assert "35 pairs, 12 lone images, 13 lone texts, 3 teachers" in frozen.headline


def test_a_run_says_what_its_rows_are(root: Path) -> None:
    only = prepare(load_run(write(root, "only", where="key = 'k0' or key = 'k1'", batch_size=2, epochs=4)), World(CPU))
    assert only.headline.startswith("2 pairs, 3 teachers")
    assert "data.unpaired changes nothing: every row of this run is a pair" in only.notes()
    batch = next(prepare(load_run(write(root, "counts", batch_size=60, epochs=4)), World(CPU)).batches.from_step(0))
    assert batch.counts(World(CPU)) == {"rows/pairs": 35, "rows/lone_images": 12, "rows/lone_texts": 13}


def test_a_held_out_image_that_is_trained_on_alone_is_refused(root: Path) -> None:
    """Row 3 is a lone image; the held-out pair has the same picture under another key."""
    folder = root / "held"
    folder.mkdir()
    for number, seed in enumerate((3, 999)):
        picture(seed).save(folder / f"{number}.png")
    (folder / "pairs.csv").write_text("key,image,caption\na,0.png,finding\nb,1.png,another finding\n")
    run(folder / "pairs.csv", root / "held-features", {"seer": Seer()})
    sets = [{"name": "held", "store": "held-features", "where": "key != ''"}]
    with pytest.raises(ConfigError, match="row 0 and 0 more are trained on too"):
        quiet(write(root, "leak", monitor={"sets": sets}))
